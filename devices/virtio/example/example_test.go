package example

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// TestShort: a complete device needs no more than 60 lines.
func TestShort(t *testing.T) {
	source, err := os.ReadFile("example.go")
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(source, []byte("\n")); n > 60 {
		t.Errorf("the example has %d lines", n)
	}
}

// word is a request of a driver.
type word struct {
	d    *virtqtest.Driver
	addr uint64
	n    byte // different in each request
}

func (w *word) Next() []virtqtest.Seg {
	w.n++
	copy(w.d.Bytes(w.addr, 8), []byte{w.n, 2, 3, 4})
	return []virtqtest.Seg{{Addr: w.addr, Len: 4}, {Addr: w.addr + 4, Len: 3, Write: true},
		{Addr: w.addr + 7, Len: 1, Write: true}}
}

func (w *word) Check(written uint32) error {
	if got := w.d.Bytes(w.addr, 8); written != 4 || !bytes.Equal(got, []byte{w.n, 2, 3, 4, 4, 3, 2, w.n}) {
		return fmt.Errorf("%d bytes: % x", written, got)
	}
	return nil
}

func TestStopAndContinue(t *testing.T) {
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 1000} {
		virtiotest.StopAndContinue(t, &Device{}, guestmem.Heap(0, virtiotest.QueueSpan), virtiotest.Load{
			Rounds: rounds, Features: features,
			Slots: func(_ int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				for range 20 {
					slots = append(slots, &word{d: d, addr: d.Alloc(8)})
				}
				return slots
			},
		})
	}
}

func TestRules(t *testing.T) {
	for _, tt := range []struct {
		name    string
		out, in uint32
	}{{"a long request", MaxLen + 1, 2 * MaxLen}, {"no room for the answer", 2, 1}} {
		t.Run(tt.name, func(t *testing.T) {
			mem := guestmem.Heap(0, 1<<20)
			d, err := virtqtest.New(mem, 0, 64, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			dev, broken := &Device{}, make(chan error, 1)
			if err := dev.Activate(virtio.Activation{Mem: mem, Broken: func(err error) { broken <- err },
				Queues: []virtio.Queue{{Layout: d.Layout, Kick: d.Kick, Call: d.Call}}}); err != nil {
				t.Fatal(err)
			}
			d.Add(virtqtest.Seg{Addr: d.Alloc(int(tt.out)), Len: tt.out},
				virtqtest.Seg{Addr: d.Alloc(int(tt.in)), Len: tt.in, Write: true})
			if _, err := d.Publish(); err != nil {
				t.Fatal(err)
			}
			var g *virtq.GuestError
			if err := <-broken; !errors.As(err, &g) {
				t.Error(err)
			}
			if err := dev.Reset(); err != nil {
				t.Error(err)
			}
		})
	}
}
