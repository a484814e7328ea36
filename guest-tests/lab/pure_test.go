package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	"gvm/guest/initramfs/initramfstest"
)

func TestDropSignature(t *testing.T) {
	const magic = "~Module signature appended~\n"
	sign := func(n uint32) []byte {
		b := append([]byte("\x7fELFbody"), "sigsig"...)
		b = append(b, make([]byte, 8)...)
		b = binary.BigEndian.AppendUint32(b, n)
		return append(b, magic...)
	}
	for _, tt := range []struct {
		name     string
		in, want []byte
	}{
		{"signed", sign(6), []byte("\x7fELFbody")},
		{"unsigned", []byte("\x7fELFbody"), []byte("\x7fELFbody")},
		{"length beyond the file", sign(1 << 31), sign(1 << 31)},
		{"magic alone", []byte(magic), []byte(magic)},
	} {
		if got := dropSignature(tt.in); !bytes.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestImageDependency(t *testing.T) {
	const out = `linux-image-amd64
  Depends: linux-image-6.1.0-56-amd64
`
	if got := imageDependency(out); got != "linux-image-6.1.0-56-amd64" {
		t.Errorf("got %q", got)
	}
	if got := imageDependency("linux-image-6.12-amd64\n  Depends: linux-image-amd64\n"); got != "" {
		t.Errorf("a metapackage is taken for a kernel: %q", got)
	}
}

func TestTranscript(t *testing.T) {
	var to bytes.Buffer
	out := &transcript{to: &to}
	const text = "=== RUN   TestA\n--- FAIL: TestA (0.1s)\n    --- FAIL: TestA/x (0.1s)\n--- PASS: TestB (0.2s)\n" +
		"\x16--- FAIL: TestC (3s)\nFAIL\n"
	for _, part := range []string{text[:20], text[20:]} {
		io.WriteString(out, part)
	}
	if got := out.failed(); !reflect.DeepEqual(got, []string{"TestA", "TestC"}) || to.String() != text {
		t.Errorf("failed: %q, passed on: %q", got, to.String())
	}
	if got := out.passed(); !reflect.DeepEqual(got, []string{"TestB"}) {
		t.Errorf("passed: %q", got)
	}
}

// TestSkip: tests that passed before a lab crashed are left out of the next one, and so are those
// that the arguments leave out.
func TestSkip(t *testing.T) {
	for _, tt := range []struct{ args, passed, want string }{
		{"-test.v", "", "-test.v"},
		{"-test.v", "TestA", "-test.v -test.skip=^(TestA)$"},
		{"-test.skip A/^[12]_ -test.v", "TestA TestB", "-test.skip=A/^[12]_ -test.v -test.skip=A/^[12]_|^(TestA|TestB)$"},
	} {
		a := parseTestArgs(strings.Fields(tt.args)).skip(strings.Fields(tt.passed))
		if got := strings.Join(a.args, " "); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.args, got, tt.want)
		}
	}
	a := parseTestArgs([]string{"-test.skip=A"}).skip([]string{"TestB"}).skip([]string{"TestC"})
	if got, want := a.args[len(a.args)-1], "-test.skip=A|^(TestB)$|^(TestC)$"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestShare: each of the tests is in one part, and the parts become smaller.
func TestShare(t *testing.T) {
	for _, tt := range []struct{ names, want string }{
		{"", "^()$"},
		{"TestA", "^(TestA)$"},
		{"TestA TestB TestC", "^(TestA)$ ^(TestB)$ ^(TestC)$"},
		{"TestA TestB TestC TestD TestE", "^(TestA|TestE)$ ^(TestB)$ ^(TestC)$ ^(TestD)$"},
		{"A B C D E F G H I J K L M", "^(A|E|I|M)$ ^(B|G|L)$ ^(C|J)$ ^(D)$ ^(F)$ ^(H)$ ^(K)$"},
	} {
		var got []string
		for _, p := range parseTestArgs([]string{"-test.run=Test", "-test.v"}).share(strings.Fields(tt.names), 2) {
			if len(p.args) != 3 || p.args[1] != "-test.v" {
				t.Errorf("%q: arguments %q", tt.names, p.args)
			}
			got = append(got, strings.TrimPrefix(p.args[len(p.args)-1], "-test.run="))
		}
		if got := strings.Join(got, " "); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.names, got, tt.want)
		}
	}
	none := func(string) bool { return false }
	parts, err := parseTestArgs([]string{"-test.run=^TestS", "-test.skip=^TestS[^h]"}).divide(t.Context(), 2, none)
	if err != nil || len(parts) != 1 || !slices.Contains(parts[0].args, "-test.run=^(TestShare)$") {
		t.Errorf("without tests to skip: %+v, %v", parts, err)
	}
	parts, err = parseTestArgs([]string{"-test.run=^Test(Share|Skip|Job)$"}).divide(t.Context(), 1,
		regexp.MustCompile("^TestS").MatchString)
	if err != nil || len(parts) != 2 || !parts[0].here || parts[1].here ||
		!slices.Contains(parts[0].args, "-test.run=^(TestSkip|TestShare)$") ||
		!slices.Contains(parts[1].args, "-test.run=^(TestJob)$") {
		t.Errorf("with tests on this machine: %+v, %v", parts, err)
	}
	for _, args := range []string{"-test.run=A/b", "-test.bench=.", "-test.fuzz=A", "-test.cpuprofile=f", "-test.v x"} {
		a := parseTestArgs(strings.Fields(args))
		parts, err := a.divide(t.Context(), 2, none)
		if err != nil || len(parts) != 1 || !a.undivided() {
			t.Errorf("%s is divided into %d parts, %v", args, len(parts), err)
		}
	}
}

func TestQEMUVersion(t *testing.T) {
	for _, tt := range []struct {
		says string
		want [2]int
		good bool
	}{
		{"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", [2]int{7, 2}, false},
		{"QEMU emulator version 10.0.2 (Debian)", [2]int{10, 0}, false},
		{"QEMU emulator version 10.2.0", [2]int{10, 2}, true},
		{"QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)", [2]int{11, 1}, true},
	} {
		path := filepath.Join(t.TempDir(), "qemu")
		if err := os.WriteFile(path, []byte("#!/bin/sh\necho '"+tt.says+"'\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		got, err := qemuVersion(t.Context(), path)
		if err != nil || got != tt.want || (newEnough(got) == nil) != tt.good {
			t.Errorf("%q: %v, %v, new enough: %v", tt.says, got, err, newEnough(got))
		}
	}
}

// TestQEMUs: the QEMU that runs L1 is another to compare with only if its version is.
func TestQEMUs(t *testing.T) {
	program := func(dir, version string) string {
		path := filepath.Join(dir, qemuName)
		text := "#!/bin/sh\necho QEMU emulator version " + version + "\n"
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	system := QEMU{program(dir, "7.2.22"), 7, 2}
	for version, want := range map[string][]QEMU{"7.2.1": {system}, "11.1.3": {system, {"", 11, 1}}} {
		l := &Lab{qemu: program(t.TempDir(), version)}
		if len(want) > 1 {
			want[1].Path = l.qemu
		}
		if got, err := l.QEMUs(t.Context()); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v, want %v", version, got, err, want)
		}
	}
}

func TestNewest(t *testing.T) {
	names := []string{
		"linux-image-6.12-amd64", "linux-image-6.12.9+deb12-amd64", "linux-image-6.12.107+deb12-amd64",
		"linux-image-6.12.117+deb12-amd64", "linux-image-6.12.117+deb12-amd64-dbg", "linux-image-6.12.200+deb12-cloud-amd64",
		"linux-image-6.12.201+deb12-rt-amd64", "linux-image-6.12.202+deb12-amd64-unsigned", "linux-image-6.120.1-amd64",
		"linux-image-6.1.0-9-amd64", "linux-image-6.1.0-56-amd64",
	}
	for prefix, want := range map[string]string{
		"linux-image-6.12": "linux-image-6.12.117+deb12-amd64",
		"linux-image-6.1":  "linux-image-6.1.0-56-amd64",
		"linux-image-5":    "",
	} {
		if got := newest(prefix, names); got != want {
			t.Errorf("newest(%q) = %q, want %q", prefix, got, want)
		}
	}
}

// fakeKernel is a kernel directory with two modules, one needing the other.
func fakeKernel(t *testing.T) *Kernel {
	dir := t.TempDir()
	for name, text := range map[string][]byte{
		"modules.dep":       []byte("kernel/top-one.ko: kernel/base.ko\nkernel/base.ko:\n"),
		"modules.builtin":   []byte("kernel/fs/ext4/ext4.ko\n"),
		"kernel/base.ko":    initramfstest.Module("depends=", ".BTF"),
		"kernel/top-one.ko": initramfstest.Module("depends=base"),
	} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return &Kernel{Release: "fake", Modules: dir, VMLinux: filepath.Join(dir, "vmlinux")}
}

// file is a file of an archive.
type file struct {
	mode cpio.FileMode
	data []byte // of a symbolic link: its target
}

// archive reads a newc archive into path -> mode and contents.
func archive(t *testing.T, name string) map[string]file {
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make(map[string]file)
	r := cpio.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode&cpio.ModeType == cpio.TypeSymlink {
			b = []byte(h.Linkname)
		}
		if dir := filepath.Dir(h.Name); dir != "." && got[dir].mode == 0 {
			t.Errorf("%s comes before its directory", h.Name)
		}
		got[h.Name] = file{h.Mode, b}
	}
}

func TestLostOptions(t *testing.T) {
	made := "# CONFIG_C is not set\nCONFIG_A=y\nCONFIG_AB=y\n"
	got := lostOptions("# a comment\nCONFIG_A=y\n\nCONFIG_B=y\nCONFIG_C=y\n", made)
	if want := []string{"CONFIG_B=y", "CONFIG_C=y"}; !slices.Equal(got, want) {
		t.Errorf("options lost are %q, want %q", got, want)
	}
}

func TestInitramfs(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	if err := os.WriteFile(data, []byte("payload"), 0o640); err != nil {
		t.Fatal(err)
	}
	mke2fs, err := hostTool("mke2fs")
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "initramfs")
	err = Initramfs{
		Kernel:   fakeKernel(t),
		Modules:  []string{"ext4", "top_one"},
		Binaries: []string{mke2fs},
		Files:    map[string]string{"/srv/deep/data": data},
		Init:     "echo hello\n",
	}.Build(out)
	if err != nil {
		t.Fatal(err)
	}
	got := archive(t, out)
	for name, want := range map[string]file{
		"modules/000-base.ko":    {cpio.TypeReg | 0o644, dropSignature(initramfstest.Module("depends=", ".btf"))},
		"modules/001-top_one.ko": {cpio.TypeReg | 0o644, dropSignature(initramfstest.Module("depends=base"))},
		"srv/deep/data":          {cpio.TypeReg | 0o640, []byte("payload")},
		"srv/deep":               {cpio.TypeDir | 0o755, []byte{}},
		"bin/sh":                 {cpio.TypeSymlink | 0o777, []byte("busybox")},
		"init":                   {cpio.TypeReg | 0o755, []byte(initPrologue + "echo hello\n" + initEpilogue)},
	} {
		if !reflect.DeepEqual(got[name], want) {
			t.Errorf("%s is %v %q, want %v %q", name, got[name].mode, got[name].data, want.mode, want.data)
		}
	}
	programs := map[string]bool{}
	for name, f := range got {
		if base, _, _ := strings.Cut(filepath.Base(name), ".so"); bytes.HasPrefix(f.data, []byte("\x7fELF")) {
			programs[base] = true
		}
	}
	for _, name := range []string{"busybox", "mke2fs", "ld-linux-x86-64", "libc", "libext2fs"} {
		if !programs[name] {
			t.Errorf("%s is not in the archive", name)
		}
	}
	st, err := os.Stat(out)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size()%4 != 0 {
		t.Errorf("the archive has %d bytes, which another cannot follow", st.Size())
	}
	if err := (Initramfs{Kernel: fakeKernel(t), Modules: []string{"nosuch"}}).Build(out); err == nil {
		t.Error("a module that is not there is accepted")
	}
}

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	w := frameWriter{w: &b}
	for _, p := range []string{"", "\x00\xff\n", strings.Repeat("x", maxPayload)} {
		if err := w.send(frameStdout, []byte(p)); err != nil {
			t.Fatal(err)
		}
		kind, got, err := readFrame(&b, make([]byte, maxPayload))
		if err != nil || kind != frameStdout || string(got) != p {
			t.Errorf("frame of %d bytes comes back as type %d, %d bytes, %v", len(p), kind, len(got), err)
		}
	}
	w.send(frameStdout, make([]byte, maxPayload+1))
	if _, _, err := readFrame(&b, make([]byte, 2*maxPayload)); err == nil {
		t.Error("a frame longer than the limit is accepted")
	}
	b.Reset()
	w.send(frameStdout, []byte("cut short"))
	b.Truncate(b.Len() - 1)
	if _, _, err := readFrame(&b, make([]byte, maxPayload)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a frame cut short gives %v", err)
	}
}

func TestJob(t *testing.T) {
	l := &Lab{Cache: "/tmp/cache/gvm-lab"}
	outer := t.TempDir() // under /tmp
	inner := filepath.Join(outer, "in,ner")
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	k := fakeKernel(t)
	j, err := l.job(&Command{
		Args:     []string{inner + "/prog"},
		Kernel:   k,
		Env:      []string{"GVM_IN_LAB=0", "A=b", "TMPDIR=/var/tmp"},
		Writable: []string{inner, outer, outer},
		Visible:  []string{"/etc/passwd", "/tmp/cache/gvm-lab/below", "/tmp/other"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []share{{"w1", outer}, {"w0", inner}}; !reflect.DeepEqual(j.Mounts, want) {
		t.Errorf("mounts %v, want %v", j.Mounts, want)
	}
	if want := []string{"/tmp/cache/gvm-lab", "/tmp/other"}; !reflect.DeepEqual(j.Visible, want) {
		t.Errorf("visible %v, want %v", j.Visible, want)
	}
	slices.Sort(j.Env)
	env := []string{"A=b", "GVM_IN_LAB=1", "GVM_LAB_CACHE=/tmp/cache/gvm-lab", "TMPDIR=/tmp"}
	if !reflect.DeepEqual(j.Env, env) {
		t.Errorf("environment %q, want %q", j.Env, env)
	}
	if j.Dir != inner {
		t.Errorf("directory %s, want %s", j.Dir, inner)
	}
	args := strings.Join(qemuArgs(&Command{Kernel: k}, j, 3, 4, 5), " ")
	if want := "local,id=w0,path=" + outer + "/in,,ner,security_model=none"; !strings.Contains(args, want) {
		t.Errorf("no %q in %s", want, args)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if j, err = l.job(&Command{Args: []string{"x"}, Dir: "testdata", Kernel: k}); err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(here, "testdata"); j.Dir != want { // the agent's own directory is another one
		t.Errorf("directory %s, want %s", j.Dir, want)
	}
	for _, c := range []Command{{}, {Args: []string{"x"}, Writable: []string{"/nonexistent"}},
		{Args: []string{"x"}, Writable: []string{"/etc/passwd"}}} {
		c.Kernel = k
		if _, err := l.job(&c); err == nil {
			t.Errorf("%v is accepted", c)
		}
	}
}

func TestParseTestArgs(t *testing.T) {
	a := parseTestArgs([]string{
		"-test.testlogfile=/tmp/log", "-test.paniconexit0", "-test.timeout=2m0s", "-test.v=test2json", "-test.run", "^TestX$",
		"-test.coverprofile=cover.out", "-test.outputdir", "out", "-test.gocoverdir=/tmp/cov", "-test.cpuprofile=/prof/cpu",
		"-own", "-test.short=true", "--", "x", "-y",
	})
	wantArgs := []string{"-test.paniconexit0", "-test.v=test2json", "-test.run=^TestX$", "-test.coverprofile=cover.out",
		"-test.outputdir=out", "-test.gocoverdir=/tmp/cov", "-test.cpuprofile=/prof/cpu", "-own", "-test.short=true"}
	if !reflect.DeepEqual(a.args, wantArgs) {
		t.Errorf("args %q, want %q", a.args, wantArgs)
	}
	if want := []string{"--", "x", "-y"}; !reflect.DeepEqual(a.rest, want) {
		t.Errorf("rest %q, want %q", a.rest, want)
	}
	if a.timeout != 2*time.Minute || a.list || a.fuzz {
		t.Errorf("timeout %v, list %v, fuzz %v", a.timeout, a.list, a.fuzz)
	}
	if got, want := a.writable("/src/pkg"), []string{"/prof", "/src/pkg/out", "/tmp/cov"}; !reflect.DeepEqual(got, want) {
		t.Errorf("writable %q, want %q", got, want)
	}
	if a := parseTestArgs([]string{"-test.list=."}); !a.list {
		t.Error("-test.list is not seen")
	}
	fuzz := parseTestArgs([]string{"-test.fuzz=FuzzX", "-test.fuzzcachedir=/c/fuzz"})
	if got, want := fuzz.writable("/src/pkg"), []string{"/c/fuzz", "/src/pkg"}; !reflect.DeepEqual(got, want) {
		t.Errorf("writable when fuzzing %q, want %q", got, want)
	}
}

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	want := make([]byte, 3<<20+5)
	copy(want[1<<20:], "in the middle")
	want[len(want)-6] = 1
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	if err := os.WriteFile(from, want, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := copySparse(to, from); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy differs (%d bytes, want %d; %v)", len(got), len(want), err)
	}
}

func TestTail(t *testing.T) {
	var all bytes.Buffer
	w := tail{also: &all}
	for range tailSize {
		io.WriteString(&w, "abc\r\n")
	}
	io.WriteString(&w, "end")
	if all.Len() != 5*tailSize+3 || len(w.b) != tailSize || !strings.HasSuffix(w.String(), "abc\nabc\nend") {
		t.Errorf("%d bytes passed on, %d kept, ending %q", all.Len(), len(w.b), w.String()[tailSize-1000:])
	}
}

// TestLock: a second setup waits for the first, and gives up with its context.
func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), name, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan struct{})
	said := writerFunc(func(p []byte) (int, error) { close(waiting); return len(p), nil })
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-waiting; cancel() }()
	if _, err := lock(ctx, name, said); !errors.Is(err, context.Canceled) {
		t.Fatalf("the lock that is held gives %v", err)
	}
	unlock()
	unlock, err = lock(t.Context(), name, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}
