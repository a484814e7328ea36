package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bobuhiro11/gokvm/kvm"

	"gvm/devices/block"
	"gvm/devices/pci"
	"gvm/devices/scsi"
	"gvm/devices/serial"
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/guest/embedded/embeddedtest"
	"gvm/guestmem"
	"gvm/kvmapi"
	"gvm/vmm/x86"
)

func idsTo(n int) []uint32 { return (&Config{CPUs: n}).apicIDs() }

// TestAPICIDs starts every CPU, and sends messages to boot CPUs with various IDs. The guest does
// not change the mode of its local APIC.
func TestAPICIDs(t *testing.T) {
	sys := system(t)
	for _, c := range []struct {
		ids  []uint32
		mode string
	}{
		{idsTo(2), "xAPIC"},
		{idsTo(8), "xAPIC"},
		{idsTo(64), "xAPIC"},
		{[]uint32{0, 2, 9, 254}, "xAPIC"},
		{[]uint32{5, 77}, "xAPIC"},
		{[]uint32{0, 255}, "x2APIC"},
		{[]uint32{1, 300, 1022}, "x2APIC"},
		{[]uint32{1, 300, 1023}, "x2APIC"},
		{[]uint32{255, 256}, "x2APIC"},
		{[]uint32{300}, "x2APIC"},
		{[]uint32{513, 1000}, "x2APIC"},
		{idsTo(255), "xAPIC"},
		{idsTo(300), "x2APIC"},
	} {
		name := fmt.Sprintf("%d CPUs from %d to %d", len(c.ids), c.ids[0], c.ids[len(c.ids)-1])
		if limit := sys.Check(kvmapi.CapMaxVCPUs); len(c.ids) > limit {
			t.Logf("%s: this host's KVM makes %d CPUs", name, limit)
			continue
		}
		if end := sys.Check(kvmapi.CapMaxVCPUID); end != 0 && int(c.ids[len(c.ids)-1]) >= end {
			t.Logf("%s: this host's KVM gives IDs up to %d", name, end-1)
			continue
		}
		console := &testConsole{}
		target := scsi.NewTarget()
		u, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewVolatile(1 << 20), Serial: "memory"})
		if err != nil {
			t.Fatal(err)
		}
		lun, _ := scsi.EncodeLUN(0)
		if err := target.Attach(lun, u); err != nil {
			t.Fatal(err)
		}
		disk, err := vscsi.New(vscsi.Config{Target: target})
		if err != nil {
			t.Fatal(err)
		}
		out, err := Run(t.Context(), sys, Config{
			Memory:  guestmem.Config{Size: 64 << 20},
			CPUs:    len(c.ids),
			APICIDs: c.ids,
			Kernel:  embeddedKernel(t),
			CmdLine: "write",
			Devices: []virtio.Device{disk, rng.New()},
			Console: console,
		})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		text := console.out.String()
		r, err := embeddedtest.ParseReport(text)
		up := fmt.Sprintf("cpus: %d of %d up, boot CPU has APIC id %d, %s mode", len(c.ids), len(c.ids), c.ids[0], c.mode)
		if out.Ending != PoweredOff || err != nil || !r.Passed || r.Interrupts == 0 || !strings.Contains(text, up) {
			t.Errorf("%s\n%s: %s, %v, %v: want %q", text, name, out.Ending, out.Err, err, up)
		}
	}
}

// TestPinsReachHighIDs: COM1's interrupt goes through the I/O APIC to a boot CPU whose ID does not
// fit KVM's own I/O APIC.
func TestPinsReachHighIDs(t *testing.T) {
	sys := system(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	console := &testConsole{to: make(chan io.Writer, 1)}
	go func() { _, _ = (<-console.to).Write([]byte("abcq")) }()
	out, err := Run(ctx, sys, Config{
		Memory:  guestmem.Config{Size: 64 << 20},
		APICIDs: []uint32{300},
		Kernel:  embeddedKernel(t),
		CmdLine: "nodisk echo",
		Console: console,
	})
	if text := console.out.String(); err != nil || out.Ending != PoweredOff || !strings.Contains(text, "abcq") {
		t.Errorf("%s\n%s, %v, %v", text, out.Ending, out.Err, err)
	}
}

// TestSetPinReachesHighIDs: so do the pins that devices set, as the clock, ACPI and INTx do. The
// guest has routed COM1's pin to its only CPU.
func TestSetPinReachesHighIDs(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m, err := newMachine(t.Context(), system(t), Config{
		Memory:  guestmem.Config{Size: 64 << 20},
		APICIDs: []uint32{300},
		Kernel:  embeddedKernel(t),
		CmdLine: "nodisk echo",
		Console: &readyConsole{ready: cancel},
	})
	if err != nil {
		t.Fatal(err)
	}
	m.run(ctx)
	m.threads.Wait()
	state := m.finalState()
	vector := state.Get(fmt.Sprintf("ioapic/pin/%d/vector", serial.COM1IRQ))
	requested := func() string { return state.Get("vcpu/0/apic/irr").(string) }
	was := requested()
	if err := m.setPin(serial.COM1IRQ, true); err != nil {
		t.Error(err)
	}
	state = m.finalState()
	has := func(irr string) bool { return slices.Contains(strings.Fields(irr), fmt.Sprint(vector)) }
	if has(was) || !has(requested()) {
		t.Errorf("vector %v: %q are requested, and %q after the pin was raised", vector, was, requested())
	}
	if err := m.close(); err != nil {
		t.Error(err)
	}
}

// readyConsole calls ready when the embedded guest is ready for input.
type readyConsole struct {
	testConsole
	ready func()
}

func (c *readyConsole) Write(p []byte) (int, error) {
	n, err := c.testConsole.Write(p)
	if bytes.Contains(c.out.Bytes(), []byte("ready")) {
		c.ready()
	}
	return n, err
}

func TestPinMessage(t *testing.T) {
	for _, c := range []struct {
		entry uint64
		want  pci.Message // zero: KVM's I/O APIC delivers it
	}{
		{0x1000_0000_0000_0034, pci.Message{}},
		{0x2c02_0000_0000_0034, pci.Message{Addr: 0xfee2_c020, Data: 0x34}},  // 300
		{0x2c02_0000_0001_0034, pci.Message{}},                               // masked
		{0xfffe_0000_0000_a934, pci.Message{Addr: 0xfeef_ffe4, Data: 0x134}}, // 32767, logical, lowest priority, level
	} {
		if got, ok := pinMessage(c.entry); got != c.want || ok != (c.want != pci.Message{}) {
			t.Errorf("%#x: %#x, %v, want %#x", c.entry, got, ok, c.want)
		}
	}
}

func TestCheckCPUs(t *testing.T) {
	all := []kvm.CPUIDEntry2{{Function: 1, Ecx: 1 << 21}}
	masked, err := x86.ParseFeatures("-x2apic")
	if err != nil {
		t.Fatal(err)
	}
	caps := map[int]int{kvmapi.CapMaxVCPUs: 1024, kvmapi.CapMaxVCPUID: 4096, kvmapi.CapX2APICAPI: 3}
	old := map[int]int{kvmapi.CapMaxVCPUs: 288}
	wide := map[int]int{kvmapi.CapMaxVCPUs: 9, kvmapi.CapMaxVCPUID: 1 << 20, kvmapi.CapX2APICAPI: 3}
	for _, c := range []struct {
		cfg       Config
		caps      map[int]int
		supported []kvm.CPUIDEntry2
		want      string // "": no error
	}{
		{Config{}, caps, all, ""},
		{Config{CPUs: 1024}, caps, all, ""},
		{Config{CPUs: 1025}, caps, all, "1025 CPUs: this host's KVM gives a guest 1 to 1024"},
		{Config{CPUs: 1 << 50}, caps, all, "gives a guest 1 to 1024"},
		{Config{CPUs: -1}, caps, all, "-1 CPUs"},
		{Config{CPUs: 255}, old, nil, ""},
		{Config{CPUs: 256}, old, all, "sends interrupts to IDs up to 254; give the guest at most 255 CPUs"},
		{Config{CPUs: 2, APICIDs: []uint32{0, 255}}, old, all, "to IDs up to 254; give its CPUs lower IDs"},
		{Config{CPUs: 256}, caps, nil, "needs the CPU feature x2apic, which this host's KVM does not offer"},
		{Config{CPUs: 256, CPUFeatures: masked}, caps, all, "needs the CPU feature x2apic, which is masked"},
		{Config{CPUs: 255, CPUFeatures: masked}, caps, all, ""},
		{Config{CPUs: 2, APICIDs: []uint32{0, 300}}, caps, all, ""},
		{Config{CPUs: 2, APICIDs: []uint32{0, 4095}}, caps, all, ""},
		{Config{CPUs: 2, APICIDs: []uint32{0, 4096}}, caps, all, "APIC ID 4096: this host's KVM gives IDs up to 4095"},
		{Config{CPUs: 2, APICIDs: []uint32{0, 300}}, old, all, "APIC ID 300: this host's KVM gives IDs up to 287"},
		{Config{CPUs: 2, APICIDs: []uint32{0, 1 << 15}}, wide, all, "APIC ID 32768: interrupts reach IDs up to 32767"},
		{Config{CPUs: 2, APICIDs: []uint32{3, 3}}, caps, all, "APIC ID 3 after 3: give them in ascending order"},
		{Config{CPUs: 3, APICIDs: []uint32{3, 4}}, caps, all, "2 APIC IDs for 3 CPUs"},
		{Config{CPUs: 2, APICIDs: []uint32{}}, caps, all, "0 APIC IDs for 2 CPUs"},
	} {
		err := checkCPUs(c.cfg, func(capability int) int { return c.caps[capability] }, c.supported)
		var ce *ConfigError
		if c.want == "" && err != nil || c.want != "" && (!errors.As(err, &ce) || !strings.Contains(ce.What, c.want)) {
			t.Errorf("%d CPUs, IDs %d: %v, want %q", c.cfg.CPUs, c.cfg.APICIDs, err, c.want)
		}
	}
}

func TestExtendedDestination(t *testing.T) {
	for addr, want := range map[uint64]uint64{
		0xfee0_0000:                 0xfee0_0000,
		0xfee2_c000:                 0xfee2_c000,
		0xfeef_f00c:                 0xfeef_f00c,      // redirection hint, logical destination
		0xfee2_c000 | 1<<5:          0x100_fee2_c000,  // 300 is 0x12c
		0xfeef_ffe0:                 0x7f00_feef_f000, // 32767
		0xffff_ffff_fee2_c000:       0xfee2_c000,      // KVM rejects other bits in the high half
		0x1_0000_0000 | 0xfee0_1000: 0xfee0_1000,
	} {
		if got := extendedDestination(addr); got != want {
			t.Errorf("%#x became %#x, want %#x", addr, got, want)
		}
	}
}
