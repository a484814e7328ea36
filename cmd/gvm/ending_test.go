package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/control"
	"gvm/guest/embedded/embeddedtest"
)

func guestRun(words ...string) []string {
	args := []string{"run"}
	for _, w := range words {
		if strings.HasPrefix(w, "--") {
			args = append(args, w)
		} else {
			args = append(args, "--guest-arg", w)
		}
	}
	return args
}

// stateLines are the lines about a machine of one CPU in a report.
const stateLines = `((vcpu/0: [^\n]+\n)?(vcpu/0/(exit|kvm): [^\n]+\n)*(pci/00:[0-9a-f]{2}.0/virtio: [^\n]+\n)+)`

// endings are the ways a guest can end by itself or by --timeout.
var endings = []struct {
	name   string
	args   []string
	status int
	out    string // part of the console
	errs   string // all of standard error
}{
	{"power-off", guestRun(), 0, "\nPASS\n", `^$`},
	{"two CPUs", guestRun("--cpus=2"), 0, "cpus: 2 of 2 up", `^$`},
	{"triple fault", guestRun("crash=triple"), exitCrash, "triple fault next\n",
		`^gvm: the guest crashed: vCPU 0: [^\n]+\n(the guest's registers are lost: [^\n]+\n|` +
			`the guest's general registers are all that is left: [^\n]+\nrax [^\n]*\nrsi [^\n]*\nr8 [^\n]*\nr12 [^\n]*\n|` +
			`rip [0-9a-f]{16} [^\n]*\nrax (?s:.*)\ncr0 (?s:.*)\ncode at rip: ([0-9a-f]{2} ){15}[0-9a-f]{2}\n)` +
			stateLines + `$`},
	{"panic", guestRun("crash=panic"), exitPanic, "pvpanic event next\n", `^gvm: guest panic: [^\n]+\n$`},
	{"reset", guestRun("crash=reset"), exitReset, "reset next\n", `^gvm: the guest asked for a reset[^\n]*\n$`},
	{"reset by ACPI", guestRun("crash=reset-acpi"), exitReset, "reset by ACPI next\n",
		`^gvm: the guest asked for a reset[^\n]*\n$`},
	{"reset by port 0xcf9", guestRun("crash=reset-cf9"), exitReset, "reset by port 0xcf9 next\n",
		`^gvm: the guest asked for a reset[^\n]*\n$`},
	{"reset by the i8042", guestRun("crash=reset-i8042"), exitReset, "reset by the i8042 next\n",
		`^gvm: the guest asked for a reset[^\n]*\n$`},
	{"timeout, spinning", guestRun("--timeout=300ms", "spin"), exitTimeout, "",
		`^gvm: --timeout 300ms elapsed\n` + stateLines + `$`},
	{"timeout, halted", guestRun("--timeout=300ms", "hang"), exitTimeout, "",
		`^gvm: --timeout 300ms elapsed\n` + stateLines + `$`},
	{"timeout, rebooting", guestRun("--timeout=1s", "--on-reset=reboot", "crash=reset"), exitTimeout, "",
		`^gvm: --timeout 1s elapsed\n` + stateLines + `?$`},
	{"timeout at once", guestRun("--timeout=1ns"), exitTimeout, "", `^gvm: --timeout 1ns elapsed\n` + stateLines + `?$`},
}

// TestEndings checks the exit statuses, on pipes and on a terminal.
func TestEndings(t *testing.T) {
	for _, tt := range endings {
		check := func(t *testing.T, r result, onTerminal bool) {
			t.Helper()
			if r.status != tt.status {
				t.Errorf("status %d, want %d", r.status, tt.status)
			}
			if !strings.Contains(lines(r.out), tt.out) {
				t.Errorf("console %q lacks %q", r.out, tt.out)
			}
			if !onTerminal && !regexp.MustCompile(tt.errs).MatchString(r.errs) {
				t.Errorf("standard error %q, want %q", r.errs, tt.errs)
			}
		}
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			check(t, gvmRuns(t, command(t, tt.args...)), false)
		})
		t.Run(tt.name+", terminal", func(t *testing.T) {
			t.Parallel()
			check(t, startOnTerminal(t, tt.args...).wait(), true)
		})
	}
}

// TestReport checks that the embedded guest passes its checks in a gvm without arguments.
func TestReport(t *testing.T) {
	t.Parallel()
	r := gvmRuns(t, command(t, "run"))
	report, err := embeddedtest.ParseReport(lines(r.out))
	if err != nil || !report.Passed || report.CPUs != 1 || len(report.Disks) != 1 || report.Interrupts == 0 {
		t.Errorf("report %+v, %v", report, err)
	}
}

func TestSignals(t *testing.T) {
	for _, tt := range []struct {
		sig    syscall.Signal
		name   string
		status int
	}{
		{syscall.SIGTERM, "SIGTERM", 143},
		{syscall.SIGINT, "SIGINT", 130},
		{syscall.SIGHUP, "SIGHUP", 129},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, word := range []string{"spin", "hang", "echo"} {
				p := startGVM(t, "", guestRun(word)...)
				p.expect(map[string]string{"spin": "spinning", "hang": "hanging", "echo": "ready"}[word])
				p.signal(tt.sig)
				if r := p.wait(); r.status != tt.status || r.errs != "gvm: stopped by "+tt.name+"\n" {
					t.Errorf("%s: status %d, want %d: %q", word, r.status, tt.status, r.errs)
				}
			}
		})
		t.Run(tt.name+", terminal", func(t *testing.T) {
			t.Parallel()
			p := startOnTerminal(t, guestRun("spin")...)
			p.expect("spinning")
			p.signal(tt.sig)
			if r := p.wait(); r.status != tt.status || !strings.HasSuffix(r.out, "gvm: stopped by "+tt.name+"\r\n") {
				t.Errorf("status %d, want %d: %q", r.status, tt.status, r.out)
			}
		})
	}
}

// asStuck makes a gvm of the tests one whose end in order never finishes.
const asStuck = "GVM_TEST_AS_STUCK"

func stuck() {
	ctx, stop := context.WithCancelCause(context.Background())
	catchSignals(ctx, stop)
	urgent.restore = func() error { fmt.Println("restored"); return nil }
	if term.IsTerminal(int(os.Stdin.Fd())) {
		if err := newTerminal(stop).open(ctx); err != nil {
			fmt.Println(err)
		}
	}
	restoring := make(chan struct{})
	if os.Getenv(asStuck) == stuckAtOnce {
		urgent.restore = func() error { close(restoring); select {} }
	}
	fmt.Println("ready")
	<-ctx.Done()
	fmt.Println("ending")
	<-restoring // never, but for stuckAtOnce
	os.Exit(gvm([]string{"gvm", "exit-status", "surplus"}))
}

// stuckAtOnce is the value of asStuck for a gvm whose end in order is over during an immediate one,
// which does not finish.
const stuckAtOnce = "at once"

// TestEverySignal sends every signal that can be caught to a gvm on a terminal: it continues, or
// ends with the terminal restored and its name released. Fatal signals dump its goroutines.
func TestEverySignal(t *testing.T) {
	t.Parallel()
	ends := map[syscall.Signal]int{syscall.SIGHUP: exitHangup, syscall.SIGINT: exitQuit,
		syscall.SIGTERM: exitTerminated}
	for _, s := range fatalSignals {
		ends[s.(syscall.Signal)] = 128 + int(s.(syscall.Signal))
	}
	for s := syscall.Signal(1); s <= 64; s++ {
		if s == syscall.SIGKILL || s == syscall.SIGSTOP || s > 34 && s < 64 { // two real-time signals are enough
			continue
		}
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			name := fmt.Sprintf("signal-%d-%d", s, os.Getpid())
			p := startOnTerminal(t, guestRun("--name="+name, "echo")...)
			p.expect("ready")
			p.signal(s)
			status, ended := ends[s]
			if !ended {
				p.typeIn("here")
				p.expect("here")
				p.signal(syscall.SIGTERM)
				status = exitTerminated
			}
			r := p.wait()
			if r.status != status {
				t.Errorf("status %d, want %d: %q", r.status, status, r.out)
			}
			if slices.Contains(fatalSignals, os.Signal(s)) &&
				!(strings.Contains(r.out, fmt.Sprintf("%s: %s\r\n", unix.SignalName(s), s)) &&
					strings.Contains(r.out, "\ngoroutine 1 [")) {
				t.Errorf("no dump: %q", r.out)
			}
			if _, err := os.Lstat(filepath.Join(runtimeDir, "gvm", name)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("its directory is left: %v", err)
			}
		})
	}
}

// TestFatalFirst: a machine claims its name once the signals are caught that would leave it behind.
func TestFatalFirst(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		caught := make(chan struct{})
		defer func(f func() <-chan struct{}) { catchFatal = f }(catchFatal)
		catchFatal = func() <-chan struct{} { return caught }
		rc := &runConfig{}
		rc.spec.Name = "a"
		var socket *control.Server
		var err error
		claimed := make(chan struct{})
		go func() {
			defer close(claimed)
			socket, err = rc.claimName(func(s string) { t.Error(s) })
		}()
		synctest.Wait()
		dir := control.DefaultDirectory().Machine("a")
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is there: %v", dir, err)
		}
		close(caught)
		<-claimed
		if err != nil {
			t.Fatal(err)
		}
		if err := rc.closeSocket(socket); err != nil {
			t.Error(err)
		}
	})
}

// endStuck starts a gvm of a value of asStuck, and ends it by a first signal.
func endStuck(t *testing.T, as string) *proc {
	t.Helper()
	p := newProc(t, nil)
	p.cmd.Env = append(p.cmd.Env, asStuck+"="+as)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = w, &p.errs
	p.start(r)
	w.Close()
	p.expect("ready")
	p.signal(syscall.SIGTERM)
	p.expect("ending")
	return p
}

// TestSecondSignal: a second signal ends a gvm at once that is already ending.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	for _, second := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		p := endStuck(t, "1")
		time.Sleep(2 * sameRequest)
		p.signal(second)
		if r := p.wait(); r.status != 128+int(second) || !strings.Contains(r.out, "restored") ||
			!strings.Contains(r.errs, "stopped at once by "+unix.SignalName(second)) {
			t.Errorf("%+v", r)
		}
	}
	p := startOnTerminalAs(t, func(p *proc) { p.cmd.Env = append(p.cmd.Env, asStuck+"=1") })
	p.expect("ready")
	p.typeIn("\x01x")
	p.expect("ending")
	p.typeIn("\x01x")
	if r := p.wait(); r.status != exitQuit || !strings.Contains(r.out, "stopped at once by Ctrl-a x") {
		t.Errorf("%+v", r)
	}
}

// TestOneEndOfTwo: an immediate end has the last word and the status, also if the end in order is
// over before it.
func TestOneEndOfTwo(t *testing.T) {
	t.Parallel()
	p := endStuck(t, stuckAtOnce)
	p.signal(syscall.SIGINT)
	if r := p.wait(); r.status != exitQuit || r.errs != "" {
		t.Errorf("%+v", r)
	}
}

// TestSameRequest: timeout(1) sends a signal twice, which counts as one request and does not end
// gvm at once.
func TestSameRequest(t *testing.T) {
	var r request
	now := time.Now()
	for i, tt := range []struct {
		signal os.Signal
		after  time.Duration
		want   bool
	}{
		{syscall.SIGTERM, 0, false},
		{syscall.SIGTERM, time.Millisecond, true},
		{syscall.SIGTERM, sameRequest - 2*time.Millisecond, true},
		{syscall.SIGTERM, time.Millisecond, false},
		{syscall.SIGINT, time.Millisecond, false},
		{syscall.SIGTERM, time.Millisecond, false},
	} {
		now = now.Add(tt.after)
		if got := r.repeated(tt.signal, now); got != tt.want {
			t.Errorf("signal %d: %v", i, got)
		}
	}
}

// TestOutput gives gvm outputs that accept nothing.
func TestOutput(t *testing.T) {
	shell := func(t *testing.T, script string) result {
		c := command(t)
		c.Args = []string{"sh", "-c", script, c.Path}
		var err error
		if c.Path, err = exec.LookPath("sh"); err != nil {
			t.Fatal(err)
		}
		return gvmRuns(t, c)
	}
	for _, tt := range []struct {
		name, script string
		status       int
		errs         string
	}{
		{"input closed", `exec "$0" run <&-`, 0, `^$`},
		{"output closed", `exec "$0" run >&-`, 0, `^$`},
		{"all closed", `exec "$0" run <&- >&- 2>&-`, 0, `^$`},
		{"input is a directory", `exec "$0" run </`, 0, `^$`},
		{"disk full", `exec "$0" run >/dev/full`, exitHost, `^gvm: console output: [^\n]*no space left on device\n$`},
		{"doctor, disk full", `exec "$0" completion bash >/dev/full`, exitHost,
			`^gvm: [^\n]*no space left on device\n$`},
		{"head", `"$0" run | head -n 1`, 0, `^(gvm: console output: [^\n]*broken pipe\n)?$`},
		{"errors to a full disk", `exec "$0" run --nosuch 2>/dev/full`, exitUsage, `^$`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := shell(t, tt.script)
			if r.status != tt.status || !regexp.MustCompile(tt.errs).MatchString(r.errs) {
				t.Errorf("status %d, want %d: %q", r.status, tt.status, r.errs)
			}
		})
	}
	pipe := func(t *testing.T) (r, w *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close(); w.Close() })
		return r, w
	}
	t.Run("reader gone", func(t *testing.T) {
		t.Parallel()
		in, out := pipe(t)
		in.Close()
		c := command(t, "run")
		c.Stdout = out
		if r := gvmRuns(t, c); r.status != exitHost ||
			!regexp.MustCompile(`^gvm: console output: .*broken pipe\n$`).MatchString(r.errs) {
			t.Errorf("status %d: %q", r.status, r.errs)
		}
	})
	// Without a reader the guest's output waits, but an end does not.
	for _, how := range []string{"timeout", "signal"} {
		t.Run("reader stopped "+how, func(t *testing.T) {
			t.Parallel()
			_, out := pipe(t)
			if _, err := unix.FcntlInt(out.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
				t.Fatal(err)
			}
			if _, err := out.Write(make([]byte, 4096)); err != nil {
				t.Fatal(err)
			}
			args, want := guestRun("--timeout=500ms"), exitTimeout
			if how == "signal" {
				args, want = guestRun("--disk="+image(t, "disk", 1, 1<<20)), 143
			}
			c := command(t, args...)
			var errs bytes.Buffer
			c.Stdout, c.Stderr = out, &errs
			in, w := pipe(t)
			c.Stdin = in
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			if how == "signal" {
				// Once the guest takes input, it can be told to stop.
				if _, err := w.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				for n, start := 1, time.Now(); n > 0 && time.Since(start) < tooLong; time.Sleep(time.Millisecond) {
					var err error
					if n, err = unix.IoctlGetInt(int(in.Fd()), unix.TIOCINQ); err != nil {
						t.Fatal(err)
					}
				}
				if err := c.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
			}
			if r := wait(t, c); r.status != want || strings.Contains(errs.String(), "the console waits") {
				t.Errorf("status %d, want %d: %s", r.status, want, &errs)
			}
		})
	}
}

// TestErrorsNotRead: standard error without a reader delays neither the run, with a note, nor a
// requested end.
func TestErrorsNotRead(t *testing.T) {
	t.Parallel()
	for _, signals := range [][]syscall.Signal{{syscall.SIGTERM}, {syscall.SIGTERM, syscall.SIGINT}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer w.Close()
		if _, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		full, dir := image(t, "disk", 2, 1<<20), t.TempDir()
		if err := unix.Mkdir(filepath.Join(dir, "gvm"), 0o755); err != nil { // causes a note by gvm
			t.Fatal(err)
		}
		p := startGVMAs(t, "", func(p *proc) {
			p.cmd.Stderr = w
			p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+dir)
		}, guestRun("--disk="+full+",iops=100", "--grace=1s", "spin")...)
		p.expect("spinning")
		for _, s := range signals {
			p.signal(s)
		}
		if got := p.wait().status; got != 128+int(signals[0]) && got != 128+int(signals[len(signals)-1]) {
			t.Errorf("%v: status %d", signals, got)
		}
	}
}

// TestKilled checks that SIGKILL leaves no lock.
func TestKilled(t *testing.T) {
	t.Parallel()
	img := image(t, "disk", 3, 1<<20)
	p := startGVM(t, "", guestRun("--disk="+img, "hang")...)
	p.expect("hanging")
	p.signal(syscall.SIGKILL)
	if r := p.wait(); r.status != 137 {
		t.Errorf("status %d", r.status)
	}
	if r := gvmRuns(t, command(t, "run", "--disk", img)); r.status != 0 {
		t.Errorf("the next gvm: status %d: %s", r.status, r.errs)
	}
}

// TestNothingLeft runs gvm repeatedly inside this process and checks that descriptors, goroutines
// and memory return to their former level. The test of package machine has every kind of end.
func TestNothingLeft(t *testing.T) {
	img := image(t, "disk", 4, 1<<20)
	fresh := filepath.Join(t.TempDir(), "fresh")
	for name, dir := range map[string]string{"TMPDIR": t.TempDir(), "XDG_CACHE_HOME": t.TempDir(),
		"XDG_RUNTIME_DIR": runtimeDir} {
		t.Setenv(name, dir)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	quietly := func(args []string) int {
		defer func(in, out, errs *os.File) {
			os.Stdin, os.Stdout, os.Stderr = in, out, errs
		}(os.Stdin, os.Stdout, os.Stderr)
		os.Stdin, os.Stdout, os.Stderr = null, null, null
		return gvm(append([]string{"gvm"}, append(args, "--sandbox=off")...)) // which has no way back
	}
	type state struct {
		fds, goroutines int
		mappings        int
		shm             int
	}
	look := func() (s state) {
		count := func(dir string) int {
			list, err := os.ReadDir(dir)
			if err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			return len(list)
		}
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return state{count("/proc/self/fd"), runtime.NumGoroutine(),
			bytes.Count(maps, []byte("kvm")) + bytes.Count(maps, []byte("memfd")), count("/dev/shm")}
	}
	disk := "--disk=" + img
	tests := map[string]struct {
		args   []string
		status int
	}{
		"power-off":       {guestRun(disk, "--cpus=2"), 0},
		"reset":           {guestRun(disk, "crash=reset"), exitReset},
		"many CPUs":       {guestRun(disk, "--cpus=100000", "--disk="+fresh+",size=1M"), exitUsage},
		"bad disk":        {guestRun(disk, "--disk=/none"), exitUsage},
		"bad feature":     {guestRun(disk, "--cpu-features=+vmx,+svm,+ia64"), exitUsage},
		"lacking feature": {guestRun(disk, "--cpu-features=-avx,+avx2"), exitUsage},
	}
	quietly(guestRun(disk)) // starts the runtime's own goroutines
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			before := look()
			if got := quietly(tt.args); got != tt.status {
				t.Errorf("status %d, want %d", got, tt.status)
			}
			left := func() bool {
				after := look()
				after.goroutines = max(after.goroutines, before.goroutines) // fewer is fine
				return after != before
			}
			for deadline := time.Now().Add(tooLong); left() && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond) // a goroutine that was told to end may still run
			}
			if left() {
				t.Errorf("%+v became %+v", before, look())
			}
		})
	}
}
