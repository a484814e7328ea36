package sidecar_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/sidecar"
)

func TestReservations(t *testing.T) {
	path := image(t, "disk.img")
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	r := sidecar.NewReservations(open(t, link, block.Options{}))
	if want := path + ".pr"; r.Path() != want {
		t.Errorf("path %s, want %s", r.Path(), want)
	}
	const magic = "GVM-PR\x00"
	load := func(want string) {
		t.Helper()
		if got, err := r.Load(); err != nil || string(got) != want {
			t.Errorf("Load: %q, %v, want %q", got, err, want)
		}
		list, err := os.ReadDir(filepath.Dir(path))
		if n := min(len(want), 1) + 1; err != nil || len(list) != n {
			t.Errorf("%d files beside the image, want %d: %v", len(list), n, list)
		}
	}
	save := func(state string) {
		t.Helper()
		if err := r.Save([]byte(state)); err != nil {
			t.Error(err)
		}
		load(state)
	}
	load("")
	save("")
	save(magic + "one state")
	save(magic + "another")
	save("")
	for name, bad := range map[string]func() error{
		"empty":       func() error { return os.WriteFile(r.Path(), nil, 0o600) },
		"large":       func() error { return os.WriteFile(r.Path(), make([]byte, 2*mib), 0o600) },
		"a directory": func() error { return os.Mkdir(r.Path(), 0o700) },
	} {
		if err := bad(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Load(); !errors.Is(err, scsi.ErrReservationState) {
			t.Errorf("%s: %v", name, err)
		}
		for _, state := range []string{magic + "in its place", ""} {
			if err := r.Save([]byte(state)); !errors.Is(err, scsi.ErrReservationState) {
				t.Errorf("%s: saved over it: %v", name, err)
			}
		}
		os.Remove(r.Path())
		load("")
	}
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	if err := r.Save([]byte("state")); err == nil {
		t.Error("saved in a directory that is not there")
	}
}
