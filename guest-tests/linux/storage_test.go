package linux

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
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

// mapped makes block devices on one, which the test's end removes. They are the devices, and with each goes
// the mend that gvm names.
var mapped = map[string]func(t *testing.T, dev string) (devices []string, mend string){
	"device mapper": func(t *testing.T, dev string) ([]string, string) {
		t.Setenv("DM_DISABLE_UDEV", "1")
		dmsetup := hostProgram(t, "dmsetup", "dmsetup")
		dm := func(args ...string) {
			t.Helper()
			if out, err := exec.Command(dmsetup, args...).CombinedOutput(); err != nil {
				t.Errorf("dmsetup %v: %v\n%s", args, err, out)
			}
		}
		var devices []string
		for n := range 2 { // the halves of a MiB
			name := fmt.Sprintf("gvm-%s-%d", filepath.Base(dev), n)
			dm("create", name, "--table", fmt.Sprintf("0 1024 linear %s %d", dev, n*1024))
			t.Cleanup(func() { dm("remove", name) })
			devices = append(devices, "/dev/mapper/"+name)
		}
		return devices, "dmsetup remove"
	},
	"md": func(t *testing.T, dev string) ([]string, string) {
		name := "md_" + filepath.Base(dev)
		write := func(file, text string) {
			t.Helper()
			must(t, os.WriteFile(file, []byte(text), 0))
		}
		write("/sys/module/md_mod/parameters/new_array", name)
		md, number := "/sys/block/"+name+"/md/", "/sys/block/"+filepath.Base(dev)+"/dev"
		t.Cleanup(func() { write(md+"array_state", "clear") })
		rdev, err := os.ReadFile(number)
		must(t, err)
		write(md+"metadata_version", "none")
		write(md+"level", "raid0")
		write(md+"chunk_size", "65536")
		write(md+"raid_disks", "1")
		write(md+"new_dev", string(rdev))
		member := md + "dev-" + filepath.Base(dev) + "/"
		write(member+"size", "1024")
		write(member+"slot", "0")
		write(md+"array_state", "active")
		return []string{"/dev/" + name}, "mdadm --stop"
	},
}

// TestMapped: a guest cannot write a device that is part of one of device mapper or md. It can write the
// mapped one, and then neither host nor guest can use it, nor a guest the device or file below; another
// device on the same one it can. Readers may share all of them, and keep out those that write.
func TestMapped(t *testing.T) {
	for kind, stack := range mapped {
		t.Run(kind, func(t *testing.T) {
			file := diskFile(t, content("mapped", 1<<20))
			dev := loopDevice(t, file)
			devices, mend := stack(t, dev)
			top := devices[0]
			refused := func(disk, why string) {
				t.Helper()
				r := gvm(t, "run", "--disk", disk)
				if r.wantStatus(t, 2); !strings.Contains(r.stderr, why) {
					r.fatalf(t, "standard error lacks %q", why)
				}
			}
			taken := func(disk string) { t.Helper(); gvm(t, "run", "--disk", disk).wantStatus(t, 0) }
			// meanwhile has a guest use a disk, and gives its process's number to f.
			meanwhile := func(disk string, f func(by string)) {
				t.Helper()
				p := start(t, nil, "run", "--guest-arg", "echo", "--disk", disk)
				p.waitFor("ready")
				f(fmt.Sprintf("in use by process %d", p.cmd.Process.Pid))
				p.signal(syscall.SIGTERM)
				p.wait().wantStatus(t, 143)
			}
			refused(dev, fmt.Sprintf("%s is part of %s; %s", dev, top, mend))
			refused(file, "loop device "+dev+" is on it")
			meanwhile(top, func(by string) {
				for _, disk := range []string{top, top + ",readonly", dev + ",readonly", file + ",readonly"} {
					refused(disk, by)
				}
				for _, disk := range devices[1:] {
					taken(disk)
				}
				if f, err := os.OpenFile(top, os.O_RDWR|syscall.O_EXCL, 0); err == nil { // as a mount does
					f.Close()
					t.Errorf("the host can use %s beside a guest", top)
				}
			})
			meanwhile(top+",readonly", func(by string) {
				refused(top, by)
				for _, disk := range []string{top, dev, file} {
					taken(disk + ",readonly")
				}
			})
			for _, below := range []string{dev, file} {
				meanwhile(below+",readonly", func(by string) {
					refused(top, by)
					taken(top + ",readonly")
				})
			}
			gvm(t, "run", "--disk", top, "--guest-arg", "write").wantStatus(t, 0)
		})
	}
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
