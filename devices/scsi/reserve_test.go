package scsi_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// Service actions and types of persistent reservations.
const (
	prRegister, prReserve, prRelease, prClear, prPreempt, prAbort, prIgnore = 0, 1, 2, 3, 4, 5, 6

	we, ea, wero, earo, wear, eaar = 1, 3, 5, 6, 7, 8
)

// cluster is a target with I_T nexuses 1 to 3, past their unit attentions.
type cluster struct {
	*scsi.Target
	t testing.TB
}

func newCluster(t testing.TB, cfg scsi.UnitConfig) *cluster {
	t.Helper()
	c := &cluster{attach(t, cfg), t}
	c.ready()
	return c
}

// ready takes the unit attention of every nexus.
func (c *cluster) ready() {
	c.t.Helper()
	for n := scsi.NexusID(1); n <= 3; n++ {
		if a := asNexus(c.Target, n, testUnitReady, nil, 0); a.String() != "CHECK 6/29/01" {
			c.t.Errorf("nexus %d: %v", n, a)
		}
	}
}

// do does a command of nexus n and checks how it ended.
func (c *cluster) do(n scsi.NexusID, cdb, out []byte, inLen int, want string) scsitest.Answer {
	c.t.Helper()
	a := asNexus(c.Target, n, cdb, out, inLen)
	if want == "CONFLICT" {
		want = "STATUS 18"
	}
	if a.String() != want {
		c.t.Errorf("nexus %d: %s % x: %v, want %s", n, scsi.OpcodeName(cdb), cdb, a, want)
	}
	return a
}

// parameters is the parameter list of PERSISTENT RESERVE OUT.
func parameters(key, newKey uint64, flags byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, key)
	b = binary.BigEndian.AppendUint64(b, newKey)
	return append(b, 0, 0, 0, 0, flags, 0, 0, 0)
}

// out does a PERSISTENT RESERVE OUT.
func (c *cluster) out(n scsi.NexusID, action, scopeType byte, key, newKey uint64, want string) {
	c.t.Helper()
	c.do(n, []byte{0x5f, action, scopeType, 0, 0, 0, 0, 0, 24, 0}, parameters(key, newKey, 0), 0, want)
}

// in does a PERSISTENT RESERVE IN and checks the data, in hexadecimal.
func (c *cluster) in(n scsi.NexusID, action byte, want string) {
	c.t.Helper()
	a := c.do(n, []byte{0x5e, action, 0, 0, 0, 0, 0, 1, 0, 0}, nil, 256, "GOOD")
	if got := hex.EncodeToString(a.Data[:256-int(a.Residual)]); got != strings.ReplaceAll(want, " ", "") {
		c.t.Errorf("nexus %d: PERSISTENT RESERVE IN %d: %s, want %s", n, action, got, want)
	}
}

// attention checks the unit attention conditions of each nexus, "" for none.
func (c *cluster) attention(want ...string) {
	c.t.Helper()
	for i, list := range want {
		for _, w := range append(strings.Fields(list), "") {
			if w == "" {
				w = "GOOD"
			} else {
				w = "CHECK 6/" + w
			}
			c.do(scsi.NexusID(i+1), testUnitReady, nil, 0, w)
		}
	}
}

// keys registers nexus 1 with key 11h and so on, up to n.
func (c *cluster) keys(n int) {
	c.t.Helper()
	for i := 1; i <= n; i++ {
		c.out(scsi.NexusID(i), prRegister, 0, 0, uint64(i)*0x11, "GOOD")
	}
}

func TestRegister(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	c.in(1, 0, "00000000 00000000")
	// An unregistered nexus has the key 0. Each REGISTER that succeeds counts.
	c.out(1, prRegister, 0, 0x11, 0x22, "CONFLICT")
	c.out(1, prRegister, 0, 0, 0, "GOOD")
	c.in(1, 0, "00000001 00000000")
	c.out(1, prRegister, 0, 0, 0x11, "GOOD")
	c.out(2, prIgnore, 0, 0x99, 0x22, "GOOD")
	c.out(3, prIgnore, 0, 0x99, 0, "GOOD")
	c.in(3, 0, "00000004 00000010 0000000000000011 0000000000000022")
	// A new key needs the old one, unless that is ignored; it may be that of
	// another nexus.
	c.out(1, prRegister, 0, 0, 0x12, "CONFLICT")
	c.out(1, prRegister, 0, 0x22, 0x12, "CONFLICT")
	c.out(1, prRegister, 0, 0x11, 0x22, "GOOD")
	c.out(2, prIgnore, 0, 0, 0x23, "GOOD")
	c.in(3, 0, "00000006 00000010 0000000000000022 0000000000000023")
	c.out(1, prRegister, 0, 0x11, 0, "CONFLICT")
	c.out(1, prRegister, 0, 0x22, 0, "GOOD")
	c.out(2, prIgnore, 0, 0, 0, "GOOD")
	c.in(3, 0, "00000008 00000000")
	c.attention("", "", "")
}

func TestReserveOutRefusals(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	c.keys(2)
	const key = 0x11
	// These need a registration or the right key, before any other check.
	for _, action := range []byte{prReserve, prRelease, prClear, prPreempt, prAbort} {
		c.out(3, action, we, 0, key, "CONFLICT")
		c.out(3, action, we, key, key, "CONFLICT")
		c.out(1, action, 0xff, 0x22, key, "CONFLICT")
		c.out(1, action, 0xff, 0, key, "CONFLICT")
	}
	at := func(a scsitest.Answer, want ...byte) {
		t.Helper()
		if !bytes.Equal(a.Sense[15:18], want) {
			t.Errorf("field pointer % x, want % x", a.Sense[15:18], want)
		}
	}
	cdb := func(action, scopeType, length byte) []byte {
		return []byte{0x5f, action, scopeType, 0, 0, 0, 0, 0, length, 0}
	}
	// SCOPE and TYPE.
	for _, typ := range []byte{0, 2, 4, 9, 15} {
		at(c.do(1, cdb(prReserve, typ, 24), parameters(key, 0, 0), 0, "CHECK 5/24/00"), 0xcb, 0, 2)
	}
	at(c.do(1, cdb(prReserve, 0x10|we, 24), parameters(key, 0, 0), 0, "CHECK 5/24/00"), 0xcf, 0, 2)
	c.out(1, prReserve, we, key, 0, "GOOD")
	at(c.do(2, cdb(prPreempt, 0, 24), parameters(0x22, key, 0), 0, "CHECK 5/24/00"), 0xcb, 0, 2)
	at(c.do(2, cdb(prPreempt, 0x20|ea, 24), parameters(0x22, key, 0), 0, "CHECK 5/24/00"), 0xcf, 0, 2)
	at(c.do(2, cdb(prPreempt, ea, 24), parameters(0x22, 0, 0), 0, "CHECK 5/26/00"), 0x80, 0, 8)
	c.out(2, prPreempt, ea, 0x22, 0x33, "CONFLICT") // no nexus has the key
	// The parameter list.
	c.do(1, cdb(prRegister, 0, 0), nil, 0, "CHECK 5/1a/00")
	c.do(1, cdb(prRegister, 0, 23), parameters(key, 1, 0), 0, "CHECK 5/1a/00")
	c.do(1, cdb(prRegister, 0, 28), append(parameters(key, 1, 0), 0, 0, 0, 0), 0, "CHECK 5/1a/00")
	c.do(1, cdb(prRegister, 0, 24), parameters(key, 1, 0)[:23], 0, "CHECK 5/0e/03")
	c.do(1, []byte{0x5f, prRegister, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0}, parameters(key, 1, 0), 0, "CHECK 5/1a/00")
	at(c.do(1, cdb(prRegister, 0, 24), parameters(key, 1, 0x08), 0, "CHECK 5/26/00"), 0x80, 0, 20) // SPEC_I_PT
	// with TransportIDs
	at(c.do(1, cdb(prRegister, 0, 28), append(parameters(key, 1, 0x08), 0, 0, 0, 0), 0, "CHECK 5/26/00"), 0x80, 0, 20)
	at(c.do(1, cdb(prRegister, 0, 24), parameters(key, 1, 0x01), 0, "CHECK 5/26/00"), 0x80, 0, 20) // APTPL
	at(c.do(1, cdb(prIgnore, 0, 24), parameters(key, 1, 0x01), 0, "CHECK 5/26/00"), 0x80, 0, 20)   // likewise
	// REPLACE LOST RESERVATION
	at(c.do(1, cdb(8, 0, 24), parameters(key, 1, 0), 0, "CHECK 5/24/00"), 0xcc, 0, 1)
	// of PERSISTENT RESERVE IN
	at(c.do(1, []byte{0x5e, 4, 0, 0, 0, 0, 0, 1, 0, 0}, nil, 256, "CHECK 5/24/00"), 0xcc, 0, 1)
	c.do(1, cdb(prReserve, we, 24), parameters(key, 0, 0x01), 0, "GOOD")   // APTPL is for registrations
	c.do(1, cdb(prRegister, 0, 24), parameters(key, key, 0x04), 0, "GOOD") // ALL_TG_PT
	c.in(1, 0, "00000003 00000010 0000000000000011 0000000000000022")
	c.in(1, 1, "00000003 00000010 0000000000000011 00000000 00 01 0000")
}

func TestReadReservation(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	c.in(3, 1, "00000000 00000000")
	c.in(3, 2, "0008 14 b0 ea01 0000")
	c.in(3, 3, "00000000 00000000")
	c.keys(2)
	c.in(3, 1, "00000002 00000000")
	const (
		id1 = "0001 00000018 06 000000 3000000000000001" + "000000000000000000000000"
		id2 = "0001 00000018 06 000000 3000000000000002" + "000000000000000000000000"
	)
	c.in(3, 3, "00000002 00000060"+"0000000000000011 00000000 00 00 00000000"+
		id1+"0000000000000022 00000000 00 00 00000000"+id2)
	c.out(2, prReserve, earo, 0x22, 0, "GOOD")
	c.in(3, 1, "00000002 00000010 0000000000000022 00000000 00 06 0000")
	c.in(3, 3, "00000002 00000060"+"0000000000000011 00000000 00 00 00000000"+
		id1+"0000000000000022 00000000 01 06 00000000"+id2)
	c.out(2, prRegister, 0, 0x22, 0x2222222222222222, "GOOD") // the holder keeps it
	c.in(3, 1, "00000003 00000010 2222222222222222 00000000 00 06 0000")
	c.out(2, prRelease, earo, 0x2222222222222222, 0, "GOOD")
	c.attention("2a/04", "", "")
	c.out(1, prReserve, wear, 0x11, 0, "GOOD")
	c.in(3, 1, "00000003 00000010 0000000000000000 00000000 00 07 0000")
	c.in(3, 3, "00000003 00000060"+"0000000000000011 00000000 01 07 00000000"+
		id1+"2222222222222222 00000000 01 07 00000000"+id2)
	// ALLOCATION LENGTH cuts the data, not its ADDITIONAL LENGTH.
	if a := c.do(3, []byte{0x5e, 0, 0, 0, 0, 0, 0, 0, 12, 0}, nil, 256, "GOOD"); a.Residual != 244 ||
		!bytes.Equal(a.Data[:13], []byte{0, 0, 0, 3, 0, 0, 0, 16, 0, 0, 0, 0, 0}) {
		t.Errorf("READ KEYS of 12 bytes: residual %d, % x", a.Residual, a.Data[:13])
	}
}

func TestReserveRelease(t *testing.T) {
	for _, typ := range []byte{we, ea, wero, earo, wear, eaar} {
		c := newCluster(t, scsi.UnitConfig{})
		c.keys(3)
		all, registrants := typ >= wear, typ >= wero
		c.out(1, prRelease, typ, 0x11, 0, "GOOD") // there is none
		c.out(1, prReserve, typ, 0x11, 0, "GOOD")
		c.out(1, prReserve, typ, 0x11, 0, "GOOD") // again
		other := map[byte]byte{we: ea, ea: we, wero: earo, earo: wero, wear: eaar, eaar: wear}[typ]
		c.out(1, prReserve, other, 0x11, 0, "CONFLICT")
		// Another nexus may reserve only units that it holds already, and releases nothing that it does
		// not hold.
		if all {
			c.out(2, prReserve, typ, 0x22, 0, "GOOD")
			c.out(2, prRelease, other, 0x22, 0, "CHECK 5/26/04")
		} else {
			c.out(2, prReserve, typ, 0x22, 0, "CONFLICT")
			c.out(2, prRelease, typ, 0x22, 0, "GOOD")
			c.out(2, prRelease, other, 0x22, 0, "GOOD")
		}
		c.out(1, prRelease, other, 0x11, 0, "CHECK 5/26/04")
		c.out(1, prRelease, 0x10|typ, 0x11, 0, "CHECK 5/26/04")
		key := "0000000000000011"
		if all {
			key = "0000000000000000"
		}
		c.in(2, 1, fmt.Sprintf("00000003 00000010 %s 00000000 00 %02x 0000", key, typ))
		c.attention("", "", "")
		c.out(1, prRelease, typ, 0x11, 0, "GOOD")
		c.in(0, 1, "00000003 00000000")
		if registrants {
			c.attention("", "2a/04", "2a/04")
		} else {
			c.attention("", "", "")
		}
	}
}

// TestUnregister has a holder that unregisters: that ends the reservation, but
// for all registrants that of the last of them.
func TestUnregister(t *testing.T) {
	for _, typ := range []byte{we, ea, wero, earo, wear, eaar} {
		c := newCluster(t, scsi.UnitConfig{})
		c.keys(2)
		c.out(1, prReserve, typ, 0x11, 0, "GOOD")
		c.out(1, prRegister, 0, 0x11, 0, "GOOD")
		switch {
		case typ >= wear:
			c.in(3, 1, fmt.Sprintf("00000003 00000010 0000000000000000 00000000 00 %02x 0000", typ))
			c.attention("", "", "")
			c.do(1, cdb10(0x2a, 0, 0, 1), filled(0, 1), 0, "CONFLICT")
			c.out(2, prIgnore, 0, 0, 0, "GOOD")
			c.in(3, 1, "00000004 00000000")
			c.attention("", "", "")
		case typ >= wero:
			c.in(3, 1, "00000003 00000000")
			c.attention("", "2a/04", "")
		default:
			c.in(3, 1, "00000003 00000000")
			c.attention("", "", "")
		}
		c.do(3, cdb10(0x2a, 0, 0, 1), filled(0, 1), 0, "GOOD")
	}
	// A registered nexus that is no holder takes nothing along.
	c := newCluster(t, scsi.UnitConfig{})
	c.keys(2)
	c.out(1, prReserve, wero, 0x11, 0, "GOOD")
	c.out(2, prRegister, 0, 0x22, 0, "GOOD")
	c.in(3, 1, "00000003 00000010 0000000000000011 00000000 00 05 0000")
	c.attention("", "", "")
}

func TestClear(t *testing.T) {
	for _, typ := range []byte{0, we, eaar} {
		c := newCluster(t, scsi.UnitConfig{})
		c.keys(2)
		if typ != 0 {
			c.out(1, prReserve, typ, 0x11, 0, "GOOD")
		}
		c.out(2, prClear, 0xff, 0x22, 0, "GOOD")
		c.in(3, 0, "00000003 00000000")
		c.in(3, 1, "00000003 00000000")
		c.attention("2a/03", "", "")
	}
}

func TestPreempt(t *testing.T) {
	const none = "00000000"
	held := func(key byte, typ byte) string {
		return fmt.Sprintf("00000010 00000000000000%02x 00000000 00 %02x 0000", key, typ)
	}
	for _, tt := range []struct {
		name        string
		typ         byte   // reserved by nexus 1, 0: not reserved
		by          byte   // nexus that preempts
		key         uint64 // of the nexus to preempt
		with        byte   // SCOPE and TYPE
		want        string
		keys        string // left
		reservation string
		attention   [3]string
	}{
		{"no reservation", 0, 2, 0x11, 0xff, "GOOD", "00000010 0000000000000022 0000000000000033", none,
			[3]string{"2a/05", "", ""}},
		{"no reservation, own key", 0, 2, 0x22, 0xff, "GOOD", "00000010 0000000000000011 0000000000000033",
			none, [3]string{}},
		{"no holder", we, 2, 0x33, 0xff, "GOOD", "00000010 0000000000000011 0000000000000022", held(0x11, we),
			[3]string{"", "", "2a/05"}},
		{"own key, no holder", we, 2, 0x22, 0xff, "GOOD", "00000010 0000000000000011 0000000000000033",
			held(0x11, we), [3]string{}},
		{"holder, same type", we, 2, 0x11, we, "GOOD", "00000010 0000000000000022 0000000000000033", held(0x22, we),
			[3]string{"2a/05", "", ""}},
		{"holder, other type", we, 2, 0x11, earo, "GOOD", "00000010 0000000000000022 0000000000000033",
			held(0x22, earo), [3]string{"2a/05", "", "2a/04"}},
		{"holder, to all registrants", earo, 2, 0x11, eaar, "GOOD", "00000010 0000000000000022 0000000000000033",
			held(0, eaar), [3]string{"2a/05", "", "2a/04"}},
		{"itself, same type", we, 1, 0x11, we, "GOOD", "00000018 0000000000000011 0000000000000022 0000000000000033",
			held(0x11, we), [3]string{}},
		{"itself, other type", we, 1, 0x11, ea, "GOOD", "00000018 0000000000000011 0000000000000022 0000000000000033",
			held(0x11, ea), [3]string{"", "2a/04", "2a/04"}},
		{"all registrants", wear, 2, 0, wear, "GOOD", "00000008 0000000000000022", held(0, wear),
			[3]string{"2a/05", "", "2a/05"}},
		{"all registrants, to one", wear, 2, 0, we, "GOOD", "00000008 0000000000000022", held(0x22, we),
			[3]string{"2a/05", "", "2a/05"}},
		{"one of all registrants", wear, 2, 0x11, we, "GOOD", "00000010 0000000000000022 0000000000000033",
			held(0, wear), [3]string{"2a/05", "", ""}},
		{"itself of all registrants", wear, 2, 0x22, we, "GOOD", "00000010 0000000000000011 0000000000000033",
			held(0, wear), [3]string{}},
		{"no one of all registrants", wear, 2, 0x44, we, "CONFLICT", "", held(0, wear), [3]string{}},
		{"no one", we, 2, 0x44, we, "CONFLICT", "", held(0x11, we), [3]string{}},
		{"zero", we, 2, 0, we, "CHECK 5/26/00", "", held(0x11, we), [3]string{}},
		{"zero, no reservation", 0, 2, 0, we, "CHECK 5/26/00", "", none, [3]string{}},
	} {
		for _, action := range []byte{prPreempt, prAbort} {
			t.Run(fmt.Sprintf("%s, %d", tt.name, action), func(t *testing.T) {
				c := newCluster(t, scsi.UnitConfig{})
				c.keys(3)
				if tt.typ != 0 {
					c.out(1, prReserve, tt.typ, 0x11, 0, "GOOD")
				}
				c.out(scsi.NexusID(tt.by), action, tt.with, 0x11*uint64(tt.by), tt.key, tt.want)
				generation := "00000004"
				if tt.want != "GOOD" {
					generation = "00000003"
					c.in(0, 0, generation+"00000018 0000000000000011 0000000000000022 0000000000000033")
				} else {
					c.in(0, 0, generation+tt.keys)
				}
				c.in(0, 1, generation+tt.reservation)
				c.attention(tt.attention[:]...)
			})
		}
	}
	// The last of all registrants takes the reservation along.
	c := newCluster(t, scsi.UnitConfig{})
	c.keys(1)
	c.out(1, prReserve, eaar, 0x11, 0, "GOOD")
	c.out(1, prPreempt, eaar, 0x11, 0x11, "GOOD")
	c.in(1, 0, "00000002 00000000")
	c.in(1, 1, "00000002 00000000")
	// A key can be that of several nexuses.
	c = newCluster(t, scsi.UnitConfig{})
	for n := scsi.NexusID(1); n <= 3; n++ {
		c.out(n, prRegister, 0, 0, 0x77, "GOOD")
	}
	c.out(1, prReserve, ea, 0x77, 0, "GOOD")
	c.out(2, prPreempt, ea, 0x77, 0x77, "GOOD")
	c.in(2, 0, "00000004 00000008 0000000000000077")
	c.in(2, 1, "00000004"+held(0x77, ea))
	c.do(2, cdb10(0x2a, 0, 0, 1), filled(0, 1), 0, "GOOD")
	c.attention("2a/05", "", "2a/05")
}

// TestReserveUnit is RESERVE(6), RESERVE(10), RELEASE(6) and RELEASE(10), and how
// they and persistent reservations exclude each other.
func TestReserveUnit(t *testing.T) {
	reserve := [][]byte{{0x16, 5: 0}, {0x56, 9: 0}}
	release := [][]byte{{0x17, 5: 0}, {0x57, 9: 0}}
	write := cdb10(0x2a, 0, 0, 1)
	c := newCluster(t, scsi.UnitConfig{})
	for i := range reserve {
		c.do(1, reserve[i], nil, 0, "GOOD")
		c.do(1, reserve[1-i], nil, 0, "GOOD")
		c.do(2, reserve[i], nil, 0, "CONFLICT")
		c.do(2, write, filled(0, 1), 0, "CONFLICT")
		c.do(1, write, filled(0, 1), 0, "GOOD")
		c.do(2, release[i], nil, 0, "GOOD") // of a reservation that is not its own
		c.do(2, write, filled(0, 1), 0, "CONFLICT")
		// All persistent reservation commands conflict, the holder's too.
		for n := scsi.NexusID(1); n <= 2; n++ {
			c.out(n, prRegister, 0, 0, 0x11, "CONFLICT")
			for action := range byte(4) {
				c.do(n, []byte{0x5e, action, 0, 0, 0, 0, 0, 1, 0, 0}, nil, 256, "CONFLICT")
			}
		}
		c.do(1, release[1-i], nil, 0, "GOOD")
		c.do(2, write, filled(0, 1), 0, "GOOD")
	}
	for _, cdb := range [][]byte{{0x16, 0x10, 5: 0}, {0x17, 0x01, 5: 0}, {0x56, 0x10, 9: 0}, {0x57, 0x01, 9: 0}} {
		c.do(1, cdb, nil, 0, "CHECK 5/24/00")
	}
	// With registrations they conflict, except for those that the persistent reservation restricts
	// in nothing (SPC-5 5.14.3).
	for _, typ := range []byte{0, we, earo, wear} {
		c := newCluster(t, scsi.UnitConfig{})
		c.keys(2)
		if typ != 0 {
			c.out(1, prReserve, typ, 0x11, 0, "GOOD")
		}
		want := []string{"CONFLICT", "CONFLICT", "CONFLICT"}
		if typ != 0 {
			want[0] = "GOOD"
		}
		if typ >= wero {
			want[1] = "GOOD"
		}
		for i := range reserve {
			for n, w := range want {
				c.do(scsi.NexusID(n+1), reserve[i], nil, 0, w)
				c.do(scsi.NexusID(n+1), release[i], nil, 0, w)
			}
		}
		c.in(1, 0, "00000002 00000010 0000000000000011 0000000000000022") // nothing was reserved
	}
	// Resets.
	for _, tt := range []struct {
		name string
		do   func(*cluster)
		want [2]string // unit attention of nexuses 1 and 2
	}{
		{"LOGICAL UNIT RESET", func(c *cluster) { c.LogicalUnitReset(0) }, [2]string{"29/03", "29/03"}},
		{"I_T NEXUS RESET", func(c *cluster) { c.NexusReset(1) }, [2]string{"29/07", ""}},
		{"power on", func(c *cluster) { c.PowerOn() }, [2]string{"29/01", "29/01"}},
	} {
		c := newCluster(t, scsi.UnitConfig{})
		c.do(1, reserve[0], nil, 0, "GOOD")
		c.NexusReset(2)
		c.do(2, testUnitReady, nil, 0, "CHECK 6/29/07")
		c.do(2, write, filled(0, 1), 0, "CONFLICT")
		tt.do(c)
		c.attention(tt.want[:]...)
		c.do(2, write, filled(0, 1), 0, "GOOD")
	}
}

// TestResets: all resets but a loss of power keep a persistent reservation.
func TestResets(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	c.keys(2)
	c.out(1, prReserve, earo, 0x11, 0, "GOOD")
	c.LogicalUnitReset(0)
	c.attention("29/03", "29/03", "29/03")
	c.NexusReset(1)
	c.attention("29/07", "", "")
	c.in(3, 0, "00000002 00000010 0000000000000011 0000000000000022")
	c.in(3, 1, "00000002 00000010 0000000000000011 00000000 00 06 0000")
	c.do(2, cdb10(0x28, 0, 0, 1), nil, blockSize, "GOOD")
	c.do(3, cdb10(0x28, 0, 0, 1), nil, blockSize, "CONFLICT")
	c.PowerOn()
	c.ready()
	c.in(3, 0, "00000000 00000000")
	c.do(3, cdb10(0x28, 0, 0, 1), nil, blockSize, "GOOD")
}

func TestTooManyRegistrations(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	for n := scsi.NexusID(1); n <= 1024; n++ {
		if n > 3 {
			c.do(n, testUnitReady, nil, 0, "CHECK 6/29/01")
		}
		c.out(n, prRegister, 0, 0, uint64(n), "GOOD")
	}
	c.do(2000, testUnitReady, nil, 0, "CHECK 6/29/01")
	c.out(2000, prRegister, 0, 0, 1, "CHECK 5/55/04")
	c.out(7, prRegister, 0, 7, 0, "GOOD")
	c.out(2000, prRegister, 0, 0, 1, "GOOD")
}

// moveTo is the parameter list of REGISTER AND MOVE.
func moveTo(key, newKey uint64, flags byte, port uint16, to scsi.NexusID) []byte {
	be := binary.BigEndian
	b := be.AppendUint64(be.AppendUint64(nil, key), newKey)
	b = be.AppendUint16(append(b, 0, flags), port)
	b = append(be.AppendUint32(b, 24), 6, 0, 0, 0)
	return append(be.AppendUint64(b, 3<<60|uint64(to)), make([]byte, 12)...)
}

// TestRegisterAndMove hands a reservation to an I_T nexus that need not have registered (SPC-5
// 5.14.8).
func TestRegisterAndMove(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	move := func(n scsi.NexusID, list []byte, want string) scsitest.Answer {
		t.Helper()
		return c.do(n, []byte{0x5f, 7, 0, 0, 0, 0, 0, byte(len(list) >> 8), byte(len(list)), 0}, list, 0, want)
	}
	c.keys(2)
	move(1, moveTo(0x11, 0x33, 0, 1, 3), "CONFLICT") // nothing is reserved
	c.out(1, prReserve, we, 0x11, 0, "GOOD")
	for _, tt := range []struct {
		nexus scsi.NexusID
		list  []byte
		want  string
		at    byte
	}{
		{3, moveTo(0, 0x33, 0, 1, 3), "CONFLICT", 0},          // not registered
		{1, moveTo(0x12, 0x33, 0, 1, 3), "CONFLICT", 0},       // another key
		{2, moveTo(0x22, 0x33, 0, 1, 3), "CONFLICT", 0},       // not the holder
		{2, moveTo(0x22, 0, 0, 9, 2), "CONFLICT", 0},          // before any other check
		{1, moveTo(0x11, 0, 0, 9, 3), "CHECK 5/26/00", 8},     // no key
		{1, moveTo(0x11, 0x33, 1, 1, 3), "CHECK 5/26/00", 17}, // APTPL
		{1, moveTo(0x11, 0x33, 0, 2, 3), "CHECK 5/26/00", 18}, // another target port
		{1, moveTo(0x11, 0x33, 0, 1, 1), "CHECK 5/26/00", 24}, // itself
		// a TransportID of iSCSI
		{1, append(moveTo(0x11, 0x33, 0, 1, 3)[:24:24], append([]byte{5}, make([]byte, 23)...)...),
			"CHECK 5/26/00", 24},
		{1, moveTo(0x11, 0x33, 0, 1, 3)[:40], "CHECK 5/1a/00", 0},
		{1, moveTo(0x11, 0x33, 0, 1, 3)[:20], "CHECK 5/1a/00", 0},
		{1, make([]byte, 512), "CHECK 5/1a/00", 0},
	} {
		if a := move(tt.nexus, tt.list, tt.want); tt.at > 0 && !bytes.Equal(a.Sense[15:18], []byte{0x80, 0, tt.at}) {
			t.Errorf("% x: field pointer % x, want %d", tt.list, a.Sense[15:18], tt.at)
		}
	}
	c.in(1, 1, "00000002 00000010 0000000000000011 00000000 00 01 0000")

	// To one that is not registered; the mover stays registered.
	move(1, moveTo(0x11, 0x33, 0, 1, 3), "GOOD")
	c.in(1, 0, "00000003 00000018 0000000000000011 0000000000000022 0000000000000033")
	c.in(1, 1, "00000003 00000010 0000000000000033 00000000 00 01 0000")
	c.do(1, cdb10(0x2a, 0, 0, 1), make([]byte, blockSize), 0, "CONFLICT")
	c.do(3, cdb10(0x2a, 0, 0, 1), make([]byte, blockSize), 0, "GOOD")
	// To one that is, with UNREG: its key changes and the mover's goes.
	move(3, moveTo(0x33, 0x44, 2, 1, 2), "GOOD")
	c.in(1, 0, "00000004 00000010 0000000000000011 0000000000000044")
	c.in(1, 1, "00000004 00000010 0000000000000044 00000000 00 01 0000")
	c.attention("", "", "")
	// A reservation of all registrants has no one holder to move it from.
	c.out(2, prRelease, we, 0x44, 0, "GOOD")
	c.out(2, prReserve, wear, 0x44, 0, "GOOD")
	move(2, moveTo(0x44, 0x55, 0, 1, 3), "CONFLICT")
}

// TestReserveOpcodes asks REPORT SUPPORTED OPERATION CODES for every command
// that reserves.
func TestReserveOpcodes(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	for _, tt := range []struct {
		option, op, action byte
		want               string
	}{
		{1, 0x16, 0, "00 03 0006 16 11 00 00 00 00"},
		{1, 0x17, 0, "00 03 0006 17 11 00 00 00 00"},
		{1, 0x56, 0, "00 03 000a 56 11 00 00 00 00 00 00 00 00"},
		{1, 0x57, 0, "00 03 000a 57 11 00 00 00 00 00 00 00 00"},
		{2, 0x5e, 0, "00 03 000a 5e 00 00 00 00 00 00 ff ff 00"},
		{2, 0x5e, 1, "00 03 000a 5e 01 00 00 00 00 00 ff ff 00"},
		{2, 0x5e, 2, "00 03 000a 5e 02 00 00 00 00 00 ff ff 00"},
		{2, 0x5e, 3, "00 03 000a 5e 03 00 00 00 00 00 ff ff 00"},
		{2, 0x5e, 4, "00 01 0000"},
		{2, 0x5f, 0, "00 03 000a 5f 00 00 00 00 ff ff ff ff 00"},
		{2, 0x5f, 1, "00 03 000a 5f 01 ff 00 00 ff ff ff ff 00"},
		{2, 0x5f, 2, "00 03 000a 5f 02 ff 00 00 ff ff ff ff 00"},
		{2, 0x5f, 3, "00 03 000a 5f 03 00 00 00 ff ff ff ff 00"},
		{2, 0x5f, 4, "00 03 000a 5f 04 ff 00 00 ff ff ff ff 00"},
		{2, 0x5f, 5, "00 03 000a 5f 05 ff 00 00 ff ff ff ff 00"},
		{2, 0x5f, 6, "00 03 000a 5f 06 00 00 00 ff ff ff ff 00"},
		{2, 0x5f, 7, "00 03 000a 5f 07 00 00 00 ff ff ff ff 00"},
		{2, 0x5f, 8, "00 01 0000"},
	} {
		a := c.do(1, []byte{0xa3, 0x0c, tt.option, tt.op, 0, tt.action, 0, 0, 0, 64, 0, 0}, nil, 64, "GOOD")
		if got := hex.EncodeToString(a.Data[:64-int(a.Residual)]); got != strings.ReplaceAll(tt.want, " ", "") {
			t.Errorf("%02x/%02x: %s, want %s", tt.op, tt.action, got, tt.want)
		}
	}
}
