package linux

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"gvm/guest-tests/lab"
	"gvm/vmm"
)

// tested is a gvm test that has ended.
type tested struct {
	status int
	stdout []byte
	stderr string
}

// testOn runs gvm test on a kernel. A nil stdin is an input at its end.
func testOn(t testing.TB, k *lab.Kernel, stdin io.Reader, args ...string) tested {
	t.Helper()
	return startTest(t, k, stdin, args...).waitTest()
}

// startTest starts a gvm test. Its kernel logs little: the lab emulates two exits for each byte of
// a log, which takes longer than the rest of most tests. A later -a takes the place of this one.
func startTest(t testing.TB, k *lab.Kernel, stdin io.Reader, args ...string) *process {
	t.Helper()
	return start(t, stdin, append([]string{"test", "-k", k.BZImage, "-a", "quiet"}, args...)...)
}

// waitTest returns how a gvm test ended.
func (p *process) waitTest() tested {
	p.t.Helper()
	r := p.wait()
	return tested{r.status, p.raw.Bytes(), r.stderr}
}

// want fails the test unless gvm test ended with the status and printed stdout alone.
func (r tested) want(t testing.TB, status int, stdout string, stderr ...string) {
	t.Helper()
	ok := r.status == status && string(r.stdout) == stdout
	for _, s := range stderr {
		ok = ok && strings.Contains(r.stderr, s)
	}
	if !ok {
		t.Fatalf("exit status %d, want %d; %d bytes of output %.200q, want %.200q; standard error, want %q:\n%s",
			r.status, status, len(r.stdout), r.stdout, stdout, stderr, r.stderr)
	}
}

// busybox returns the path of this machine's busybox, which is static.
func busybox(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestCommand: with every kernel gvm test prints the command's output and nothing else. The guest
// loads the modules of its disks and shares and those of --module, a script has its interpreter
// with the libraries of it, and the command has the names of the disks of --scratch, whichever of
// them the kernel finds first. TestRoots does it with the cloud kernel. --timing has the phases up
// to the guest's end. The guest's first program is gvm-agent if it is beside gvm, else gvm.
func TestCommand(t *testing.T) {
	dir, bb := t.TempDir(), busybox(t)
	script, image := filepath.Join(dir, "script"), filepath.Join(dir, "disk")
	text := `#!/usr/bin/env bash
read -r _ _ release _ </proc/version
echo "$release $1"
until [[ -b /dev/sda ]]; do :; done
echo guest >"$2/made"
[[ ! -x ` + bb + ` ]] || ` + bb + ` stat -c %s /init
[[ ! -v TEST_DEV ]] || exec ` + bb + ` sh -c '
serials() {
	for d; do
		s=/sys/block/${d#/dev/}
		echo $(tail -c +5 $s/device/vpd_pg80) $(cat $s/size)
	done
}
serials $TEST_DEV
serials $SCRATCH_DEV_POOL
serials $LOGWRITES_DEV
serials $TEST_DEVS | wc -l
echo data >$TEST_DEV
head -c 5 $TEST_DEV
echo ${SCRATCH_DEV-unset}
grep -c "^dm_mod " /proc/modules'
`
	if err := errors.Join(os.WriteFile(script, []byte(text), 0o700),
		os.WriteFile(image, make([]byte, 1<<20), 0o600)); err != nil {
		t.Fatal(err)
	}
	scratch := ""
	for i := range 5 {
		scratch += fmt.Sprintf("gvm-scratch-%d %d\n", i+1, 5<<30>>9)
	}
	scratch += "5\ndata\nunset\n1\n"
	gvm, agent := lab.Program("gvm"), lab.Program("gvm-agent")
	alone := filepath.Join(dir, "gvm") // has no gvm-agent beside it
	if b, err := os.ReadFile(gvm); err != nil || os.WriteFile(alone, b, 0o700) != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(agent); err != nil { // under the race detector
		agent = gvm
	}
	agents := map[string][2]string{"5.10": {alone, gvm}, "6.12": {gvm, agent}} // gvm, and its guest's first program
	for _, name := range append([]string{"debian"}, lab.Versions()...) {
		k := kernel(t, name)
		t.Run(name, func(t *testing.T) {
			rw := t.TempDir()
			args, want := []string{"-v", "--timing", "--disk", image, "--rw", rw, "--timeout", "2m"}, k.Release+" a  b\n"
			program := gvm
			if a, ok := agents[name]; ok {
				program = a[0]
				args, want = append(args, "--file", bb), want+fmt.Sprintln(size(t, a[1]))
			}
			if name != "5.10" { // which logs all, and none of it is the command's output
				args = append(args, "-a", "quiet")
			}
			if name == "6.12" {
				args, want = append(args, "--scratch", "5x5G", "--module", "dm-mod"), want+scratch
			}
			args = append([]string{"test", "-k", k.BZImage}, append(args, "--", script, "a  b", rw)...)
			r := startProgram(t, program, nil, cacheHome, args...).waitTest()
			r.want(t, 0, want, "the agent said hello by ")
			phases := regexp.MustCompile(`(?s)  ` + vmm.Entered + `\n.*  the agent's hello\n.*  the command's start\n.*` +
				`  the command's end\n.*  the guest's end\n`)
			if !phases.MatchString(r.stderr) {
				t.Errorf("--timing lacks some of %s:\n%s", phases, r.stderr)
			}
			if b, err := os.ReadFile(filepath.Join(rw, "made")); string(b) != "guest\n" {
				t.Errorf("the guest's file: %q, %v", b, err)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		testOn(t, theLab(t).Cloud, nil, "--", "/no/such/program").want(t, 127, "", "/no/such/program: no such file")
	})
}

// size returns the length of a file.
func size(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// limit returns the output of ulimit -c here.
func limit(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "ulimit -c").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestRungs: each way to the agent carries every byte in both directions, keeps standard error
// apart, shows the end of the input, and tells of the command's end: its status, also one of gvm's
// own, and a signal. A fault of the kernel does not count with --oops=ignore.
func TestRungs(t *testing.T) {
	k, bb := theLab(t).Cloud, busybox(t)
	file := filepath.Join(t.TempDir(), "verdict.json")
	for rung, end := range map[string]struct {
		args   []string
		script string
		status int
		stderr string
	}{
		"vsock":   {[]string{"--verdict", file}, "exit 70", 70, ""},
		"console": {nil, "kill -9 $$", 137, "gvm: the command was ended by SIGKILL\n"},
		"com2": {[]string{"--oops=ignore", "-a", "quiet printk.time=0"}, "echo '<3>BUG: made up' >/dev/kmsg; exit 4", 4,
			""},
	} {
		t.Run(rung, func(t *testing.T) {
			n := 64 << 20
			switch {
			case rung == "com2": // an exit of the CPU for each byte
				n = 16 << 10
			case os.Getenv(lab.InLabEnv) == "1": // 300 KB/s; TestStreams has all of it
				n = 1 << 20 // four of the agent's windows
			}
			in, dir := content(t.Name(), n), t.TempDir()
			var out bytes.Buffer
			fmt.Fprintf(&out, "%s", in)
			fmt.Fprintf(&out, "%d\n%s\n0\nab c\n", n, dir)
			out.WriteString(limit(t))
			r := testOn(t, k, bytes.NewReader(in), append(end.args, "--rung", rung, "--cwd", dir, "--env", "A=ab c", "-v",
				"--", bb, "sh", "-c", `tee /tmp/in; wc -c </tmp/in; pwd; id -u; echo "$A"; ulimit -c; echo "to stderr" >&2; `+
					end.script)...)
			r.want(t, end.status, out.String(), "the agent said hello by "+rung+"\n", "\nto stderr\n", end.stderr)
			if rung != "vsock" {
				return
			}
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var v map[string]any
			if err := json.Unmarshal(b, &v); err != nil || v["kind"] != "exited" || v["status"] != 70.0 ||
				v["release"] != k.Release {
				t.Errorf("%v\n%s", err, b)
			}
		})
	}
	t.Run("status", func(t *testing.T) {
		testOn(t, k, nil, "--rung", "status", "--", bb, "sh", "-c", "exit 9").want(t, 9, "",
			"only its exit status will be known")
	})
}

// TestFaults: a fault of the guest's kernel is no end of the command, and leaves a record with
// --crash-dir.
func TestFaults(t *testing.T) {
	k, bb := theLab(t).Cloud, busybox(t)
	for _, c := range []struct {
		name, script string
		args         []string
		status       int
		stderr       string
		record       string
	}{
		{"panic", "echo c >/proc/sysrq-trigger", nil, 120,
			"gvm: guest panic: Kernel panic - not syncing: sysrq triggered crash", "console end log state.json vmcore"},
		{"a fault that it outlives", "echo '<3>BUG: made up' >/dev/kmsg; exit 4", []string{"-a", "quiet printk.time=0"}, 120,
			"gvm: the guest's kernel reported bug: BUG: made up (fingerprint ", "console end log state.json"},
		{"power-off", "poweroff -f; sleep 100", nil, 121, "gvm: the guest powered off before the command ended", ""},
		// A real-time program has the only CPU, and nothing else runs. The log shows progress
		// before that.
		{"hang", "echo -1 >/proc/sys/kernel/sched_rt_runtime_us; exec /usr/bin/chrt -f 99 " + bb +
			" sh -c 'while :; do :; done'", []string{"-a", "", "--hang", "10s", "--file", "/usr/bin/chrt"}, 122,
			"gvm: the guest hangs: no progress for 10s", "console end log state.json vmcore"},
		{"timeout", "sleep 1000", []string{"-a", "", "--timeout", "20s"}, 124, "gvm: the timeout of 20s elapsed",
			"console end log state.json vmcore"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			args := append(c.args, "--crash-dir", dir, "--crash-core", "--", bb, "sh", "-c", c.script)
			testOn(t, k, nil, args...).want(t, c.status, "", c.stderr)
			files, err := filepath.Glob(dir + "/*/*")
			must(t, err)
			var names []string
			for _, f := range files {
				names = append(names, filepath.Base(f))
			}
			if got := strings.Join(names, " "); got != c.record {
				t.Fatalf("the record has %q, want %q", got, c.record)
			}
			if c.record == "" {
				return
			}
			log, err := os.ReadFile(filepath.Join(filepath.Dir(files[0]), "log"))
			must(t, err)
			last := strings.TrimPrefix(c.stderr, "gvm: ")
			if !regexp.MustCompile(`Z gvm     the guest's first instruction\n(?s:.*)Z console .*\n(?s:.*)Z gvm     ` +
				regexp.QuoteMeta(last)).Match(log) {
				t.Errorf("the log:\n%s", log)
			}
		})
	}
}

// TestUntested: a run that cannot test has status 125.
func TestUntested(t *testing.T) {
	bb := busybox(t)
	broken := filepath.Join(t.TempDir(), "bzImage")
	if err := os.WriteFile(broken, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-k", broken}, {"-k", "/no/kernel"}, {"--no-such-flag"}, {"--hang", "1ms"}} {
		r := gvm(t, append(append([]string{"test"}, args...), "--", bb, "true")...)
		r.wantStatus(t, 125)
		if strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%v: standard error %q, want one line", args, r.stderr)
		}
	}
}

// bisectExample returns the README's commands for a bisection.
func bisectExample(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile(`(?m)(?:^    .*\n)*^    git bisect run .*\n(?:^    .*\n)*`).FindString(string(b))
	if block == "" {
		t.Fatal("README.md has no git bisect run")
	}
	return regexp.MustCompile(`(?m)^    `).ReplaceAllString(block, "")
}

// TestBisect: git bisect run finds a bad kernel by the README's commands, and skips a broken one.
// The tree has the files by which gvm knows one of Linux, and its build takes a kernel of the lab.
func TestBisect(t *testing.T) {
	good, bad, tree := theLab(t).Cloud.BZImage, kernel(t, "6.12").BZImage, t.TempDir()
	for name, value := range map[string]string{
		"PATH":                filepath.Dir(lab.Program("gvm")) + ":" + os.Getenv("PATH"),
		"GIT_CONFIG_GLOBAL":   "/dev/null",
		"GIT_CONFIG_NOSYSTEM": "1",
		"GIT_AUTHOR_NAME":     "a", "GIT_AUTHOR_EMAIL": "a@b",
		"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
	} {
		t.Setenv(name, value)
	}
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(tree, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	git := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("git", append([]string{"-C", tree}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("git %q: %v\n%s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	git("init", "-q")
	for _, name := range []string{"Kbuild", "MAINTAINERS", "arch/x86/Makefile", "broken"} {
		write(name, "")
	}
	write("Makefile", ".PHONY: olddefconfig bzImage\nolddefconfig:\nbzImage:\n"+
		"\tmkdir -p arch/x86/boot\n\tcp $$(cat kernel) arch/x86/boot/bzImage\n")
	for i, image := range []string{good, good, "broken", good, bad, bad} { // the third to the fifth are tried
		write("kernel", image)
		git("add", ".")
		git("commit", "-q", "--allow-empty", "-m", fmt.Sprint("commit ", i+1))
		if i == 0 {
			git("tag", "v6.1")
		}
	}
	git("tag", "v6.12")
	r := startProgram(t, "/bin/sh", nil, cacheHome, "-ec", "cd "+tree+"\n"+bisectExample(t)).wait()
	first, skipped := git("rev-parse", "v6.12~1"), git("rev-parse", "v6.12~3")
	if r.status != 0 || !strings.Contains(r.console, "\n"+first+" is the first bad commit\n") ||
		!strings.Contains(git("bisect", "log"), "\ngit bisect skip "+skipped) {
		r.fatalf(t, "want %s found, and %s skipped", first, skipped)
	}
}

// TestMatrix: a matrix of stock kernels and numbers of CPUs has a machine for each cell, and its
// table, JUnit, JSON and status tell of the one that fails.
func TestMatrix(t *testing.T) {
	cloud, newer := theLab(t).Cloud, kernel(t, "6.12")
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	r := testOn(t, cloud, nil, "-k", newer.BZImage, "--cpus", "1,2", "--repeat", "1", "-j", "1", "--output", file("out"),
		"--junit", file("junit"), "--results", file("results"), "--", busybox(t), "sh", "-c",
		`echo "$(uname -r) $(nproc)"; [ "$(nproc)" = 1 ] || case $(uname -r) in 6.12.*) echo no; exit 3; esac`)
	table := "cell verdict seconds retries\n"
	type cell struct {
		Name, Kernel string
		CPUs, Round  int
		Verdict      struct {
			Kind, Release string
			Status        int
		}
	}
	type testcase struct {
		Name    string    `xml:"name,attr"`
		Failure *struct{} `xml:"failure"`
	}
	var cells []cell
	var cases []testcase
	outputs := map[string]string{}
	for _, k := range []*lab.Kernel{cloud, newer} {
		for cpus := 1; cpus <= 2; cpus++ {
			c := cell{Name: fmt.Sprintf("vmlinuz-%s-cpus%d", k.Release, cpus), Kernel: k.BZImage, CPUs: cpus, Round: 1}
			c.Verdict.Kind, c.Verdict.Release = "exited", k.Release
			verdict, out, test := "passed", fmt.Sprintf("%s %d\n", k.Release, cpus), testcase{Name: c.Name}
			if k == newer && cpus == 2 {
				verdict, c.Verdict.Status, test.Failure = "exited 3", 3, &struct{}{}
				out += "no\n"
			}
			table += fmt.Sprintf("%s %s S 0\n", c.Name, verdict)
			cells, cases, outputs[c.Name+".out"] = append(cells, c), append(cases, test), out
		}
	}
	got := regexp.MustCompile(` +`).ReplaceAllString(string(r.stdout), " ")
	got = regexp.MustCompile(` \d+\.\d `).ReplaceAllString(got, " S ")
	if want := table + "4 cells: 3 passed, 1 failed\n"; r.status != 3 || got != want {
		t.Fatalf("status %d, want 3, and the table\n%swant\n%s%s", r.status, r.stdout, want, r.stderr)
	}
	var results struct {
		Status int
		Counts map[string]int
		Cells  []cell
	}
	var junit struct {
		Tests    int        `xml:"tests,attr"`
		Failures int        `xml:"failures,attr"`
		Errors   int        `xml:"errors,attr"`
		Cases    []testcase `xml:"testsuite>testcase"`
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(file(name))
		if err != nil {
			t.Error(err)
		}
		return b
	}
	if b := read("results"); json.Unmarshal(b, &results) != nil || results.Status != 3 ||
		results.Counts["passed"] != 3 || results.Counts["failed"] != 1 || !slices.Equal(results.Cells, cells) {
		t.Errorf("--results has %s", b)
	}
	if b := read("junit"); xml.Unmarshal(b, &junit) != nil || junit.Tests != 4 || junit.Failures != 1 ||
		junit.Errors != 0 || !reflect.DeepEqual(junit.Cases, cases) {
		t.Errorf("--junit has %s", b)
	}
	for name, want := range outputs {
		if b := read("out/" + name); string(b) != want {
			t.Errorf("%s has %q, want %q", name, b, want)
		}
	}
}

// TestTestSignals: a signal reaches the command, which may end by it in its own way; a command that
// ignores it is ended.
func TestTestSignals(t *testing.T) {
	k, bb := theLab(t).Cloud, busybox(t)
	for _, c := range []struct {
		trap, grace string
		status      int
	}{{"trap 'exit 9' INT", "1m", 9}, {"trap '' INT", "800ms", 130}} {
		p := startTest(t, k, nil, "--grace", c.grace, "--", bb, "sh", "-c",
			c.trap+"; echo ready; while :; do sleep 0.1; done")
		p.waitFor("ready")
		p.signal(syscall.SIGINT)
		p.waitTest().want(t, c.status, "ready\n")
	}
}

// TestRoots: the host's root directory, another one, and directories beside them. Only --rw changes
// the host's.
func TestRoots(t *testing.T) {
	l := theLab(t)
	for root, name := range map[string]string{"/": "cloud", l.Tree: "6.12"} {
		t.Run(name, func(t *testing.T) { testRoot(t, kernel(t, name), root) })
	}
}

func testRoot(t *testing.T, k *lab.Kernel, root string) {
	rw, ro, image := t.TempDir(), t.TempDir(), diskFile(t, content(t.Name(), 1<<20))
	cwd := rw
	if root == "/" {
		cwd = t.TempDir() // which the guest's /tmp lacks
	}
	if err := os.WriteFile(filepath.Join(ro, "file"), []byte("of the host\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	version, err := os.ReadFile(filepath.Join(root, "etc/debian_version"))
	if err != nil {
		t.Fatal(err)
	}
	script := `set -e
cat /etc/debian_version
cat "$2/file"
touch "$2/no" 2>/dev/null && echo "changed --ro"
echo guest >"$1/made"
echo guest >/etc/gvm-made
rm /etc/passwd
ls -l /etc/gvm-made /etc/passwd 2>/dev/null | wc -l
stat -f -c %T / /tmp
pwd
until [ -b /dev/sda ]; do :; done
sha256sum </dev/sda`
	want := string(version) + "of the host\n1\noverlayfs\ntmpfs\n" + cwd + "\n" + sum(content(t.Name(), 1<<20)) + "  -\n"
	if root == "/" {
		script += "; git --version >/dev/null; uname -r"
		want += k.Release + "\n"
	}
	testOn(t, k, nil, "--root", root, "--rw", rw, "--ro", ro, "--cwd", cwd, "--disk", image, "--", "sh", "-c", script,
		"sh", rw, ro).want(t, 0, want)
	if b, err := os.ReadFile(filepath.Join(rw, "made")); string(b) != "guest\n" {
		t.Errorf("the guest's file: %q, %v", b, err)
	}
	for path, want := range map[string]bool{
		filepath.Join(root, "etc/gvm-made"): false, filepath.Join(root, "etc/passwd"): true, filepath.Join(ro, "no"): false,
	} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s on the host: %v", path, err)
		}
	}
}

// TestShell: without a command gvm test is a shell on a terminal of the guest, with job control.
func TestShell(t *testing.T) {
	p, keys := startOnTerminal(t, "test", "-k", theLab(t).Cloud.BZImage, "-a", "quiet")
	p.waitForText("# ")
	fmt.Fprint(keys, "tty; stty size; echo $((6*7))\r")
	p.waitForText("\n/dev/pts/0\n24 80\n42\n")
	fmt.Fprint(keys, "sh -c 'echo in front; exec sleep 1000'\r") // a key before that would be the shell's
	p.waitForText("\nin front\n")
	fmt.Fprint(keys, "\x03echo after $?\r")
	p.waitForText("\nafter 130\n")
	fmt.Fprint(keys, "exit 5\r")
	p.wait().wantStatus(t, 5)
}
