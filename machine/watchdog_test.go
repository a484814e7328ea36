package machine

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"gvm/devices/acpipm"
	"gvm/devices/pci"
	"gvm/devices/serial"
	"gvm/guestmem"
	"gvm/vmm"
)

const esbBar = 0xd000_0000 // of the watchdog, behind virtio-scsi and virtio-rng

// hang is a guest that prints the flags of its watchdog, enables it and hangs.
func hang(t *testing.T) (s steps) {
	const slot, reload = 3, esbBar + 0xc
	unlocked := func(x step) { s = append(s, step{opStore8, reload, 0x80}, step{opStore8, reload, 0x86}, x) }
	s = s.configure(slot, 0x10, esbBar).configure(slot, 4, pci.CommandMemory)
	unlocked(step{opStore32, esbBar, 40}) // 40 ms each
	unlocked(step{opStore32, esbBar + 4, 40})
	s = append(s, step{opPrint, reload + 1, 0}) // WDT_TIMEOUT is 2 here
	s = append(s, step{opOut8, serial.COM1, '\n'})
	return s.configure(slot, 0x68, 2)
}

// TestWatchdog: the actions of gvm when the watchdog of a guest that hangs expires.
func TestWatchdog(t *testing.T) {
	powerOff := step{opOut8, acpipm.Port + acpipm.OffControl + 1, acpipm.SleepTypeS5<<2 | 1<<5}
	for _, tt := range []struct {
		name   string
		action vmm.WatchdogAction
		then   steps
		ending vmm.Ending
		output string
		note   string
	}{
		{"exit", vmm.WatchdogExit, nil, vmm.Expired, "\x00\n", ""},
		// The NMI is a triple fault without an interrupt table.
		{"nmi", vmm.WatchdogNMI, nil, vmm.GuestCrashed, "\x00\n", "the guest's watchdog expired: it gets an NMI"},
		{"in time", vmm.WatchdogExit, steps{powerOff}, vmm.PoweredOff, "\x00\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // bounds a watchdog that does not expire
			defer cancel()
			var console bytes.Buffer
			var notes []string
			m, err := Start(ctx, Spec{Memory: guestmem.Config{Size: 64 << 20}, Console: Output(&console), BareCmdLine: true,
				Kernel: append(hang(t), tt.then...).kernel(t), Watchdog: tt.action,
				Note: func(s string) { notes = append(notes, s) }})
			if err != nil {
				t.Fatal(err)
			}
			out, err := m.Wait()
			if err != nil || out.Ending != tt.ending || console.String() != tt.output || strings.Join(notes, "|") != tt.note {
				t.Errorf("%s, %v, %v, console %q, notes %q", out.Ending, out.Err, err, console.String(), notes)
			}
			if tt.ending == vmm.Expired && (out.Err.Error() != "the guest's watchdog expired" ||
				!strings.Contains(out.Report, "vcpu/0: ")) {
				t.Errorf("%v\n%s", out.Err, out.Report)
			}
		})
	}
}

// TestWatchdogReset: the guest starts again, and finds that its watchdog was the cause.
func TestWatchdogReset(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, in := io.Pipe()
	m, err := Start(ctx, Spec{Memory: guestmem.Config{Size: 64 << 20}, Console: Output(in), BareCmdLine: true,
		Kernel: hang(t).kernel(t), Watchdog: vmm.WatchdogReset})
	if err != nil {
		t.Fatal(err)
	}
	lives := bufio.NewReader(out)
	for _, want := range []string{"\x00\n", "\x02\n", "\x02\n"} {
		if line, err := lives.ReadString('\n'); err != nil || line != want {
			t.Errorf("%q, %v, want %q", line, err, want)
		}
	}
	go io.Copy(io.Discard, out) // ends with in
	m.Stop(errors.New("enough"), 0)
	if out, err := m.Wait(); err != nil || out.Ending != vmm.Stopped {
		t.Errorf("%s, %v, %v", out.Ending, out.Err, err)
	}
	in.Close()
}

// TestWatchdogPause: the machine is paused, and goes on after a resume without expiring again.
func TestWatchdogPause(t *testing.T) {
	notes := make(chan string, 10)
	m, err := Start(t.Context(), Spec{Memory: guestmem.Config{Size: 64 << 20}, BareCmdLine: true,
		Kernel: hang(t).kernel(t), Watchdog: vmm.WatchdogPause, Note: func(s string) { notes <- s }})
	if err != nil {
		t.Fatal(err)
	}
	if n := <-notes; n != "the guest's watchdog expired: it is paused until gvm resume" {
		t.Error(n)
	}
	for !m.Paused() {
		time.Sleep(time.Millisecond)
	}
	if n, err := m.Inspect(t.Context(), "pci/00:03.0/watchdog"); err != nil || n.Get("stage") != 0 ||
		n.Get("timeout") != true {
		t.Errorf("%+v, %v", n, err)
	}
	if err := m.Resume(); err != nil {
		t.Error(err)
	}
	if err := m.Pause(t.Context()); err != nil { // the watchdog has not paused it again
		t.Error(err)
	}
	m.Stop(errors.New("enough"), 0)
	if out, err := m.Wait(); err != nil || out.Ending != vmm.Stopped {
		t.Errorf("%s, %v, %v", out.Ending, out.Err, err)
	}
}
