package main

import (
	"os"
	"strings"
	"testing"
)

// TestProtectionFile: gvm makes protection information for the writes of a guest that knows nothing
// of it, refuses blocks that change afterwards, and checks nothing without IMAGE.pi.
func TestProtectionFile(t *testing.T) {
	t.Parallel()
	file := image(t, "disk", 1, 8<<20)
	passes(t, guestRun("--disk="+file+",pi=1", "write")...)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(file + ".pi"); err != nil || fi.Size() <= 4096 {
		t.Fatalf("protection information: %v, %v", fi, err)
	}
	b[5] ^= 1 // in the first block, which the guest writes and reads
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := gvmRuns(t, command(t, guestRun("--disk="+file+",pi=1")...)); r.status == 0 ||
		!strings.Contains(r.out, "b/10/01") {
		t.Errorf("status %d: %s", r.status, r.out)
	}
	if r := gvmRuns(t, command(t, guestRun("--disk="+file+",pi=1,block_size=4096")...)); r.status != exitUsage ||
		!strings.Contains(r.errs,
			file+".pi: not the protection information of this disk: it is for blocks of 512 bytes") {
		t.Errorf("status %d: %s", r.status, r.errs)
	}
	if err := os.Remove(file + ".pi"); err != nil {
		t.Fatal(err)
	}
	passes(t, guestRun("--disk="+file+",pi=1")...)
	if _, err := os.Stat(file + ".pi"); !os.IsNotExist(err) {
		t.Errorf("a guest that only reads has made it: %v", err)
	}
	passes(t, guestRun("--disk=mem:8M,pi=1,block_size=4096", "write")...)
}
