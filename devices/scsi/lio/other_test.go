package lio

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// TestOther: another process adds disks to the target of a living one and removes them, to the
// last, as that does itself. It changes no other target.
func TestOther(t *testing.T) {
	f := newFake(t)
	h := fakeHost(f, process{7, 70})
	foreign(t, h)
	without := f.snapshot()
	tg, err := h.provision([]Unit{unit(0, image(t, "a.img"))})
	if err != nil {
		t.Fatal(err)
	}
	before, b := f.snapshot(), image(t, "b.img")
	other := fakeHost(f, process{7, 70})
	for range 2 {
		if notes, err := other.addTo(os.Getpid(), tg.WWN, unit(5, b)); err != nil || len(notes) != 0 {
			t.Fatal(notes, err)
		}
		if _, err := other.addTo(os.Getpid(), tg.WWN, unit(5, image(t, "c.img"))); !errors.Is(err, ErrUnit) {
			t.Errorf("a LUN that is taken: %v", err)
		}
		if _, err := other.addTo(os.Getpid(), tg.WWN, unit(6, b)); !errors.Is(err, ErrBusy) {
			t.Errorf("an image that is served: %v", err)
		}
		added := f.snapshot()
		for _, wwn := range []string{"", "naa.5001405a1b2c3d4e", tg.WWN + "/tpgt_0", "../core"} {
			_, err := other.addTo(os.Getpid(), wwn, unit(9, b))
			if err2 := other.removeFrom(os.Getpid(), wwn, 5); !errors.Is(err, ErrNoTarget) || !errors.Is(err2, ErrNoTarget) ||
				strings.Contains(err.Error(), "\n") {
				t.Errorf("target %q: %v, %v", wwn, err, err2)
			}
		}
		for _, pid := range []int{7, 8, 0, -1} {
			if err := other.removeFrom(pid, tg.WWN, 5); !errors.Is(err, ErrNoTarget) {
				t.Errorf("of process %d: %v", pid, err)
			}
		}
		if err := other.removeFrom(os.Getpid(), tg.WWN, 6); !errors.Is(err, ErrNoLUN) {
			t.Errorf("a LUN that is not there: %v", err)
		}
		if got := f.snapshot(); got != added {
			t.Errorf("a refused change has changed something:\n%s", got)
		}
		if err := other.removeFrom(os.Getpid(), tg.WWN, 5); err != nil {
			t.Fatal(err)
		}
	}
	if got := f.snapshot(); got != before {
		t.Errorf("after the removal:\n%s", got)
	}
	if _, err := other.addTo(os.Getpid(), tg.WWN, unit(1, b)); err != nil {
		t.Fatal(err)
	}
	if err := other.removeFrom(os.Getpid(), tg.WWN, 0); err != nil { // which the process has made
		t.Error(err)
	}
	if err := tg.Close(); err != nil {
		t.Error(err)
	}
	if got := f.snapshot(); got != without {
		t.Errorf("the process has left:\n%s", got)
	}
}

// TestTakeDown: another process takes down the target of a living one, and no other target. A
// change that began before that makes nothing after it.
func TestTakeDown(t *testing.T) {
	f := newFake(t)
	h := fakeHost(f, process{7, 70})
	foreign(t, h)
	without := f.snapshot()
	tg, err := h.provision([]Unit{unit(0, image(t, "a.img"))})
	if err != nil {
		t.Fatal(err)
	}
	before, other := f.snapshot(), fakeHost(f, process{7, 70})
	if !other.owns(os.Getpid()) || other.owns(8) {
		t.Error("the owner of the target is not known")
	}
	for pid, wwn := range map[int]string{os.Getpid(): "naa.5001405a1b2c3d4e", 7: tg.WWN, 8: tg.WWN} {
		if err := other.takeDown(pid, wwn); !errors.Is(err, ErrNoTarget) || f.snapshot() != before {
			t.Errorf("%s of process %d: %v\n%s", wwn, pid, err, f.snapshot())
		}
	}
	slow, err := other.of(os.Getpid(), tg.WWN)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.takeDown(os.Getpid(), tg.WWN); err != nil || f.snapshot() != without || other.owns(os.Getpid()) {
		t.Errorf("%v; left:\n%s", err, f.snapshot())
	}
	u := unit(1, image(t, "b.img"))
	u.ReadOnly = true // another backstore, whose adapter there is not yet
	if err := slow.Add(u); !errors.Is(err, ErrNoTarget) || f.snapshot() != without {
		t.Errorf("added after the end: %v\n%s", err, f.snapshot())
	}
	if err := other.takeDown(os.Getpid(), tg.WWN); !errors.Is(err, ErrNoTarget) {
		t.Errorf("taken down twice: %v", err)
	}
}
