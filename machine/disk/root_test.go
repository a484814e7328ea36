package disk

import (
	"encoding/binary"
	"hash/crc32"
	"strings"
	"testing"

	"gvm/devices/block"
)

const (
	linuxRootGUID = "\xe3\xbc\x68\x4f\xcd\xe8\xb1\x4d\x96\xe7\xfb\xca\xf9\x84\xb7\x09"
	linuxDataGUID = "\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4"
	espGUID       = "\x28\x73\x2a\xc1\x1f\xf8\xd2\x11\xba\x4b\x00\xa0\xc9\x3e\xc9\x3b"
)

// mbr makes a disk with an MBR's partition table.
func mbr(signature uint32, types ...byte) block.Backend {
	m := block.NewMem(1 << 20)
	b := make([]byte, 512)
	binary.LittleEndian.PutUint32(b[440:], signature)
	for i, t := range types {
		if t != 0 {
			p := b[446+16*i:]
			p[4] = t
			binary.LittleEndian.PutUint32(p[8:], uint32(64+i*64))
			binary.LittleEndian.PutUint32(p[12:], 64)
		}
	}
	b[510], b[511] = 0x55, 0xaa
	_, _ = m.WriteAt(b, 0)
	return m
}

// gpt makes a disk with a GUID partition table, whose partitions have the unique GUIDs 11…, 22…
func gpt(block int, types ...string) block.Backend {
	m := mbr(0, 0xee)
	entries := make([]byte, 128*128)
	for i, t := range types {
		e := entries[128*i:]
		copy(e, t)
		for j := range 16 {
			e[16+j] = byte(i+1) * 0x11
		}
		binary.LittleEndian.PutUint64(e[32:], 100)
		binary.LittleEndian.PutUint64(e[40:], 120)
	}
	h := make([]byte, 92)
	copy(h, "EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00")
	binary.LittleEndian.PutUint64(h[24:], 1)
	binary.LittleEndian.PutUint64(h[72:], 2)
	binary.LittleEndian.PutUint32(h[80:], 128)
	binary.LittleEndian.PutUint32(h[84:], 128)
	binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h))
	_, _ = m.WriteAt(h, int64(block))
	_, _ = m.WriteAt(entries, int64(2*block))
	return m
}

func broken(b block.Backend, at int64) block.Backend {
	_, _ = b.WriteAt([]byte{0xa5}, at)
	return b
}

// TestRoot checks root= for a kernel without an initrd: a word that names the first disk in any
// order in which Linux may find the disks, or no word and a note.
func TestRoot(t *testing.T) {
	plain := func() block.Backend { return block.NewMem(1 << 20) }
	guid := func(digit string) string {
		return "PARTUUID=" + strings.Repeat(digit, 8) + strings.Repeat("-"+strings.Repeat(digit, 4), 3) + "-" +
			strings.Repeat(digit, 12)
	}
	for _, tt := range []struct {
		name  string
		block int
		disks []block.Backend
		want  string // "" for a note
	}{
		{"a file system alone", 512, []block.Backend{plain()}, "/dev/sda"},
		{"a target of the kernel's alone", 512, []block.Backend{nil}, "/dev/sda"},
		{"two file systems", 512, []block.Backend{plain(), plain()}, ""},
		{"with a target of the kernel's", 512, []block.Backend{plain(), nil}, ""},
		{"MBR", 512, []block.Backend{mbr(0xdeadbeef, 0x82, 0x83)}, "PARTUUID=deadbeef-02"},
		{"MBR and others", 512, []block.Backend{mbr(0x0a, 0x83), plain(), mbr(0x0b, 0x83)}, "PARTUUID=0000000a-01"},
		{"MBR and its clone", 512, []block.Backend{mbr(0x0a, 0x83), mbr(0x0a, 0x83)}, ""},
		{"MBR and its clone with an extended partition", 512,
			[]block.Backend{mbr(0x0a, 0x83), mbr(0x0a, 0x83, 0x05)}, ""},
		{"MBR and another with an extended partition", 512,
			[]block.Backend{mbr(0x0a, 0, 0x83), mbr(0x0a, 0x83, 0x05)}, "PARTUUID=0000000a-02"},
		{"two partitions", 512, []block.Backend{mbr(0x0a, 0x83, 0x83)}, ""},
		{"extended", 512, []block.Backend{mbr(0x0a, 0x83, 0x05)}, ""},
		{"no Linux partition", 512, []block.Backend{mbr(0x0a, 0x0c)}, ""},
		{"a boot sector", 512, []block.Backend{mbr(0x0a)}, "/dev/sda"},
		{"no partition table", 512, []block.Backend{broken(mbr(0x0a, 0x83), 446)}, "/dev/sda"},
		{"GPT, root by type", 512, []block.Backend{gpt(512, espGUID, linuxDataGUID, linuxRootGUID), plain()},
			guid("3")},
		{"GPT, 4096", 4096, []block.Backend{gpt(4096, espGUID, linuxDataGUID), plain()}, guid("2")},
		{"GPT, two of Linux", 512, []block.Backend{gpt(512, linuxDataGUID, linuxDataGUID)}, ""},
		{"GPT, two roots", 512, []block.Backend{gpt(512, linuxRootGUID, linuxRootGUID)}, ""},
		{"GPT and its clone", 512, []block.Backend{gpt(512, linuxDataGUID), gpt(512, linuxRootGUID)}, ""},
		{"GPT header broken", 512, []block.Backend{broken(gpt(512, linuxDataGUID), 512+60)}, ""},
		{"GPT entries broken", 512, []block.Backend{broken(gpt(512, linuxDataGUID), 1024+56)}, ""},
		{"GPT of another block size", 4096, []block.Backend{gpt(512, linuxDataGUID)}, ""},
	} {
		var disks []rootDisk
		for _, b := range tt.disks {
			disks = append(disks, rootDisk{b, tt.block})
		}
		got, why := rootWord(disks)
		if got != tt.want || (why == "") != (tt.want != "") || got == "" && !strings.Contains(why, "root=") {
			t.Errorf("%s: root=%s, %q; want %q", tt.name, got, why, tt.want)
		}
	}
}

// FuzzPartitions reads partition tables of arbitrary disks. The number of partitions is bounded.
func FuzzPartitions(f *testing.F) {
	for _, b := range []block.Backend{mbr(1, 0x83), gpt(512, linuxRootGUID)} {
		seed := make([]byte, 20<<10)
		_, _ = b.ReadAt(seed, 0)
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		m := block.NewMem(1 << 20)
		_, _ = m.WriteAt(image[:min(len(image), 1<<20)], 0)
		parts, ok := partitions(rootDisk{m, 512})
		if len(parts) > 4096 || !ok && len(parts) > 0 {
			t.Errorf("%d partitions, %v", len(parts), ok)
		}
	})
}
