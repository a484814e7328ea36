package vhostscsi_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"gvm/guest-tests/lab"
	"gvm/kvmapi/vhost"
)

const configfs = "/sys/kernel/config/target"

// TestMain has the tests run where there is a vhost-scsi and a LIO to set up:
// here, or in the lab. GVM_TEST_L1=6.12 takes Debian's 6.12 kernel for the lab.
func TestMain(m *testing.M) {
	os.Exit(lab.Main(m, lab.Options{Direct: hasVhostSCSI}))
}

func hasVhostSCSI() (bool, string) {
	dev, err := vhost.OpenSCSI()
	if err != nil {
		return false, err.Error()
	}
	dev.Close()
	if _, err := os.Stat(configfs + "/core"); err != nil {
		return false, err.Error()
	}
	return os.Getuid() == 0, fmt.Sprintf("%s and LIO are here, and the user is %d", vhost.SCSIPath, os.Getuid())
}

// target is a target of LIO's vhost fabric. Its parts are taken down by the
// test's cleanup, which fails when the kernel still uses them.
type target struct {
	t    testing.TB
	wwpn string
	dir  string
}

func newTarget(t testing.TB, wwpn string) *target {
	tg := &target{t, wwpn, filepath.Join(configfs, "vhost", wwpn)}
	if err := os.MkdirAll(filepath.Dir(tg.dir), 0o755); err != nil {
		t.Fatal(err)
	}
	tg.mkdir(tg.dir)
	return tg
}

func (tg *target) mkdir(dir string) {
	tg.t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		tg.t.Fatal(err)
	}
	tg.t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			tg.t.Error(err)
		}
	})
}

func (tg *target) write(file, value string) {
	tg.t.Helper()
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		tg.t.Fatal(err)
	}
}

// group makes a portal group, with a nexus if it is wanted.
func (tg *target) group(tag int, nexus bool) (dir string) {
	tg.t.Helper()
	dir = fmt.Sprintf("%s/tpgt_%d", tg.dir, tag)
	tg.mkdir(dir)
	if nexus {
		tg.write(dir+"/nexus", "naa.5001405aaaaaaaaa")
		tg.t.Cleanup(func() { tg.write(dir+"/nexus", "NULL") })
	}
	return dir
}

var stores int // made so far, for their names

// lun makes a LUN of the group out of a new file with that content.
func (tg *target) lun(group string, number int, content []byte) (file, store string) {
	tg.t.Helper()
	file = filepath.Join(tg.t.TempDir(), "disk")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		tg.t.Fatal(err)
	}
	stores++
	hba := fmt.Sprintf("%s/core/fileio_%d", configfs, 100+stores)
	store = hba + "/disk"
	tg.mkdir(hba)
	tg.mkdir(store)
	tg.write(store+"/control", fmt.Sprintf("fd_dev_name=%s,fd_dev_size=%d,fd_buffered_io=1", file, len(content)))
	tg.write(store+"/enable", "1")
	tg.mkdir(fmt.Sprintf("%s/lun/lun_%d", group, number))
	tg.plug(group, number, store)
	tg.t.Cleanup(func() { tg.unplug(group, number) })
	return file, store
}

func (tg *target) plug(group string, number int, store string) {
	tg.t.Helper()
	if err := os.Symlink(store, fmt.Sprintf("%s/lun/lun_%d/store", group, number)); err != nil {
		tg.t.Fatal(err)
	}
}

// unplug unplugs a LUN that is plugged.
func (tg *target) unplug(group string, number int) {
	tg.t.Helper()
	if err := os.Remove(fmt.Sprintf("%s/lun/lun_%d/store", group, number)); err != nil && !os.IsNotExist(err) {
		tg.t.Fatal(err)
	}
}
