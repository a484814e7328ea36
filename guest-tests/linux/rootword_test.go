package linux

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"regexp"
	"slices"
	"testing"
)

// mbr returns a disk of 8 MiB with a partition table in its MBR. The second partition, at
// rootStart, is for Linux, and has the given number of blocks.
func mbr(signature, blocks uint32) []byte {
	b := make([]byte, 8<<20)
	binary.LittleEndian.PutUint32(b[440:], signature)
	mbrPartition(b, 0, 0x82, 64, 1024)
	mbrPartition(b, 1, 0x83, rootStart, blocks)
	return b
}

// rootStart is the first block of the Linux partition.
const rootStart = 4096

func mbrPartition(b []byte, i int, kind byte, first, blocks uint32) {
	p := b[446+16*i:]
	p[4] = kind
	binary.LittleEndian.PutUint32(p[8:], first)
	binary.LittleEndian.PutUint32(p[12:], blocks)
	b[510], b[511] = 0x55, 0xaa
}

// gpt returns the same with a GUID partition table. A PARTUUID has the number of the disk in the
// top two bits of each byte.
func gpt(disk byte, blocks uint32) []byte {
	gpt := make([]byte, 8<<20)
	le := binary.LittleEndian
	all := uint64(len(gpt) / 512)
	mbrPartition(gpt, 0, 0xee, 1, uint32(all-1))
	entries := make([]byte, 128*128)
	for i, kind := range []string{"\x28\x73\x2a\xc1\x1f\xf8\xd2\x11\xba\x4b\x00\xa0\xc9\x3e\xc9\x3b",
		"\xe3\xbc\x68\x4f\xcd\xe8\xb1\x4d\x96\xe7\xfb\xca\xf9\x84\xb7\x09"} {
		e := entries[128*i:]
		copy(e, kind)
		for j := range 16 {
			e[16+j] = byte(16*(i+1)+j) ^ disk<<6
		}
		start, n := uint64(2048), uint64(1024)
		if i == 1 {
			start, n = rootStart, uint64(blocks)
		}
		le.PutUint64(e[32:], start)
		le.PutUint64(e[40:], start+n-1)
	}
	header := func(at, other, table uint64) {
		h := gpt[at*512:][:92]
		copy(h, "EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00")
		le.PutUint64(h[24:], at)
		le.PutUint64(h[32:], other)
		le.PutUint64(h[40:], 34)
		le.PutUint64(h[48:], all-34)
		copy(h[56:], "a disk of gvm's"+string('0'+disk))
		le.PutUint64(h[72:], table)
		le.PutUint32(h[80:], 128)
		le.PutUint32(h[84:], 128)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
		copy(gpt[table*512:], entries)
	}
	header(1, all-1, 2)
	header(all-1, 1, all-33)
	return gpt
}

var rootOnConsole = regexp.MustCompile(`Command line: .*\broot=PARTUUID=(\S+)`)

var luns = regexp.MustCompile(`name-\d+`)

// TestRootWord tests the root= that gvm adds for the first of four disks and a kernel without an
// initrd: Linux computes the same PARTUUID for that partition with any names of the disks.
func TestRootWord(t *testing.T) {
	k := kernel(t, "7.3")
	lunOf := map[string]string{"MBR": "0", "GPT": "4"} // in the guest that computes both
	firsts := map[string][]byte{"MBR": mbr(0x00c0ffee, 1024), "GPT": gpt(0, 1024)}
	var others []string
	for i, lun := range []int{1, 255, 300} {
		others = append(others, "--disk", fmt.Sprintf("%s,lun=%d", diskFile(t, content(fmt.Sprint(t.Name(), i), 8<<20)), lun))
	}
	script, disks := "", slices.Clone(others)
	want := map[string]string{}
	for name, first := range firsts {
		disk := diskFile(t, first)
		r := gvm(t, append([]string{"run", "--kernel", k.BZImage, "--memory", "512M", "--disk", disk}, others...)...)
		r.wantStatus(t, 5) // VFS: Unable to mount root fs: the kernel's disk driver is a module
		m := rootOnConsole.FindStringSubmatch(r.console)
		if m == nil {
			r.fatalf(t, "%s: no root=PARTUUID= on the kernel's command line", name)
		}
		disks = append(disks, "--disk", disk+",lun="+lunOf[name])
		script += "find_uuid " + name + " " + m[1] + "\n"
		want[name+"-partition"], want[name+"-lun"] = "2", lunOf[name]
	}
	r := guest{kernel: k, script: `
wait_for /dev/sda; wait_for /dev/sdb; wait_for /dev/sdc; wait_for /dev/sdd; wait_for /dev/sde
find_uuid() { # NAME PARTUUID
	for p in /sys/block/sd*/sd*[0-9]; do
		grep -qi "^PARTUUID=$2$" $p/uevent || continue
		say $1-partition $(cat $p/partition)
		lun=$(readlink -f $p/../device)
		say $1-lun ${lun##*:}
	done
}
for d in /sys/block/sd*; do
	lun=$(readlink -f $d/device)
	say name-${lun##*:} ${d##*/}
done
` + script}.run(t, disks...)
	r.wantStatus(t, 0)
	r.want(t, want)
	names := luns.FindAllString(r.console, -1)
	if slices.Sort(names); !slices.Equal(names, []string{"name-0", "name-1", "name-16684", "name-255", "name-4"}) {
		t.Errorf("LUNs %q, want 300 with the bits of flat space addressing", names)
	}
}
