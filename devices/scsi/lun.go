package scsi

// ReportLUNsWLUN is the REPORT LUNS well-known logical unit (SAM-5 4.7.7.5.1).
// Every target has it.
const ReportLUNsWLUN LUN = 0xc101 << 48

// EncodeLUN returns the LUN of logical unit n: peripheral device addressing up
// to 255, flat space addressing up to 16383 (SAM-5 4.7.5, 4.7.7). It reports
// false for a number that single level addressing cannot hold.
func EncodeLUN(n int) (LUN, bool) {
	switch {
	case n < 0 || n > 0x3fff:
		return 0, false
	case n < 256:
		return LUN(n) << 48, true
	}
	return LUN(0x4000|n) << 48, true
}

// DecodeLUN returns the number of a single level LUN, in peripheral device
// addressing on bus 0 or in flat space addressing. It reports false for every
// other form, the well-known logical units among them.
func DecodeLUN(l LUN) (n int, ok bool) {
	if l&(1<<48-1) != 0 {
		return 0, false
	}
	switch first := int(l >> 48); first >> 14 {
	case 0:
		return first & 0xff, first>>8 == 0
	case 1:
		return first & 0x3fff, true
	}
	return 0, false
}

// canonical returns the form under which a LUN is stored: an initiator may address LUN 5 as 0005h
// or 4005h, as Linux does for virtio-scsi.
func (l LUN) canonical() LUN {
	if l&^(0xff<<48) == 0 { // as nearly all are
		return l
	}
	if n, ok := DecodeLUN(l); ok {
		l, _ = EncodeLUN(n)
	}
	return l
}
