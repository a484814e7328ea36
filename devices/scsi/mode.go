package scsi

import (
	"bytes"
	"encoding/binary"
)

// Page control of MODE SENSE (SPC-5 6.14).
const (
	modeCurrent = iota
	modeChangeable
	modeDefault
	modeSaved
)

// modePage is a mode page: its size with the two bytes of header, a function that fills it in, and
// one that stores a checked new value.
type modePage struct {
	code  byte
	size  int
	fill  func(u *Unit, control int, p []byte)
	store func(u *Unit, p []byte)
}

// modePages in ascending order of their code. None has subpages.
var modePages = []modePage{
	{code: 0x01, size: 12, fill: func(*Unit, int, []byte) {}},      // Read-Write Error Recovery (SBC-4 6.5.8)
	{code: 0x08, size: 20, fill: fillCaching, store: storeCaching}, // Caching (SBC-4 6.5.6)
	{code: 0x0a, size: 12, fill: fillControl, store: storeControl}, // Control (SPC-5 7.5.10)
	// Informational Exceptions Control (SBC-4 6.5.7)
	{code: 0x1c, size: 12, fill: func(_ *Unit, control int, p []byte) {
		if control != modeChangeable {
			p[2] = 0x08 // DEXCPT: no failure is predicted
		}
	}},
}

func fillCaching(u *Unit, control int, p []byte) {
	wce := u.cfg.Cache != WriteThrough // changeable, and on by default
	if control == modeCurrent {
		wce = u.wce.Load()
	}
	if wce {
		p[2] = 0x04
	}
}

func storeCaching(u *Unit, p []byte) { u.wce.Store(p[2]&0x04 != 0) }

func fillControl(u *Unit, control int, p []byte) {
	dSense, swp := control == modeChangeable, control == modeChangeable
	if control == modeCurrent {
		dSense, swp = u.dSense.Load(), u.swp.Load()
	}
	if control != modeChangeable {
		p[2] = 0x02 // GLTSD
		p[3] = 0x10 // QUEUE ALGORITHM MODIFIER: unrestricted reordering
	}
	if dSense {
		p[2] |= 0x04
	}
	if swp {
		p[4] |= 0x08
	}
}

func storeControl(u *Unit, p []byte) {
	u.dSense.Store(p[2]&0x04 != 0)
	u.swp.Store(p[4]&0x08 != 0)
}

// bytes returns the page of u with its header.
func (m *modePage) bytes(u *Unit, control int) []byte {
	p := make([]byte, m.size)
	p[0], p[1] = m.code, byte(m.size-2)
	m.fill(u, control, p)
	return p
}

// modeSense is MODE SENSE(6) and (10) (SPC-5 6.14, 6.15).
func modeSense(tk *task) error {
	cdb, u := tk.CDB, tk.u
	ten := tk.op.length() == 10
	control, page, sub := int(cdb[2]>>6), cdb[2]&0x3f, cdb[3]
	if sub != 0x00 && sub != 0xff {
		return invalidCDB(3, 7)
	}
	if control == modeSaved {
		return SavingNotSupported
	}
	var pages []byte
	for i := range modePages {
		if m := &modePages[i]; page == 0x3f || page == m.code {
			pages = append(pages, m.bytes(u, control)...)
		}
	}
	if len(pages) == 0 {
		return invalidCDB(2, 5)
	}
	var desc []byte
	if long := ten && cdb[1]&0x10 != 0; cdb[1]&0x08 == 0 {
		desc = u.blockDescriptor(long)
	}
	specific := byte(0x10) // DPOFUA
	if u.writeProtected() != nil {
		specific |= 0x80 // WP
	}
	var b []byte
	if ten {
		b = []byte{0, 0, 0, specific, 0, 0, 0, byte(len(desc))}
		if len(desc) == 16 {
			b[4] = 0x01 // LONGLBA
		}
		binary.BigEndian.PutUint16(b, uint16(len(b)+len(desc)+len(pages)-2))
	} else {
		b = []byte{0, 0, specific, byte(len(desc))}
		b[0] = byte(len(b) + len(desc) + len(pages) - 1)
	}
	return tk.reply(append(append(b, desc...), pages...))
}

// blockDescriptor is the mode parameter block descriptor of a direct access
// device, of 8 or 16 bytes (SBC-4 6.5.2).
func (u *Unit) blockDescriptor(long bool) []byte {
	if long {
		b := make([]byte, 16)
		binary.BigEndian.PutUint64(b, u.Blocks())
		binary.BigEndian.PutUint32(b[12:], uint32(u.blockSize))
		return b
	}
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, clamp32(u.Blocks()))
	binary.BigEndian.PutUint32(b[4:], uint32(u.blockSize))
	return b
}

// modeSelect is MODE SELECT(6) and (10) (SPC-5 6.12, 6.13). It checks the whole list before it
// changes anything.
func modeSelect(tk *task) error {
	cdb, u := tk.CDB, tk.u
	if cdb[1]&0x01 != 0 {
		return invalidCDB(1, 0) // SP: nothing can be saved
	}
	n, header := tk.listLength(), 4
	if tk.op.length() == 10 {
		header = 8
	}
	if n == 0 {
		return nil
	}
	if cdb[1]&0x10 == 0 {
		return invalidCDB(1, 4) // PF: pages of a vendor's format
	}
	b, err := tk.parameters(n)
	if err != nil {
		return err
	}
	at, err := u.checkBlockDescriptor(b, header)
	if err != nil {
		return err
	}
	type change struct {
		page *modePage
		data []byte
	}
	var changes []change
	for at < n {
		m, p, err := u.checkPage(b[at:], at)
		if err != nil {
			return err
		}
		changes = append(changes, change{m, p})
		at += m.size
	}
	before := u.modeState()
	for _, c := range changes {
		if c.page.store != nil {
			c.page.store(u, c.data)
		}
	}
	after := u.modeState()
	if before != after {
		u.set.attention(ModeParamsChanged, func(id NexusID) bool { return id != tk.Nexus })
	}
	if before.wce && !after.wce {
		// From here on the initiator sends no flushes. No write runs beside this command, so this
		// flush covers all writes that are not durable by themselves.
		return u.flush()
	}
	if !after.wce {
		return u.flushDirty() // that flush may have failed
	}
	return nil
}

// modeState is the state that MODE SELECT can change.
type modeState struct{ wce, dSense, swp bool }

func (u *Unit) modeState() modeState {
	return modeState{u.wce.Load(), u.dSense.Load(), u.swp.Load()}
}

// checkBlockDescriptor checks the header and the block descriptor, which may only repeat the
// current values, and returns the offset of the pages.
func (u *Unit) checkBlockDescriptor(b []byte, header int) (int, error) {
	if len(b) < header {
		return 0, ParameterListLength
	}
	size, at, long := int(b[3]), 3, false
	if header == 8 {
		size, at, long = int(binary.BigEndian.Uint16(b[6:])), 6, b[4]&0x01 != 0
	}
	if size == 0 {
		return header, nil
	}
	want := u.blockDescriptor(long)
	if size != len(want) {
		return 0, invalidParam(at)
	}
	if len(b) < header+size {
		return 0, ParameterListLength
	}
	got := b[header : header+size]
	count := len(want) - 4 // bytes before the block length, some of them reserved
	if !long {
		got[4] = 0
	}
	switch blocks := got[:4]; {
	case !bytes.Equal(got[count:], want[count:]):
		return 0, invalidParam(header + count)
	case long && (bytes.Equal(got[:8], want[:8]) || allAre(got[:8], 0) || allAre(got[:8], 0xff)):
	case !long && (bytes.Equal(blocks, want[:4]) || allAre(blocks, 0) || allAre(blocks, 0xff)):
	default:
		return 0, invalidParam(header)
	}
	return header + size, nil
}

// checkPage checks the mode page at the start of b, which lies at byte at of
// the list.
func (u *Unit) checkPage(b []byte, at int) (*modePage, []byte, error) {
	if len(b) < 2 {
		return nil, nil, ParameterListLength
	}
	for i := range modePages {
		m := &modePages[i]
		if b[0]&0x7f != m.code { // bit 6 is SPF: subpages
			continue
		}
		if int(b[1]) != m.size-2 {
			return nil, nil, invalidParam(at + 1)
		}
		if len(b) < m.size {
			return nil, nil, ParameterListLength
		}
		now, may := m.bytes(u, modeCurrent), m.bytes(u, modeChangeable)
		for j := 2; j < m.size; j++ {
			if (b[j]^now[j])&^may[j] != 0 {
				return nil, nil, invalidParam(at + j)
			}
		}
		return m, b[:m.size], nil
	}
	return nil, nil, invalidParam(at)
}

// allAre reports whether every byte of p is c.
func allAre(p []byte, c byte) bool {
	for _, x := range p {
		if x != c {
			return false
		}
	}
	return true
}
