package vscsi

import (
	"bytes"
	"encoding/binary"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

// TestUsedLength compares the used length with the written bytes: every byte up to it
// (virtio 1.3, 2.7.8.2), and all of the data that the residual says was moved.
func TestUsedLength(t *testing.T) {
	target, _ := protectedUnit(t)
	plain, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(1 << 20), Serial: "P"})
	if err != nil {
		t.Fatal(err)
	}
	lun1, _ := scsi.EncodeLUN(1)
	if err := target.Attach(lun1, plain); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, Config{Target: target, Protection: true}, featureProtection|virtio.FeatureEventIdx)
	read := func(protect byte, blocks byte) []byte {
		cdb := rw10(0x28, 0, blocks)
		cdb[1] = protect << 5
		return cdb
	}
	d := r.q[2]
	hdr, in := d.Alloc(59), d.Alloc(108+700<<10)
	// do does a command with room bytes for protection information and data, and returns the
	// used length and what lies in its device-writable part, which was full of pattern.
	do := func(pattern byte, lun int, pi uint32, cdb []byte, room int) (resp []byte, n int) {
		t.Helper()
		h := headerPI(0, pi, cdb...)
		h[3] = byte(lun)
		copy(d.Bytes(hdr, 59), h)
		resp = d.Bytes(in, 108+room)
		for i := range resp {
			resp[i] = pattern
		}
		d.Add(virtqtest.Seg{Addr: hdr, Len: 59}, virtqtest.Seg{Addr: in, Len: uint32(len(resp)), Write: true})
		r.publish(2)
		_, used, err := d.Wait()
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Clone(resp), int(used)
	}
	for _, lun := range []int{0, 0, 1, 1, 1} { // unit attentions
		do(0, lun, 0, make([]byte, 6), 0)
	}
	for _, tt := range []struct {
		name string
		lun  int
		pi   uint32
		cdb  []byte
		room int // for protection information and data
		want int // beside the response
	}{
		{"no information", 0, 0, read(0, 2), 1024, 1024},
		{"information that is not asked for", 0, 16, read(0, 2), 16 + 1024, 16 + 1024},
		{"information", 0, 16, read(1, 2), 16 + 1024, 16 + 1024},
		{"room for more information", 0, 40, read(1, 2), 40 + 1024, 40 + 1024},
		{"information without checks", 0, 16, read(3, 2), 16 + 1024, 16 + 1024},
		{"too little room for information", 0, 8, read(1, 2), 8 + 1024, 0},
		{"more room for information than any command has", 0, 600 << 10, read(0, 2), 600<<10 + 1024, 0},
		{"and some of it used", 0, 600 << 10, read(1, 2), 600<<10 + 1024, 16},
		{"a unit without information", 1, 16, read(0, 2), 16 + 1024, 16 + 1024},
		{"refused by it", 1, 16, read(1, 2), 16 + 1024, 0},
		{"less room than data", 0, 16, read(0, 2), 16 + 700, 16 + 700},
		{"less data than room", 0, 16, read(0, 1), 16 + 1024, 16 + 512},
		{"no data", 0, 16, read(0, 0), 16 + 1024, 0},
		{"out of range", 0, 16, rw10(0x28, 1<<20, 2), 16 + 1024, 0},
		{"INQUIRY", 0, 16, inquiry(5), 16 + 36, 16 + 5},
		{"no such unit", 5, 16, read(0, 2), 16 + 1024, 0},
		{"no data of a command", 0, 16, make([]byte, 6), 16 + 1024, 0},
	} {
		// The memory is set to one value, then to another: bytes that are the same afterwards were
		// written.
		var seen [2][]byte
		for i, pattern := range []byte{0x3c, 0xc3} {
			resp, n := do(pattern, tt.lun, tt.pi, tt.cdb, tt.room)
			if n != 108+tt.want {
				t.Errorf("%s: used length %d, want %d", tt.name, n, 108+tt.want)
			}
			if resid := int(binary.LittleEndian.Uint32(resp[4:])); resid > tt.room-int(tt.pi) {
				t.Errorf("%s: residual %d", tt.name, resid)
			}
			seen[i] = resp[:n]
		}
		if !bytes.Equal(seen[0], seen[1]) {
			t.Errorf("%s: not all of the used length was written", tt.name)
		}
	}
}

// TestUsedLengthBesides is TestUsedLength of the control and the event queue.
func TestUsedLengthBesides(t *testing.T) {
	target := newTarget(t, 0)
	r := newRig(t, Config{Target: target}, featureHotplug)
	an := func(typ byte) []byte { return append([]byte{typ, 0, 0, 0}, header(linuxLUN(0), 0, 0)[:12]...) }
	event := func() {
		if got := r.dev.Event(TransportReset, 0, ResetRescan); got != Delivered {
			t.Errorf("the event is %v", got)
		}
	}
	for _, tt := range []struct {
		name string
		q    int
		out  []byte
		room int
		want int
		do   func() // then
	}{
		{"a task management function", 0, tmf(tmfLogicalUnitReset, linuxLUN(0), 0), 16, 1, nil},
		{"one that is rejected", 0, tmf(77, linuxLUN(0), 0), 1, 1, nil},
		{"one for no target", 0, tmf(tmfAbortTask, "\x02\x00\x00\x00\x00\x00\x00\x00", 0), 8, 1, nil},
		{"asynchronous notification, query", 0, an(1), 16, 5, nil},
		{"asynchronous notification, subscribe", 0, an(2), 5, 5, nil},
		{"an event", 1, nil, 16, 16, event},
		{"an event in a large buffer", 1, nil, 64, 16, event},
	} {
		d := r.q[tt.q]
		out, in := d.Alloc(64), d.Alloc(64)
		var seen [2][]byte
		for i, pattern := range []byte{0x3c, 0xc3} {
			copy(d.Bytes(out, 64), tt.out)
			area := d.Bytes(in, 64)
			for j := range area {
				area[j] = pattern
			}
			segs := []virtqtest.Seg{{Addr: out, Len: uint32(len(tt.out))}, {Addr: in, Len: uint32(tt.room), Write: true}}
			if tt.out == nil {
				segs = segs[1:]
			}
			d.Add(segs...)
			r.publish(tt.q)
			if tt.do != nil {
				if err := r.dev.workers[tt.q].Barrier(); err != nil {
					t.Fatal(err)
				}
				tt.do()
			}
			_, n, err := d.Wait()
			if err != nil {
				t.Fatal(err)
			}
			if int(n) != tt.want {
				t.Errorf("%s: used length %d, want %d", tt.name, n, tt.want)
			}
			if rest := area[n:]; !bytes.Equal(rest, bytes.Repeat([]byte{pattern}, len(rest))) {
				t.Errorf("%s: more than the used length was written", tt.name)
			}
			seen[i] = bytes.Clone(area[:n])
		}
		if !bytes.Equal(seen[0], seen[1]) {
			t.Errorf("%s: not all of the used length was written", tt.name)
		}
	}
}
