package disk

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
)

func TestMishaps(t *testing.T) {
	var notes []string
	var held int
	add := func(s string) { notes = append(notes, s) }
	m := &mishaps{name: "vm", note: add, paused: add, hold: func(context.Context) bool { held++; return held < 3 }}
	eio, full, quota := fmt.Errorf("write at byte 0: %w", unix.EIO), fmt.Errorf("write at byte 0: %w", unix.ENOSPC),
		fmt.Errorf("write at byte 0: %w", unix.EDQUOT)
	for _, v := range []struct {
		policy ErrorPolicy
		err    error
		retry  bool
		notes  string
	}{
		{Report, eio, false, "report: the guest gets an error: write at byte 0: input/output error"},
		{Report, eio, false, ""},
		{Report, full, false, "report: the guest gets an error: write at byte 0: no space left on device"},
		{StopOnFull, eio, false, "enospc-stop: the guest gets an error: write at byte 0: input/output error"},
		{StopOnFull, full, true,
			"enospc-stop: write at byte 0: no space left on device; the machine is paused until: gvm resume vm"},
		{Stop, quota, true, "stop: write at byte 0: disk quota exceeded; the machine is paused until: gvm resume vm"},
		{Stop, io.ErrUnexpectedEOF, false, "stop: " + io.ErrUnexpectedEOF.Error() +
			"; the machine is paused until: gvm resume vm"},
	} {
		d := Spec{OnError: v.policy}
		d.Path = errorPolicies.of(v.policy)
		notes = nil
		tell, retry := m.watch(t.Context(), d)
		if tell != nil {
			tell(v.err)
		}
		if again := retry != nil && retry(v.err); again != v.retry || strings.Join(notes, "|") != v.notes {
			t.Errorf("%s, %v: retried %v, %q", d.Path, v.err, again, notes)
		}
	}
	m.hold = nil
	if _, retry := m.watch(t.Context(), Spec{OnError: Stop}); retry != nil {
		t.Error("waits for no reader")
	}
}

// TestMishapsTogether fails many commands of two disks at the same time: each disk is named once,
// and again after the machine was resumed.
func TestMishapsTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var notes []string
		resumed := make(chan struct{})
		m := &mishaps{name: "vm", paused: func(s string) {
			mu.Lock()
			defer mu.Unlock()
			notes = append(notes, s)
		}, hold: func(context.Context) bool { <-resumed; return true }}
		fail := func() {
			var failing sync.WaitGroup
			for _, path := range []string{"a", "b"} {
				_, retry := m.watch(t.Context(), Spec{Path: path, OnError: Stop})
				for i := range 64 {
					failing.Go(func() { retry(fmt.Errorf("write at byte %d: %w", i, unix.EIO)) })
				}
			}
			synctest.Wait()
			close(resumed)
			failing.Wait()
			resumed = make(chan struct{})
		}
		for range 3 {
			fail()
		}
		m.note = m.paused
		for i := range 3 * maxTold {
			tell, _ := m.watch(t.Context(), Spec{Path: fmt.Sprint("disk", i)})
			tell(unix.EIO)
		}
		if len(m.held) > 0 || len(m.told) > maxTold {
			t.Errorf("%d disks hold the machine, %d failures are kept", len(m.held), len(m.told))
		}
		if notes = notes[:len(notes)-3*maxTold]; len(notes) != 6 {
			t.Errorf("%d notes of 2 disks in 3 pauses: %q", len(notes), notes)
		}
	})
}
