package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"gvm/devices/block"
)

// killsEnv is the number of kills in TestKilledInJournal for each kind of disk; `make soak` sets
// it.
const killsEnv = "GVM_TEST_KILLS"

// TestKilledInJournal kills gvm while its guest writes numbered blocks. It then finds every block
// whose write was reported to the guest, flushed or not, in every cache mode, since only a failure
// of the host could lose it. No block is torn. Each guest continues with the disk of the one
// before.
func TestKilledInJournal(t *testing.T) {
	kills := 2
	if s := os.Getenv(killsEnv); s != "" {
		var err error
		if kills, err = strconv.Atoi(s); err != nil {
			t.Fatalf("%s=%s: %v", killsEnv, s, err)
		}
	}
	for name, options := range map[string]string{
		"writeback": "", "writethrough": ",cache=writethrough", "unsafe": ",cache=unsafe",
		"blocks of 4096": ",block_size=4096", "overlay": ",overlay=",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const size = 16 << 20 // more than a guest writes before it is killed
			img := filepath.Join(t.TempDir(), "disk.img")
			if err := block.Create(img, size, false); err != nil {
				t.Fatal(err)
			}
			spec, overlay := img+options, ""
			if name == "overlay" {
				overlay = filepath.Join(t.TempDir(), "disk.ovl")
				spec += overlay
			}
			old := make([]byte, size)
			for range kills {
				p := startGVM(t, "", guestRun("--disk="+spec, "write", "journal")...)
				p.expect(fmt.Sprintf("\nwrote %d\r", 1+rand.IntN(800)))
				p.signal(syscall.SIGKILL)
				r := p.wait()
				now := make([]byte, size)
				disk := openKilled(t, img, overlay)
				if _, err := disk.ReadAt(now, 0); err != nil {
					t.Fatal(err)
				}
				disk.Close()
				checkJournal(t, r.out, old, now)
				old = now
			}
		})
	}
}

// openKilled opens a disk of a killed gvm.
func openKilled(t *testing.T, img, overlay string) interface {
	block.Backend
	Close() error
} {
	t.Helper()
	f, err := block.Open(img, block.Options{ReadOnly: overlay != ""})
	if err != nil {
		t.Fatal(err)
	}
	if overlay == "" {
		return f
	}
	o, err := block.OpenOverlay(f, overlay)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// checkJournal checks a disk, which held old before, against the guest's reports of its writes of 4
// KiB: each block has the reported write, or a later one.
func checkJournal(t *testing.T, console string, old, now []byte) {
	t.Helper()
	const write = 4096
	slots := uint64(len(now) / write)
	wrote := make([]uint64, slots) // by slot; 0: none
	last := uint64(0)
	for line := range strings.Lines(lines(console)) {
		var n uint64
		if got, err := fmt.Sscanf(line, "wrote %d\n", &n); err == nil && got == 1 &&
			line == fmt.Sprintf("wrote %d\n", n) {
			wrote[n%slots], last = n, n
		}
	}
	if last == 0 {
		t.Fatal("the guest has written nothing")
	}
	for at := 0; at < len(now); at += 512 {
		b := now[at : at+512]
		slot := uint64(at / write)
		n := binary.LittleEndian.Uint64(b)
		for i := 8; i < len(b); i += 8 {
			if binary.LittleEndian.Uint64(b[i:]) != n {
				t.Fatalf("the block at %#x is torn: writes %d and %d", at, n, binary.LittleEndian.Uint64(b[i:]))
			}
		}
		// The guest's last report may be cut off, so that one more write is on the disk.
		fresh := n > 0 && n%slots == slot && n >= wrote[slot] && n <= last+2
		if !fresh && (wrote[slot] > 0 || string(b) != string(old[at:at+512])) {
			t.Fatalf("the block at %#x has write %d, and %d was written; the last that the guest told of was %d",
				at, n, wrote[slot], last)
		}
	}
}
