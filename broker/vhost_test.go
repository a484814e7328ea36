package broker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/lio"
	"gvm/text"
)

// TestVhost: the broker has the kernel serve an image that a request of the owner names so: once,
// from the machine's own target, as the request has it. It removes disks of that target alone.
func TestVhost(t *testing.T) {
	s := newSetup(t)
	var added []lio.Unit // this and the next two are guarded by s.mu
	var removed []int
	var opened os.FileInfo
	target := &lio.Target{WWN: "naa.5001405000000001"}
	mine := func(pid int, wwn string) error {
		if pid != os.Getpid() || wwn != target.WWN {
			return fmt.Errorf("%d, %s: no such target", pid, wwn)
		}
		return nil
	}
	addUnit := func(pid int, wwn string, u lio.Unit) ([]string, error) {
		if fi, err := u.Backend.(*block.File).Stat(); err != nil || !os.SameFile(fi, opened) {
			t.Errorf("not the file that was opened, but %+v, %v", fi, err)
		}
		if _, err := scsi.NewUnit(u.UnitConfig); err != nil {
			t.Error(err)
		}
		added = append(added, u)
		return []string{"a note"}, mine(pid, wwn)
	}
	s.mu.Lock()
	s.kernel = kernel{addUnit, func(pid int, wwn string, lun int) error {
		removed = append(removed, lun)
		return mine(pid, wwn)
	}, mine}
	s.mu.Unlock()
	if err := s.Shut(); err != nil {
		t.Fatal(err)
	}
	path, plain, other := s.image(t, "k.img"), s.image(t, "plain.img"), s.image(t, "other.img")
	add := func(path string, lun int) error {
		_, err := s.call(message{Op: addTo, Path: text.Name(path), WWN: target.WWN, LUN: lun}, nil)
		return err
	}
	refused := func(what string, err error) {
		t.Helper()
		s.mu.Lock()
		defer s.mu.Unlock()
		if !errors.Is(err, unix.EACCES) || len(added) > 0 {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("an image that no request names", add(other, 1))
	s.add(t, plain)
	refused("one that gvm is to serve", add(plain, 1))
	f := s.add(t, path+",backend=vhost,lun=3,serial=S,readonly")
	s.add(t, s.image(t, "next.img")+",backend=vhost") // which ends no grant of another
	refused("another LUN", add(path, 4))
	_, err := s.Image(path, block.Options{ReadOnly: true, BlockSize: 512, Lend: true})
	refused("the image once more", err)
	// The path leads elsewhere: package lio refuses that, as the file is another one.
	s.mu.Lock()
	opened, err = f.Stat()
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), os.Symlink(other, path)); err != nil {
		t.Fatal(err)
	}

	u := lio.Unit{LUN: 3, UnitConfig: scsi.UnitConfig{Backend: f, Serial: "forged", BlockSize: 4096}}
	notes, err := s.AddTo(target, u)
	s.mu.Lock()
	got := added
	added = nil
	s.mu.Unlock()
	if err != nil || len(notes) != 1 || len(got) != 1 {
		t.Fatalf("%v, %v; added %+v", notes, err, got)
	}
	b := got[0].Backend.(*block.File)
	if g := got[0]; g.LUN != 3 || g.Serial != "S" || !g.ReadOnly || g.BlockSize != 512 || b.Identity() != path {
		t.Errorf("%+v, %s", g, b.Identity())
	}
	refused("the image twice", add(path, 3))
	err = s.RemoveFrom(target, 3)
	s.mu.Lock()
	if err != nil || len(removed) != 1 || removed[0] != 3 {
		t.Errorf("%v, removed %v", err, removed)
	}
	s.mu.Unlock()
	if s.RemoveFrom(&lio.Target{WWN: "naa.5001405000000002"}, 3) == nil {
		t.Error("a disk of another's target is removed")
	}
	if s.TakeDown(&lio.Target{WWN: "naa.5001405000000002"}) == nil {
		t.Error("another's target is taken down")
	}
	if err := s.TakeDown(target); err != nil {
		t.Error(err)
	}
}

// TestTakeDownDeaths: a machine whose broker is dead leaves its kernel's target to the keeper. One
// whose broker is stopped does not wait for it once more at its end.
func TestTakeDownDeaths(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		ours, theirs := pair(t)
		c := newClient("m", ours, func(string) {})
		c.shut = true
		close(c.started)
		go c.receive()
		if !stopped {
			theirs.Close()
			if err := c.TakeDown(&lio.Target{WWN: "naa.5001405000000001"}); err != nil {
				t.Error(err)
			}
			c.conn.Close()
			continue
		}
		synctest.Test(t, func(t *testing.T) {
			c.taking++          // which the broker does not answer
			began := time.Now() // of a clock that only waits advance
			if err := c.End(); err == nil || time.Now() != began {
				t.Errorf("%v, waited %v", err, time.Since(began))
			}
		})
		theirs.Close()
	}
}

// TestVhostErrors: the machine has the kernel's errors as its own, each one line.
func TestVhostErrors(t *testing.T) {
	s := newSetup(t)
	if err := s.Shut(); err != nil {
		t.Fatal(err)
	}
	target := &lio.Target{WWN: "naa.5001405000000001"}
	if err := s.RemoveFrom(target, 0); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("a target that is not there: %v", err)
	}
	for _, want := range []error{lio.ErrUnit, lio.ErrBusy, lio.ErrPermission} {
		s.mu.Lock()
		s.kernel.addTo = func(int, string, lio.Unit) ([]string, error) { return nil, fmt.Errorf("x: %w", want) }
		s.mu.Unlock()
		f := s.add(t, filepath.Join(s.dir, want.Error()+".img")+",size=1M,backend=vhost")
		_, err := s.AddTo(target, lio.Unit{UnitConfig: scsi.UnitConfig{Backend: f}})
		if err == nil || err.Error() != "x: "+want.Error() || want != lio.ErrPermission && !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
}
