package scsi

// logPages are the pages of LOG SENSE by page code and subpage code, with their parameters: the
// lists of pages, and Informational Exceptions (SPC-5 7.3.9).
var logPages = []struct {
	code, sub byte
	data      []byte
}{
	{0x00, 0x00, []byte{0x00, 0x2f}},                         // Supported Log Pages
	{0x00, 0xff, []byte{0x00, 0x00, 0x00, 0xff, 0x2f, 0x00}}, // Supported Log Pages and Subpages
	// No exception, no temperature, and no warning temperature (by custom the vendor specific
	// byte).
	{0x2f, 0x00, []byte{0x00, 0x00, 0x03, 0x04, 0x00, 0x00, 0xff, 0xff}},
}

// logSense is LOG SENSE (SPC-5 6.9). No page has counters, so all values of PAGE CONTROL mean the
// same.
func logSense(tk *task) error {
	cdb := tk.CDB
	if cdb[1]&0x01 != 0 {
		return invalidCDB(1, 0) // SP: nothing can be saved
	}
	for _, p := range logPages {
		if p.code != cdb[2]&0x3f || p.sub != cdb[3] {
			continue
		}
		if cdb[5] != 0 || cdb[6] != 0 {
			return invalidCDB(5, 7) // PARAMETER POINTER: no page has a parameter other than 0
		}
		b := []byte{p.code, p.sub, 0, byte(len(p.data))}
		if p.sub != 0 {
			b[0] |= 0x40 // SPF
		}
		return tk.reply(append(b, p.data...))
	}
	if cdb[3] != 0 {
		return invalidCDB(3, 7)
	}
	return invalidCDB(2, 5)
}
