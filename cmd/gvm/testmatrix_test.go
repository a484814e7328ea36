package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/guest-tests/exitkernel"
	"gvm/guest-tests/lab"
	"gvm/testrun"
)

// TestMatrix: a matrix runs each kernel in each round, tells of each on standard error, has a table
// on standard output, keeps everything in files, and ends with the gravest verdict. The embedded
// guest runs no agent.
func TestMatrix(t *testing.T) {
	t.Parallel()
	kernel := testKernel(t)
	c := command(t, "test", "-k", "none", "-k", kernel, "-a", "crash=triple", "-j", "2", "--repeat", "2", "--retry", "1",
		"--output", "out", "--junit", "junit", "--results", "results", "--", "sh")
	r := gvmRuns(t, c)
	if r.status != 121 || !strings.HasPrefix(r.out, "cell ") || strings.Count(r.out, "crash 121") != 2 ||
		strings.Count(r.out, "retry 1 after: the guest crashed") != 2 || strings.Count(r.out, "not-tested 125") != 2 ||
		!strings.HasSuffix(r.out, "4 cells: 0 passed, 2 failed, 2 not tested; lost guests retried: 2\n") {
		t.Errorf("status %d, output\n%s", r.status, r.out)
	}
	for _, want := range []string{"gvm: kernel-run1: the machine:\n",
		"gvm: kernel-run2-retry1: the end of the kernel's log:\n",
		" none-run2: not-tested 125 in ", "gvm: 4/4 ",
		"gvm: not all cells passed: 0 passed, 2 failed, 2 not tested; lost guests retried: 2\n"} {
		if !strings.Contains(r.errs, want) {
			t.Errorf("standard error lacks %q:\n%s", want, r.errs)
		}
	}
	var names []string
	list, err := os.ReadDir(filepath.Join(c.Dir, "out"))
	for _, e := range list {
		names = append(names, e.Name())
	}
	want := []string{"none-run1.verdict.json", "none-run2.verdict.json"}
	for _, run := range []string{"run1", "run1-retry1", "run2", "run2-retry1"} {
		for _, suffix := range []string{".err", ".klog", ".out", ".verdict.json"} {
			want = append(want, "kernel-"+run+suffix)
		}
	}
	slices.Sort(want)
	if slices.Sort(names); err != nil || !slices.Equal(names, want) {
		t.Errorf("--output has %q, %v, want %q", names, err, want)
	}
	for name, text := range map[string]string{"out/kernel-run2.klog": "triple fault next",
		"junit": `<testsuites tests="6" failures="0" errors="4" skipped="2">`} {
		if b := readTestFile(t, filepath.Join(c.Dir, name)); !strings.Contains(string(b), text) {
			t.Errorf("%s lacks %q: %s", name, text, b)
		}
	}
	var results struct {
		Format string
		Status int
		Cells  []struct{ Verdict struct{ Kind, Kernel string } }
	}
	b := readTestFile(t, filepath.Join(c.Dir, "results"))
	if err := json.Unmarshal(b, &results); err != nil || results.Format != "gvm-test-matrix-1" || results.Status != 121 ||
		len(results.Cells) != 4 || results.Cells[3].Verdict.Kind != "crash" || results.Cells[3].Verdict.Kernel != kernel {
		t.Errorf("%v: %s", err, b)
	}
}

// TestMatrixScratch: each machine has the disks of --scratch, its own.
func TestMatrixScratch(t *testing.T) {
	t.Parallel()
	c := command(t, "test", "-k", testKernel(t), "--repeat", "2", "-j", "2", "--scratch", "3x16M", "--output", "out",
		"--", "sh")
	if r := gvmRuns(t, c); r.status != 125 {
		t.Errorf("status %d: %s", r.status, r.errs)
	}
	for _, run := range []string{"1", "2"} {
		log := string(readTestFile(t, filepath.Join(c.Dir, "out", "kernel-run"+run+".klog")))
		if n := strings.Count(log, "disk 0:0:0:"); n != 3 {
			t.Errorf("%d disks:\n%s", n, log)
		}
	}
}

// exitKernel makes a kernel whose command ends at once with a status.
func exitKernel(t *testing.T, status byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), fmt.Sprint("exit", status))
	if err := os.WriteFile(path, exitkernel.Image(status), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestGoExec: go test -exec runs a package's tests by gvm test, and takes its status.
func TestGoExec(t *testing.T) {
	t.Parallel()
	if os.Getenv(lab.InLabEnv) == "1" {
		t.Skip("the lab has no build cache that Go may write to")
	}
	cache, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	for status, want := range map[byte]string{0: "\nok  \tx\t", 3: "\nFAIL\tx\t"} {
		c := command(t)
		for name, text := range map[string]string{"go.mod": "module x\n", "x_test.go": "package x\n"} {
			if err := os.WriteFile(filepath.Join(c.Dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		run := exec.Command("go", "test", "-v", "-exec", self(t)+" test -k "+exitKernel(t, status)+" --", "./...")
		run.Dir, run.Env = c.Dir, append(c.Env, "GOCACHE="+strings.TrimSpace(string(cache)), "GOWORK=off")
		out, err := run.CombinedOutput()
		if (err == nil) != (status == 0) || !strings.Contains(string(out), want) ||
			!strings.Contains(string(out), "gvm: the kernel has no way for the command's streams") {
			t.Errorf("status %d: %v, want %q:\n%s", status, err, want, out)
		}
	}
}

// TestMatrixStatus: a matrix passes if all of its cells do, and one that could not be tested hides
// none that failed.
func TestMatrixStatus(t *testing.T) {
	t.Parallel()
	pass, fail := exitKernel(t, 0), exitKernel(t, 3)
	for _, tt := range []struct {
		args   string
		status int
		table  string
	}{
		{"-k " + pass + " --cpus 1,2 --repeat 3", 0, "6 cells: 6 passed\n"},
		{"-k " + pass + " --retry 1", 0, "1 cell: 1 passed\n"},
		{"-k " + pass + " -k none", 125, "2 cells: 1 passed, 1 not tested\n"},
		{"-k none -k " + pass + " -k " + fail, 3, "3 cells: 1 passed, 1 failed, 1 not tested\n"},
		{"-k " + exitKernel(t, 130) + " --repeat 1", 130, "1 cell: 0 passed, 1 failed\n"},
		{"-k " + exitKernel(t, 130) + " --repeat 1 --bisect", 1, "1 cell: 0 passed, 1 failed\n"},
	} {
		r := gvmRuns(t, command(t, slices.Concat([]string{"test"}, strings.Fields(tt.args), []string{"--", "sh"})...))
		if r.status != tt.status || !strings.HasSuffix(r.out, tt.table) ||
			strings.Contains(r.errs, "not all cells passed") != (tt.status != 0) ||
			strings.Count(r.errs, "only its exit status will be known") > 1 { // a note is said once
			t.Errorf("%s: status %d, want %d:\n%s%s", tt.args, r.status, tt.status, r.out, r.errs)
		}
	}
}

// TestCellOutput: a cell keeps the end of both streams, and all of them in files.
func TestCellOutput(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cell")
	o, cfg := &cellOutput{path: path}, testrun.Config{}
	closeAll, err := o.connect(&cfg)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	for _, b := range [][]byte{[]byte(want.String()[:1000]), []byte(want.String()[1000:])} {
		if _, err := cfg.Stdout.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	for b := range slices.Chunk([]byte(want.String()), 1000) {
		if _, err := cfg.Stderr.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	closeAll()
	for suffix, end := range map[string]*tail{".out": &o.out, ".err": &o.errs} {
		lines := end.lines()
		if b := readTestFile(t, path+suffix); string(b) != want.String() || len(lines) != tailLines ||
			lines[0] != "line 99980" || lines[tailLines-1] != "line 99999" || len(end.b) > 2*tailBytes {
			t.Errorf("%s: %d bytes of %d; %q of %d bytes", suffix, len(b), want.Len(), lines, len(end.b))
		}
	}
	if _, err := (&cellOutput{path: path}).connect(&cfg); !errors.Is(err, os.ErrExist) {
		t.Errorf("a file of another run: %v", err)
	}
	if lines := new(tail).lines(); lines != nil {
		t.Errorf("no output: %q", lines)
	}
}

// TestMatrixStop: a signal ends the machines that run, no other begins, and the table has all.
func TestMatrixStop(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := startGVM(t, dir, "test", "-k", testKernel(t), "-a", "spin", "--cpus", "1,2", "--repeat", "3", "-j", "2",
		"--hang", "0", "--output", "out", "--junit", "junit", "--", "sh")
	for _, name := range []string{"run1", "run2"} {
		p.eventually("the machines run", func() bool {
			b, _ := os.ReadFile(filepath.Join(dir, "out/kernel-cpus1-"+name+".klog"))
			return strings.Contains(string(b), "gvm embedded guest")
		})
	}
	p.signal(syscall.SIGINT)
	r := p.wait()
	if r.status != 130 || strings.Count(r.out, "stopped 130") < 2 || strings.Count(r.out, "not run  ") != 4 ||
		!strings.Contains(r.out, "6 cells: 0 passed, 6 not run\n") {
		t.Errorf("status %d:\n%s\n%s", r.status, r.out, r.errs)
	}
	if b := readTestFile(t, filepath.Join(dir, "junit")); !strings.Contains(string(b), `errors="0" skipped="6"`) {
		t.Errorf("the JUnit file is %s", b)
	}
}

// TestCellRunsOn: the end of a matrix, by --timeout or a signal, does not wait for a cell's process
// that a guest keeps from counting the time and from ending. The process ends with a matrix that is
// killed, also if a signal had stopped it.
func TestCellRunsOn(t *testing.T) {
	t.Parallel()
	for how, want := range map[string]struct {
		status int
		text   string
	}{
		"timeout": {124, ": timeout 124 in "},
		"signal":  {143, ": stopped 143 in "},
		"kill":    {},
	} {
		_, dir := openFIFO(t)
		args := []string{"test", "-k", "fifo", "--repeat", "1"}
		if how == "timeout" {
			args = append(args, "--timeout", "2s")
		}
		p := startGVM(t, dir, append(args, "--", "sh")...)
		var cell int
		p.eventually("the cell's process runs", func() bool {
			pid := fmt.Sprint(p.cmd.Process.Pid)
			tasks, _ := filepath.Glob("/proc/" + pid + "/task/*/children")
			for _, path := range tasks {
				children, _ := os.ReadFile(path)
				for _, child := range strings.Fields(string(children)) {
					words, _ := os.ReadFile("/proc/" + child + "/cmdline")
					if strings.HasPrefix(string(words), cellArg0+"\x00") {
						cell, _ = strconv.Atoi(child)
					}
				}
			}
			return cell != 0
		})
		process, err := unix.PidfdOpen(cell, 0)
		if err := errors.Join(err, syscall.Kill(cell, syscall.SIGSTOP)); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(process)
		if how == "signal" {
			p.signal(syscall.SIGTERM)
		}
		if how == "kill" { // not wait: the reaper of orphans decides how long the process is in gvm's group
			_ = errors.Join(p.cmd.Process.Kill(), p.cmd.Wait())
		} else if r := p.wait(); r.status != want.status || !strings.Contains(r.errs, want.text) {
			t.Errorf("%s: status %d: %s%s", how, r.status, r.out, r.errs)
		}
		if await(t, process) == 0 {
			t.Errorf("%s: the cell's process is left", how)
		}
	}
}

// TestMatrixStuckReader: a signal ends a matrix whose table nothing reads. The rows are more than
// the pipe holds.
func TestMatrixStuckReader(t *testing.T) {
	t.Parallel()
	c := command(t, "test", "-k", "none", "--repeat", "60", "--", "sh")
	stuckOutput(t, c, syscall.SIGTERM)
	if r := wait(t, c); r.status != exitTerminated {
		t.Errorf("status %d", r.status)
	}
}

// TestMatrixTerminal: on a terminal the last line has the cells that run.
func TestMatrixTerminal(t *testing.T) {
	t.Parallel()
	r := startOnTerminal(t, "test", "-k", testKernel(t), "-a", "crash=triple", "--repeat", "2", "-j", "1",
		"--", "sh").wait()
	for _, want := range []string{clearLine + "0/2 done, 0 not passed; running: kernel-run1",
		"\r\n1/2 done, 1 not passed; running: ", "cell "} {
		if r.status != 121 || !strings.Contains(r.out, want) {
			t.Errorf("status %d, the terminal lacks %q: %q", r.status, want, r.out)
		}
	}
}

// TestMatrixWords: wrong words for a matrix are one line and status 125, and leave nothing behind.
func TestMatrixWords(t *testing.T) {
	t.Parallel()
	kernel := testKernel(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	full := filepath.Join(dir, "full")
	if err := errors.Join(os.WriteFile(image, make([]byte, 1<<20), 0o600), os.Mkdir(full, 0o700),
		os.WriteFile(filepath.Join(full, "x"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for args, errs := range map[string]string{
		"--cpus 1,0 -- sh":                               "--cpus 0: want 1 or more",
		"--cpus 1,,2 -- sh":                              `--cpus "1,,2": want a number, or several apart by commas`,
		"--cpus 2,2 -- sh":                               "--cpus 2,2: has 2 twice",
		"-k= -- sh":                                      "--kernel: the value is empty: want KERNEL",
		"--repeat 0 -- sh":                               "--repeat 0: want 1 or more",
		"--repeat 5001 -k x -- sh":                       "--repeat 5001 of 2 cells: want 10000 cells at most",
		"--jobs 0 -- sh":                                 "--jobs 0: want 1 or more",
		"-j -1 -- sh":                                    "--jobs -1: want 1 or more",
		"--retry -1 -- sh":                               "--retry -1: want 0 or more",
		"--repeat 2":                                     "several machines have no terminal for a shell: give a COMMAND",
		"--repeat 2 --verdict x -- sh":                   "--verdict is for one machine without --repeat and the like: ",
		"--repeat 2 --klog x -- sh":                      "--klog is for one machine without --repeat and the like: --output",
		"--repeat 2 --timing -- sh":                      "--timing is for one machine",
		"--backend vhost -- sh":                          "--backend needs a --disk",
		"--backend x --disk mem:1M -- sh":                "--disk mem:1M: backend=x: want process, vhost or auto",
		"--backend auto,auto --disk " + image + " -- sh": "--backend auto,auto: has auto twice",
		"--disk " + image + " -j 2 -- sh":                "machines at the same time cannot share it",
		"--output " + full + " -- sh":                    "--output: " + full + ": is not empty; name a new directory",
		"--output none/none -- sh":                       "--output: none/none: no such file",
		"--output new --junit n --results /none/n -- sh": "--results: /none/n: no such file or directory",
		"--junit new --output none/none -- sh":           "--output: none/none: no such file",
		"--junit " + image + " --repeat 2 -- sh":         "--junit: " + image + ": has something that gvm did not write",
		"-j 2 --backend process --disk none -- sh":       "none",
	} {
		c := command(t, append([]string{"test", "-k", kernel}, strings.Fields(args)...)...)
		r := gvmRuns(t, c)
		left, err := os.ReadDir(c.Dir)
		if r.status != 125 || !strings.Contains(r.errs, errs) || r.out != "" || strings.Count(r.errs, "\n") != 1 ||
			err != nil || len(left) > 0 {
			t.Errorf("%s: status %d, %q, want %q; %v left", args, r.status, r.errs+r.out, errs, left)
		}
	}
}
