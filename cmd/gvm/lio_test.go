package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gvm/devices/scsi/lio"
)

// lioTree makes a directory like the kernel's target with a disk of another tool, one of a dead
// gvm, and a target that has both.
func lioTree(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "target")
	theirs, dead := "core/fileio_0/disk0", "core/fileio_19999999000000000100/gvm-9999999-1-0-lun3"
	lun := "vhost/naa.5001405a1b2c3d4e/tpgt_1/lun/"
	for _, d := range []string{theirs, dead, "core/alua/lu_gps", "vhost/discovery_auth", lun + "lun_0", lun + "lun_3"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{theirs: "/srv/their\xe4.img\n", dead: "/srv/left.img\n"} {
		if err := os.WriteFile(filepath.Join(root, name, "udev_path"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for n, to := range map[string]string{"lun_0/x": theirs, "lun_3/y": dead} {
		if err := os.Symlink("../../../../../../target/"+to, filepath.Join(root, lun, n)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestLioList(t *testing.T) {
	root := lioTree(t)
	var out, notes bytes.Buffer
	if err := lioList(&out, &notes, root, false); err != nil || notes.Len() > 0 {
		t.Fatal(err, notes.String())
	}
	want := []string{
		"KIND OWNER NAME WHAT",
		"target other vhost/naa.5001405a1b2c3d4e tpgt 1 LUN 0 disk0, tpgt 1 LUN 3 gvm-9999999-1-0-lun3",
		`disk other core/fileio_0/disk0 /srv/their\xe4.img`,
		"disk gvm 9999999 (dead) core/fileio_19999999000000000100/gvm-9999999-1-0-lun3 /srv/left.img",
	}
	var got []string
	for _, l := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		got = append(got, strings.Join(strings.Fields(l), " "))
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("table is\n%s", out.String())
	}
	out.Reset()
	if err := lioList(&out, &notes, root, true); err != nil {
		t.Fatal(err)
	}
	var objects []lio.Object
	if err := json.Unmarshal(out.Bytes(), &objects); err != nil || len(objects) != 3 ||
		objects[1].Image != "/srv/their\xe4.img" || objects[2].Owner.PID != 9999999 || objects[2].Owner.Alive {
		t.Errorf("%v: %s", err, out.String())
	}
}

func TestLioAbsent(t *testing.T) {
	root := filepath.Join(t.TempDir(), "config", "target")
	var out, notes bytes.Buffer
	if err := lioGC(&out, &notes, root); err != nil || out.Len() > 0 || !strings.Contains(notes.String(), "configfs") {
		t.Errorf("gc: %v, %q, %q", err, out.String(), notes.String())
	}
	if err := lioList(&out, &notes, root, true); err != nil || out.String() != "[]\n" {
		t.Errorf("list: %v, %q", err, out.String())
	}
}

// TestLioGCFails: plain directories refuse operations of configfs, which is an error of the host.
func TestLioGCFails(t *testing.T) {
	var out, notes bytes.Buffer
	err := lioGC(&out, &notes, lioTree(t))
	if err == nil || exitStatus(err) != exitHost || !strings.Contains(err.Error(), "gvm-9999999-1-0-lun3") {
		t.Errorf("%v: %q", err, out.String())
	}
}

func TestLioWords(t *testing.T) {
	for _, words := range [][]string{{"lio", "no"}, {"lio", "list", "x"}, {"lio", "gc", "x"}, {"lio", "gc", "--no"}} {
		a := app(nil)
		a.Writer, a.ErrWriter = new(bytes.Buffer), new(bytes.Buffer)
		if err := a.Run(append([]string{"gvm"}, words...)); err == nil || exitStatus(err) != exitUsage {
			t.Errorf("gvm %v: %v", words, err)
		}
	}
}
