package scsi

import "encoding/binary"

// testUnitReady is TEST UNIT READY (SPC-5 6.49). Dispatch has checked that the unit is ready.
func testUnitReady(*task) error { return nil }

// requestSense is REQUEST SENSE (SPC-5 6.39): a pending unit attention, else the reason why the
// unit is not ready.
func requestSense(tk *task) error {
	s := Sense{Key: NoSense}
	if tk.u == nil {
		s = LUNNotSupported
	} else if ua, ok := tk.u.set.takeAttention(tk.Nexus); ok {
		s = ua
	} else if err := tk.u.notReady(); err != nil {
		s = senseOf(err)
	}
	return tk.reply(s.encode(tk.CDB[1]&0x01 != 0))
}

// reportLUNs is REPORT LUNS (SPC-5 6.33).
func reportLUNs(tk *task) error {
	var luns []LUN
	switch tk.CDB[2] {
	case 0x00, 0x11: // 11h leaves out subsidiary units; there are none
		luns = tk.t.LUNs()
	case 0x01:
		luns = []LUN{ReportLUNsWLUN}
	case 0x02:
		luns = append(tk.t.LUNs(), ReportLUNsWLUN)
	case 0x10, 0x12: // administrative and subsidiary units
	default:
		return invalidCDB(2, 7)
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(8*len(luns)))
	b = append(b, zeros4...)
	for _, l := range luns {
		b = binary.BigEndian.AppendUint64(b, uint64(l))
	}
	for _, u := range tk.t.all() {
		u.set.clearAttention(tk.Nexus, LUNsChanged)
	}
	return tk.reply(b)
}

// timeouts is a command timeouts descriptor that names no timeout (SPC-5
// 6.35.4).
const timeouts = "\x00\x0a" + "\x00\x00" + zeros4 + zeros4

// reportSupportedOpcodes is REPORT SUPPORTED OPERATION CODES (SPC-5 6.35).
func reportSupportedOpcodes(tk *task) error {
	rctd := tk.CDB[2]&0x80 != 0
	code, action := tk.CDB[3], binary.BigEndian.Uint16(tk.CDB[4:])
	row := &opcodes[code]
	has := row.name != ""
	switch tk.CDB[2] & 0x07 {
	case 0: // all commands
		return tk.reply(allOpcodes(tk.u, rctd))
	case 1: // an operation code without service actions
		if row.actions != nil {
			return invalidCDB(2, 2)
		}
	case 2: // one with them
		if has && row.actions == nil {
			return invalidCDB(2, 2)
		}
		has = has && findAction(&row, action)
	case 3: // either
		if row.actions != nil {
			has = findAction(&row, action)
		} else {
			has = has && action == 0
		}
	default:
		return invalidCDB(2, 2)
	}
	return tk.reply(oneOpcode(tk.u, code, row, has, rctd))
}

// findAction replaces row by the row of its service action.
func findAction(row **opcode, action uint16) bool {
	if action > 0x1f {
		return false
	}
	a := (*row).find(byte(action))
	if a == nil {
		return false
	}
	*row = a
	return true
}

// oneOpcode is the one_command parameter data (SPC-5 6.35.3).
func oneOpcode(u *Unit, code byte, row *opcode, has, rctd bool) []byte {
	if !has || !row.exists(u) {
		return []byte{0, 0x01, 0, 0} // not supported
	}
	b := []byte{0, 0x03, 0, byte(row.length())} // supported as the standard says
	b = append(b, row.usageData(code)...)
	if rctd {
		b[1] |= 0x80 // CTDP
		b = append(b, timeouts...)
	}
	return b
}

// allOpcodes is the all_commands parameter data (SPC-5 6.35.2).
func allOpcodes(u *Unit, rctd bool) []byte {
	b := make([]byte, 4)
	add := func(code int, row *opcode, service bool) {
		if !row.exists(u) {
			return
		}
		d := [8]byte{0: byte(code), 7: byte(row.length())}
		if service {
			d[3] = row.action()
			d[5] |= 0x01 // SERVACTV
		}
		if rctd {
			d[5] |= 0x02 // CTDP
		}
		b = append(b, d[:]...)
		if rctd {
			b = append(b, timeouts...)
		}
	}
	for i := range opcodes {
		row := &opcodes[i]
		for j := range row.actions {
			add(i, &row.actions[j], true)
		}
		if row.run != nil {
			add(i, row, false)
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// reportSupportedTMFs is REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-5
// 6.36).
func reportSupportedTMFs(tk *task) error {
	// ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, QUERY
	// TASK; QUERY TASK SET, I_T NEXUS RESET.
	b := []byte{0x80 | 0x40 | 0x10 | 0x08 | 0x04, 0x02 | 0x01, 0, 0}
	if tk.CDB[2]&0x80 != 0 { // REPD: with the timeouts, all unknown
		b[3] = 0x0c
		b = append(b, make([]byte, 12)...)
	}
	return tk.reply(b)
}

// startStopUnit is START STOP UNIT (SBC-4 5.31). The unit ejects nothing and has only the power
// conditions active and stopped.
func startStopUnit(tk *task) error {
	cdb, u := tk.CDB, tk.u
	start, noFlush := cdb[4]&0x01 != 0, cdb[4]&0x04 != 0
	switch condition := cdb[4] >> 4; {
	case cdb[3]&0x0f != 0:
		return invalidCDB(3, 3) // POWER CONDITION MODIFIER
	case condition == 1: // ACTIVE: START and LOEJ are ignored
		start = true
	case condition != 0:
		return invalidCDB(4, 7)
	case cdb[4]&0x02 != 0:
		return invalidCDB(4, 1) // LOEJ
	}
	if start {
		u.stopped.Store(false)
		return nil
	}
	was := u.stopped.Swap(true)
	switch {
	case noFlush:
		return nil
	case cdb[1]&0x01 != 0: // IMMED
		tk.flushAfter = true
		return nil
	}
	err := u.flush()
	if err != nil || tk.stopped() { // it failed or was aborted: restore the state
		u.stopped.Store(was)
	}
	return err
}

// preventAllow is PREVENT ALLOW MEDIUM REMOVAL (SBC-4 5.15). The medium cannot be removed, so the
// unit keeps no state for it.
func preventAllow(tk *task) error {
	if tk.CDB[4]&0x02 != 0 {
		return invalidCDB(4, 1)
	}
	return nil
}
