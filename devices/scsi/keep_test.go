package scsi_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
)

// keeper is a ReservationKeeper whose Save fails while err is set.
type keeper struct {
	state []byte
	saves int
	err   error
}

func (k *keeper) Load() ([]byte, error) { return k.state, nil }
func (k *keeper) Save(b []byte) error {
	if k.saves++; k.err == nil {
		k.state = bytes.Clone(b)
	}
	return k.err
}

// outAPTPL is cluster.out with APTPL.
func (c *cluster) outAPTPL(n scsi.NexusID, action byte, key, newKey uint64, want string) {
	c.t.Helper()
	c.do(n, []byte{0x5f, action, 0, 0, 0, 0, 0, 0, 24, 0}, parameters(key, newKey, 1), 0, want)
}

// TestAPTPL: with APTPL registrations and reservation are there after a loss of power and
// in another process, without they are not.
func TestAPTPL(t *testing.T) {
	k := &keeper{}
	var reported []error
	cfg := scsi.UnitConfig{Reservations: k, OnError: func(err error) { reported = append(reported, err) }}
	c := newCluster(t, cfg)
	c.keys(1)
	if k.saves != 0 {
		t.Errorf("%d saves without APTPL", k.saves)
	}
	c.outAPTPL(2, prRegister, 0, 0x22, "GOOD")
	c.out(2, prReserve, wero, 0x22, 0, "GOOD")
	if k.saves != 2 {
		t.Errorf("%d saves", k.saves)
	}
	const capabilities = "0008 15 b1 ea01 0000"
	c.in(1, 2, capabilities)
	c.PowerOn()
	c.do(1, testUnitReady, nil, 0, "CHECK 6/29/01")
	for _, again := range []*cluster{c, newCluster(t, cfg)} {
		again.in(1, 0, "00000000 00000010 0000000000000011 0000000000000022")
		again.in(1, 1, "00000000 00000010 0000000000000022 00000000 00 05 0000")
		again.in(1, 2, capabilities)
	}
	c = newCluster(t, cfg)
	c.do(3, cdb10(0x2a, 0, 0, 1), make([]byte, blockSize), 0, "CONFLICT")
	c.do(1, cdb10(0x2a, 0, 0, 1), make([]byte, blockSize), 0, "GOOD")

	// A save that fails changes nothing, and is done again before the next one is
	// skipped for having nothing to save.
	k.err = errors.New("no room")
	c.out(2, prRelease, wero, 0x22, 0, "CHECK 4/44/00")
	c.in(1, 1, "00000000 00000010 0000000000000022 00000000 00 05 0000")
	if len(reported) != 1 || !errors.Is(reported[0], k.err) {
		t.Errorf("OnError got %v", reported)
	}
	k.err = nil
	c.out(2, prRelease, wero, 0x22, 0, "GOOD")
	c.do(1, testUnitReady, nil, 0, "CHECK 6/2a/04")
	// Without APTPL, the last registration counts, and nothing is kept.
	c.out(1, prIgnore, 0, 0, 0x12, "GOOD")
	if len(k.state) != 0 {
		t.Errorf("kept: % x", k.state)
	}
	c.PowerOn()
	c.do(1, testUnitReady, nil, 0, "CHECK 6/29/01")
	c.in(1, 0, "00000000 00000000")
}

// TestKeptState: a kept state is restored unchanged or refused.
func TestKeptState(t *testing.T) {
	k := &keeper{}
	c := newCluster(t, scsi.UnitConfig{Reservations: k})
	c.outAPTPL(1, prRegister, 0, 0x11, "GOOD")
	c.out(1, prReserve, eaar, 0x11, 0, "GOOD")
	good := k.state
	for i := range good {
		for _, b := range [][]byte{good[:i], append(bytes.Clone(good[:i]), good[i]^0x10)} {
			state := append(bytes.Clone(b), good[len(b):]...)
			if len(b) == i {
				state = b
			}
			if len(state) == 0 {
				continue
			}
			_, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(1 << 20), Serial: "S",
				Reservations: &keeper{state: state}})
			if !errors.Is(err, scsi.ErrReservationState) {
				t.Errorf("%d bytes, changed at %d: %v", len(state), i, err)
			}
		}
	}
}

// TestPreemptAndAbort: commands of a preempted nexus are over when it returns, while others write,
// preempt and register.
func TestPreemptAndAbort(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	var all sync.WaitGroup
	for n := scsi.NexusID(1); n <= 3; n++ {
		all.Go(func() {
			key := uint64(n) * 0x11
			out := func(action, scopeType byte, key, newKey uint64) string {
				cdb := []byte{0x5f, action, scopeType, 0, 0, 0, 0, 0, 24, 0}
				return asNexus(c.Target, n, cdb, parameters(key, newKey, 0), 0).String()
			}
			for i := range 200 {
				out(prIgnore, 0, 0, key)
				switch i % 4 {
				case 0:
					out(prReserve, wero, key, 0)
				case 1:
					out(prAbort, wero, key, uint64(i%3+1)*0x11)
				case 2:
					out(prRelease, wero, key, 0)
				}
				a := asNexus(c.Target, n, cdb10(0x2a, 0, uint32(n), 1), make([]byte, blockSize), 0)
				if s := a.String(); s != "GOOD" && s != "STATUS 18" && s != "STATUS 40" && s[:8] != "CHECK 6/" {
					t.Errorf("nexus %d: %s", n, s)
				}
			}
		})
	}
	all.Wait()
}

// FuzzReservations has three initiators follow the bytes, and checks invariants.
func FuzzReservations(f *testing.F) {
	f.Add([]byte{0x00, 0x11, 0x41, 0x05, 0x42, 0x22, 0x84, 0x13})
	f.Add([]byte{0x00, 0x01, 0x40, 0x02, 0x01, 0x17, 0x44, 0x08, 0xc1, 0x55})
	f.Fuzz(func(t *testing.T, ops []byte) {
		k := &keeper{}
		target := attach(t, scsi.UnitConfig{Reservations: k})
		last := uint32(0)
		for ; len(ops) >= 2 && len(ops) <= 400; ops = ops[2:] {
			n, what, arg := scsi.NexusID(ops[0]>>6), ops[0]&0x0f, ops[1]
			key, newKey := uint64(arg&3), uint64(arg>>2&3)
			switch {
			case what < 8:
				cdb := []byte{0x5f, what, arg >> 4, 0, 0, 0, 0, 0, 24, 0}
				asNexus(target, n, cdb, parameters(key, newKey, ops[0]>>4&1), 0)
			case what == 8:
				asNexus(target, n, []byte{0x16 + arg&1, 0, 0, 0, 0, 0}, nil, 0)
			case what == 9:
				target.NexusReset(n)
			case what == 10:
				target.LogicalUnitReset(0)
			case what == 11:
				target.PowerOn()
				last = 0
			default:
				asNexus(target, n, cdb10(0x2a, 0, 0, 1), make([]byte, blockSize), 0)
			}
			status := func(action byte) []byte {
				for range 4 {
					cdb := []byte{0x5e, action, 0, 0, 0, 0, 0, 16, 0, 0}
					if a := asNexus(target, 3, cdb, nil, 4096); a.Status == scsi.Good {
						return a.Data[:4096-int(a.Residual)]
					} else if a.Status == scsi.ReservationConflict { // of RESERVE(6)
						return nil
					}
				}
				t.Fatal("unit attention for ever")
				return nil
			}
			full, reservation := status(3), status(1)
			if full == nil || reservation == nil {
				continue
			}
			generation := binary.BigEndian.Uint32(full)
			if generation < last {
				t.Errorf("PRGENERATION %d after %d", generation, last)
			}
			last = generation
			holders, typ := 0, byte(0)
			for d := full[8:]; len(d) > 0; d = d[24+24:] {
				if binary.BigEndian.Uint64(d) == 0 {
					t.Errorf("registered with key 0: % x", d)
				}
				if d[12]&1 != 0 {
					holders++
					typ = d[13]
				}
			}
			reserved := len(reservation) > 8
			if reserved != (holders > 0) || reserved && reservation[8+13] != typ ||
				holders > 1 && typ != wear && typ != eaar {
				t.Errorf("%d holders of type %d, reservation % x", holders, typ, reservation)
			}
			if len(k.state) > 0 {
				if _, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(1 << 20), Serial: "S",
					Reservations: k}); err != nil {
					t.Error(err)
				}
			}
		}
	})
}
