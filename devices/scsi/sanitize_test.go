package scsi_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"syscall"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/scsi/backend"
	"gvm/devices/scsi/scsitest"
)

// sanitizeCDB is SANITIZE with flags and service action, and the length of a list.
func sanitizeCDB(b1 byte, n int) []byte {
	return []byte{0x48, b1, 0, 0, 0, 0, 0, byte(n >> 8), byte(n), 0}
}

func TestSanitize(t *testing.T) {
	rec := &scsitest.Recorder{Backend: backend.NewMem(blocks * block)}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	data := filled(1, 64)
	medium := func() []byte {
		p := make([]byte, blocks*block)
		if _, err := rec.Backend.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		return p
	}
	expect(t, target, cdb16(0x8a, 0, 0, 64), data, 0, "GOOD")
	rec.Log()
	expect(t, target, sanitizeCDB(0x02, 0), nil, 0, "GOOD")
	if log := strings.Join(rec.Log(), ", "); log != "discard 0+1048576, flush" {
		t.Errorf("BLOCK ERASE: %s", log)
	}
	if !bytes.Equal(medium(), make([]byte, blocks*block)) {
		t.Error("BLOCK ERASE: not all zeroes")
	}
	list := []byte{0x83, 0, 0, 3, 0xa0, 0xb1, 0xc2} // INVERT, three times
	expect(t, target, sanitizeCDB(0x01, len(list)), list, 0, "GOOD")
	want := bytes.Repeat([]byte{0xa0, 0xb1, 0xc2}, 171)[:block]
	if got := medium(); !bytes.Equal(got, bytes.Repeat(want, blocks)) {
		t.Errorf("OVERWRITE: % x", got[:8])
	}
	list[0] = 0x82
	expect(t, target, sanitizeCDB(0x81, len(list)), list, 0, "GOOD")
	settle(target)
	if got := medium(); got[0] != 0x5f || got[blocks*block-1] != ^want[block-1] {
		t.Errorf("OVERWRITE with IMMED, inverted: % x", got[:8])
	}
	for _, v := range []struct {
		b1   byte
		n    int
		list []byte
	}{
		{0x02, 8, make([]byte, 8)}, {0x1f, 8, make([]byte, 8)}, {0x01, 0, nil}, {0x01, 4, make([]byte, 4)}, {0x01, 4 + block + 1, make([]byte, 4+block+1)},
		{0x01, 7, []byte{0, 0, 0, 3, 1, 2, 3}}, {0x01, 7, []byte{1, 0, 0, 0, 1, 2, 3}}, {0x01, 7, []byte{1, 0, 0, 4, 1, 2, 3}}, {0x03, 0, nil}, {0x00, 0, nil},
	} {
		expect(t, target, sanitizeCDB(v.b1, v.n), v.list, 0, "CHECK 5/24/00")
	}
	expect(t, target, sanitizeCDB(0x1f, 0), nil, 0, "GOOD") // nothing has failed
	expect(t, target, []byte{0x1b, 0, 0, 0, 0, 0}, nil, 0, "GOOD")
	expect(t, target, sanitizeCDB(0x02, 0), nil, 0, "CHECK 2/04/02")
	expect(t, attach(t, scsi.UnitConfig{ReadOnly: true}), sanitizeCDB(0x01, 7), list, 0, "CHECK 7/27/00")
	expect(t, attach(t, scsi.UnitConfig{Backend: struct{ scsi.Backend }{rec.Backend}}), sanitizeCDB(0x02, 0), nil, 0, "CHECK 5/20/00")
}

// TestSanitizeProgress asks while SANITIZE is at it.
func TestSanitizeProgress(t *testing.T) {
	rec := &scsitest.Recorder{Backend: backend.NewMem(blocks * block)}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	asked := 0
	rec.OnCall = func(call string) {
		if asked++; asked > 1 {
			return
		}
		expect(t, target, testUnitReady, nil, 0, "CHECK 2/04/1b")
		expect(t, target, cdb10(0x28, 0, 0, 1), nil, block, "CHECK 2/04/1b")
		expect(t, target, []byte{0x12, 0, 0, 0, 96, 0}, nil, 96, "GOOD")
		if a := expect(t, target, []byte{0x03, 0, 0, 0, 18, 0}, nil, 18, "GOOD"); hex.EncodeToString(a.Data) != "700002000000000a00000000041b00000000" {
			t.Errorf("REQUEST SENSE % x", a.Data)
		}
	}
	expect(t, target, sanitizeCDB(0x02, 0), nil, 0, "GOOD")
	if asked != 2 {
		t.Errorf("%d calls", asked)
	}
	expect(t, target, testUnitReady, nil, 0, "GOOD")
}

// TestSanitizeFailure: a unit of which SANITIZE has failed has no medium until one
// succeeds, or EXIT FAILURE MODE is allowed.
func TestSanitizeFailure(t *testing.T) {
	for _, v := range []struct {
		b1   byte // AUSE, IMMED
		want string
		exit string
	}{{0x02, "CHECK 3/31/03", "CHECK 5/24/00"}, {0x22, "CHECK 3/31/03", "GOOD"}, {0x82, "GOOD", "CHECK 5/24/00"}, {0xa2, "GOOD", "GOOD"}} {
		faulty := backend.NewFaulty(backend.NewMem(blocks*block), backend.Fault{Op: backend.OpDiscard, Nth: 1, Err: syscall.EIO})
		target := attach(t, scsi.UnitConfig{Backend: faulty})
		expect(t, target, sanitizeCDB(v.b1, 0), nil, 0, v.want)
		settle(target)
		expect(t, target, testUnitReady, nil, 0, "CHECK 3/31/03")
		expect(t, target, cdb10(0x2a, 0, 0, 1), make([]byte, block), 0, "CHECK 3/31/03")
		expect(t, target, sanitizeCDB(0x1f, 0), nil, 0, v.exit)
		expect(t, target, sanitizeCDB(0x02, 0), nil, 0, "GOOD")
		expect(t, target, testUnitReady, nil, 0, "GOOD")
	}
}
