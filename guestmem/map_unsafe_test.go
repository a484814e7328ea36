package guestmem

import (
	"runtime/debug"
	"testing"
	"unsafe"
)

var read byte // keeps the compiler from removing the reads

// TestGuards reads just outside a region, on both sides.
func TestGuards(t *testing.T) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	for _, shared := range []bool{false, true} {
		m, err := Map(Config{Size: MinSize + 4096, Shared: shared})
		if err != nil {
			t.Fatal(err)
		}
		b := m.Regions()[0].Bytes
		if uintptr(unsafe.Pointer(&b[0]))%hugePage != 0 {
			t.Errorf("RAM starts at %p, not on 2 MiB", &b[0])
		}
		for _, off := range []int{-1, len(b), len(b) + hugePage - 1} {
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("shared %v: offset %d of %d could be read", shared, off, len(b))
					}
				}()
				read = *(*byte)(unsafe.Add(unsafe.Pointer(&b[0]), off))
			}()
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}
