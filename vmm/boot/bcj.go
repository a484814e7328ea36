package boot

import "encoding/binary"

// undoX86 undoes the x86 branch filter of xz in place: the operands of CALL
// (E8) and JMP (E9) were made absolute, so that calls of one function look
// alike to LZMA. An operand counts only when its top byte is 0 or FF, and
// an opcode byte up to three bytes before may exclude it: prevMask keeps which of
// those there were.
func undoX86(b []byte, start uint32) {
	// Whether an operand is taken, and which byte of it an opcode before may
	// have been meant for, both by prevMask.
	allowed := [8]bool{true, true, true, false, true, false, false, false}
	byteNo := [8]uint{0, 1, 2, 2, 3, 3, 3, 3}
	top := func(v byte) bool { return v == 0 || v == 0xff }
	prevMask, prev := uint32(0), -5
	for i := 0; i+5 <= len(b); i++ {
		if b[i]&0xfe != 0xe8 {
			continue
		}
		if gap := i - prev; gap > 3 {
			prevMask = 0
		} else if prevMask = prevMask << (gap - 1) & 7; prevMask != 0 {
			if !allowed[prevMask] || top(b[i+4-int(byteNo[prevMask])]) {
				prev = i
				prevMask = prevMask<<1 | 1
				continue
			}
		}
		prev = i
		if !top(b[i+4]) {
			prevMask = prevMask<<1 | 1
			continue
		}
		src := binary.LittleEndian.Uint32(b[i+1:])
		var dest uint32
		// Twice at most: the byte that is looked at was neither 0 nor FF at
		// first, and its complement is what the second round gives.
		for {
			dest = src - (start + uint32(i) + 5)
			if prevMask == 0 {
				break
			}
			shift := byteNo[prevMask] * 8
			if !top(byte(dest >> (24 - shift))) {
				break
			}
			src = dest ^ (1<<(32-shift) - 1)
		}
		dest &= 1<<25 - 1
		if dest&(1<<24) != 0 {
			dest |= 0xff000000
		}
		binary.LittleEndian.PutUint32(b[i+1:], dest)
		i += 4
	}
}
