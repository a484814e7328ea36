package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
)

// TestErrorStop fills a disk's file system under a guest, which pauses the machine. With more room
// the write is repeated and the guest notices nothing; if the disk is removed the guest gets an
// error; and a machine can be ended meanwhile.
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
			if v.out != "" && r.status != v.status || v.status == 143 && r.status != 143 ||
				!strings.Contains(r.out, v.out) ||
				!strings.Contains(r.errs, image+": write at byte ") ||
				!strings.Contains(r.errs, "the machine is paused until: gvm resume "+name) {
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
