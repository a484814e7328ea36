package net

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

// fuzzer is one run of FuzzQueues.
type fuzzer struct {
	*rig
	injected, sentOut uint32 // frames so far, to and from the guest
	received, taken   uint32 // the least number of the next one
	frame             []byte // to the guest, as far as it has come
	left              uint16 // buffers of it to come
	spoiled           bool   // there are chains of garbage
}

// step has the driver or the backend do something.
func (f *fuzzer) step(op []byte) {
	n := int(op[2])<<8 | int(op[3])
	switch op[0] % 8 {
	case 0:
		if f.q[0].Free() >= 2 {
			f.add(0, HeaderLen+n%3100)
		}
	case 1:
		b := numbered(make([]byte, 4000), f.injected)
		if op[1] == 1 {
			b = b[:n%(HeaderLen-1)+1] // no whole header
		}
		if err := unix.Sendto(f.peer[0], b, unix.MSG_DONTWAIT, nil); err == nil && op[1] != 1 {
			f.injected++
		}
	case 2:
		if f.q[1].Free() >= 2 {
			f.send(0, numbered(make([]byte, 4000), f.sentOut))
			f.sentOut++
		}
	case 3:
		f.garbage(op)
	case 4:
		f.stop()
		f.activate()
	case 5:
		if i := len(f.q) - 1; f.a.Features&featureMQ != 0 && !f.spoiled {
			f.control(i, op[1]%6, op[2]%3, op[3]%4, 0)
		}
	case 6:
		if err := f.dev.Reset(); err != nil {
			f.t.Fatal(err)
		}
		for i := range f.a.Queues { // the driver that continues here lost nothing else
			used := f.q[i].Bytes(f.q[i].Device, 4)
			f.a.Queues[i].Base = binary.LittleEndian.Uint16(used[2:])
		}
		f.frame, f.left = nil, 0
		f.activate()
	default:
		f.dev.Inspect()
	}
}

// garbage makes any chain available in any queue.
func (f *fuzzer) garbage(op []byte) {
	i := int(op[1]) % len(f.q)
	d := f.q[i]
	if d.Free() < 2 {
		return
	}
	f.spoiled = true
	at := d.Alloc(512)
	copy(d.Bytes(at, 8), op)
	d.Add(virtqtest.Seg{Addr: at, Len: uint32(op[2]), Write: op[4]&1 != 0},
		virtqtest.Seg{Addr: at, Len: uint32(op[3]), Write: op[4]&3 != 0})
	f.publish(i)
}

// check checks the frames that have come.
func (f *fuzzer) check() {
	next := func(b []byte, least *uint32, before uint32) {
		if len(b) < HeaderLen+4 {
			f.t.Fatalf("a frame of %d bytes", len(b))
		}
		n := binary.LittleEndian.Uint32(b[HeaderLen:])
		if n < *least || n >= before {
			f.t.Fatalf("frame %d, not one of %d to %d", n, *least, before)
		}
		if err := check(b, &n); err != nil {
			f.t.Fatal(err)
		}
		*least = n
	}
	for {
		head, written, ok := f.q[0].Used()
		if !ok {
			break
		}
		if f.spoiled {
			continue
		}
		b := f.q[0].Bytes(f.at[slotAt{0, head}], int(written))
		if f.left == 0 {
			f.frame, f.left = nil, binary.LittleEndian.Uint16(b[numBuffersOff:])
		}
		f.frame = append(f.frame, b...)
		if f.left--; f.left == 0 {
			next(f.frame, &f.received, f.injected)
		}
	}
	for _, d := range f.q[1:] {
		for ok := true; ok; {
			_, _, ok = d.Used()
		}
	}
	b := make([]byte, MaxFrame)
	for {
		n, _, err := unix.Recvfrom(f.peer[0], b, unix.MSG_DONTWAIT)
		if err != nil {
			break
		}
		if !f.spoiled {
			next(b[:n], &f.taken, f.sentOut)
		}
	}
	for _, p := range f.dev.pairs {
		p.mu.Lock()
		room, segs := 0, 0
		for _, b := range p.held {
			room, segs = room+b.n, segs+len(b.iov)
		}
		if room != p.room || segs != p.segs || len(p.frame) > overflowLen {
			f.t.Errorf("%d bytes in %d segments are held, not %d in %d; %d of a frame", room, segs, p.room, p.segs,
				len(p.frame))
		}
		p.mu.Unlock()
	}
}

// FuzzQueues has a driver and a backend that do anything. Frames come whole and in their order, and
// chains of a stopped device are the driver's.
func FuzzQueues(f *testing.F) {
	const (
		buffer = "\x00\x00\x04\x00\x00"
		small  = "\x00\x00\x00\x40\x00"
		inject = "\x01\x00\x00\x00\x00"
		send   = "\x02\x00\x00\x00\x00"
		stop   = "\x04\x00\x00\x00\x00"
		reset  = "\x06\x00\x00\x00\x00"
	)
	for _, s := range []string{
		"\x00" + buffer + inject + inject + buffer + send + stop + send,
		"\x01" + small + inject + inject + inject + small + stop + small + small + buffer,
		"\x02" + buffer + buffer + buffer + inject + inject + reset + buffer + inject,
		"\x03\x05\x04\x00\x02\x00" + send + "\x05\x00\x00\x01\x00" + "\x05\x04\x00\x03\x00" + stop + "\x05\x04\x00\x01\x00",
		"\x01\x03\x00\x20\x20\x03" + inject + "\x03\x01\x20\x20\x00" + "\x03\x04\x20\x20\x02",
		"\x02\x01\x01\x00\x03\x00" + buffer + inject + stop,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		if len(ops) == 0 {
			return
		}
		features := []uint64{0, featureMrgRxB, featureMrgRxB | virtio.FeatureEventIdx | virtio.FeatureIndirectDesc,
			featureMrgRxB | featureCtrlVQ | featureCtrlRX | featureMQ}[ops[0]%4]
		r := &fuzzer{rig: newRig(t, 2, features)}
		for ops = ops[1:min(len(ops), 5*100)]; len(ops) >= 5; ops = ops[5:] {
			r.step(ops[:5])
			if len(r.broken) > 0 {
				break
			}
			r.check()
		}
		if err := r.dev.Reset(); err != nil {
			t.Fatal(err)
		}
		for _, p := range r.dev.pairs {
			if len(p.held) > 0 {
				t.Errorf("%d buffers are held after a reset", len(p.held))
			}
		}
	})
}
