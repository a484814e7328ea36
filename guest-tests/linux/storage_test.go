package linux

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
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

// testFio has a guest use fio, and a protected disk whose second MiB changes before.
func testFio(t *testing.T, protected string) {
	t.Helper()
	if fi, err := os.Stat(protected + ".pi"); err != nil || fi.Size() < 8<<10 {
		t.Fatalf("the protection information: %v, %v", fi, err)
	}
	b, err := os.ReadFile(protected)
	must(t, err)
	b[1<<20+700] ^= 1
	must(t, os.WriteFile(protected, b, 0o600))
	var args []string
	job := ""
	for i, options := range []string{"", ",cache=writethrough", ",block_size=4096", ",pi=1"} {
		args = append(args, "--disk", diskFile(t, make([]byte, 2<<20))+options) // half of it for each job
		for j, rw := range []string{"randwrite", "randtrimwrite"} {
			job += fmt.Sprintf("[lun%d-%s]\nfilename=$(disk %d)\noffset=%dk\nrandseed=%d\nrw=%s\n", i, rw, i, 1024*j, 7+i, rw)
		}
	}
	g := guest{kernel: theLab(t).Debian, hostPrograms: []string{hostProgram(t, "fio", "fio")}, script: `
for d in a b c d e; do wait_for /dev/sd$d; done
cat >/tmp/job <<-END
[global]
size=1m
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
for lun in 0 1 2 3; do d=$(disk $lun); say trims-$lun $(awk '{ print ($12 > 0) }' /sys/block/${d##*/}/stat); done
klog

dd if=$(disk 4) of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null && say before read
dd if=$(disk 4) of=/dev/null bs=4k skip=256 count=1 iflag=direct 2>/dev/null || say changed refused
dmesg | grep -q 'protection error\|guard' && say log protection
`}
	r := g.run(t, append(args, "--disk", protected+",pi=1", "--cpus", "2")...)
	r.wantStatus(t, 0)
	r.want(t, map[string]string{
		"fio": "0 8", "trims-0": "1", "trims-1": "1", "trims-2": "1", "trims-3": "1",
		"before": "read", "changed": "refused", "log": "protection",
	})
	r.kernelLog(t, 1)
}

// mapped makes block devices on one, which the test's end removes. They are the devices, and with
// each goes the mend that gvm names.
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

// TestMapped: a guest cannot write a device that is part of one of device mapper or md. It can
// write the mapped one, and then neither host nor guest can use it, nor a guest the device or file
// below; another device on the same one it can. Readers may share all of them, and keep out those
// that write.
func TestMapped(t *testing.T) {
	needsRoot(t, "a loop device")
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

// nbd makes /dev/nbd0 a client of an NBD server of the file. It returns a function that disconnects
// it, which the test's end does too.
func nbd(t *testing.T, file string) (disconnect func()) {
	t.Helper()
	if _, err := os.Stat("/dev/nbd0"); err != nil {
		t.Fatalf("%v: modprobe nbd", err)
	}
	program := hostProgram(t, "qemu-nbd", "qemu-utils")
	socket := filepath.Join(t.TempDir(), "socket") // there may be no /var/lock
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-nbd %v: %v\n%s", args, err, out)
		}
	}
	run("--format=raw", "--fork", "--socket="+socket, "--connect=/dev/nbd0", file)
	disconnect = sync.OnceFunc(func() { run("--disconnect", "/dev/nbd0") })
	t.Cleanup(disconnect)
	return disconnect
}
