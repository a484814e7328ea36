//go:build built

package linux

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/guest-tests/lab"
)

// TestDistribution boots a whole Debian system from its disk, logs in on the console, and asks
// systemd whether all its units have started.
func TestDistribution(t *testing.T) {
	d, err := theLab(t).Distribution()
	must(t, err)
	for _, backend := range []string{"process", "vhost"} {
		t.Run(backend+" by a pipe", func(t *testing.T) { testDistribution(t, d, backend, startOnPipe) })
		t.Run(backend+" on a terminal", func(t *testing.T) { testDistribution(t, d, backend, startOnTerminal) })
	}
}

// The words of the system for its kernel's command line, and its last output before a login.
const (
	bootDistribution = "root=/dev/sda rw quiet systemd.show_status=1"
	loginPrompt      = "\ndebian login: "
)

func testDistribution(t *testing.T, d lab.Distribution, backend string,
	start func(*testing.T, ...string) (*process, io.Writer)) {
	if backend == "vhost" {
		needsTarget(t)
	}
	lioUnchanged(t)
	disk := filepath.Join(t.TempDir(), "root.ext4")
	must(t, d.CopyRoot(disk))
	begin := time.Now()
	p, console := start(t, "run", "--cpus", "2", "--kernel", d.BZImage, "--initrd", d.Initrd,
		"--cmdline", bootDistribution, "--disk", disk+",backend="+backend)
	p.waitForText(loginPrompt)
	t.Logf("the prompt for a login after %.1f s", time.Since(begin).Seconds())
	fmt.Fprint(console, "root\r")
	p.waitForText("root@debian:~# ")
	// One line: the shell would put its prompt before the output of a second one. echo ends the line
	// that the shell leaves editing on.
	fmt.Fprint(console, strings.Join([]string{
		"echo",
		"echo = state $(systemctl is-system-running --wait)",
		"echo = failed $(systemctl --failed --no-legend --plain)",
		"echo = cpus $(nproc)",
		"echo = root $(findmnt -n -o SOURCE,FSTYPE /)",
		"seq 1 50000 >/root/numbers",
		"systemctl poweroff\r",
	}, "; "))
	r := p.wait()
	t.Logf("the end after %.1f s", time.Since(begin).Seconds())
	r.wantStatus(t, 0)
	if state := r.said(t, "state"); state != "running" {
		t.Errorf("systemd is %s, want running; units that failed: %s", state, r.said(t, "failed"))
	}
	r.want(t, map[string]string{"cpus": "2", "root": "/dev/sda ext4", "failed": ""})
	fsck(t, disk)
	if got, want := debugfs(t, disk, "cat /root/numbers"), numbers(1, 50000); sum(got) != sum(want) {
		t.Errorf("/root/numbers in the image is %d bytes, not the guest's", len(got))
	}
}

// BenchmarkDistribution measures from the start of a VMM to the system's prompt for a login, with 2
// CPUs and the disk served by the VMM and by the kernel. Each iteration boots once in every way,
// one after the other.
func BenchmarkDistribution(b *testing.B) {
	l := theLab(b)
	d, err := l.Distribution()
	must(b, err)
	disk := filepath.Join(b.TempDir(), "root.ext4")
	type way struct {
		name, peer string
		make       func() (program string, args []string, done func())
	}
	var ways []way
	for _, backend := range []string{"process", "vhost"} {
		ways = append(ways, way{"gvm-" + backend, "", func() (string, []string, func()) {
			return lab.Program("gvm"), []string{"run", "--cpus", "2", "--memory", "512M", "--kernel", d.BZImage, "--initrd",
				d.Initrd, "--cmdline", bootDistribution, "--disk", disk + ",backend=" + backend}, func() {}
		}})
	}
	for _, q := range qemus(b, l) {
		args := append(qemuArgs("q35", d.BZImage, d.Initrd), "-append", "console=ttyS0 "+bootDistribution, "-smp", "2")
		ways = append(ways, way{q.name, "gvm-process", func() (string, []string, func()) {
			return q.Path, append(args[:len(args):len(args)], q.disk(disk)...), func() {}
		}}, way{q.name + "-vhost", "gvm-vhost", func() (string, []string, func()) {
			device, done := vhostDisk(b, disk)
			return q.Path, append(args[:len(args):len(args)], device...), done
		}})
	}
	boot := func(w way) (took float64) {
		r := again(b, func(result) bool { return took > 0 }, func() result {
			must(b, d.CopyRoot(disk))
			program, args, done := w.make()
			defer done()
			cleanMemory(b)
			begin := time.Now()
			p := startProgram(b, program, nil, cacheHome, args...)
			if p.shows(loginPrompt) {
				took = time.Since(begin).Seconds()
				p.signal(syscall.SIGTERM)
			}
			return p.end()
		})
		if took == 0 {
			r.fatalf(b, "%s: no prompt for a login", w.name)
		}
		return took
	}
	boot(ways[0]) // fills the page cache with files, and gvm's cache with the kernel
	figures := make([]figure, len(ways))
	for i, w := range ways {
		figures[i].What, figures[i].Way = "until the login, s", w.name
	}
	for b.Loop() {
		for i, w := range ways {
			figures[i].Values = append(figures[i].Values, boot(w))
		}
	}
	for i, w := range ways {
		for k := range figures {
			if figures[k].Way == w.peer {
				figures[k].of(figures[i])
			}
		}
	}
	report(b, "linux-distribution", figures)
}
