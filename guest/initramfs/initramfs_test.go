package initramfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/sys/unix"

	"gvm/vmm/boot"
)

// read returns the files of an archive in their order, as another reader of the format sees them:
// "NAME MODE CONTENT".
func read(t testing.TB, f *boot.File) (all []string) {
	t.Helper()
	b := make([]byte, f.Size)
	if err := f.ReadFull(b, 0); err != nil {
		t.Fatal(err)
	}
	if len(b)%4 != 0 {
		t.Errorf("the archive has %d bytes", len(b))
	}
	r := cpio.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		content := h.Linkname
		if h.Mode&cpio.ModeType == cpio.TypeReg {
			data, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			content = string(data)
		}
		all = append(all, strings.TrimSpace(h.Name+" "+modeText(h.Mode)+" "+content))
	}
}

func modeText(m cpio.FileMode) string {
	return string("0123456789abcdef"[m>>12]) + string([]byte{'0' + byte(m>>9&7), '0' + byte(m>>6&7), '0' + byte(m>>3&7),
		'0' + byte(m&7)})
}

func image(t testing.TB, b *Builder) *boot.File {
	t.Helper()
	f, err := b.Image()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestImage writes every type of file, and reads the archive with another reader.
func TestImage(t *testing.T) {
	b := New()
	b.File("/usr/bin/a", 0o755|fs.ModeSetuid, []byte("content of a"))
	b.Symlink("/bin", "usr/bin")
	b.Dir("/tmp", 0o777|fs.ModeSticky)
	b.Add(Entry{Name: "/dev/null", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o666, Major: 1, Minor: 3},
		Entry{Name: "/dev/sda", Mode: fs.ModeDevice | 0o600, Major: 8}, Entry{Name: "pipe", Mode: fs.ModeNamedPipe | 0o640})
	b.File("a\xff\n b", 0, nil)
	b.File("TRAILER!!!", 0o600, []byte("x"))
	b.File("/bin/a", 0o600, []byte("later"))
	want := []string{
		"./TRAILER!!! 80600 x",
		"a\xff\n b 80000",
		"bin a0777 usr/bin",
		"dev 40755",
		"dev/null 20666",
		"dev/sda 60600",
		"pipe 10640",
		"tmp 41777",
		"usr 40755",
		"usr/bin 40755",
		"usr/bin/a 80600 later",
	}
	if got := read(t, image(t, b)); !slices.Equal(got, want) {
		t.Errorf("%q\nwant\n%q", got, want)
	}
}

// TestImageHeader compares an archive byte by byte.
func TestImageHeader(t *testing.T) {
	b := New()
	b.Add(Entry{Name: "n", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o620, UID: 1000, GID: 0xfffffffe, Major: 0x105,
		Minor: 64})
	f := image(t, b)
	got := make([]byte, f.Size)
	if err := f.ReadFull(got, 0); err != nil {
		t.Fatal(err)
	}
	want := "070701" + "00000001" + "00002190" + "000003e8" + "fffffffe" + "00000001" + "00000000" + "00000000" +
		"00000000" + "00000000" + "00000105" + "00000040" + "00000002" + "00000000" + "n\x00" +
		"070701" + strings.Repeat("00000000", 4) + "00000001" + strings.Repeat("00000000", 6) + "0000000b" + "00000000" +
		"TRAILER!!!\x00" + "\x00\x00\x00"
	if string(got) != want {
		t.Errorf("\n%q, want\n%q", got, want)
	}
}

// TestLinks: files are placed where links lead, in whichever order they are added.
func TestLinks(t *testing.T) {
	add := []func(*Builder){
		func(b *Builder) { b.Symlink("/lib64", "/usr/lib64") },
		func(b *Builder) { b.Symlink("/usr/lib64", "../opt/./lib") },
		func(b *Builder) { b.Symlink("/lib64/ld.so", "../lib/ld-1.so") },
		func(b *Builder) { b.Symlink("/lib", "usr/lib") },
		func(b *Builder) { b.File("/lib64/x", 0o644, []byte("x")) },
		func(b *Builder) { b.Dir("/lib64", 0o711) },
		func(b *Builder) { b.File("/lib/../y", 0o644, []byte("y")) },
	}
	want := []string{
		"lib a0777 usr/lib",
		"lib64 a0777 /usr/lib64",
		"opt 40755",
		"opt/lib 40711",
		"opt/lib/ld.so a0777 ../lib/ld-1.so",
		"opt/lib/x 80644 x",
		"usr 40755",
		"usr/lib64 a0777 ../opt/./lib",
		"usr/y 80644 y",
	}
	for range len(add) {
		b := New()
		for _, f := range add {
			f(b)
		}
		if got := read(t, image(t, b)); !slices.Equal(got, want) {
			t.Errorf("%q\nwant\n%q", got, want)
		}
		add = append(add[1:], add[0])
	}
}

func TestFaults(t *testing.T) {
	huge := &boot.File{Name: "huge", ReaderAt: bytes.NewReader(nil), Size: 1 << 32}
	file := func(names ...string) (all []Entry) {
		for _, n := range names {
			all = append(all, Entry{Name: n})
		}
		return all
	}
	link := func(name, target string) Entry { return Entry{Name: name, Mode: fs.ModeSymlink, Target: target} }
	for _, tt := range []struct {
		entries []Entry
		want    string
	}{
		{file("/"), "root directory"},
		{file("a/.."), "root directory"},
		{file("a", "a/b/c"), `"a" in the initramfs is the directory of "a/b/c" and another file`},
		{append(file("a"), Entry{Name: "/a/", Mode: fs.ModeDir}), "both a directory"},
		{file("a\x00b"), "NUL"},
		{[]Entry{link("a", "b\x00")}, "NUL"},
		{[]Entry{link("a", "")}, "without a target"},
		{file(strings.Repeat("a", 4096)), "4095 bytes"},
		{[]Entry{link("a", strings.Repeat("b", 4096))}, "4095 bytes"},
		{[]Entry{{Name: "a", Content: huge}}, "4096 MiB"},
		{[]Entry{{Name: "a", Mode: fs.ModeSocket}}, "socket"},
		{append(file("b/c"), link("a", "b"), link("b", "a")), "too many symbolic links"},
		{append(file("a/b"), link("a", "a/x")), "too many symbolic links"},
	} {
		b := New()
		b.Add(tt.entries...)
		f, err := b.Image()
		var ie *boot.ImageError
		if !errors.As(err, &ie) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.80v: %v, %v; want %s", tt.entries, f, err, tt.want)
		}
	}
}

// TestHostFile reads files of the host where they are, and reports those that cannot be read.
func TestHostFile(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	if err := errors.Join(os.WriteFile(at("big"), big, 0o750), os.WriteFile(at("empty"), nil, 0o600),
		unix.Mkfifo(at("fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	b := New()
	if err := errors.Join(b.HostFile(t.Context(), "/init", at("big")),
		b.HostFile(t.Context(), "/empty", at("empty"))); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{at("none"): "does not exist", at("fifo"): "is a pipe",
		dir: "is a directory"} {
		if err := b.HostFile(t.Context(), "/x", path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	f := image(t, b)
	if got := read(t, f); !slices.Equal(got, []string{"empty 80600", "init 80750 " + string(big)}) {
		t.Errorf("%.200q", got)
	}
	whole := make([]byte, f.Size)
	if err := f.ReadFull(whole, 0); err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < 600; off += 7 { // within a part, and over several
		b := make([]byte, 300)
		if n, err := f.ReadAt(b, off); n != len(b) || err != nil || !bytes.Equal(b, whole[off:][:len(b)]) {
			t.Fatalf("at %d: %q, %v", off, b[:n], err)
		}
	}
	if err := os.Truncate(at("big"), 10); err != nil {
		t.Fatal(err)
	}
	err := f.ReadFull(make([]byte, f.Size), 0)
	if err == nil || !strings.HasPrefix(err.Error(), at("big")+" became shorter") {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// FuzzImage puts files of any names into an archive. Another reader finds each as often as it is
// there, below directories that come first.
func FuzzImage(f *testing.F) {
	f.Add("/a/b", "/c", "d", "../a")
	f.Add("lib/x", "lib", "usr/lib", "y")
	f.Add("TRAILER!!!", "a", "TRAILER!!!/..", "\xff\n")
	f.Fuzz(func(t *testing.T, file, link, target, dir string) {
		b := New()
		b.File(file, 0o644, []byte(target))
		b.Symlink(link, target)
		b.Dir(dir, 0o700)
		im, err := b.Image()
		if ie := (*boot.ImageError)(nil); err != nil {
			if !errors.As(err, &ie) {
				t.Fatal(err)
			}
			return
		}
		data := make([]byte, im.Size)
		if err := im.ReadFull(data, 0); err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{"": true}
		for r := cpio.NewReader(bytes.NewReader(data)); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			name := strings.TrimPrefix(h.Name, "./")
			if !seen[parent(name)] || seen[name] && h.Name != "./TRAILER!!!" {
				t.Fatalf("%q behind %q", h.Name, slices.Collect(maps.Keys(seen)))
			}
			seen[name] = h.Mode&cpio.ModeType == cpio.TypeDir
		}
	})
}
