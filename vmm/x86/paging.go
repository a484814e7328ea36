package x86

import (
	"encoding/binary"

	"github.com/bobuhiro11/gokvm/kvm"
)

// Bits of paging entries (Intel SDM 3, 4.3 to 4.5).
const (
	entryPresent = 1 << 0
	entryPS      = 1 << 7 // the entry maps a large page; only where it may refer to a table
	entryAddr    = 0x000f_ffff_ffff_f000
)

// Translate returns the guest physical address of a linear address in the paging mode of s; ok is
// false if it is not mapped. It ignores access rights. read reads guest physical memory; the tables
// are the guest's, and may say anything.
func Translate(read func(gpa uint64, p []byte) error, s *kvm.Sregs, linear uint64) (gpa uint64, ok bool) {
	long := s.EFER&eferLMA != 0 && s.CR0&cr0PG != 0
	if !long && linear>>32 != 0 {
		return 0, false
	}
	table, levels, size := s.CR3&entryAddr, uint(4), 8 // size of an entry
	switch {
	case s.CR0&cr0PG == 0:
		return linear, true
	case long:
		if s.CR4&cr4LA57 != 0 {
			levels = 5
		}
		unused := 64 - 12 - 9*levels
		if uint64(int64(linear<<unused)>>unused) != linear { // not canonical
			return 0, false
		}
	case s.CR4&cr4PAE != 0:
		table, levels = s.CR3&0xffff_ffe0, 3
	default:
		table, levels, size = s.CR3&0xffff_f000, 2, 4
	}
	bits := uint(9) // of the linear address for a table
	if size == 4 {
		bits = 10
	}
	for level := levels; level > 0; level-- {
		shift := 12 + bits*(level-1)
		index := linear >> shift & (1<<bits - 1)
		var b [8]byte
		if read(table+index*uint64(size), b[:size]) != nil {
			return 0, false
		}
		entry := binary.LittleEndian.Uint64(b[:])
		if entry&entryPresent == 0 {
			return 0, false
		}
		offset := linear & (1<<shift - 1)
		switch {
		case level == 1:
		case size == 4 && level == 2 && entry&entryPS != 0 && s.CR4&cr4PSE != 0: // 4 MiB, PSE-36
			return entry>>13&0xff<<32 | entry&0xffc0_0000 | offset, true
		case size == 8 && (level == 2 || level == 3 && long) && entry&entryPS != 0:
		default:
			table = entry & entryAddr
			continue
		}
		return entry&entryAddr&^(1<<shift-1) | offset, true
	}
	return 0, false
}
