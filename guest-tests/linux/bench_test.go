package linux

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi"
	"gvm/devices/scsi/backend"
	"gvm/devices/scsi/lio"
	"gvm/guest-tests/bootinit"
	"gvm/guest-tests/lab"
)

// benchCmdline keeps a kernel from work that is nobody's business in a test guest.
const benchCmdline = "quiet mitigations=off cryptomgr.notests"

// qemuArgs are arguments of a QEMU that is as near to gvm run as it gets, but for
// disks.
func qemuArgs(machine, kernel, initrd string) []string {
	return []string{"-accel", "kvm", "-cpu", "host", "-machine", machine, "-m", "512", "-nodefaults", "-no-user-config", "-display", "none",
		"-serial", "stdio", "-no-reboot", "-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 " + benchCmdline,
		"-device", "virtio-rng-pci"}
}

// cleanMemory has the kernel clear the memory that it is going to give to the next guest. An
// emulated processor (the lab's) is slow to store to memory that still has code of an earlier
// guest on it, which it has translated; this is so of no other.
func cleanMemory(b *testing.B) {
	if os.Getenv(lab.InLabEnv) != "1" {
		return
	}
	memory, err := unix.Mmap(-1, 0, 1<<30, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err == nil {
		err = unix.Munmap(memory)
	}
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkBoot measures from the start of a VMM to the first word of init (bootinit's), with
// Debian's xz-compressed bzImage or the vmlinux in it, and benchCmdline. Each iteration boots
// once in every way, one after the other, as a lab's speed changes over time; the metrics are
// medians in seconds, and medians of how many times as long as in another way it takes in the
// same iteration.
func BenchmarkBoot(b *testing.B) {
	l := theLab(b)
	initramfs, err := bootinit.Initramfs()
	if err != nil {
		b.Fatal(err)
	}
	initrd := filepath.Join(b.TempDir(), "initrd")
	if err := os.WriteFile(initrd, initramfs, 0o600); err != nil {
		b.Fatal(err)
	}
	args := []string{"run", "--kernel", l.Debian.BZImage, "--initrd", initrd, "--cmdline", benchCmdline}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		b.Fatal(err)
	}
	kvm := func(machine, kernel string) []string {
		return append(qemuArgs(machine, kernel, initrd), "-device", "virtio-scsi-pci")
	}
	vmlinux := slices.Clone(args)
	vmlinux[2] = l.Debian.VMLinux
	ways := []struct {
		name    string
		program string
		cold    bool // no kernel is in the cache
		args    []string
		peer    string
	}{
		{"gvm-warm", lab.Program("gvm"), false, args, ""},
		{"gvm-cold", lab.Program("gvm"), true, args, "gvm-warm"},
		{"gvm-bzimage", lab.Program("gvm"), false, append(args[:len(args):len(args)], "--boot", "bzimage"), "gvm-warm"},
		{"gvm-vmlinux", lab.Program("gvm"), false, vmlinux, "gvm-warm"},
		{"qemu-q35", qemu, false, kvm("q35", l.Debian.BZImage), "gvm-warm"},
		{"qemu-pc", qemu, false, kvm("pc", l.Debian.BZImage), "gvm-warm"},
		{"qemu-pc-vmlinux", qemu, false, kvm("pc", l.Debian.VMLinux), "gvm-vmlinux"},
	}
	times := make([][]float64, len(ways))
	boot := func(i int) float64 {
		w, cache := ways[i], cacheHome
		if w.cold {
			cache = b.TempDir()
		}
		cleanMemory(b)
		begin := time.Now()
		p := startProgram(b, w.program, nil, cache, w.args...)
		p.waitFor(bootinit.Line)
		d := time.Since(begin).Seconds()
		p.signal(syscall.SIGTERM)
		p.wait()
		return d
	}
	boot(0) // files come into the page cache, the kernel into gvm's
	for b.Loop() {
		for i := range ways {
			times[i] = append(times[i], boot(i))
		}
	}
	median := func(v []float64) float64 { slices.Sort(v); return v[len(v)/2] }
	for i, w := range ways {
		for j, peer := range ways {
			if peer.name != w.peer {
				continue
			}
			var ratios []float64
			for n := range times[i] {
				ratios = append(ratios, times[i][n]/times[j][n])
			}
			b.ReportMetric(median(ratios), w.name+"/"+peer.name)
		}
	}
	for i, w := range ways {
		b.ReportMetric(median(times[i]), w.name+"-s")
	}
}

// BenchmarkDisk has fio, in a Linux guest, read and write blocks of 4 KiB at random places of
// the same file, served by gvm's target and the kernel's, in gvm and in
// QEMU. Each iteration boots a guest of each, one after the other. The metrics are
// medians: IOPS, mean latency in µs, and IOPS as a multiple of the way after the
// slash.
func BenchmarkDisk(b *testing.B) {
	l := theLab(b)
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		b.Fatal(err)
	}
	loads := []string{"read-1", "read-32", "write-1", "write-32"}
	script := "wait_for /dev/sda\n"
	// Fields of fio's terse output, version 3: IOPS and the mean latency in µs.
	fields := map[string]string{"read": "$8, $40", "write": "$49, $81"}
	for _, load := range loads {
		rw, depth, _ := strings.Cut(load, "-")
		script += fmt.Sprintf(`say %s $(fio --name=x --filename=/dev/sda --direct=1 --ioengine=libaio --rw=rand%s --bs=4k --iodepth=%s \
	--time_based --runtime=5 --norandommap --disable_slat=1 --disable_clat=1 --eta=never --output-format=terse --terse-version=3 2>&1 | awk -F';' '$1 == 3 && $5 == 0 { print %s }')
`, load, rw, depth, fields[rw])
	}
	args := guest{kernel: l.Debian, hostPrograms: []string{hostProgram(b, "fio", "fio")}, script: script, cmdline: benchCmdline}.build(b)
	initrd := args[4]
	file := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(file, content("disk", 64<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	gvmWith := func(backend string) func() (string, []string, func()) {
		return func() (string, []string, func()) {
			return lab.Program("gvm"), append(args[:len(args):len(args)], "--disk", file+",backend="+backend), func() {}
		}
	}
	ways := []struct {
		name string
		make func() (program string, args []string, done func())
	}{
		{"gvm", gvmWith("process")},
		{"gvm-vhost", gvmWith("vhost")},
		{"qemu", func() (string, []string, func()) {
			return qemu, append(qemuArgs("q35", l.Debian.BZImage, initrd), "-object", "iothread,id=t", "-device", "virtio-scsi-pci,iothread=t",
				"-drive", "if=none,id=d,format=raw,cache=writeback,file="+file, "-device", "scsi-hd,drive=d"), func() {}
		}},
		{"qemu-vhost", func() (string, []string, func()) {
			f, err := backend.Open(file, backend.Options{})
			if err != nil {
				b.Fatal(err)
			}
			target, err := lio.Provision(lio.Config{Units: []lio.Unit{{UnitConfig: scsi.UnitConfig{Backend: f}}}})
			if err != nil {
				b.Fatal(err)
			}
			return qemu, append(qemuArgs("q35", l.Debian.BZImage, initrd), "-device", "vhost-scsi-pci,wwpn="+target.WWN), func() {
				if err := errors.Join(target.Close(), f.Close()); err != nil {
					b.Error(err)
				}
			}
		}},
	}
	iops, latency := map[string][]float64{}, map[string][]float64{}
	for b.Loop() {
		for _, w := range ways {
			ended := func(r result) bool { return r.status == 0 }
			r := again(b, ended, func() result {
				program, args, done := w.make()
				defer done()
				return startProgram(b, program, nil, cacheHome, args...).wait()
			})
			for _, load := range loads {
				var n, us float64
				if _, err := fmt.Sscan(r.said(b, load), &n, &us); err != nil {
					r.fatalf(b, "%s: %v", w.name, err)
				}
				key := load + "-" + w.name
				iops[key], latency[key] = append(iops[key], n), append(latency[key], us)
			}
		}
	}
	median := func(v []float64) float64 { slices.Sort(v); return v[len(v)/2] }
	for _, load := range loads {
		for i, w := range ways {
			key := load + "-" + w.name
			b.ReportMetric(median(iops[key]), key+"-iops")
			b.ReportMetric(median(latency[key]), key+"-us")
			if i < 2 { // each of gvm's beside what QEMU has of its kind
				peer := ways[i+2].name
				b.ReportMetric(median(iops[key])/median(iops[load+"-"+peer]), key+"/"+peer)
			}
		}
		b.ReportMetric(median(iops[load+"-gvm-vhost"])/median(iops[load+"-gvm"]), load+"-gvm-vhost/gvm")
	}
}
