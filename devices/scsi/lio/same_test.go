package lio

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
)

// ask returns the answer of package scsi's unit to INQUIRY.
func ask(t *testing.T, u *scsi.Unit, cdb ...byte) []byte {
	t.Helper()
	target := scsi.NewTarget()
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 255)
	done := make(chan scsi.Result, 1)
	target.Submit(&scsi.Command{CDB: cdb, In: [][]byte{buf}, Done: func(r scsi.Result) { done <- r }})
	r := <-done
	if r.Status != scsi.Good {
		t.Fatalf("% x: status %v", cdb, r.Status)
	}
	return buf[:len(buf)-int(r.Residual)]
}

// shown has the disks of a target shown to this machine as well, by LIO's
// loopback fabric, and returns the directories of their block devices in sysfs,
// by LUN.
func shown(t *testing.T, tg *Target) map[int]string {
	t.Helper()
	k := kernel(DefaultRoot)
	const wwn = "naa.5001405bbbbbbbbb"
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	undo := func(f func(string) error, path string) {
		t.Cleanup(func() {
			if err := f(path); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		})
	}
	for _, d := range []string{"loopback", "loopback/" + wwn, "loopback/" + wwn + "/tpgt_1"} {
		do(k.mkdir(d))
		undo(k.rmdir, d)
	}
	tpg := "loopback/" + wwn + "/tpgt_1"
	do(k.write(tpg+"/nexus", wwn))
	undo(func(p string) error { return k.write(p, "NULL") }, tpg+"/nexus")
	out := make(map[int]string)
	for _, n := range tg.LUNs() {
		lun := lunDir(tpg, n)
		do(k.mkdir(lun))
		undo(k.rmdir, lun)
		do(k.symlink(tg.disks[n], lun+"/x"))
		undo(k.unlink, lun+"/x")
		for deadline := time.Now().Add(time.Minute); out[n] == ""; time.Sleep(10 * time.Millisecond) {
			found, _ := filepath.Glob(fmt.Sprintf(
				"/sys/bus/scsi/devices/*:0:1:%d/block/sd*/device/scsi_disk/*/cache_type", n))
			if len(found) == 1 {
				dir := strings.Split(found[0], "/device/scsi_disk")[0]
				_, queueErr := os.Stat(dir + "/queue/rotational") // sd makes these later
				_, nodeErr := os.Stat("/dev/" + filepath.Base(dir))
				if queueErr == nil && nodeErr == nil {
					out[n] = dir
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("LUN %d does not appear", n)
			}
		}
	}
	return out
}

// naa6 returns the designator that LIO derives from a company id and a serial number: NAA 6h, the
// id, and up to 25 of the serial number's hexadecimal digits.
func naa6(serial string) []byte {
	digits := fmt.Sprintf("6%06x", companyID(serial))
	for _, c := range strings.ToLower(serial) {
		if strings.ContainsRune("0123456789abcdef", c) && len(digits) < 32 {
			digits += string(c)
		}
	}
	b, _ := hex.DecodeString(digits + strings.Repeat("0", 32-len(digits)))
	return b
}

// differs turns an answer of package scsi into that of LIO: it names each difference of the two.
func differs(page string, b []byte, u Unit, serial string) []byte {
	put := binary.BigEndian
	device := u.LUN != 0 // block devices: of the test's own, and under readonly
	switch page {
	case "inquiry":
		b[3] &^= 0x10 // HISUP
		b[5] = 0x80   // SCCS, and not 3PC
		// MULTIP: this test uses a second port
		b[6] |= 0x10
		copy(b[58:], []byte{0x00, 0xa0, 0x0c, 0x60, 0x04, 0x60, 0x04, 0xc0, 0, 0}) // SAM-5, SAS-3, SPC-4, SBC-3
	case "vpd_pg80":
		b[3]++ // LIO counts the NUL
		b = append(b, 0)
	case "vpd_pg83": // up to the designators of ports, which package scsi lacks
		b = append([]byte{0x00, 0x83, 0, 0, 0x01, 0x03, 0, 16}, naa6(serial)...)
		t10 := fmt.Sprintf("%-8s%s:%s\x00", "GVM", "DISK", serial)
		b = append(append(b, 0x02, 0x01, 0, byte(len(t10))), t10...)
	case "vpd_pgb0":
		b[5] = 1                         // MAXIMUM COMPARE AND WRITE LENGTH
		b[32] = 0                        // UGAVALID
		put.PutUint32(b[8:], 8<<20/4096) // MAXIMUM TRANSFER LENGTH
		put.PutUint32(b[20:], 1<<19)     // MAXIMUM UNMAP LBA COUNT, with blocks of 4096 bytes
		put.PutUint64(b[36:], 65535)     // MAXIMUM WRITE SAME LENGTH
		if device {                      // by the limits of the device
			put.PutUint32(b[8:], 2560)
			put.PutUint32(b[12:], 2560)
			put.PutUint32(b[20:], 0x7fffff)
			put.PutUint64(b[36:], 0x7fffff)
		}
		if u.ReadOnly {
			b[3] = 0x10
			b = b[:20]
		}
	case "vpd_pgb1":
		b[7] = 0 // WABEREQ
	case "vpd_pgb2":
		b[6] = 0 // PROVISIONING TYPE
		if device {
			b[5] &^= 0x04 // LBPRZ
		}
	}
	return b
}

// first returns the first byte of a file or block device, past the device's page cache.
func first(t *testing.T, path string) byte {
	t.Helper()
	flags := os.O_RDONLY
	if strings.HasPrefix(path, "/dev/") {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(page)
	if _, err := f.Read(page); err != nil {
		t.Fatal(err)
	}
	return page[0]
}

// TestKernelSameDisk compares LIO's answers for a disk with those of package scsi for the same
// unit, and tries to write to it in any case.
func TestKernelSameDisk(t *testing.T) {
	units := kernelUnits(t)
	units[0].Serial, units[0].BlockSize = "disk-1", 4096
	protected := image(t, "p.img") // a writable block device, served read-only
	protected.Close()
	dev := loopDevice(t, protected.Path())
	units = append(units, unit(9, reopen(t, dev, block.Options{Raw: true, ReadOnly: true})))
	units[3].ReadOnly = true
	tg, err := Provision(Config{Units: units})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tg.Close() })
	dirs := shown(t, tg)
	for _, u := range units {
		same, err := scsi.NewUnit(u.UnitConfig)
		if err != nil {
			t.Fatal(err)
		}
		file := func(name string) []byte {
			b, err := os.ReadFile(filepath.Join(dirs[u.LUN], name))
			if err != nil {
				t.Errorf("LUN %d: %v", u.LUN, err)
			}
			return b
		}
		for name, page := range map[string]byte{"inquiry": 0, "vpd_pg80": 0x80, "vpd_pg83": 0x83, "vpd_pgb0": 0xb0,
			"vpd_pgb1": 0xb1, "vpd_pgb2": 0xb2} {
			got, want := file("device/"+name),
				differs(name, ask(t, same, 0x12, byte(min(page, 1)), page, 0, 255, 0), u, same.Serial())
			if name == "vpd_pg83" {
				got = got[:len(want)]
				copy(got[2:4], want[2:4])
			}
			if !bytes.Equal(got, want) {
				t.Errorf("LUN %d %s: LIO says\n%swant\n%s", u.LUN, name, hex.Dump(got), hex.Dump(want))
			}
		}
		cache, size := "write back", fmt.Sprint(1<<20/512)
		if u.ReadOnly {
			cache = "write through" // a read-only loop device has no cache
		}
		for name, want := range map[string]string{
			"ro": strconv.Itoa(btoi(u.ReadOnly)), "size": size,
			"queue/logical_block_size": strconv.Itoa(same.BlockSize()), "queue/rotational": "0",
		} {
			if got := strings.TrimSpace(string(file(name))); got != want {
				t.Errorf("LUN %d: %s is %s, want %s", u.LUN, name, got, want)
			}
		}
		if got, err := filepath.Glob(dirs[u.LUN] + "/device/scsi_disk/*/cache_type"); err != nil || len(got) != 1 {
			t.Errorf("LUN %d: %v %v", u.LUN, got, err)
		} else if b, _ := os.ReadFile(got[0]); strings.TrimSpace(string(b)) != cache {
			t.Errorf("LUN %d: cache is %s, want %s", u.LUN, b, cache)
		}
		node := "/dev/" + filepath.Base(dirs[u.LUN])
		data := bytes.Repeat([]byte{0xa5}, same.BlockSize())
		status, sense := write10(t, node, data)
		if status == 2 && sense[2]&0xf == 6 { // UNIT ATTENTION: the LUNs have changed
			status, sense = write10(t, node, data)
		}
		written := first(t, u.Backend.(*block.File).Path()) == 0xa5
		// The loop device's refusal is LOGICAL UNIT COMMUNICATION FAILURE to LIO.
		if u.ReadOnly && (written || status != 2 || sense[2]&0xf != 2) || !u.ReadOnly && (!written || status != 0) {
			t.Errorf("LUN %d: WRITE(10) has status %d, sense % x; written: %v", u.LUN, status, sense, written)
		}
	}
}
