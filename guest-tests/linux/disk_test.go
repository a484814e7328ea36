package linux

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"gvm/guest-tests/lab"
)

// TestDisks uses disks that differ in everything that a guest can see. A block device of the
// kernel's NBD client is one, as in the example of docs/storage.md, and the server has the guest's
// writes; an ordinary user, who cannot connect the client, has a file instead. One has protection
// information, which the guest uses from its block layer to the image's file, and data changed in
// between is an error to the next guest. That one has fio write blocks of random sizes to four
// other disks at once, trim some and verify all.
func TestDisks(t *testing.T) {
	t.Parallel()
	l := theLab(t)
	first, second, third := content("first", 2<<20), content("second", 3<<20), content("third", 4<<20)
	fourth := content("nbd", 1<<20)
	files := []string{diskFile(t, first), diskFile(t, second), diskFile(t, third), diskFile(t, fourth)}
	protected := diskFile(t, make([]byte, 4<<20))
	remote, disconnect := files[3], func() {}
	if os.Geteuid() == 0 {
		remote, disconnect = "/dev/nbd0", nbd(t, files[3])
	}
	r := guest{kernel: l.Debian, script: `
for d in a b c d e; do wait_for /dev/sd$d; done
for d in /sys/block/sd*; do
	s=$d/device; dev=/dev/${d##*/}; lun=$(readlink -f $s); lun=${lun##*:}
	read bytes <$d/size
	read ro <$d/ro
	read logical <$d/queue/logical_block_size
	read physical <$d/queue/physical_block_size
	read cache <$d/queue/write_cache
	read fua <$d/queue/fua
	read vendor <$s/vendor
	read model <$s/model
	read wwid <$s/wwid
	say $lun-disk ${d##*/}
	say $lun-sha256 $(sum $dev)
	say $lun-bytes $((bytes * 512))
	say $lun-readonly $ro
	say $lun-blocks $logical $physical
	say $lun-cache $cache fua $fua
	say $lun-serial $(tail -c +5 $s/vpd_pg80)
	say $lun-name $vendor $model
	say $lun-wwid $wwid
	[ $lun = 5 ] && protected=$d && continue
	printf 'written to lun %5d' $lun | dd of=$dev bs=4k seek=1 conv=sync,fsync,notrunc 2>/dev/null &&
		say $lun-write done || say $lun-write failed
	if [ $lun = 3 ]; then
		# The kernel has refused; now let the disk do it.
		blockdev --setrw $dev
		printf 'forced' | dd of=$dev bs=4k seek=2 conv=sync,fsync,notrunc 2>/dev/null && say forced done || say forced failed
	fi
done
say disks $(ls -d /sys/block/sd* | wc -l)

say format $(cat $protected/integrity/format)
say device $(cat $protected/integrity/device_is_integrity_capable) \
	$(cat /sys/class/scsi_host/host0/prot_capabilities)
dev=/dev/${protected##*/}
dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null
dd if=/tmp/data of=$dev bs=64k seek=16 oflag=direct 2>/dev/null || say not written
dd if=/tmp/data of=$dev bs=64k conv=fsync 2>/dev/null || say not written
echo 3 >/proc/sys/vm/drop_caches
dd if=$dev bs=64k count=32 2>/dev/null | cmp - /tmp/data || say another
dd if=$dev bs=64k skip=16 count=32 iflag=direct 2>/dev/null | tail -c 1048576 >/tmp/tail
tail -c 1048576 /tmp/data | cmp - /tmp/tail || say another
say compared
klog
`}.run(t,
		"--disk", files[0]+",serial=one",
		"--disk", files[1]+",lun=3,readonly,serial=disk two",
		"--disk", files[2]+",lun=300,block_size=4096,cache=writethrough,serial=three",
		"--disk", remote+",lun=4,serial=four",
		"--disk", protected+",lun=5,pi=1,serial=five")
	r.wantStatus(t, 0)
	// Linux keeps the addressing method of a LUN past 255 in its number: flat,
	// 01b (SAM-5 4.7.7.3), so 300 is 0x4000 + 300.
	r.want(t, map[string]string{
		"disks":    "5",
		"0-sha256": sum(first), "3-sha256": sum(second), "16684-sha256": sum(third), "4-sha256": sum(fourth),
		"5-sha256": sum(make([]byte, 4<<20)),
		"0-bytes":  "2097152", "3-bytes": "3145728", "16684-bytes": "4194304", "4-bytes": "1048576", "5-bytes": "4194304",
		"0-readonly": "0", "3-readonly": "1", "16684-readonly": "0", "4-readonly": "0", "5-readonly": "0",
		"0-blocks": "512 512", "3-blocks": "512 512", "16684-blocks": "4096 4096",
		"0-serial": "one", "3-serial": "disk two", "16684-serial": "three", "4-serial": "four", "5-serial": "five",
		"0-name": "GVM DISK", "3-name": "GVM DISK", "16684-name": "GVM DISK", "4-name": "GVM DISK", "5-name": "GVM DISK",
		"0-cache": "write back fua 1", "16684-cache": "write through fua 0",
		"0-write": "done", "3-write": "failed", "16684-write": "done", "4-write": "done", "forced": "failed",
		"format": "T10-DIF-TYPE1-CRC", "device": "1 119", "compared": "",
	})
	wwids := map[string]bool{}
	for _, lun := range []string{"0", "3", "16684", "4", "5"} {
		wwids[r.said(t, lun+"-wwid")] = true
	}
	if len(wwids) != 5 {
		r.fatalf(t, "the disks have only %d names between them", len(wwids))
	}
	if strings.Contains(r.console, "= not") || strings.Contains(r.console, "= another") {
		r.fatalf(t, "the data of the protected disk differs from the data written")
	}
	r.kernelLog(t, 1,
		// The errors of the forced write.
		`\] (sd 0:0:0:3|(critical \w+ error,|Buffer I/O error on) dev `+r.said(t, "3-disk")+`)`)
	disconnect()
	written := func(lun string) []byte {
		b := make([]byte, 4096)
		copy(b, lun)
		return b
	}
	copy(first[4096:], written("written to lun     0"))
	copy(third[4096:], written("written to lun 16684"))
	copy(fourth[4096:], written("written to lun     4"))
	for i, b := range [][]byte{first, second, third, fourth} {
		wantFile(t, files[i], 0, b)
	}
	testFio(t, protected)
}

// TestReboot: data written to a file system survives a reset of the machine, for the guest and in
// the image, and so does the clock's time. Before, the guest reads and sets the clock, waits for
// its interrupts and sleeps until its alarm. The watchdog resets it, and its driver finds that
// afterwards. The generation ID has its driver.
func TestReboot(t *testing.T) {
	t.Parallel()
	l := theLab(t)
	disk := diskFile(t, make([]byte, 32<<20))
	r := guest{
		kernel:       l.Debian,
		modules:      []string{"ext4", "i6300esb"},
		hostPrograms: []string{"/usr/sbin/rtcwake", "/usr/sbin/hwclock", "/usr/sbin/mkfs.ext4"},
		files:        map[string]string{"etc/mke2fs.conf": filepath.Join(l.Tree, "etc/mke2fs.conf")},
		script: `
wait_for /dev/sda
magic=$(dd if=/dev/sda bs=2 skip=540 count=1 2>/dev/null | hexdump -e '"%04x"')
cause() { cat /sys/class/watchdog/watchdog0/bootstatus; }
if [ "$magic" != ef53 ]; then
	say first $(cause)
	say id $(ls -d /sys/bus/*/drivers/vmgenid/GVMG0001*)
	mkfs.ext4 -q /dev/sda </dev/null || say mkfs failed
	mount -t ext4 /dev/sda /mnt || say mount failed
	mkdir /mnt/dir
	seq 1 100000 | dd of=/mnt/dir/numbers bs=64k conv=fsync 2>/dev/null || say write failed
	say before $(sum /mnt/dir/numbers)
	umount /mnt || say umount failed

	irqs() { awk '$NF == "rtc0" {n = 0; for (i = 2; i < NF-2; i++) n += $i; print n}' /proc/interrupts; }
	say line $(awk '$NF == "rtc0" {print $1, $(NF-2), $(NF-1)}' /proc/interrupts)
	n=$(irqs)
	# It waits for the end of an update, by interrupt, and gives up after ten seconds.
	/bin/hwclock --utc -r >/tmp/out 2>&1 && say read ok || { say read failed; cat /tmp/out; }
	# Where the lab stands still for a second, Linux finds the time past and needs no interrupt.
	for again in 1 2 3 4 5; do [ $(irqs) -gt $n ] || /bin/hwclock --utc -r >/dev/null; done
	say update $(( $(irqs) > n ))
	date -s '2031-12-24 12:34:56' >/dev/null
	/bin/hwclock --utc -w && say written $(/bin/hwclock --utc -r | cut -d: -f1)
	n=$(irqs)
	rtcwake -m on -s 2 >/dev/null && say alarm $(( $(irqs) > n ))
	rtcwake -m freeze -s 3 >/dev/null && say woken yes || say woken no
	klog
	watchdog -F -T 2 -t 1000 /dev/watchdog
fi
case $(cat /sys/class/rtc/rtc0/date) in 2031-*) say rebooted in 2031 ;; esac
say then $(cause)
date -s '2021-12-24 12:34:56' >/dev/null # e2fsck refuses times of the future
mount -t ext4 /dev/sda /mnt || say mount failed again
say after $(sum /mnt/dir/numbers)
echo second boot >/mnt/second
umount /mnt
klog
`}.run(t, "--disk", disk, "--watchdog", "reset", "--cpus", "2")
	r.wantStatus(t, 0)
	want := sum(numbers(1, 100000))
	r.want(t, map[string]string{
		"before": want, "after": want, "line": "8: IO-APIC 8-edge", "read": "ok", "update": "1",
		"written": "2031-12-24 12", "alarm": "1", "woken": "yes", "rebooted": "in 2031",
		"first": "0", "then": "32", // WDIOF_CARDRESET
	})
	if id := r.said(t, "id"); !strings.HasSuffix(id, "/vmgenid/GVMG0001:00") {
		t.Errorf("the driver of the generation ID has %q", id)
	}
	r.kernelLog(t, 2)
	fsck(t, disk)
	if got := sum(debugfs(t, disk, "cat /dir/numbers")); got != want {
		t.Errorf("the file has SHA-256 %s in the image, want %s", got, want)
	}
	if got := string(debugfs(t, disk, "cat /second")); got != "second boot\n" {
		t.Errorf("the second boot's file holds %q", got)
	}
}

// TestRoot runs a small Debian system from its disk.
func TestRoot(t *testing.T) {
	t.Parallel()
	l := theLab(t)
	disk := filepath.Join(t.TempDir(), "root.ext4")
	err := l.CopyRootImage(t.Context(), disk, prologue+`
say root $(grep ' / ' /proc/mounts | cut -d' ' -f1-3)
say debian $(cat /etc/debian_version)
say bash $(sha256sum </usr/bin/bash | cut -c1-64)
seq 1 50000 >/root/numbers
sync
say written $(sum /root/numbers)
klog
`)
	if err != nil {
		t.Fatal(err)
	}
	bash, err := os.ReadFile(filepath.Join(l.Tree, "usr/bin/bash"))
	if err != nil {
		t.Fatal(err)
	}
	version, err := os.ReadFile(filepath.Join(l.Tree, "etc/debian_version"))
	if err != nil {
		t.Fatal(err)
	}
	r := guest{kernel: kernel(t, "6.12"), modules: []string{"ext4"}, script: lab.SwitchRoot,
		cmdline: "root=/dev/sda"}.run(t, "--disk", disk)
	r.wantStatus(t, 0)
	r.want(t, map[string]string{
		"root":    "/dev/sda / ext4",
		"debian":  strings.TrimSpace(string(version)),
		"bash":    sum(bash),
		"written": sum(numbers(1, 50000)),
	})
	r.kernelLog(t, 1)
	fsck(t, disk)
	if got, want := debugfs(t, disk, "cat /root/numbers"), numbers(1, 50000); sum(got) != sum(want) {
		t.Errorf("/root/numbers in the image has %d bytes that differ from the guest's", len(got))
	}
}

func fsck(t *testing.T, disk string) {
	t.Helper()
	if out, err := exec.Command("/usr/sbin/e2fsck", "-f", "-n", disk).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

func debugfs(t *testing.T, disk, request string) []byte {
	t.Helper()
	out, err := exec.Command("/usr/sbin/debugfs", "-R", request, disk).Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v", request, err)
	}
	return out
}

// TestKilled: the disk has all writes that the guest was told of. The image is free for the next
// gvm at once, but not before.
func TestKilled(t *testing.T) {
	t.Parallel()
	l := theLab(t)
	disk := diskFile(t, make([]byte, 8<<20))
	p := start(t, nil, append(guest{kernel: l.Cloud, script: `
n=0
while [ $n -lt 64 ]; do
	n=$((n+1))
	seq $((n*1000)) $((n*1000+999)) |
		dd of=/dev/sda oflag=direct conv=sync,fsync,notrunc bs=8k count=1 iflag=fullblock seek=$n 2>/dev/null ||
		say write failed
	echo written $n
	[ $n = 40 ] && sleep 600
done
`}.build(t), "--disk", disk)...)
	p.waitFor("written 40")
	other := gvm(t, "run", "--disk", disk)
	if other.wantStatus(t, 2); !strings.Contains(other.stderr, fmt.Sprint(p.cmd.Process.Pid)) {
		other.fatalf(t, "the message does not name process %d, which uses the disk", p.cmd.Process.Pid)
	}
	p.signal(syscall.SIGKILL)
	p.wait().wantStatus(t, -1)
	for n := 1; n <= 40; n++ {
		wantFile(t, disk, int64(n)*8192, numbers(n*1000, n*1000+999))
	}
	gvm(t, "run", "--disk", disk).wantStatus(t, 0)
}
