package vmm

import (
	"context"
	"errors"
	"testing"
	"time"
)

// patienceFor is how long a guest may run: one that does not end by itself, and others.
var patienceFor = map[bool]time.Duration{true: 3 * haltSilence, false: 30 * time.Second}

// TestHalted: a guest that prints that it halts, and has halted, ends the machine; the same text
// from a program does not.
func TestHalted(t *testing.T) {
	const halted = "[    4.567890] reboot: System halted\r\n"
	for _, tt := range []struct {
		name   string
		script script
		cpus   int
		want   Ending
	}{
		{"halted", script{}.print(halted), 1, Halted},
		{"one of three CPUs was started", script{}.print(halted), 3, Halted},
		{"syslog", script{}.print("<0>[    4.567890][    T1] reboot: System halted\r\n"), 1, Halted},
		{"halted after a panic", script{}.print("[ 1.0] " + panicked + "\r\n" + offset + halted), 1, GuestPanic},
		{"an exception before the kernel can panic", script{}.print("PANIC: early exception 0x0d IP 10:ffffffff81c0ffee " +
			"error 0 cr2 0x0\n[    0.000000] CPU: 0 UID: 0 PID: 0 Comm: swapper Not tainted 6.12.0 #1\n"), 1, GuestPanic},
		{"an early exception of a quiet kernel", script{}.print("PANIC: early exception 0x0e IP 10:ffffffff81c0ffee " +
			"error 0 cr2 0xffff888001000000\n"), 1, GuestPanic},
		{"halted after a program's early exception", script{}.print("PANIC: early exception 0x0e IP 10:0 error 0 cr2 0x0\n" +
			halted), 1, Halted},
		{"idle after a program's early exception", script{}.print("PANIC: early exception 0x0e IP 10:0 error 0 cr2 0x0\n").
			idle(), 1, Stopped},
		{"power-off", script{}.print("reboot: System halted\r\n").powerOff(), 1, PoweredOff},
		{"idle", script{}.print("reboot: System halted\r\n").idle(), 1, Stopped},
		{"said nothing", script{}.print("hello\r\n"), 1, Stopped},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), patienceFor[tt.want == Stopped])
			defer cancel()
			out, _ := tt.script.runContext(ctx, t, false, Config{CPUs: tt.cpus})
			if out.Ending != tt.want {
				t.Errorf("%s, %v, want %s", out.Ending, out.Err, tt.want)
			}
		})
	}
}

// TestPowerButton: PowerButton reports whether the guest listens to it.
func TestPowerButton(t *testing.T) {
	for name, tt := range map[string]struct {
		script  script
		listens bool
	}{
		"listens": {script{}.out(0x603, 1).stamp(1), true}, // PWRBTN_EN
		"deaf":    {script{}.stamp(1), false},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			p := new(Pauser)
			if p.PowerButton() {
				t.Error("no machine runs, and its guest listens")
			}
			listens := false
			tt.script.runContext(ctx, t, false, Config{Pauser: p, Stamp: func(byte) {
				go func() { listens = p.PowerButton(); cancel(errors.New("pressed")) }()
			}})
			if listens != tt.listens {
				t.Errorf("the guest listens: %v, want %v", listens, tt.listens)
			}
		})
	}
}
