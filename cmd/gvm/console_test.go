package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestConsoleCommand: consoles of a machine in the background see its output, type, leave it
// running and end with it; one that does not read delays neither.
func TestConsoleCommand(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("console-%d", os.Getpid())
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	p := startGVMAs(t, t.TempDir(), func(p *proc) { p.cmd.Stdin = null }, guestRun("--name="+name, "echo")...)
	p.expect("ready")
	stalled := startGVM(t, "", "console", name)
	stalled.expect("ready")
	stalled.signal(syscall.SIGSTOP)
	onTerminal := startOnTerminal(t, "console", name)
	onTerminal.expect("; Ctrl-a d leaves it", "ready")
	piped := startGVM(t, "", "console", name)
	piped.expect("ready")
	onTerminal.typeIn("<one>\x01h")
	onTerminal.expect("<one>", "Ctrl-a d  leave the console; the machine runs on")
	piped.expect("<one>")
	onTerminal.typeIn("\x01b>")
	p.expect("<one>", "\x00>")
	piped.typeIn("<two>\x01d")
	onTerminal.expect("<two>\x01d")
	onTerminal.typeIn("\x01d")
	if r := onTerminal.wait(); r.status != 0 || !strings.Contains(r.out, "left the console of "+name+", which runs on") {
		t.Errorf("Ctrl-a d: status %d, %q", r.status, r.out)
	}
	again := startOnTerminal(t, "console", name)
	again.expect("<two>")
	again.signal(syscall.SIGTERM)
	if r := again.wait(); r.status != exitTerminated {
		t.Errorf("SIGTERM: status %d, %q", r.status, r.out)
	}
	piped.typeIn("q")
	for who, proc := range map[string]*proc{"gvm run": p, "gvm console": piped} {
		if r := proc.wait(); r.status != 0 || !strings.HasSuffix(r.out, "PASS\r\n") ||
			who == "gvm console" && !strings.Contains(r.errs, "machine "+name+" has ended") {
			t.Errorf("%s: status %d, %q, %q", who, r.status, r.out, r.errs)
		}
	}
	stalled.signal(syscall.SIGCONT)
	if r := stalled.wait(); r.status != 0 {
		t.Errorf("stopped meanwhile: status %d, %q", r.status, r.errs)
	}
	for args, want := range map[string]string{
		"absent": "no machine of this user", "a b": "console takes [VM], and got 2 words",
	} {
		if r := ask(t, t.TempDir(), append([]string{"console"}, strings.Fields(args)...)...); r.status != 2 ||
			!strings.Contains(r.errs, want) {
			t.Errorf("%s: status %d, %q", args, r.status, r.errs)
		}
	}
}

// TestHVCCommand: the virtio console of a machine has the size of the last terminal that has used
// it, and has changed, which lasts; the machine does not wait for a driver, and ends the others.
func TestHVCCommand(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("hvc-%d", os.Getpid())
	p := startGVM(t, t.TempDir(), guestRun("--name="+name, "--hvc", "hang")...)
	p.expect("hanging")
	use := func(rows, cols uint16) *proc {
		t.Helper()
		c := newProc(t, []string{"console", name, "--hvc"})
		c.master, c.slave = openPTY(t)
		c.resize(rows, cols)
		c.settings = c.termios()
		c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = c.slave, c.slave, c.slave
		c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		c.input = c.master
		c.start(c.master)
		c.expect("the virtio console of " + name + "; Ctrl-a d leaves it")
		return c
	}
	size := func(c *proc, rows, cols int) {
		t.Helper()
		want := fmt.Sprintf("/cols %d\n.*/rows %d\n", cols, rows)
		c.eventually("a size of "+want, func() bool {
			r := ask(t, "", "inspect", name, "pci/00:03.0/virtio/device")
			sized, err := regexp.MatchString(want, r.out)
			if err != nil || r.status != 0 {
				t.Fatalf("%+v, %v", r, err)
			}
			return sized
		})
	}
	first := use(43, 132)
	size(first, 43, 132)
	second := use(24, 80)
	size(second, 24, 80)
	first.resize(50, 100)
	size(first, 50, 100)
	first.resize(0, 0) // which is none
	first.resize(65535, 65535)
	size(first, 65535, 65535)
	piped := startGVM(t, "", "console", name, "--hvc")
	piped.typeIn("never read")
	second.typeIn(strings.Repeat("z", 1000) + "\x01b")
	second.expect("Ctrl-a h  this help")
	if strings.Contains(second.text(), "break") {
		t.Errorf("a break: %q", second.text())
	}
	second.typeIn("\x01d")
	left := "left the virtio console of " + name + ", which runs on"
	if r := second.wait(); r.status != 0 || !strings.Contains(r.out, left) {
		t.Errorf("Ctrl-a d: status %d, %q", r.status, r.out)
	}
	size(first, 65535, 65535)
	p.signal(syscall.SIGSTOP)
	first.resize(30, 90)
	p.signal(syscall.SIGCONT)
	size(first, 30, 90)
	piped.eventually("connected, and has read its input", func() bool {
		n, err := unix.IoctlGetInt(int(piped.input.(*os.File).Fd()), unix.TIOCINQ)
		if err != nil {
			t.Fatal(err)
		}
		return n == 0
	})
	p.signal(syscall.SIGTERM)
	for who, c := range map[string]*proc{"on a terminal": first, "on pipes": piped} {
		if r := c.wait(); r.status != 0 || !strings.Contains(r.out+r.errs, "machine "+name+" has ended") {
			t.Errorf("%s: status %d, %q, %q", who, r.status, r.out, r.errs)
		}
	}
	if r := p.wait(); r.status != exitTerminated {
		t.Errorf("gvm run: status %d, %q", r.status, r.errs)
	}
}

// resize gives the terminal another size.
func (p *proc) resize(rows, cols uint16) {
	p.t.Helper()
	if err := unix.IoctlSetWinsize(int(p.slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}); err != nil {
		p.t.Fatal(err)
	}
}
