package guestmem

import (
	"bytes"
	"errors"
	"testing"
)

// TestExtents: the extents have all bytes that are not zero, and looking for them takes no memory.
func TestExtents(t *testing.T) {
	for _, shared := range []bool{false, true} {
		m, err := Map(Config{Size: 3<<30 + 1<<20, Shared: shared})
		if err != nil {
			t.Fatal(err)
		}
		places := []int{0, 5000, 1<<30 + 3, 3<<30 - 1}
		r := m.Regions()[0]
		for _, at := range places {
			r.Bytes[at] = 1
		}
		before := resident(t)
		last, found := 0, 0
		if err := r.Extents(t.Context(), func(from, to int) error {
			if from < last || from >= to || to > len(r.Bytes) {
				t.Fatalf("shared %v: an extent from %#x to %#x after %#x", shared, from, to, last)
			}
			last, found = to, found+bytes.Count(r.Bytes[from:to], []byte{1})
			return nil
		}); err != nil || found != len(places) {
			t.Errorf("shared %v: %d bytes, %v", shared, found, err)
		}
		if grew := resident(t) - before; grew > 64<<20 {
			t.Errorf("shared %v: %d MiB grew", shared, grew>>20)
		}
		failed := errors.New("failed")
		if err := r.Extents(t.Context(), func(_, _ int) error { return failed }); err != failed {
			t.Errorf("shared %v: %v", shared, err)
		}
		if err := m.Regions()[1].Extents(t.Context(), func(from, to int) error {
			t.Errorf("shared %v: %#x to %#x of an empty region", shared, from, to)
			return nil
		}); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}
