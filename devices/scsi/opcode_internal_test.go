package scsi

import (
	"slices"
	"testing"
)

// TestRows checks that the parts of each row agree.
func TestRows(t *testing.T) {
	for i := range opcodes {
		for _, o := range append(opcodes[i].actions, opcodes[i]) {
			if o.run == nil {
				continue
			}
			taken := map[int]bool{}
			for _, f := range []field{o.extent.lba, o.extent.blocks, o.list} {
				size := (int(f.bits) + 7) / 8
				if f != (field{}) && (f.at < 1 || int(f.at)+size > o.length()-1) {
					t.Errorf("%s: %+v is not inside a CDB of %d bytes", o.name, f, o.length())
				}
				if !slices.Contains([]uint8{0, 8, 16, 21, 32, 64}, f.bits) {
					t.Errorf("%s: field.of reads no number of %d bits", o.name, f.bits)
				}
				for at := int(f.at); at < int(f.at)+size; at++ {
					if taken[at] {
						t.Errorf("%s: byte %d is part of two numbers", o.name, at)
					}
					taken[at] = true
				}
			}
			list := o.data == listIn || o.data == listOut
			for what, wrong := range map[string]bool{
				"blocks without an address":             o.data.ofBlocks() && o.extent.lba == field{},
				"blocks without their number":           o.data.ofBlocks() && o.extent.blocks == field{},
				"blocks, but not of the medium":         o.data.ofBlocks() && o.flags&medium == 0,
				"a number of blocks without an address": o.extent.lba == field{} && o.extent.blocks != field{},
				"no length of its data":                 list && o.list == field{} && o.name != "READ CAPACITY(10)",
				"a length of no data":                   !list && o.list != field{} && i != 0x48,
				"a FUA bit that is not looked at":       o.flags&fuaBit != 0 && o.usage[0]&0x08 == 0,
				"an UNMAP bit that is not looked at":    o.data == oneBlock && o.usage[0]&0x08 == 0,
				"two ways of counting":                  o.data.ofBlocks() && o.flags&(counts|countsSegments) != 0,
				"counts twice, and no blocks":           !o.data.ofBlocks() && o.flags&countsTwice != 0,
			} {
				if wrong {
					t.Errorf("%s: %s", o.name, what)
				}
			}
		}
	}
}
