package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/devices/block"
)

// endBound distinguishes an end on a slow machine from one that waits for the guest's work, which
// takes minutes.
const endBound = 20 * time.Second

// TestEndOfSanitize ends machines and changes their disk during a SANITIZE command with 31
// overwrites: neither waits for the command.
func TestEndOfSanitize(t *testing.T) {
	// begin starts a machine and returns when the guest is overwriting the disk; "" is a file of 3
	// GiB.
	begin := func(t *testing.T, start func(*testing.T, string, ...string) *proc, disk string, flags ...string) *proc {
		if disk == "" {
			disk = filepath.Join(t.TempDir(), "disk.img")
			if err := block.Create(disk, 3<<30, false); err != nil {
				t.Fatal(err)
			}
		}
		p := start(t, t.TempDir(), guestRun(append(flags, "--disk="+disk, "sanitize")...)...)
		p.expect("sanitizing")
		return p
	}
	onTerminal := func(t *testing.T, _ string, args ...string) *proc { return startOnTerminal(t, args...) }
	within := func(t *testing.T, what string, since time.Time) {
		t.Helper()
		took := time.Since(since)
		t.Logf("%s took %v", what, took.Round(time.Millisecond))
		if took > endBound {
			t.Errorf("%s took %v", what, took)
		}
	}
	succeeds := func(t *testing.T, args ...string) {
		t.Helper()
		if r := ask(t, t.TempDir(), args...); r.status != 0 {
			t.Errorf("%v: status %d: %s", args, r.status, r.errs)
		}
	}
	for kind, disk := range map[string]string{"null": "null:16T", "file": ""} {
		name := func(what string) string { return fmt.Sprintf("sanitize-%s-%s-%d", kind, what, os.Getpid()) }
		for _, v := range []struct {
			name   string
			start  func(*testing.T, string, ...string) *proc
			end    func(*testing.T, *proc)
			status int
		}{
			{"SIGTERM", startGVM, func(t *testing.T, p *proc) { p.signal(syscall.SIGTERM) }, 143},
			{"SIGINT", startGVM, func(t *testing.T, p *proc) { p.signal(syscall.SIGINT) }, exitQuit},
			{"quit", onTerminal, func(t *testing.T, p *proc) { p.typeIn("\x01x") }, exitQuit},
			{"stop", startGVM, func(t *testing.T, p *proc) { succeeds(t, "stop", name("stop")) }, exitTerminated},
			{"remove", startGVM, func(t *testing.T, p *proc) {
				succeeds(t, "disk", "remove", name("remove"), "0")
				succeeds(t, "stop", name("remove"))
			}, exitTerminated},
			{"resize", startGVM, func(t *testing.T, p *proc) {
				if kind == "file" { // the other keeps its size
					succeeds(t, "disk", "resize", name("resize"), "0", "4G")
				}
				succeeds(t, "stop", name("resize"))
			}, exitTerminated},
		} {
			t.Run(kind+" "+v.name, func(t *testing.T) {
				p := begin(t, v.start, disk, "--name="+name(v.name))
				since := time.Now()
				v.end(t, p)
				if r := p.wait(); r.status != v.status || strings.Contains(r.errs, "not finished") {
					t.Errorf("status %d, want %d: %s", r.status, v.status, r.errs)
				}
				within(t, "the end", since)
			})
		}
		t.Run(kind+" timeout", func(t *testing.T) {
			t.Parallel()
			const timeout = 15 * time.Second // for a guest to get there
			since := time.Now()
			p := begin(t, startGVM, disk, "--timeout="+timeout.String())
			if r := p.wait(); r.status != exitTimeout {
				t.Errorf("status %d, want %d: %s", r.status, exitTimeout, r.errs)
			}
			within(t, "the end after the timeout", since.Add(timeout))
		})
	}
}
