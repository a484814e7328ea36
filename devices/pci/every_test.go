package pci_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"gvm/devices/internal/every"
	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
)

// msixModel is a function's MSI-X state as PCI 3.0, 6.8.2 has it.
type msixModel struct {
	master          bool // Bus Master Enable, without which a function writes no message (6.2.2)
	enabled, masked bool // MSI-X Enable and Function Mask (6.8.2.3)
	vectors         []modelVector
}

type modelVector struct {
	masked, pending bool
	msg             pci.Message
}

const goodAddr, badAddr = 0xfee0_1000, 0x1000 // a message to badAddr is one that the machine refuses

// reset is the state after a reset: bus mastering is off, MSI-X is disabled and every vector is
// masked (6.8.2.3, 6.8.2.9).
func (m *msixModel) reset() {
	m.master, m.enabled, m.masked = false, false, false
	for i := range m.vectors {
		m.vectors[i] = modelVector{masked: true}
	}
}

// control writes Message Control. A function with MSI-X disabled has no pending bit set: its device
// interrupts by INTx, or not at all.
func (m *msixModel) control(enabled, masked bool) {
	for i := range m.vectors {
		m.vectors[i].pending = m.vectors[i].pending && enabled
	}
	m.enabled, m.masked = enabled, masked
}

// interrupt has the device ask for vector i: its message is sent, or its pending bit set if it is
// masked (6.8.2.10) or the function is no bus master. Several requests for a pending vector become
// one.
func (m *msixModel) interrupt(i int) { m.vectors[i].pending = m.enabled }

// sends reports whether the function sends the message of vector i now: it is pending, masked
// neither by itself nor by the function (6.8.3.5), and the function is a bus master.
func (m *msixModel) sends(i int) bool {
	v := m.vectors[i]
	return v.pending && m.enabled && m.master && !m.masked && !v.masked && v.msg.Addr == goodAddr
}

// pendingBits has no bit of a message that is being sent.
func (m *msixModel) pendingBits() (bits uint64) {
	for i, v := range m.vectors {
		if v.pending && !m.sends(i) {
			bits |= 1 << i
		}
	}
	return bits
}

// access is one access of the driver, or one interrupt of the device.
type access struct {
	name  string
	model func(m *msixModel)
	do    func(r *rig, m *msixModel) // after model
}

// accesses returns every access to a function with n vectors, the last of which changes Bus Master
// Enable.
func accesses(t *testing.T, n int) (all []access) {
	for v, name := range []string{"disable", "disable and mask", "enable", "enable and mask"} {
		all = append(all, access{name,
			func(m *msixModel) { m.control(v&2 != 0, v&1 != 0) },
			func(r *rig, _ *msixModel) { r.control(uint64(v) << 14) }})
	}
	readPending := func(r *rig, m *msixModel) {
		if got, want := r.pending(), m.pendingBits(); got != want {
			t.Errorf("pending bits %b, want %b", got, want)
		}
	}
	all = append(all, access{"read the pending bits", func(*msixModel) {}, readPending})
	for i := range n {
		of := func(name string, model func(v *modelVector), do func(r *rig, v *modelVector)) {
			all = append(all, access{fmt.Sprint(name, " ", i), func(m *msixModel) { model(&m.vectors[i]) },
				func(r *rig, m *msixModel) { do(r, &m.vectors[i]) }})
		}
		of("mask", func(v *modelVector) { v.masked = true }, func(r *rig, _ *modelVector) { r.mask(i, 1) })
		of("unmask", func(v *modelVector) { v.masked = false }, func(r *rig, _ *modelVector) { r.mask(i, 0) })
		of("change the data of", func(v *modelVector) { v.msg.Data ^= 0x51 }, func(r *rig, v *modelVector) {
			pcitest.Store(r.MSIX, uint64(16*i+8), 4, uint64(v.msg.Data))
		})
		of("change the address of", func(v *modelVector) {
			if v.msg.Addr == goodAddr {
				v.msg.Addr = badAddr
			} else {
				v.msg.Addr = goodAddr
			}
		}, func(r *rig, v *modelVector) { pcitest.Store(r.MSIX, uint64(16*i), 8, v.msg.Addr) })
		all = append(all, access{fmt.Sprint("interrupt ", i), func(m *msixModel) { m.interrupt(i) },
			func(r *rig, m *msixModel) {
				if err := r.Event(i).Signal(); err != nil {
					t.Fatal(err)
				}
				readPending(r, m) // before the machine has taken the event
			}})
	}
	return append(all, access{"change Bus Master Enable",
		func(m *msixModel) { m.master = !m.master },
		func(r *rig, m *msixModel) { r.master(m.master) }})
}

// TestEveryMSIXSequence makes every sequence of accesses to MSI-X, of 6 with one vector and of 4
// with two, after a reset and with bus mastering on, and of one less after the three more accesses
// that let a vector interrupt: enable, function mask, mask, message and interrupt of a vector, a
// read of the pending bits. Sequences that change Bus Master Enable as well are one access shorter.
// The reset is that of the sequence before. After each access the function has sent the messages
// that PCI 3.0, 6.2.2 and 6.8.2 ask for, each once, and at the end of each sequence, which is the
// middle of others, it has the right pending bits.
func TestEveryMSIXSequence(t *testing.T) {
	total := 0
	for _, s := range []struct {
		vectors, length int
		master          bool
	}{{1, 6, false}, {2, 4, false}, {1, 5, true}, {2, 3, true}} {
		all := accesses(t, s.vectors)
		choice := all
		if !s.master {
			choice = all[:len(all)-1]
		}
		r := newMSIX(t, s.vectors)
		r.vs.Refuse = func(m pci.Message) error {
			if m.Addr != goodAddr {
				return errors.New("not an APIC")
			}
			return nil
		}
		m := &msixModel{vectors: make([]modelVector, s.vectors)}
		named := func(name string) access {
			return all[slices.IndexFunc(all, func(a access) bool { return a.name == name })]
		}
		reset := access{"reset", (*msixModel).reset, func(r *rig, _ *msixModel) {
			if err := r.fn.Reset(); err != nil {
				t.Fatal(err)
			}
		}}
		for _, start := range [][]access{
			{reset, named("change Bus Master Enable")},
			{reset, named("change Bus Master Enable"), named("enable"), named("change the address of 0"), named("unmask 0")},
		} {
			n := every.Run(func(pick func(int) int) {
				made := slices.Clone(start)
				for range s.length - len(start)/4 {
					made = append(made, choice[pick(len(choice))])
				}
				r.reports = r.reports[:0]
				for i, a := range append(made, named("read the pending bits")) {
					a.model(m)
					a.do(r, m)
					for v := range m.vectors {
						got, sent := r.vs.All[v].Take()
						want := m.sends(v)
						if sent != want || sent && got != m.vectors[v].msg {
							t.Errorf("vector %d: sent %t, %v, want %t, %v", v, sent, got, want, m.vectors[v].msg)
						}
						m.vectors[v].pending = m.vectors[v].pending && !want
					}
					if t.Failed() {
						for _, a := range made[:min(i+1, len(made))] {
							t.Log(a.name)
						}
						t.FailNow()
					}
				}
			})
			t.Logf("%d vectors, after %d accesses: %d sequences", s.vectors, len(start), n)
			total += n
		}
	}
	t.Logf("%d sequences", total)
}
