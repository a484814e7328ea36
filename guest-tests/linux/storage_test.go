package linux

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// hostProgram returns the path of a program of this machine.
func hostProgram(t testing.TB, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v; it is in Debian's %s", err, pkg)
	}
	return path
}

// TestFio has fio write blocks of random sizes to four disks at once, trim some and verify all.
func TestFio(t *testing.T) {
	t.Parallel()
	var args []string
	job := ""
	for i, options := range []string{"", ",cache=writethrough", ",block_size=4096", ",pi=1"} {
		args = append(args, "--disk", diskFile(t, make([]byte, 8<<20))+options) // half of it for each job
		for j, rw := range []string{"randwrite", "randtrimwrite"} {
			job += fmt.Sprintf("[lun%d-%s]\nfilename=/dev/sd%c\noffset=%dk\nrandseed=%d\nrw=%s\n", i, rw, 'a'+i, 4096*j, 7+i, rw)
		}
	}
	g := guest{kernel: theLab(t).Debian, hostPrograms: []string{hostProgram(t, "fio", "fio")}, script: `
wait_for /dev/sdd
cat >/tmp/job <<-END
[global]
size=4m
bsrange=4k-128k
blockalign=4k
direct=1
ioengine=psync
thread
fsync=16
verify=crc32c
verify_fatal=1
` + job + `
END
fio --output=/tmp/out /tmp/job >/tmp/errors 2>&1
say fio $? $(grep -c 'err= 0' /tmp/out)
cat /tmp/errors
for d in a b c d; do say trims-$d $(awk '{ print ($12 > 0) }' /sys/block/sd$d/stat); done
klog
`}
	r := g.run(t, append(args, "--cpus", "2")...)
	r.wantStatus(t, 0)
	r.want(t, map[string]string{"fio": "0 8", "trims-a": "1", "trims-b": "1", "trims-c": "1", "trims-d": "1"})
	r.kernelLog(t, 1)
}

// TestProtection: a Linux guest uses a disk's protection information, from its block layer to the
// image's file, and data changed in between is an error.
func TestProtection(t *testing.T) {
	t.Parallel()
	l, file := theLab(t), diskFile(t, make([]byte, 4<<20))
	first := guest{kernel: l.Debian, script: `
wait_for /dev/sda
say format $(cat /sys/block/sda/integrity/format)
say device $(cat /sys/block/sda/integrity/device_is_integrity_capable) \
	$(cat /sys/class/scsi_host/host0/prot_capabilities)
dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null
dd if=/tmp/data of=/dev/sda bs=64k seek=16 oflag=direct 2>/dev/null || say not written
dd if=/tmp/data of=/dev/sda bs=64k conv=fsync 2>/dev/null || say not written
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/sda bs=64k count=32 2>/dev/null | cmp - /tmp/data || say another
dd if=/dev/sda bs=64k skip=16 count=32 iflag=direct 2>/dev/null | tail -c 1048576 >/tmp/tail
tail -c 1048576 /tmp/data | cmp - /tmp/tail || say another
say compared
klog
`}.run(t, "--disk", file+",pi=1")
	first.wantStatus(t, 0)
	first.want(t, map[string]string{"format": "T10-DIF-TYPE1-CRC", "device": "1 119", "compared": ""})
	first.kernelLog(t, 1)
	if strings.Contains(first.console, "= not") || strings.Contains(first.console, "= another") {
		first.fatalf(t, "the data differs from the data written")
	}
	if fi, err := os.Stat(file + ".pi"); err != nil || fi.Size() < 8<<10 {
		t.Fatalf("the protection information: %v, %v", fi, err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b[1<<20+700] ^= 1
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	second := guest{kernel: l.Debian, script: `
wait_for /dev/sda
dd if=/dev/sda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null && say before read
dd if=/dev/sda of=/dev/null bs=4k skip=256 count=1 iflag=direct 2>/dev/null || say changed refused
dmesg | grep -q 'protection error\|guard' && say log protection
`}.run(t, "--disk", file+",pi=1")
	second.wantStatus(t, 0)
	second.want(t, map[string]string{"before": "read", "changed": "refused", "log": "protection"})
}

// TestDeviceMapper: a guest cannot write a device that is part of a device mapper's. It can write
// the mapped one, and then the host cannot use it.
func TestDeviceMapper(t *testing.T) {
	t.Setenv("DM_DISABLE_UDEV", "1")
	dmsetup, file := hostProgram(t, "dmsetup", "dmsetup"), diskFile(t, content("mapped", 1<<20))
	dev := loopDevice(t, file)
	name := "gvm-" + filepath.Base(dev)
	dm := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(dmsetup, args...).CombinedOutput(); err != nil {
			t.Fatalf("dmsetup %v: %v\n%s", args, err, out)
		}
	}
	dm("create", name, "--table", "0 2048 linear "+dev+" 0")
	t.Cleanup(func() { dm("remove", name) })
	r := gvm(t, "run", "--disk", dev)
	if r.wantStatus(t, 2); !strings.Contains(r.stderr, dev+" is part of /dev/mapper/"+name+"; dmsetup remove") {
		r.fatalf(t, "standard error does not name the user of the device")
	}
	r = gvm(t, "run", "--disk", file)
	if r.wantStatus(t, 2); !strings.Contains(r.stderr, "loop device "+dev+" is on it") {
		r.fatalf(t, "standard error does not name the user of the image")
	}
	gvm(t, "run", "--disk", "/dev/mapper/"+name, "--guest-arg", "write").wantStatus(t, 0)
}

// TestNBD runs the example of docs/storage.md: a block device of the kernel's NBD client is a
// guest's disk, and the server has the guest's writes.
func TestNBD(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/dev/nbd0"); err != nil {
		t.Fatalf("%v: modprobe nbd", err)
	}
	nbd, file := hostProgram(t, "qemu-nbd", "qemu-utils"), diskFile(t, content("nbd", 4<<20))
	socket := filepath.Join(t.TempDir(), "socket") // there may be no /var/lock
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(nbd, args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-nbd %v: %v\n%s", args, err, out)
		}
	}
	run("--format=raw", "--fork", "--socket="+socket, "--connect=/dev/nbd0", file)
	disconnected := false
	disconnect := func() {
		if !disconnected {
			disconnected = true
			run("--disconnect", "/dev/nbd0")
		}
	}
	defer disconnect()
	r := guest{kernel: theLab(t).Debian, script: `
wait_for /dev/sda
say size $(cat /sys/block/sda/size)
say sum $(sum /dev/sda)
yes gvm | head -c 65536 >/tmp/data
dd if=/tmp/data of=/dev/sda bs=64k seek=3 conv=fsync 2>/dev/null && say written
klog
`}.run(t, "--disk", "/dev/nbd0")
	r.wantStatus(t, 0)
	want := content("nbd", 4<<20)
	r.want(t, map[string]string{"size": "8192", "sum": sum(want), "written": ""})
	r.kernelLog(t, 1)
	disconnect()
	copy(want[3<<16:], strings.Repeat("gvm\n", 1<<14))
	wantFile(t, file, 0, want)
}
