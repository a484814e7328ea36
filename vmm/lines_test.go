package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"gvm/devices/acpipm"
	"gvm/devices/rtc"
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/guestmem"
	"gvm/vmm/boot"
)

// TestInterruptLines: the clock's interrupt arrives at pin 8 of the PICs. The interrupt of a PCI
// device whose driver does not use MSI-X arrives at the pin given by its interrupt line register
// and ACPI's _PRT.
func TestInterruptLines(t *testing.T) {
	const slavePIC = 0xa0                                                  // reads as the interrupt request register
	enable := script{}.out(rtc.Port, 0x0b).in(slavePIC)                    // register B
	guest := enable.out(rtc.Port+1, 0x42).stamp(1).in(slavePIC).powerOff() // PIE, 24 hours
	console := new(testConsole)
	m, err := newMachine(t.Context(), system(t), Config{
		Memory: guestmem.Config{Size: 64 << 20}, Kernel: guest.kernel(t, false), Protocol: boot.Linux64, Console: console,
		Devices: []virtio.Device{rng.New()},
		Stamp:   func(byte) { time.Sleep(20 * time.Millisecond) }, // many periods of the clock
	})
	if err != nil {
		t.Fatal(err)
	}
	tables, override := make([]byte, acpiSize), []byte{2, 10, 0, 10, 10, 0, 0, 0} // ACPI 6.5, 5.2.12.5
	if err := m.mem.Read(acpiBase, tables); err != nil || !bytes.Contains(tables, []byte("_PRT")) ||
		!bytes.Contains(tables, override) {
		t.Errorf("ACPI tells nothing of pin 10: %v", err)
	}
	const slot, buffer = 1, 4 << 20
	h := &hostile{m, rand.New(rand.NewPCG(1, 2))}
	if got := h.get(&h.mmio, h.config(slot)+0x3c, 2); got != 0x010a {
		t.Errorf("interrupt pin and line %#x", got)
	}
	h.start(slot)
	le := binary.LittleEndian
	h.write(ringsAt, le.AppendUint64(le.AppendUint64(nil, buffer), 2<<32|16)) // 16 bytes, for the device to write
	h.write(ringsAt+4096+2, []byte{1, 0, 0, 0})
	h.put(&h.mmio, h.bar(slot, 0)+0x3000, 2, 0)
	deadline := time.Now().Add(30 * time.Second)
	for ; h.get(&h.mmio, h.config(slot)+6, 2)&8 == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the device has no interrupt")
		}
	}
	out := m.run(t.Context())
	if _, err := m.takeDown(t.Context(), false); err != nil || out.Ending != PoweredOff {
		t.Errorf("%+v, %v", out, err)
	}
	if got := console.out.String(); got != "\x04\x05" {
		t.Errorf("requests of pins 8 to 15: %q, want that of pin 10, and then that of pin 8 too", got)
	}
}

// TestLevelTriggeredLines: the PICs take the lines that several devices may share, PCI's and the
// SCI's, as level-triggered, as firmware leaves them, in every life of the machine. A kernel that
// finds its interrupts by the interrupt line registers (acpi=off) changes nothing of that.
func TestLevelTriggeredLines(t *testing.T) {
	const elcr = 0x4d0 // and 0x4d1: the PICs' edge/level control registers
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	lives := 0
	guest := script{}.in(elcr).in(elcr+1).out(elcr, 0).out(elcr+1, 0).stamp(1).reset()
	_, console := guest.runContext(ctx, t, false, Config{Rebooting: true, Stamp: func(byte) {
		if lives++; lives == 2 {
			cancel(errors.New("enough"))
		}
	}})
	const once = "\x20\x0e" // 5, and 9 to 11
	if got := console[:min(4, len(console))]; got != once+once {
		t.Errorf("level-triggered: %q, want %q, and again after a reset", got, once)
	}
}

// TestClockKept: the clock's memory outlives a reset of the machine.
func TestClockKept(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	lives := 0
	guest := script{}.out(rtc.Port, 0x40).in(rtc.Port+1).out(rtc.Port+1, 'Z').stamp(1).reset()
	_, console := guest.runContext(ctx, t, false, Config{Rebooting: true, Stamp: func(byte) {
		if lives++; lives == 2 {
			cancel(errors.New("enough"))
		}
	}})
	if console[:min(2, len(console))] != "\x00Z" {
		t.Errorf("read %q, want nothing and then the written text", console)
	}
}

// TestClockAlarm: the clock's alarm sets RTC_STS (ACPI 6.5, 4.8.3.1.1).
func TestClockAlarm(t *testing.T) {
	cfg := Config{Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t)}
	m, err := newMachine(t.Context(), system(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	h := &hostile{m, rand.New(rand.NewPCG(1, 2))}
	for _, w := range [][2]uint64{{1, 0xff}, {3, 0xff}, {5, 0xff}, {0x0b, 0x22}} { // every second; AIE
		h.put(&h.pio, rtc.Port, 1, w[0])
		h.put(&h.pio, rtc.Port+1, 1, w[1])
	}
	const status = 1 << 10
	deadline := time.Now().Add(30 * time.Second)
	for ; h.get(&h.pio, acpipm.Port, 2)&status == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("RTC_STS is not set")
			break
		}
	}
	if err := m.close(); err != nil {
		t.Error(err)
	}
}
