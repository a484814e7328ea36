package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
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
