package vpci_test

import (
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"

	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
)

// An operation of FuzzConfig is 12 bytes: what to do, log2 of the width, an
// offset in two bytes and a value in eight.
const opSize = 12

func op(kind, width byte, off uint16, v uint64) []byte {
	b := binary.LittleEndian.AppendUint16([]byte{kind, width}, off)
	return binary.LittleEndian.AppendUint64(b, v)
}

const (
	opConfigRead = iota
	opConfigWrite
	opLoad
	opStore
	opTable
	opTableRead
	opBroken
	opChanged
	opSignal
	opReset
	opGuestStore
	opPause
	opResume
	ops
)

// do runs one operation as hostile guest or device.
func (r *rig) do(b []byte) {
	n, off := 1<<(b[1]&3), uint64(binary.LittleEndian.Uint16(b[2:]))
	v := binary.LittleEndian.Uint64(b[4:])
	cfg := pcitest.CF8(r.bus, 1)
	if b[1]&4 != 0 {
		cfg = pcitest.ECAM(r.bus, 1)
	} else {
		n = min(n, 4)
		off &^= uint64(n - 1)
	}
	regs, size := r.v.Function().Region(0)
	table, _ := r.v.Function().Region(2)
	inside := min(off&0x3fff, size-8)
	switch b[0] % ops {
	case opConfigRead:
		cfg.Read(int(off&0xff), n)
	case opConfigWrite:
		cfg.Write(int(off&0xff), n, v)
	case opLoad:
		pcitest.Load(regs, inside, n)
	case opStore:
		pcitest.Store(regs, inside, n, v)
	case opTable:
		pcitest.Store(table, off&0x7f, n, v)
	case opTableRead:
		pcitest.Load(table, min(off&0xfff, 0xff8), n)
	case opBroken, opChanged, opSignal:
		a := r.dev.last.Load()
		switch {
		case a == nil:
		case b[0]%ops == opBroken:
			a.Broken(errors.New("made up"))
		case b[0]%ops == opChanged:
			a.ConfigChanged()
		default:
			a.Queues[int(off)%len(a.Queues)].Call.Signal()
		}
	case opReset:
		if err := r.bus.Reset(); err != nil {
			r.t.Error(err)
		}
	case opPause:
		<-r.v.Pause(r.t.Context())
	case opResume:
		<-r.v.Resume()
	case opGuestStore:
		r.store(cfg.Read(0x10, 4)&^15|cfg.Read(0x14, 4)<<32+inside, n, v)
	}
}

// check checks the rules that hold after any act of the guest.
func (r *rig) check() {
	r.t.Helper()
	cfg := pcitest.ECAM(r.bus, 1)
	for reg, want := range map[int]uint64{0x00: 0x10481af4, 0x08: 0x01000001, 0x2c: 0x10481af4, 0x34: 0x40} {
		equal(r.t, "read-only register", cfg.Read(reg, 4), want)
	}
	equal(r.t, "capabilities", len(pcitest.Caps(cfg, 9))+len(pcitest.Caps(cfg, 0x11)), 6)

	want := map[uint64]string{taken: "other"}
	bells := 0
	for _, b := range r.v.Function().BARs() {
		if !b.Mapped {
			continue
		}
		if b.Index == 0 {
			want[b.Base] = "dev BAR 0"
			bells = len(r.dev.sizes)
		} else {
			want[b.Base] = "dev BAR 2"
		}
		low := b.Base >= w32.Base && b.Base+b.Size <= w32.Base+w32.Size
		high := b.Base >= w64.Base && b.Base+b.Size <= w64.Base+w64.Size
		if !low && !high || b.Base%b.Size != 0 || cfg.Read(4, 2)&pci.CommandMemory == 0 {
			r.t.Errorf("BAR %d is mapped at %#x", b.Index, b.Base)
		}
	}
	if got := r.space.Mapped(); !maps.Equal(got, want) {
		r.t.Errorf("mapped %v, want %v", got, want)
	}
	equal(r.t, "doorbells", len(r.bells.addresses()), bells)

	enabled := cfg.Read(pcitest.Caps(cfg, 0x11)[0]+2, 2)&0x8000 != 0
	for i, v := range r.vs.All {
		if v.Fault() != "" || v.Live() && !enabled {
			r.t.Errorf("vector %d: connected %t, enabled %t, %s", i, v.Live(), enabled, v.Fault())
		}
	}

	regs, _ := r.v.Function().Region(0)
	switch status := pcitest.Load(regs, deviceStatus, 1); {
	case status&0x30 != 0, status&4 != 0 && status&8 == 0, status&64 != 0 && status&4 == 0:
		r.t.Errorf("status %#x", status)
	case r.dev.active != nil && (status&4 == 0 || cfg.Read(4, 2)&pci.CommandMaster == 0):
		r.t.Errorf("active with status %#x, command %#x", status, cfg.Read(4, 2))
	}
	for i, max := range r.dev.sizes {
		pcitest.Store(regs, queueSelect, 2, uint64(i))
		if n := uint16(pcitest.Load(regs, queueSize, 2)); n == 0 || n&(n-1) != 0 || n > max {
			r.t.Errorf("queue %d has size %d", i, n)
		}
		if v := pcitest.Load(regs, queueVector, 2); v >= 5 && v != 0xffff {
			r.t.Errorf("queue %d has vector %d", i, v)
		}
	}
}

const taken = 0xc800_0000

func hostileRig(t testing.TB) *rig {
	dev := scsi(t)
	r := newRig(t, dev, writable{dev})
	if err := r.space.Map("other", taken, 0x10_0000, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.space.Unmap(taken); err != nil {
			t.Error(err)
		}
	})
	r.vs.Refuse = func(m pci.Message) error {
		if m.Addr>>20 != 0xfee {
			return errors.New("not an APIC")
		}
		return nil
	}
	return r
}

// start is a driver's start as operations of FuzzConfig.
func start() (b []byte) {
	for _, o := range [][]byte{
		op(opConfigWrite, 1, 4, 6), op(opConfigWrite, 1, 0x42, 0x8000),
		op(opTable, 3, 0, 0xfee0_0000), op(opTable, 3, 8, 0x41), op(opTable, 3, 16, 0xfee0_1000), op(opTable, 3, 24, 0x42),
		op(opStore, 0, deviceStatus, 0), op(opStore, 2, driverFeatureSelect, 1), op(opStore, 2, driverFeature, 1),
		op(opStore, 0, deviceStatus, 11),
		op(opStore, 1, configVector, 0), op(opStore, 1, queueVector, 1), op(opStore, 1, queueSize, 32),
		op(opStore, 3, queueDesc, 0x1000), op(opStore, 3, queueDriver, 0x2000), op(opStore, 3, queueDevice, 0x3000),
		op(opStore, 1, queueEnable, 1), op(opStore, 0, deviceStatus, 15),
	} {
		b = append(b, o...)
	}
	return b
}

// FuzzConfig has a guest write any registers, while the device signals, breaks and changes.
func FuzzConfig(f *testing.F) {
	seed := func(more ...[]byte) {
		b := start()
		for _, m := range more {
			b = append(b, m...)
		}
		f.Add(b)
	}
	seed(op(opGuestStore, 1, 0x3000, 0), op(opSignal, 0, 0, 0), op(opBroken, 0, 0, 0), op(opStore, 0, deviceStatus, 0))
	seed(op(opTable, 2, 28, 1), op(opSignal, 0, 0, 0), op(opTableRead, 3, 0x800, 0), op(opTable, 2, 28, 0),
		op(opTable, 2, 16, 0x1000))
	seed(op(opConfigWrite, 2, 0x10, 0xffffffff), op(opConfigWrite, 2, 0x14, 0xffffffff),
		op(opConfigWrite, 6, 0x10, taken), op(opConfigWrite, 2, 0x14, 0))
	seed(op(opConfigWrite, 2, 0x10, 0xc000_0000), op(opConfigWrite, 2, 0x14, 0), op(opConfigWrite, 2, 0x18, 0xc100_0000),
		op(opConfigWrite, 1, 4, 0))
	seed(op(opConfigWrite, 1, 4, 2), op(opConfigWrite, 1, 4, 6), op(opReset, 0, 0, 0), op(opChanged, 0, 0, 0),
		op(opBroken, 0, 0, 0))
	seed(op(opPause, 0, 0, 0), op(opConfigWrite, 1, 4, 2), op(opResume, 0, 0, 0), op(opConfigWrite, 1, 4, 6),
		op(opConfigWrite, 1, 4, 2), op(opConfigWrite, 1, 4, 0), op(opConfigWrite, 1, 4, 6), op(opPause, 0, 0, 0))
	seed(op(opConfigWrite, 0, 0x94, 0), op(opConfigWrite, 2, 0x98, deviceStatus), op(opConfigWrite, 2, 0x9c, 1),
		op(opConfigWrite, 0, 0xa0, 0))
	seed(op(opConfigWrite, 7, 0x98, 0x4_0000_2004), op(opConfigRead, 6, 0xa0, 0), op(opConfigRead, 7, 0xff, 0),
		op(opLoad, 3, 0x1000, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := hostileRig(t)
		for ; len(b) >= opSize; b = b[opSize:] {
			r.do(b[:opSize])
			r.check()
			if t.Failed() {
				t.Fatalf("after %x", b[:opSize])
			}
		}
	})
}

// TestConcurrent has two vCPUs do anything at the same time while the device
// breaks and changes; it is for the race detector and against deadlocks.
func TestConcurrent(t *testing.T) {
	r := hostileRig(t)
	var vcpus sync.WaitGroup
	for id := range uint64(2) {
		vcpus.Go(func() {
			rnd := rand.New(rand.NewPCG(id, 7))
			for n := range 10000 {
				if n%50 == 0 {
					for b := start(); len(b) > 0; b = b[opSize:] {
						r.do(b)
					}
				}
				b := op(byte(rnd.Uint32()), byte(rnd.Uint32()), uint16(rnd.Uint32()), rnd.Uint64()>>rnd.UintN(64))
				if b[0]%ops == opReset && n%10 != 0 {
					continue
				}
				r.do(b)
			}
		})
	}
	stop := make(chan struct{})
	var worker sync.WaitGroup
	regs, _ := r.v.Function().Region(0)
	worker.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				pcitest.Store(regs, 0x3000, 2, 0) // a doorbell that KVM does not take
				if a := r.dev.last.Load(); a != nil {
					a.Broken(errors.New("made up"))
					a.ConfigChanged()
					a.Queues[0].Call.Signal()
				}
			}
		}
	})
	vcpus.Wait()
	close(stop)
	worker.Wait()
	<-r.v.Resume()
	r.check()
	if err := r.bus.Reset(); err != nil {
		t.Fatal(err)
	}
	r.vs.Refuse = nil
	d := r.attach(pcitest.CF8(r.bus, 1), false)
	d.interrupts()
	equal(t, "status after all that", d.start(), 15)
	r.dev.active.Queues[0].Call.Signal()
	r.took("queue 0", 0x41)
}
