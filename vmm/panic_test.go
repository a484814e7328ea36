package vmm

import (
	"strings"
	"testing"
	"time"

	"gvm/devices/pvpanic"
)

// TestPanicVerdict: what a guest shows of a panic and how it ends make the ending.
func TestPanicVerdict(t *testing.T) {
	line := "<0>[   12.345678][    T1] " + panicked + "\r\n"
	for _, tt := range []struct {
		name        string
		script      script
		tripleFault bool
		want        Ending
	}{
		{"reset", script{}.print(line).reset(), false, GuestPanic},
		{"reset in the middle of the line", script{}.print("/ # <0>[ 1.2] " + panicked).reset(), false, GuestPanic},
		{"triple fault as a reset", script{}.print(line), true, GuestPanic},
		{"end marker", script{}.print(line + offset + endMarker + "\r\n"), false, GuestPanic},
		{"pvpanic, then its text", script{}.print(line).pvpanic(pvpanic.Panicked), false, GuestPanic},
		{"power-off", script{}.print(line).powerOff(), false, PoweredOff},
		{"restart in order", script{}.print(line + restarting).reset(), false, GuestReset},
		{"reset without a panic", script{}.print("hello\r\n").reset(), false, GuestReset},
		{"triple fault without a panic", script{}.print("hello\r\n"), true, GuestCrashed},
	} {
		out, console := tt.script.run(t, tt.tripleFault, Config{})
		if out.Ending != tt.want || out.Ending == GuestPanic && !strings.HasPrefix(out.Err.Error(), panicked) {
			t.Errorf("%s: %s, %v, want %s; console %q", tt.name, out.Ending, out.Err, tt.want, console)
		}
		if tt.tripleFault && out.Report == "" {
			t.Errorf("%s: no registers", tt.name)
		}
	}
}

// stuckConsole takes nothing before it is told to.
type stuckConsole struct{ free chan struct{} }

func (c stuckConsole) Connect(Input) {}
func (c stuckConsole) Write(p []byte) (int, error) {
	<-c.free
	return len(p), nil
}

// TestPanicBehindSlowConsole: a guest that resets before the console has taken its panic panicked.
func TestPanicBehindSlowConsole(t *testing.T) {
	free := make(chan struct{})
	s := script{}.print("first\r\n").stamp(1).print("[    1.234567] " + panicked + "\r\n").stamp(2).reset()
	out, _ := s.run(t, false, Config{Console: stuckConsole{free}, Stamp: func(code byte) {
		switch code {
		case 1:
			time.Sleep(10 * time.Millisecond) // "first" is on its way alone
		case 2:
			time.AfterFunc(100*time.Millisecond, func() { close(free) })
		}
	}})
	if out.Ending != GuestPanic {
		t.Errorf("%s, %v", out.Ending, out.Err)
	}
}
