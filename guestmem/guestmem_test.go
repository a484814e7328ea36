package guestmem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSliceBounds(t *testing.T) {
	m, err := Of(Region{Base: 0x1000, Bytes: make([]byte, 0x2000), FD: -1},
		Region{Base: 0x10000, Bytes: make([]byte, 0x1000), FD: -1})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		addr, n uint64
		ok      bool
	}{
		{0x1000, 0x2000, true},
		{0x1000, 0, true},
		{0x2fff, 1, true},
		{0x2fff, 2, false},
		{0xfff, 1, false},
		{0xfff, 2, false},
		{0x3000, 0, false},
		{0x10000, 0x1000, true},
		{0x10fff, 1, true},
		{0x11000, 1, false},
		{0x1000, 1 << 63, false},
		{^uint64(0), 1, false},
		{^uint64(0), ^uint64(0), false},
		{0x1000, ^uint64(0), false},
		{0, 0, false},
	} {
		b, err := m.Slice(c.addr, c.n)
		if (err == nil) != c.ok {
			t.Errorf("Slice(%#x, %#x): %v", c.addr, c.n, err)
		}
		if err == nil && uint64(len(b)) != c.n {
			t.Errorf("Slice(%#x, %#x) has %d bytes", c.addr, c.n, len(b))
		}
		var re *RangeError
		if err != nil && (!errors.As(err, &re) || re.Addr != c.addr || re.Len != c.n) {
			t.Errorf("Slice(%#x, %#x): %v is no RangeError of it", c.addr, c.n, err)
		}
	}
	b, _ := m.Slice(0x1000, 16)
	if cap(b) != 16 {
		t.Errorf("a slice of 16 bytes can be grown to %d", cap(b))
	}
}

func TestOfRefusesOverlap(t *testing.T) {
	if _, err := Of(Region{Base: 0, Bytes: make([]byte, 0x2000)},
		Region{Base: 0x1000, Bytes: make([]byte, 0x1000)}); err == nil {
		t.Error("overlapping regions were accepted")
	}
	if _, err := Of(Region{Base: 0}); err == nil {
		t.Error("an empty region was accepted")
	}
}

func TestMapLeavesTheHole(t *testing.T) {
	for _, c := range []struct {
		size uint64
		want [][2]uint64
	}{
		{16 << 20, [][2]uint64{{0, 16 << 20}}},
		{3 << 30, [][2]uint64{{0, 3 << 30}}},
		{3<<30 + 4096, [][2]uint64{{0, 3 << 30}, {4 << 30, 4096}}},
		{6 << 30, [][2]uint64{{0, 3 << 30}, {4 << 30, 3 << 30}}},
	} {
		for _, shared := range []bool{false, true} {
			m, err := Map(Config{Size: c.size, Shared: shared})
			if err != nil {
				t.Fatal(err)
			}
			if len(m.Regions()) != len(c.want) || m.Size() != c.size {
				t.Fatalf("%d bytes: %d regions of %d bytes", c.size, len(m.Regions()), m.Size())
			}
			for i, r := range m.Regions() {
				if r.Base != c.want[i][0] || uint64(len(r.Bytes)) != c.want[i][1] || (r.FD >= 0) != shared {
					t.Errorf("%d bytes: region %d is %#x+%#x, fd %d", c.size, i, r.Base, len(r.Bytes), r.FD)
				}
				r.Bytes[len(r.Bytes)-1] = 1
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	for _, size := range []uint64{0, 4096, MinSize - 4096, MinSize + 1, 1 << 50} {
		if _, err := Map(Config{Size: size}); err == nil {
			t.Errorf("Map took %d bytes", size)
		}
	}
}

// TestUint16Neighbours stores to both halves of one word from two goroutines: neither may undo the
// other's store.
func TestUint16Neighbours(t *testing.T) {
	m := Heap(0, 4096)
	b, _ := m.Slice(0, 4)
	var wg sync.WaitGroup
	for half := range 2 {
		wg.Go(func() {
			for i := range uint16(2000) {
				StoreUint16(b[2*half:], i)
				if v := LoadUint16(b[2*half:]); v != i {
					t.Errorf("half %d: stored %d, loaded %d", half, i, v)
					return
				}
			}
		})
	}
	wg.Wait()
	if b[0] != 0xcf || b[1] != 0x07 || b[2] != 0xcf || b[3] != 0x07 {
		t.Errorf("bytes are % x", b)
	}
}

// TestDiscard: only whole pages inside the slice go, and reading them does not bring them back.
func TestDiscard(t *testing.T) {
	for _, shared := range []bool{false, true} {
		m, err := Map(Config{Size: MinSize, Shared: shared})
		if err != nil {
			t.Fatal(err)
		}
		b := m.Regions()[0].Bytes
		for i := range b {
			b[i] = 1
		}
		before := resident(t)
		for _, r := range [][2]int{{0, 0}, {5, 5}, {5, 4096}, {4095, 4097}, {1, 8191}, {4 << 20, 12 << 20},
			{13<<20 - 1, 13<<20 + 4097}, {MinSize - 4096, MinSize}} {
			if err := m.Discard(b[r[0]:r[1]]); err != nil {
				t.Errorf("shared %v: %v", shared, err)
			}
		}
		if gone := before - resident(t); gone < 7<<20 {
			t.Errorf("shared %v: %d KiB went", shared, gone>>10)
		}
		for i, v := range b {
			gone := i >= 4<<20 && i < 12<<20 || i >= 13<<20 && i < 13<<20+4096 || i >= MinSize-4096
			if (v == 0) != gone {
				t.Fatalf("shared %v: byte %#x is %d", shared, i, v)
			}
		}
		if err := unix.Mlock(b[:4096]); err != nil {
			t.Fatal(err)
		}
		if err := m.Discard(b[:4096]); !errors.Is(err, unix.EINVAL) || b[0] != 1 {
			t.Errorf("shared %v: locked memory: %v, %d", shared, err, b[0])
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	m := Heap(0, 8192)
	m.Regions()[0].Bytes[0] = 1
	if err := m.Discard(m.Regions()[0].Bytes); err != nil || m.Regions()[0].Bytes[0] != 1 {
		t.Errorf("memory of a test: %v", err)
	}
}

// TestResident counts the pages that were touched, in private and in shared memory.
func TestResident(t *testing.T) {
	for _, shared := range []bool{false, true} {
		m, err := Map(Config{Size: 300 << 20, Shared: shared})
		if err != nil {
			t.Fatal(err)
		}
		r := m.Regions()[0]
		for i := range 3 {
			// A huge page comes whole.
			if n, ok := r.Resident(t.Context()); !ok || n < uint64(i)*4096 || n > uint64(i)*hugePage {
				t.Errorf("shared %v, %d pages: %d, %v", shared, i, n, ok)
			}
			r.Bytes[i*(residentStep+4096)] = 1
		}
		over, cancel := context.WithCancel(t.Context())
		cancel()
		if n, ok := r.Resident(over); ok {
			t.Errorf("after the end: %d", n)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestMapIsLazy maps far more than it touches.
func TestMapIsLazy(t *testing.T) {
	for _, shared := range []bool{false, true} {
		before := resident(t)
		m, err := Map(Config{Size: 64 << 30, Shared: shared})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range m.Regions() {
			r.Bytes[0], r.Bytes[len(r.Bytes)/2] = 1, 1
		}
		// Four accesses, each of which may allocate a 2 MiB page.
		if grew := resident(t) - before; grew > 64<<20 {
			t.Errorf("64 GiB with four bytes touched (shared %v) took %d MiB", shared, grew>>20)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// resident returns the process's resident set in bytes.
func resident(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	var size, pages int
	if _, err := fmt.Sscan(string(b), &size, &pages); err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

func TestHugepages(t *testing.T) {
	b, _ := os.ReadFile("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
	m, err := Map(Config{Size: 32 << 20, Hugepages: true})
	if n, _ := strconv.Atoi(strings.TrimSpace(string(b))); n < 16 {
		if err == nil {
			t.Fatalf("mapped 16 huge pages where %d are free", n)
		}
		if !strings.Contains(err.Error(), "sysctl vm.nr_hugepages=16") {
			t.Errorf("the error lacks the mend: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	m.Regions()[0].Bytes[5<<20] = 1
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Map(Config{Size: 33 << 20, Hugepages: true}); err == nil {
		t.Error("33 MiB of 2 MiB pages were mapped")
	}
}
