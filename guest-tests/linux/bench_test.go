package linux

import (
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"gvm/guest-tests/lab"
)

const benchCmdline = "quiet mitigations=off cryptomgr.notests"

// BenchmarkBootXZ measures from the start of a VMM to the first line of init,
// with Debian's xz-compressed bzImage, an initramfs without modules, and a command line that
// keeps a kernel from work that is nobody's business in a test guest. Each iteration boots once in every way,
// one after the other, as a lab's speed changes over time; the metrics are
// medians in seconds, and how many times faster gvm's default is.
func BenchmarkBootXZ(b *testing.B) {
	l := theLab(b)
	initrd := filepath.Join(b.TempDir(), "initrd")
	if err := (lab.Initramfs{Init: "echo init is up"}).Build(initrd); err != nil {
		b.Fatal(err)
	}
	args := []string{"run", "--kernel", l.Debian.BZImage, "--initrd", initrd, "--cmdline", benchCmdline}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		b.Fatal(err)
	}
	kvm := func(machine string) []string {
		return []string{"-accel", "kvm", "-cpu", "host", "-machine", machine, "-m", "512", "-nodefaults", "-no-user-config", "-display", "none",
			"-serial", "stdio", "-no-reboot", "-kernel", l.Debian.BZImage, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 " + benchCmdline,
			"-device", "virtio-scsi-pci", "-device", "virtio-rng-pci"}
	}
	ways := []struct {
		name    string
		program string
		cold    bool // no kernel is in the cache
		args    []string
	}{
		{"gvm-warm", lab.Program("gvm"), false, args},
		{"gvm-cold", lab.Program("gvm"), true, args},
		{"gvm-bzimage", lab.Program("gvm"), false, append(args[:len(args):len(args)], "--boot", "bzimage")},
		{"qemu-q35", qemu, false, kvm("q35")},
		{"qemu-pc", qemu, false, kvm("pc")},
	}
	times := make([][]float64, len(ways))
	boot := func(i int) float64 {
		w, cache := ways[i], cacheHome
		if w.cold {
			cache = b.TempDir()
		}
		begin := time.Now()
		p := startProgram(b, w.program, nil, cache, w.args...)
		p.waitFor("init is up")
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
	median := func(i int) float64 {
		slices.Sort(times[i])
		return times[i][len(times[i])/2]
	}
	for i, w := range ways {
		b.ReportMetric(median(i), w.name+"-s")
		if i > 0 {
			b.ReportMetric(median(i)/median(0), w.name+"/warm")
		}
	}
}
