package linux

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi/lio"
	"gvm/guest-tests/lab"
)

// TestVhostPlugSandbox: in the sandbox the broker has the kernel serve disks that gvm disk adds: of
// both kinds of backstore, to be read and written, twice. gvm has let go of one that it removed.
// Nothing is left in LIO, however gvm ends. In a jail the broker has a janitor do it, also for a
// device of the command line.
func TestVhostPlugSandbox(t *testing.T) {
	needsTarget(t)
	const user = 41234
	for _, end := range []string{"in order", "SIGKILL", "in order in a jail", "SIGKILL in a jail"} {
		t.Run(end, func(t *testing.T) {
			lioUnchanged(t)
			end, inJail := strings.CutSuffix(end, " in a jail")
			run := t.TempDir()
			stays, comes := diskFile(t, content("stays", 1<<20)), diskFile(t, make([]byte, 2<<20))
			device := loopDevice(t, diskFile(t, content("device", 3<<20)))
			shown, options := comes, ",backend=vhost"
			args := guest{kernel: theLab(t).Debian, script: `
until d=$(disk 0); [ -b "$d" ]; do sleep 0.1; done
new() { # BLOCKS of LUN 1
	until new=$(disk 1); [ "$(cat "/sys/block/${new##*/}/size" 2>/dev/null)" = $1 ]; do sleep 0.1; done
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
`}.build(t)
			args = append(args, "--name=plugged", "--sandbox=on", "--disk", stays+",backend=vhost")
			if inJail {
				defer func() { must(t, os.Chown(device, 0, 0)) }()
				must(t, errors.Join(os.Chmod(args[4], 0o644), os.Chmod(run, 0o755), // the initrd, the jail
					os.Chown(stays, user, user), os.Chown(device, user, user)))
				args = append(args, "--jail", run, fmt.Sprint("--uid=", user), fmt.Sprint("--gid=", user),
					"--disk", device+options+",lock=off")
				run = filepath.Join(run, "run")
			}
			t.Setenv("XDG_RUNTIME_DIR", run)
			p := start(t, nil, args...)
			p.waitFor("ready")
			verb := gvm
			if inJail { // the machine is this user's
				program := filepath.Join(t.TempDir(), "gvm")
				b, err := os.ReadFile(lab.Program("gvm"))
				must(t, errors.Join(err, os.WriteFile(program, b, 0o755), os.Chmod(filepath.Dir(filepath.Dir(program)), 0o755)))
				verb = func(t testing.TB, args ...string) result {
					return startProgram(t, "/usr/bin/setpriv", nil, cacheHome, append([]string{fmt.Sprint("--reuid=", user),
						fmt.Sprint("--regid=", user), "--clear-groups", program}, args...)...).wait()
				}
			}
			disk := func(want string, args ...string) {
				t.Helper()
				r := verb(t, append([]string{"disk"}, args...)...)
				r.wantStatus(t, 0)
				if !strings.HasPrefix(r.console, want) || strings.Contains(r.console, ";") { // the guest is told
					r.fatalf(t, "gvm disk %q", args)
				}
			}
			if inJail {
				at := filepath.Join(run, "comes") // of a directory that gvm has made
				must(t, errors.Join(os.Rename(comes, at), os.Chown(at, user, user)))
				comes, shown = at, "/run/comes"
				options += ",lock=off" // whose file is not in the jail
				disk("removed LUN 1, "+device, "remove", "plugged", device)
			}
			for _, n := range []string{"once", "twice"} {
				disk("added LUN 1, "+shown, "add", "plugged", comes+",backend=vhost")
				p.waitFor("added " + n)
				if r := verb(t, "disk", "add", "plugged", comes+",backend=vhost"); r.status != 2 ||
					!strings.Contains(r.stderr, "given twice") {
					r.fatalf(t, "the same image once more")
				}
				disk("removed LUN 1, "+shown, "remove", "plugged", shown)
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
			disk("added LUN 1, "+device, "add", "plugged", device+options)
			p.waitFor("added device")
			if end == "SIGKILL" {
				p.signal(syscall.SIGKILL)
				p.wait().wantStatus(t, -1)
			} else {
				r := p.wait()
				r.wantStatus(t, 0)
				r.want(t, map[string]string{"kept": "written once", "device": sum(content("device", 3<<20))})
				if strings.Contains(r.console, "= write failed") {
					r.fatalf(t, "a disk could not be written")
				}
			}
			for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
				left, _ := filepath.Glob(lio.DefaultRoot + "/core/*_1???????????????????")
				if len(left) == 0 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("left in LIO: %v", left)
				}
			}
		})
	}
}
