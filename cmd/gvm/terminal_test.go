package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest/embedded"
	"gvm/panics"
)

// TestTerminal talks to a guest on a terminal. wait checks each time that the terminal's settings
// are restored.
func TestTerminal(t *testing.T) {
	const raw = unix.ICANON | unix.ECHO | unix.ISIG | unix.IEXTEN
	for _, tt := range []struct {
		name   string
		word   string
		ready  string
		do     func(p *proc)
		status int
		last   string // of the output
	}{
		{"raw", "echo", "ready", func(p *proc) {
			if s := p.termios(); s.Lflag&raw != 0 || s.Oflag&unix.OPOST != 0 || s.Iflag&(unix.ICRNL|unix.IXON) != 0 {
				p.t.Errorf("not raw: %+v", s)
			}
			p.typeIn("\x03\x04\x1a\x13\x1c\r\x7fq") // special characters of a terminal that is not raw
			p.expect("ready\r\n\x03\x04\x1a\x13\x1c\r\x7fq\r\n")
		}, 0, "PASS\r\n"},
		{"every byte", "echo", "ready", func(p *proc) {
			var all []byte
			for b := range 256 {
				if b != 'q' && b != escape {
					all = append(all, byte(b))
				}
			}
			p.typeIn(string(all))
			p.expect("ready\r\n" + string(all))
			p.typeIn("q")
		}, 0, "PASS\r\n"},
		{"early input", "echo", "", func(p *proc) { p.typeIn("early"); p.expect("ready\r\nearly"); p.typeIn("q") }, 0,
			"PASS\r\n"},
		{"help", "echo", "ready", func(p *proc) {
			p.typeIn("a\x01hb")
			p.expect("Ctrl-a x", "Ctrl-a Ctrl-a", "ab")
			p.typeIn("q")
		}, 0, "PASS\r\n"},
		{"literal Ctrl-a", "echo", "ready",
			func(p *proc) { p.typeIn("<\x01\x01>"); p.expect("<\x01>"); p.typeIn("q") }, 0, "PASS\r\n"},
		{"Ctrl-a and another key", "echo", "ready", func(p *proc) {
			p.typeIn("<\x01z>")
			p.expect("Ctrl-a h  this help", "Ctrl-a Ctrl-a", "<>")
			p.typeIn("q")
		}, 0, "PASS\r\n"},
		{"Ctrl-a alone", "echo", "ready", func(p *proc) {
			p.typeIn("<\x01")
			p.expect("<")
			p.typeIn("\x01>q") // Ctrl-a and its key arrive separately
			p.expect("<\x01>")
		}, 0, "PASS\r\n"},
		{"break", "echo", "ready", func(p *proc) { p.typeIn("<\x01b>"); p.expect("<\x00>"); p.typeIn("q") }, 0,
			"PASS\r\n"},
		{"quit", "echo", "ready", func(p *proc) { p.typeIn("<"); p.expect("<"); p.typeIn("\x01x") }, exitQuit,
			"\r\ngvm: stopped by Ctrl-a x\r\n"},
		{"quit at once", "spin", "", func(p *proc) { p.typeIn("\x01x") }, exitQuit, "gvm: stopped by Ctrl-a x\r\n"},
		{"quit, guest spins", "spin", "spinning", func(p *proc) { p.typeIn("\x01X") }, exitQuit,
			"gvm: stopped by Ctrl-a x\r\n"},
		// The guest takes none of this input; gvm must still see the keys typed after it.
		{"quit, guest takes no input", "hang", "hanging", func(p *proc) {
			for range 3 {
				p.typeIn(strings.Repeat("z", 1000))
				p.typeIn("\x01h")
			}
			p.expectCount("Ctrl-a h  this help", 3)
			p.typeIn("\x01x")
		}, exitQuit, "gvm: stopped by Ctrl-a x\r\n"},
		{"SIGTERM, guest takes no input", "hang", "hanging", func(p *proc) {
			p.typeIn(strings.Repeat("z", 1000))
			p.signal(syscall.SIGTERM)
		}, 143, "gvm: stopped by SIGTERM\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := startOnTerminal(t, guestRun(tt.word)...)
			p.expect(tt.ready)
			tt.do(p)
			if r := p.wait(); r.status != tt.status || !strings.HasSuffix(r.out, tt.last) {
				t.Errorf("status %d, want %d: %q", r.status, tt.status, r.out)
			}
		})
	}
	for _, args := range [][]string{{"run", "--nosuch"}, {"run", "--disk", "none"}, {"doctor"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			t.Parallel()
			want := exitUsage
			if args[0] == "doctor" {
				want = 0
			}
			if r := startOnTerminal(t, args...).wait(); r.status != want {
				t.Errorf("status %d: %q", r.status, r.out)
			}
		})
	}
}

// panicsEnv makes a gvm of the tests panic at SIGUSR1; "locked": with a lock that the end in order
// needs.
const panicsEnv = "GVM_TEST_PANICS"

func panicAtSignal(locked bool) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGUSR1)
	panics.Go(func() {
		<-c
		if locked {
			stderr.mu.Lock()
		}
		panic("broken")
	})
}

// TestPanic: after a panic of any goroutine gvm ends with status 70, and the terminal is restored,
// which wait checks.
func TestPanic(t *testing.T) {
	for _, lock := range []string{"free", "locked"} {
		t.Run(lock, func(t *testing.T) {
			t.Parallel()
			p := startOnTerminalAs(t, func(p *proc) { p.cmd.Env = append(p.cmd.Env, panicsEnv+"="+lock) },
				guestRun("spin")...)
			p.expect("spinning")
			p.signal(syscall.SIGUSR1)
			r := p.wait()
			if r.status != exitBug || lock == "free" && (!strings.Contains(r.out, "panicAtSignal") ||
				strings.Count(r.out, "a bug in gvm, please report it: panic: broken") != 1) {
				t.Errorf("status %d: %q", r.status, r.out)
			}
		})
	}
}

// TestHangUp hangs up the terminal.
func TestHangUp(t *testing.T) {
	t.Parallel()
	p := startOnTerminal(t, guestRun("spin")...)
	p.expect("spinning")
	p.slave.Close()
	p.slave = nil
	p.master.Close()
	if r := p.wait(); r.status != exitHangup {
		t.Errorf("status %d", r.status)
	}
}

// TestPipe gives a guest input from a pipe: every byte is data, and its end does not end the guest.
func TestPipe(t *testing.T) {
	t.Parallel()
	p := startGVM(t, "", guestRun("echo")...)
	p.typeIn("\x01x\x01\x01")
	p.expect("ready", "\x01x\x01\x01")
	for i := range 10 { // the guest buffers 256 bytes that it has not sent back
		p.typeIn(strings.Repeat("long ", 50))
		p.expectCount("long ", 50*(i+1))
	}
	p.typeIn("q")
	if r := p.wait(); r.status != 0 {
		t.Errorf("status %d: %s", r.status, r.errs)
	}
	p = startGVM(t, "", guestRun("echo")...)
	p.typeIn("all")
	p.input.Close()
	p.expect("ready\r\nall")
	p.signal(syscall.SIGTERM)
	if r := p.wait(); r.status != 143 {
		t.Errorf("after the end of input: status %d: %s", r.status, r.errs)
	}
}

// TestTerminalSize: the kernel's command line has the size of a terminal.
func TestTerminalSize(t *testing.T) {
	t.Parallel()
	kernel := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(kernel, embedded.Image, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name       string
		rows, cols uint16
		args       []string
		want       string
	}{
		{"size", 50, 132, nil,
			`"console=ttyS0 panic=-1 LINES=50 COLUMNS=132 ` +
				`systemd.tty.rows.ttyS0=50 systemd.tty.columns.ttyS0=132 crash=reset"`},
		{"the terminal has none", 0, 0, nil, `"console=ttyS0 panic=-1 crash=reset"`},
		{"bare", 50, 132, []string{"--bare-cmdline"}, `"crash=reset"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newProc(t, append([]string{"run", "--kernel", kernel, "--cmdline", "crash=reset"}, tt.args...))
			p.master, p.slave = openPTY(t)
			if err := unix.IoctlSetWinsize(int(p.slave.Fd()), unix.TIOCSWINSZ,
				&unix.Winsize{Row: tt.rows, Col: tt.cols}); err != nil {
				t.Fatal(err)
			}
			p.settings = p.termios()
			p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = p.slave, p.slave, p.slave
			p.start(p.master)
			if r := p.wait(); r.status != exitReset || !strings.Contains(r.out, "command line: "+tt.want) {
				t.Errorf("status %d, %q, want %q", r.status, r.out, tt.want)
			}
		})
	}
	r := gvmRuns(t, command(t, "run", "--kernel", kernel, "--cmdline", "crash=reset"))
	if !strings.Contains(r.out, `command line: "console=ttyS0 panic=-1 crash=reset"`) {
		t.Errorf("not on a terminal: status %d, %q", r.status, r.out)
	}
}

// TestStolenInput: the end does not wait for a read of the terminal that waits although there was
// input, as it does if another process reads the terminal too, or has changed it.
func TestStolenInput(t *testing.T) {
	master, slave := openPTY(t)
	out, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	var hungUp atomic.Bool
	x := newTerminal(func(err error) {
		if !hungUp.Load() {
			t.Error(err)
		}
	})
	x.in, x.out = slave, out
	if err := x.open(t.Context()); err != nil {
		t.Fatal(err)
	}
	fd := int(slave.Fd())
	s, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	s.Cc[unix.VMIN], s.Cc[unix.VTIME] = 255, 255 // a read waits 25 s for a second byte
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, s); err != nil {
		t.Fatal(err)
	}
	if _, err := master.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	for !reads(t, fd) {
		time.Sleep(time.Millisecond)
	}
	closed := make(chan error, 1)
	go func() { closed <- x.close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the end waits for the terminal")
	}
	hungUp.Store(true)
	master.Close()
	x.input.Wait() // for the read, which has the descriptor
}

// reads reports whether a thread of this process waits in read(2) of a descriptor.
func reads(t *testing.T, fd int) bool {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/syscall")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		b, _ := os.ReadFile(name) // the thread may have ended
		if strings.HasPrefix(string(b), fmt.Sprintf("%d %#x ", unix.SYS_READ, fd)) {
			return true
		}
	}
	return false
}
