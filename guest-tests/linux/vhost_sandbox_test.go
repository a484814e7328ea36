package linux

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi/lio"
)

// TestVhostPlugSandbox: in the sandbox the broker has the kernel serve disks that gvm disk adds: of
// both kinds of backstore, to be read and written, twice. gvm has let go of one that it removed.
// Nothing is left in LIO, however gvm ends.
func TestVhostPlugSandbox(t *testing.T) {
	for _, end := range []string{"in order", "SIGKILL"} {
		t.Run(end, func(t *testing.T) {
			lioUnchanged(t)
			t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
			stays, comes := diskFile(t, content("stays", 1<<20)), diskFile(t, make([]byte, 2<<20))
			device := loopDevice(t, diskFile(t, content("device", 3<<20)))
			p := start(t, nil, append(guest{kernel: theLab(t).Debian, script: `
wait_for /dev/sda
new() { # BLOCKS of it
	until [ "$(cat /sys/block/sd[b-z]/size 2>/dev/null)" = $1 ]; do sleep 0.1; done
	new=$(echo /sys/block/sd[b-z]); new=/dev/${new##*/}
	wait_for $new
}
gone() { while [ -e $new ]; do sleep 0.1; done; echo removed $1; }
echo ready
new 4096
echo written once | dd of=$new bs=512 conv=sync,fsync 2>/dev/null || say write failed
echo added once; gone once
new 4096
say kept $(dd if=$new bs=12 count=1 2>/dev/null)
echo written twice | dd of=$new bs=512 conv=sync,fsync 2>/dev/null || say write failed
echo added twice; gone twice
new 6144
say device $(sum <$new)
echo added device
`}.build(t), "--name=plugged", "--sandbox=on", "--disk", stays+",backend=vhost")...)
			p.waitFor("ready")
			disk := func(want string, args ...string) {
				t.Helper()
				r := gvm(t, append([]string{"disk"}, args...)...)
				r.wantStatus(t, 0)
				if !strings.HasPrefix(r.console, want) || strings.Contains(r.console, ";") { // the guest is told
					r.fatalf(t, "gvm disk %q", args)
				}
			}
			for _, n := range []string{"once", "twice"} {
				disk("added LUN 1, "+comes, "add", "plugged", comes+",backend=vhost")
				p.waitFor("added " + n)
				if r := gvm(t, "disk", "add", "plugged", comes+",backend=vhost"); r.status != 2 ||
					!strings.Contains(r.stderr, "given twice") {
					r.fatalf(t, "the same image once more")
				}
				disk("removed LUN 1, "+comes, "remove", "plugged", comes)
				p.waitFor("removed " + n)
				f, err := block.Open(comes, block.Options{})
				must(t, err)
				must(t, f.Close())
				b, err := os.ReadFile(comes)
				must(t, err)
				if !strings.HasPrefix(string(b), "written "+n+"\n") {
					t.Errorf("the image has %.20q", b)
				}
			}
			disk("added LUN 1, "+device, "add", "plugged", device+",backend=vhost")
			p.waitFor("added device")
			if end == "SIGKILL" {
				p.signal(syscall.SIGKILL)
				p.wait().wantStatus(t, -1)
				for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
					left, _ := filepath.Glob(lio.DefaultRoot + "/core/*_1???????????????????")
					if len(left) == 0 {
						break
					}
					if time.Now().After(deadline) {
						t.Fatalf("the broker has left %v", left)
					}
				}
			} else {
				r := p.wait()
				r.wantStatus(t, 0)
				r.want(t, map[string]string{"kept": "written once", "device": sum(content("device", 3<<20))})
				if strings.Contains(r.console, "= write failed") {
					r.fatalf(t, "a disk could not be written")
				}
			}
		})
	}
}
