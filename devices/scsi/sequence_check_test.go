package scsi_test

import (
	"bytes"
	"encoding/binary"
	"slices"

	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// check holds an answer against the model.
func (s *sequence) check(u *modelUnit, nexus int, cdb, out, in []byte, a scsitest.Answer, before []byte, changes int) {
	t, name := s.t, scsi.OpcodeName(cdb)
	key, asc, ascq := a.Codes()
	switch a.Status {
	case scsi.Good, scsi.ReservationConflict:
		if len(a.Sense) > 0 {
			t.Errorf("%s: status %02x with sense % x", name, a.Status, a.Sense)
		}
	case scsi.CheckCondition:
		if len(a.Sense) < 8 || key == 0 {
			t.Errorf("%s: CHECK CONDITION with sense % x", name, a.Sense)
		}
		if (key == scsi.MediumError || key == scsi.HardwareError || key == scsi.AbortedCommand) && !u.disk.failing &&
			!u.sanitized && cdb[0] != 0x83 {
			t.Errorf("%s: %v with a sound backend", name, a)
		}
	default:
		t.Errorf("%s: status %02x", name, a.Status)
	}
	if int(a.Residual) > len(in)+len(out) {
		t.Errorf("%s: residual %d of %d bytes", name, a.Residual, len(in)+len(out))
	}
	if cdb[0] == 0xa0 && a.Status == scsi.Good {
		for _, u := range s.units {
			q := &u.attentions[nexus].queue
			*q = slices.DeleteFunc(*q, func(code string) bool { return code == "3f0e" })
		}
		s.luns(cdb, in, a)
	}
	if !u.attached {
		if u.disk.changes != changes {
			t.Errorf("%s: a unit that is not there is written to", name)
		}
		return
	}
	s.attention(u, nexus, cdb, in, a, string([]byte{"0123456789abcdef"[asc>>4], "0123456789abcdef"[asc&15],
		"0123456789abcdef"[ascq>>4], "0123456789abcdef"[ascq&15]}))
	protected := u.cfg.ReadOnly || u.swp
	medium := !bytes.Contains([]byte{0x48, 0x83}, cdb[:1]) // these work on a unit that is stopped
	if u.disk.changes != changes && (a.Status == scsi.ReservationConflict || key == scsi.UnitAttention ||
		key == scsi.IllegalRequest || protected || u.stopped && medium) {
		t.Errorf("%s % x: the medium is written to: %v, protected %v, stopped %v", name, cdb, a, protected, u.stopped)
	}
	if a.Status == scsi.Good || key == scsi.MediumError && bytes.Contains([]byte{0x15, 0x55}, cdb[:1]) {
		s.predict(u, nexus, cdb, out, in, a) // MODE SELECT takes effect although the flush failed
	}
	if u.disk.failing || cdb[0] == 0x83 {
		for _, u := range s.units { // any part may have been done
			u.content = u.disk.all()
		}
	}
	if got := u.disk.all(); !bytes.Equal(got, u.content) {
		t.Fatalf("%s % x, %v: the medium is not as it should be", name, cdb, a)
	}
	if !u.disk.failing && a.Status != scsi.Good && !bytes.Equal(before, u.content) {
		t.Errorf("%s: %v, and the medium has changed", name, a)
	}
	u.doubt = u.doubt || u.disk.failing
	// IMMED: a failure is told later
	flushes := (cdb[0] == 0x35 || cdb[0] == 0x91) && (cdb[1]&0x02 == 0 || !u.disk.failing)
	if a.Status == scsi.Good && u.disk.dirty && (flushes || !u.wce && !u.doubt) {
		t.Errorf("%s is answered before the writes are durable", name)
	}
	u.doubt = u.doubt && u.disk.dirty
	if cdb[0] == 0x48 && a.Status == scsi.Good {
		u.sanitized = u.disk.failing
	}
}

// attention is check for unit attention conditions.
func (s *sequence) attention(u *modelUnit, nexus int, cdb, in []byte, a scsitest.Answer, code string) {
	n := &u.attentions[nexus]
	key, _, _ := a.Codes()
	if cdb[0] == 0x03 && a.Status == scsi.Good { // REQUEST SENSE takes one
		switch moved := len(in) - int(a.Residual); {
		case len(n.queue) > 0 && moved < 14:
			n.unknown = true
		case len(n.queue) > 0 && in[0]&0x7e == 0x70 && in[2] == 6 && in[12] != 0x2a ||
			len(n.queue) > 0 && in[0]&0x7e == 0x72 && in[1] == 6 && in[2] != 0x2a:
			n.queue = n.queue[1:]
		default:
			n.unknown = true
		}
	}
	reservations := []string{"2a03", "2a04", "2a05"}
	switch {
	case n.unknown:
		if a.Status == scsi.Good && cdb[0] == 0x00 {
			*n = attentions{seen: true} // nothing is left
		} else if code == "2901" || code == "2903" || code == "2907" {
			n.queue = nil
		}
	case key == scsi.UnitAttention && slices.Contains(reservations, code):
	case key == scsi.UnitAttention && (len(n.queue) == 0 || n.queue[0] != code):
		s.t.Fatalf("%s: unit attention %s, want one of %v", scsi.OpcodeName(cdb), code, n.queue)
	case key == scsi.UnitAttention:
		n.queue = n.queue[1:]
	case a.Status == scsi.Good && len(n.queue) > 0 && !bytes.Contains([]byte{0x12, 0xa0, 0x03}, cdb[:1]):
		s.t.Fatalf("%s: GOOD, and %v pending", scsi.OpcodeName(cdb), n.queue)
	}
}

// luns holds the inventory of REPORT LUNS against the units there are.
func (s *sequence) luns(cdb, in []byte, a scsitest.Answer) {
	if cdb[2] != 0 || len(in)-int(a.Residual) < 4 {
		return
	}
	n := 0
	for _, u := range s.units {
		if u.attached {
			n++
		}
	}
	if got := int(binary.BigEndian.Uint32(in)); got != 8*n {
		s.t.Errorf("REPORT LUNS: %d bytes for %d units", got, n)
	}
}

// extent is where a command reads or writes, if it does.
func extent(cdb []byte) (lba, n int) {
	be := binary.BigEndian
	switch cdb[0] >> 5 {
	case 0:
		if n = int(cdb[4]); n == 0 {
			n = 256
		}
		return int(be.Uint32(cdb) & 0x1fffff), n
	case 1, 2:
		return int(be.Uint32(cdb[2:])), int(be.Uint16(cdb[7:]))
	case 5:
		return int(be.Uint32(cdb[2:])), int(be.Uint32(cdb[6:]))
	}
	return int(be.Uint64(cdb[2:])), int(be.Uint32(cdb[10:]))
}

// predict applies a command that ended GOOD to the model, and checks its data.
func (s *sequence) predict(u *modelUnit, nexus int, cdb, out, in []byte, a scsitest.Answer) {
	be, size := binary.BigEndian, u.disk.block
	lba, n := extent(cdb)
	part := func(n int) []byte { return u.content[lba*size : (lba+n)*size] }
	switch cdb[0] {
	case 0x08, 0x28, 0x88, 0xa8:
		if got := in[:min(n*size, len(in))]; !bytes.Equal(got, part(n)[:len(got)]) {
			s.t.Errorf("%s % x: wrong data", scsi.OpcodeName(cdb), cdb)
		}
	case 0x0a, 0x2a, 0x8a, 0xaa, 0x2e, 0x8e, 0xae:
		copy(part(n), out)
	case 0x8b: // ORWRITE
		for i := range part(n) {
			part(n)[i] |= out[i]
		}
	case 0x89: // COMPARE AND WRITE
		n = int(cdb[13])
		if !bytes.Equal(part(n), out[:n*size]) {
			s.t.Error("COMPARE AND WRITE is GOOD, and the medium is not so")
		}
		copy(part(n), out[n*size:])
	case 0x41, 0x93: // WRITE SAME
		for i := range n {
			if cdb[0] == 0x93 && cdb[1]&1 != 0 {
				clear(part(n))
				break
			}
			copy(part(n)[i*size:(i+1)*size], out)
		}
	case 0x2f, 0x8f, 0xaf: // VERIFY
		if check := cdb[1] >> 1 & 3; check == 1 && !bytes.Equal(part(n), out[:n*size]) {
			s.t.Error("VERIFY is GOOD, and the medium is not so")
		}
	case 0x42: // UNMAP
		if list := int(be.Uint16(cdb[7:])); list >= 8 {
			for d := out[8:min(8+int(be.Uint16(out[2:]))/16*16, list)]; len(d) >= 16; d = d[16:] {
				lba, n = int(be.Uint64(d)), int(be.Uint32(d[8:]))
				clear(part(n))
			}
		}
	case 0x48: // SANITIZE
		switch cdb[1] & 0x1f {
		case 1:
			for i := 0; i < len(u.content); i += int(be.Uint16(out[2:])) {
				copy(u.content[i:], out[4:4+be.Uint16(out[2:])])
			}
		case 2:
			clear(u.content)
		}
	case 0x1b: // START STOP UNIT
		u.stopped = cdb[4]&0xf1 == 0 // neither START nor the power condition ACTIVE
	case 0x25:
		if len(in) >= 8 && int(be.Uint32(in))+1 != len(u.content)/size {
			s.t.Errorf("READ CAPACITY(10): %d blocks of %d", be.Uint32(in)+1, len(u.content)/size)
		}
	case 0x15, 0x55:
		s.modeSelect(u, nexus, cdb, out)
	case 0x1a, 0x5a:
		s.modeSense(u, cdb, in, a)
	}
}

// modeSelect takes the pages that parameters makes.
func (s *sequence) modeSelect(u *modelUnit, nexus int, cdb, out []byte) {
	header, size := 4, int(cdb[4])
	if cdb[0] == 0x55 {
		header, size = 8, int(binary.BigEndian.Uint16(cdb[7:]))
	}
	if size <= header {
		return
	}
	p := out[header:size]
	switch {
	case len(p) >= 3 && p[0]&0x7f == 0x08 && u.wce != (p[2]&4 != 0):
		u.wce = !u.wce
		u.tell("2a01", nexus)
	case len(p) >= 5 && p[0]&0x7f == 0x0a:
		if swp, dSense := p[4]&8 != 0, p[2]&4 != 0; swp != u.swp || dSense != u.dSense {
			u.swp, u.dSense = swp, dSense
			u.tell("2a01", nexus)
		}
	}
}

// modeSense checks WP and the caching page.
func (s *sequence) modeSense(u *modelUnit, cdb, in []byte, a scsitest.Answer) {
	header, specific := 4, 2
	if cdb[0] == 0x5a {
		header, specific = 8, 3
	}
	moved := len(in) - int(a.Residual)
	if moved <= header+16 || cdb[1]&0x08 == 0 || cdb[2] != 0x08 { // DBD, the current caching page
		return
	}
	if wp := in[specific]&0x80 != 0; wp != (u.cfg.ReadOnly || u.swp) {
		s.t.Errorf("MODE SENSE: WP %v", wp)
	}
	if wce := in[header+2]&4 != 0; wce != u.wce {
		s.t.Errorf("MODE SENSE: WCE %v, want %v", wce, u.wce)
	}
}
