package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"gvm/kvmapi/eventfd"
)

// MSI-X capability and table (PCI 3.0, 6.8.2).
const (
	capMSIX = 0x11
	// MaxVectors is the largest MSI-X table.
	MaxVectors = 2048

	msixEnable  = 1 << 15 // in message control
	msixMaskAll = 1 << 14
	entrySize   = 16
	entryData   = 8
	entryCtrl   = 12
	entryMasked = 1
)

// MSIX is a function's MSI-X capability. A vector is connected only while MSI-X is enabled, neither
// the function nor the vector is masked, and the function is a bus master: its messages are writes
// to memory (PCI 3.0, 6.2.2). Each change of that is one call of the machine's Vector, because each
// is a system call that briefly stops interrupt delivery in the whole guest.
type MSIX struct {
	// Changed, if set, is called after a write that may have enabled or disabled MSI-X;
	// configuration space is locked meanwhile.
	Changed func()

	name    string
	report  func(error)
	pba     uint64 // offset of the pending bit array in the BAR
	enabled atomic.Bool

	mu     sync.Mutex // innermost: no lock is taken under it
	masked bool       // the function mask
	master bool       // Bus Master Enable
	table  []byte
	vec    []vector
}

type vector struct {
	Vector
	asked bool    // Unmask was called with msg since the last Mask
	live  bool    // and succeeded
	msg   Message // the machine's message
}

// AddMSIX adds an MSI-X capability of n vectors to f, with table and pending bit array in a 32-bit
// BAR of their own. report is called with the machine's refusals, such as that of a message made up
// by the guest. A guest can cause many calls, and locks are held: report must not call back. On an
// error AddMSIX closes every vector that it made.
func (f *Function) AddMSIX(bar, n int, vectors Vectors, report func(error)) (*MSIX, error) {
	if n < 1 || n > MaxVectors {
		return nil, fmt.Errorf("pci: %s: %d MSI-X vectors", f.Name, n)
	}
	m := &MSIX{name: f.Name, report: report, table: make([]byte, entrySize*n)}
	m.clear()
	for i := range n {
		v, err := vectors()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("pci: %s: vector %d: %w", f.Name, i, err), m.Close())
		}
		m.vec = append(m.vec, vector{Vector: v})
	}
	m.pba = max(2048, uint64(1)<<bits.Len(uint(entrySize*n-1)))
	err := f.AddBAR(BAR{Index: bar, Size: 2 * m.pba, Handler: m})
	if err == nil {
		body := binary.LittleEndian.AppendUint16(nil, uint16(n-1))
		body = binary.LittleEndian.AppendUint32(body, uint32(bar))
		body = binary.LittleEndian.AppendUint32(body, uint32(m.pba)|uint32(bar))
		_, err = f.AddCapability(Capability{ID: capMSIX, Body: body, Writable: []byte{0, (msixEnable | msixMaskAll) >> 8},
			OnWrite: func(body []byte, off, n int) {
				m.control(binary.LittleEndian.Uint16(body))
				if f.intx != nil {
					f.intx.update(func() {})
				}
				if m.Changed != nil {
					m.Changed()
				}
			}})
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	f.msix = m
	return m, nil
}

// Len returns the number of vectors.
func (m *MSIX) Len() int { return len(m.vec) }

// Event returns the eventfd that raises vector i.
func (m *MSIX) Event(i int) *eventfd.FD { return m.vec[i].Event() }

// Enabled reports whether the guest enabled MSI-X. It takes no lock.
func (m *MSIX) Enabled() bool { return m.enabled.Load() }

// Discard discards pending interrupts of masked vectors, as a reset of the device does.
func (m *MSIX) Discard() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.discard()
}

// TakePending reports whether a vector was signalled while MSI-X is disabled, and discards the
// signal. With MSI-X enabled it does nothing.
func (m *MSIX) TakePending() (was bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.Enabled() && m.discard()
}

// Close closes every vector. The guest must have stopped, and no Event may be in use.
func (m *MSIX) Close() error {
	var errs []error
	for _, v := range m.vec {
		errs = append(errs, v.Close())
	}
	return errors.Join(errs...)
}

// Read reads the table, all of which reads back, and the pending bit array.
func (m *MSIX) Read(off uint64, p []byte) {
	clear(p)
	m.mu.Lock()
	defer m.mu.Unlock()
	if off < m.pba {
		if off < uint64(len(m.table)) {
			copy(p, m.table[off:])
		}
		return
	}
	for i := range 8 * len(p) {
		n := 8*(off-m.pba) + uint64(i)
		if n >= uint64(len(m.vec)) {
			break
		}
		// A connected vector has no pending bit; an event that KVM is about to consume must not
		// show as one.
		if v := &m.vec[n]; !v.live && m.Enabled() && v.Event().Pending() {
			p[i/8] |= 1 << (i % 8)
		}
	}
}

// Write changes table entries by aligned accesses of four or eight bytes. PCI 3.0, 6.8.2 leaves
// others undefined: they are dropped, like writes to the pending bits.
func (m *MSIX) Write(off uint64, p []byte) {
	if len(p)%4 != 0 || off%4 != 0 || off >= uint64(len(m.table)) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := copy(m.table[off:], p)
	for i := off / entrySize; i <= (off+uint64(n)-1)/entrySize; i++ {
		ctrl := m.table[i*entrySize+entryCtrl:][:4]
		binary.LittleEndian.PutUint32(ctrl, binary.LittleEndian.Uint32(ctrl)&entryMasked)
		m.apply(int(i))
	}
}

func (m *MSIX) control(v uint16) {
	m.mu.Lock()
	defer m.mu.Unlock()
	enable, mask := v&msixEnable != 0, v&msixMaskAll != 0
	if enable == m.Enabled() && mask == m.masked {
		return
	}
	if enable && !m.Enabled() {
		m.discard() // no pending bit is set while MSI-X is disabled
	}
	m.enabled.Store(enable)
	m.masked = mask
	for i := range m.vec {
		m.apply(i)
	}
}

// setMaster follows Bus Master Enable.
func (m *MSIX) setMaster(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if on == m.master {
		return
	}
	m.master = on
	for i := range m.vec {
		m.apply(i)
	}
}

// apply makes the machine's vector i match the table; mu is held.
func (m *MSIX) apply(i int) {
	v, e := &m.vec[i], m.table[i*entrySize:][:entrySize]
	msg := Message{binary.LittleEndian.Uint64(e), binary.LittleEndian.Uint32(e[entryData:])}
	if !m.Enabled() || !m.master || m.masked || e[entryCtrl]&entryMasked != 0 {
		m.mask(i)
		return
	}
	if v.asked && v.msg == msg {
		return
	}
	if err := v.Unmask(msg); err != nil {
		m.report(fmt.Errorf("pci: %s: MSI-X vector %d, message %#x to %#x: %w", m.name, i, msg.Data, msg.Addr, err))
		m.mask(i) // its old message is no longer the guest's
		v.asked, v.msg = true, msg
		return
	}
	v.asked, v.live, v.msg = true, true, msg
}

func (m *MSIX) mask(i int) {
	v := &m.vec[i]
	if v.live {
		if err := v.Mask(); err != nil {
			m.report(fmt.Errorf("pci: %s: mask MSI-X vector %d: %w", m.name, i, err))
		}
	}
	v.asked, v.live = false, false
}

// discard drains the events of vectors that are not connected, and reports whether there was one;
// mu is held.
func (m *MSIX) discard() (was bool) {
	for i := range m.vec {
		if v := &m.vec[i]; !v.live {
			pending, err := v.Event().Drain()
			if err != nil {
				m.report(fmt.Errorf("pci: %s: MSI-X vector %d: %w", m.name, i, err))
			}
			was = was || pending
		}
	}
	return was
}

// clear resets the table: every vector is masked.
func (m *MSIX) clear() {
	clear(m.table)
	for i := entryCtrl; i < len(m.table); i += entrySize {
		m.table[i] = entryMasked
	}
}

func (m *MSIX) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.enabled.Store(false)
	m.masked, m.master = false, false
	m.clear()
	for i := range m.vec {
		m.mask(i)
	}
	m.discard()
}
