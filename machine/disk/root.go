package disk

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
)

// rootDisk is a disk that may have the root file system of a kernel without an initrd.
type rootDisk struct {
	image     io.ReaderAt // nil: a target of the kernel, which gvm does not read
	blockSize int
}

// rootWord returns root= for a kernel without an initrd, which finds the root itself (Linux,
// block/early-lookup.c): the first disk, or its only partition that can be the root. If no word is
// sure to name it, rootWord returns "" and the reason. A name such as /dev/sda is sure only for a
// single disk: sd_probe runs for all disks at once, in any order of LUNs, and no kernel parameter
// orders it (PROBE_PREFER_ASYNCHRONOUS). A PARTUUID is sure if no other disk has it.
func rootWord(disks []rootDisk) (word, why string) {
	none := func(format string, args ...any) (string, string) {
		return "", "no root= is added: " + fmt.Sprintf(format, args...) + "; add root= to --cmdline, or an initrd"
	}
	var parts []partition
	partitioned := false
	if disks[0].image != nil {
		parts, partitioned = partitions(disks[0])
	}
	if !partitioned {
		if len(disks) > 1 {
			return none("Linux names several disks in any order, and the first has no partition to name by PARTUUID")
		}
		return "/dev/sda", ""
	}
	var root []partition
	for _, use := range []partitionUse{linuxRoot, linuxData} {
		for _, p := range parts {
			if p.use == use {
				root = append(root, p)
			}
		}
		if len(root) > 0 {
			break
		}
	}
	if len(root) != 1 {
		return none("%d partitions of the first disk may have the root file system", len(root))
	}
	for _, d := range disks[1:] {
		if d.image == nil {
			continue
		}
		others, _ := partitions(d)
		for _, p := range others {
			if strings.HasPrefix(p.uuid, root[0].uuid) { // Linux compares only this prefix
				return none("another disk has a partition with the PARTUUID %s too", root[0].uuid)
			}
		}
	}
	return "PARTUUID=" + root[0].uuid, ""
}

// partition is a row of a partition table.
type partition struct {
	uuid string // in the form of PARTUUID=
	use  partitionUse
}

// partitionUse is the use that a partition's type declares.
type partitionUse int

const (
	otherUse partitionUse = iota
	linuxData
	linuxRoot
)

// Types of GPT partitions: the Discoverable Partitions Specification's "Root Partition (amd64)",
// and "Linux filesystem".
var gptUses = map[string]partitionUse{
	"4f68bce3-e8cd-4db1-96e7-fbcaf984b709": linuxRoot,
	"0fc63daf-8483-4772-8e79-3d69d8477de4": linuxData,
}

// Types of MBR partitions (UEFI 2.10, 5.2).
const (
	mbrLinux      = 0x83
	mbrProtective = 0xee
)

// partitions reads a disk's partition table, and reports whether it has one. A table that is broken
// has no partitions. Of one that gvm does not read to its end none can be the root.
func partitions(d rootDisk) ([]partition, bool) {
	b := make([]byte, 512)
	if n, _ := d.image.ReadAt(b, 0); n < len(b) || b[510] != 0x55 || b[511] != 0xaa {
		return nil, false
	}
	signature := binary.LittleEndian.Uint32(b[440:])
	var list []partition
	found, chained := false, false
	for i := range 4 {
		p := b[446+16*i:][:16]
		if p[0]&0x7f != 0 {
			return nil, false // not a boot indicator: a boot sector of a file system
		}
		if p[4] == mbrProtective {
			return gptPartitions(d), true
		}
		if binary.LittleEndian.Uint32(p[12:]) == 0 {
			continue
		}
		found = true
		switch p[4] {
		case 0x05, 0x0f, 0x85:
			chained = true
		case mbrLinux:
			list = append(list, partition{fmt.Sprintf("%08x-%02x", signature, i+1), linuxData})
		default:
			list = append(list, partition{fmt.Sprintf("%08x-%02x", signature, i+1), otherUse})
		}
	}
	if chained { // an extended partition has any number of logical ones, with other numbers
		for i := range list {
			list[i].use = otherUse
		}
	}
	return list, found
}

// gptPartitions reads a GUID partition table (UEFI 2.10, 5.3) by its primary header.
func gptPartitions(d rootDisk) []partition {
	const headerSize, most = 92, 1 << 20
	h := make([]byte, headerSize)
	le := binary.LittleEndian
	if n, _ := d.image.ReadAt(h, int64(d.blockSize)); n < len(h) || string(h[:8]) != "EFI PART" ||
		le.Uint32(h[12:]) != headerSize {
		return nil
	}
	sum := le.Uint32(h[16:])
	clear(h[16:20])
	at, entries, size := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if crc32.ChecksumIEEE(h) != sum || at > 1<<40 || size != 128 || uint64(entries)*uint64(size) > most {
		return nil
	}
	table := make([]byte, entries*size)
	n, _ := d.image.ReadAt(table, int64(at)*int64(d.blockSize))
	if n < len(table) || crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
		return nil
	}
	var list []partition
	for ; len(table) > 0; table = table[size:] {
		if kind := guid(table); kind != guid(make([]byte, 16)) {
			list = append(list, partition{guid(table[16:]), gptUses[kind]})
		}
	}
	return list
}

// guid writes a GUID as Linux does: three fields are little-endian (UEFI 2.10, appendix A).
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}
