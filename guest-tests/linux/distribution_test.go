//go:build built

package linux

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"
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

func testDistribution(t *testing.T, d lab.Distribution, backend string,
	start func(*testing.T, ...string) (*process, io.Writer)) {
	lioUnchanged(t)
	disk := filepath.Join(t.TempDir(), "root.ext4")
	must(t, d.CopyRoot(disk))
	begin := time.Now()
	p, console := start(t, "run", "--cpus", "2", "--kernel", d.BZImage, "--initrd", d.Initrd,
		"--cmdline", "root=/dev/sda rw quiet systemd.show_status=1", "--disk", disk+",backend="+backend)
	p.waitForText("\ndebian login: ")
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
		t.Errorf("/root/numbers in the image is %d bytes, not what the guest wrote", len(got))
	}
}
