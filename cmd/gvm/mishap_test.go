package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
)

func TestMishaps(t *testing.T) {
	var notes []string
	var held int
	add := func(s string) { notes = append(notes, s) }
	m := &mishaps{name: "vm", note: add, paused: add, hold: func(context.Context) bool { held++; return held < 3 }}
	eio, full, quota := fmt.Errorf("write at byte 0: %w", unix.EIO), fmt.Errorf("write at byte 0: %w", unix.ENOSPC), fmt.Errorf("write at byte 0: %w", unix.EDQUOT)
	for _, v := range []struct {
		policy errorPolicy
		err    error
		retry  bool
		notes  string
	}{
		{reportErrors, eio, false, "report: the guest gets an error: write at byte 0: input/output error"},
		{reportErrors, eio, false, ""},
		{reportErrors, full, false, "report: the guest gets an error: write at byte 0: no space left on device"},
		{stopWhenFull, eio, false, "enospc-stop: the guest gets an error: write at byte 0: input/output error"},
		{stopWhenFull, full, true, "enospc-stop: write at byte 0: no space left on device; the machine is paused until: gvm resume vm"},
		{stopOnErrors, quota, true, "stop: write at byte 0: disk quota exceeded; the machine is paused until: gvm resume vm"},
		{stopOnErrors, io.ErrUnexpectedEOF, false, "stop: " + io.ErrUnexpectedEOF.Error() + "; the machine is paused until: gvm resume vm"},
	} {
		d := disk{onError: v.policy}
		for name, p := range errorPolicies {
			if p == v.policy {
				d.path = name
			}
		}
		notes = nil
		tell, retry := m.watch(t.Context(), d)
		if tell != nil {
			tell(v.err)
		}
		if again := retry != nil && retry(v.err); again != v.retry || strings.Join(notes, "|") != v.notes {
			t.Errorf("%s, %v: retried %v, %q", d.path, v.err, again, notes)
		}
	}
	m.hold = nil
	if _, retry := m.watch(t.Context(), disk{onError: stopOnErrors}); retry != nil {
		t.Error("waits for nobody")
	}
}

// TestMishapsTogether has many commands of two disks fail at the same time: each disk is named
// once, and again after the machine went on.
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
				_, retry := m.watch(t.Context(), disk{path: path, onError: stopOnErrors})
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
			tell, _ := m.watch(t.Context(), disk{path: fmt.Sprint("disk", i)})
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

// TestErrorStop lets a disk's file system run full under a guest: the machine pauses. With more room
// the write is done again and the guest notices nothing; without the disk it gets an error; and a machine
// that is ended meanwhile ends.
func TestErrorStop(t *testing.T) {
	t.Parallel()
	small := t.TempDir()
	switch err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=16k"); {
	case errors.Is(err, unix.EPERM):
		t.Skipf("needs root, to mount a file system that is soon full: %v", err)
	case err != nil:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	for i, v := range []struct {
		policy string
		mend   func(t *testing.T, p *proc, c *control.Client, name string)
		status int
		out    string
	}{
		{"stop", func(t *testing.T, _ *proc, c *control.Client, name string) {
			if err := unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
				t.Fatal(err)
			}
			if r := ask(t, small, "resume", name); r.status != 0 {
				t.Errorf("resume: %+v", r)
			}
		}, 0, "PASS"},
		{"enospc-stop", func(t *testing.T, _ *proc, c *control.Client, name string) {
			if r := ask(t, small, "disk", "remove", name, "0"); r.status != 0 {
				t.Errorf("remove: %+v", r)
			}
			if r := ask(t, small, "resume", name); r.status != 0 {
				t.Errorf("resume: %+v", r)
			}
		}, 0, ""},
		{"stop", func(_ *testing.T, p *proc, _ *control.Client, _ string) { p.signal(syscall.SIGTERM) }, 143, ""},
	} {
		t.Run(fmt.Sprint(v.policy, i), func(t *testing.T) {
			if err := unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=16k"); err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprintf("stop-%d-%d", os.Getpid(), i)
			image := filepath.Join(small, "disk.img")
			p := startGVM(t, "", guestRun("--name="+name, "--disk="+image+",size=8M,error="+v.policy, "write")...)
			c := control.NewClient(control.In(filepath.Join(runtimeDir, "gvm")), name)
			for {
				info, err := c.Info(t.Context())
				if err == nil && info.State == control.Paused {
					break
				}
				p.mu.Lock()
				over := p.ended || p.late
				p.mu.Unlock()
				if over {
					t.Fatalf("the machine does not pause: %+v", p.wait())
				}
				time.Sleep(time.Millisecond)
			}
			v.mend(t, p, c, name)
			r := p.wait()
			if v.out != "" && r.status != v.status || v.status == 143 && r.status != 143 || !strings.Contains(r.out, v.out) ||
				!strings.Contains(r.errs, image+": write at byte ") || !strings.Contains(r.errs, "the machine is paused until: gvm resume "+name) {
				t.Errorf("%+v", r)
			}
			if v.out == "" && strings.Contains(r.out, "PASS") {
				t.Errorf("the guest has noticed nothing: %s", r.out)
			}
			if err := os.Remove(image); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		})
	}
}
