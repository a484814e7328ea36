package scsi

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
)

// ReservationKeeper keeps the persistent reservations of one unit on stable storage, beyond a loss
// of power and the end of this process. The bytes are opaque to it. A unit calls its methods one at
// a time.
type ReservationKeeper interface {
	// Load returns the state of the last Save, empty if there is none.
	Load() ([]byte, error)
	// Save replaces the state, and returns when it is on stable storage. An empty state means
	// nothing to keep.
	Save(state []byte) error
}

// The kept state is a header: magic with the version, TYPE, three zero bytes, the holder, the
// number of registrations; then for each the I_T nexus and the key; then the CRC-32C of all that.
// Numbers are big-endian.
const (
	keptMagic        = "GVM-PR\x00\x01"
	keptHeader       = len(keptMagic) + 12
	keptRegistration = 12
)

var keptCRC = crc32.MakeTable(crc32.Castagnoli)

// ErrReservationState is the error of NewUnit when its ReservationKeeper returns something that is
// no state of persistent reservations.
var ErrReservationState = errors.New("not a state of persistent reservations")

// kept encodes p for a ReservationKeeper, empty if there is nothing to keep.
func (p persistent) kept() []byte {
	if !p.aptpl || len(p.registered) == 0 {
		return nil
	}
	be := binary.BigEndian
	b := append([]byte(keptMagic), byte(p.kind), 0, 0, 0)
	b = be.AppendUint32(b, uint32(p.holder))
	b = be.AppendUint32(b, uint32(len(p.registered)))
	for _, r := range p.registered {
		b = be.AppendUint32(b, uint32(r.nexus))
		b = be.AppendUint64(b, r.key)
	}
	return be.AppendUint32(b, crc32.Checksum(b, keptCRC))
}

// parseKept is the inverse of kept. It accepts only output of kept.
func parseKept(b []byte) (persistent, error) {
	if len(b) == 0 {
		return persistent{}, nil
	}
	be := binary.BigEndian
	body := len(b) - 4
	if body < keptHeader || string(b[:len(keptMagic)]) != keptMagic ||
		be.Uint32(b[body:]) != crc32.Checksum(b[:body], keptCRC) {
		return persistent{}, ErrReservationState
	}
	h, list := b[len(keptMagic):keptHeader], b[keptHeader:body]
	p := persistent{kind: reservationType(h[0]), holder: NexusID(be.Uint32(h[4:])), aptpl: true}
	n := be.Uint32(h[8:])
	if n == 0 || n > maxRegistrations || len(list) != int(n)*keptRegistration ||
		h[1]|h[2]|h[3] != 0 || p.kind != 0 && !p.kind.valid() {
		return persistent{}, ErrReservationState
	}
	for ; len(list) > 0; list = list[keptRegistration:] {
		r := registration{NexusID(be.Uint32(list)), be.Uint64(list[4:])}
		if r.key == 0 || p.key(r.nexus) != 0 {
			return persistent{}, ErrReservationState
		}
		p.registered = append(p.registered, r)
	}
	if one := p.kind != 0 && !p.kind.allRegistrants(); one && p.key(p.holder) == 0 || !one && p.holder != 0 {
		return persistent{}, ErrReservationState
	}
	return p, nil
}

// loadReservations loads the state from k, which may be nil.
func loadReservations(k ReservationKeeper) (persistent, error) {
	if k == nil {
		return persistent{}, nil
	}
	b, err := k.Load()
	if err != nil {
		return persistent{}, err
	}
	return parseKept(b)
}
