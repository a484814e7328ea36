package vmm

import (
	"slices"
	"testing"

	"gvm/devices/serial"
	"gvm/devices/statusport"
	"gvm/guestmem"
	"gvm/inspect"
)

// TestCOM2: a second UART has a stream of its own, and exists only on request.
func TestCOM2(t *testing.T) {
	guest := script{}.print("one").out(serial.COM2, []byte("two")...).print("three").powerOff()
	for _, with := range []bool{true, false} {
		com2, want := new(testConsole), ""
		cfg := Config{}
		if with {
			cfg.COM2, want = com2, "two"
		}
		out, text := guest.run(t, false, cfg)
		if out.Ending != PoweredOff || text != "onethree" || com2.out.String() != want {
			t.Errorf("%v, COM1 %q, COM2 %q: want %q", out.Ending, text, com2.out.String(), want)
		}
	}
}

// TestInspectPorts: the state has the second UART and the status port, if they are there.
func TestInspectPorts(t *testing.T) {
	m, err := newMachine(t.Context(), system(t), Config{
		Kernel: embeddedKernel(t), Memory: guestmem.Config{Size: 64 << 20}, COM2: new(testConsole),
		Status: func(statusport.Report) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	for path, want := range map[string]any{"com2/lsr": inspect.Hex(0x60), "status_port/reports": uint64(0)} {
		if n, err := m.state().Read(t.Context(), path); err != nil || n.Value != want {
			t.Errorf("%+v, %v", n, err)
		}
	}
}

// TestStatusPort: the reports of a program in the guest arrive in order.
func TestStatusPort(t *testing.T) {
	var got []statusport.Report
	out, _ := script{}.out(statusport.Port, 1).out(statusport.Port+1, byte(statusport.Alive)).
		out(statusport.Port, 7).out(statusport.Port+1, byte(statusport.Exited)).powerOff().
		run(t, false, Config{Status: func(r statusport.Report) { got = append(got, r) }})
	want := []statusport.Report{{Kind: statusport.Alive, Value: 1}, {Kind: statusport.Exited, Value: 7}}
	if out.Ending != PoweredOff || !slices.Equal(got, want) {
		t.Errorf("%v, reports %v, want %v", out.Ending, got, want)
	}
}
