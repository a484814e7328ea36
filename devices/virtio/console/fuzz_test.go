package console

import (
	"bytes"
	"encoding/binary"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

// FuzzDriver has drivers that do anything, of a console and another port, or of a console alone,
// and streams that take all. Each 6 bytes are one step. The bytes of each stream come in their
// order and once, and a driver that sets up the console learns its last size.
func FuzzDriver(f *testing.F) {
	const (
		ready   = "\x00\x00\x00\x00\x01\x00" // DEVICE_READY
		port    = "\x00\x00\x03\x00\x01\x00" // PORT_READY
		open    = "\x00\x00\x06\x00\x01\x00"
		shut    = "\x00\x00\x06\x00\x00\x00"
		hear    = "\x01\x02\x08\xff\x01\x00"
		rx      = "\x01\x00\x20\x10\x01\x00"
		tx      = "\x02\x01\xff\x10\x00\x00"
		stop    = "\x03\x00\x00\x00\x00\x00"
		write   = "\x04\x00\x20\x00\x00\x00"
		closed  = "\x05\x00\x00\x00\x00\x00"
		reset   = "\x06\x00\x00\x00\x00\x00"
		single  = "\x06\x01\x00\x00\x00\x00" // reset, and a driver of one port
		size    = "\x07\x00\x50\x18\x00\x00"
		larger  = "\x07\x01\x2c\x40\x00\x00"
		alone   = "\x07\x00\x00\x00\x00\x01" // first: a console alone
		typed   = "\x04\x00\x08\x00\x00\x00"
		printed = "\x02\x00\x08\x08\x00\x00"
		keys    = "\x01\x00\x20\x10\x01\x00"
	)
	f.Add([]byte(ready + hear + hear + port + hear + hear + open + rx + write + tx + stop + tx + write + rx))
	f.Add([]byte(open + tx + tx + tx + tx + stop + tx + shut + write + rx + stop + open + closed + tx + hear))
	f.Add([]byte(port + rx + write + open + reset + open + rx + tx))
	f.Add([]byte(ready + port + hear + size + hear + hear + larger + size + hear + stop + larger + hear + open + typed +
		keys + printed + reset + port + hear + hear + hear + hear + single + printed + typed + keys + size))
	f.Add([]byte(alone + size + printed + typed + keys + stop + larger + keys + reset + printed + size + keys + closed))
	f.Fuzz(func(t *testing.T, ops []byte) {
		const all = featureMultiport | featureSize
		names, features := []string{hvc, "b"}, uint64(all)
		if len(ops) >= 6 && ops[5]&1 != 0 {
			names, features = names[:1], featureSize
		}
		r := newRig(t, features, names...)
		var out [2]counting
		var at []uint64
		for _, d := range r.q {
			at = append(at, d.Alloc(64<<10))
		}
		for _, h := range r.host {
			go func() {
				var in counting
				for b := make([]byte, 1000); ; {
					n, err := h.Read(b)
					if err := in.check(b[:n]); err != nil {
						t.Error(err)
					}
					if err != nil {
						return
					}
				}
			}()
		}
		for ops = ops[:min(len(ops), 6*64)]; len(ops) >= 6 && len(r.broken) == 0; ops = ops[6:] {
			r.step(ops[:6], at, &out)
		}
		r.changes.Store(0)
		r.reset(features)
		r.wantSize()
	})
}

// wantSize checks that a new driver learns the size of the console.
func (r *rig) wantSize() {
	r.t.Helper()
	size := binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, r.cols), r.rows)
	known := r.cols != 0
	if got := r.dev.Config()[:4]; !bytes.Equal(got, size) || (r.changes.Load() > 0) != known {
		r.t.Errorf("configuration % x, %d changes; want % x", got, r.changes.Load(), size)
	}
	if !known || r.dev.alone() {
		return
	}
	r.say(0, portReady, 1)
	for range len(messages) + 1 { // PORT_OPEN comes twice if the stream ends just now
		if m := r.hear(); m[4] == resize {
			if m[8:] != string(size) {
				r.t.Errorf("size % x, want % x", m[8:], size)
			}
			return
		}
	}
	r.t.Error("the driver does not learn the size")
}

// step does one step. Data that the driver sends are the next of its port's stream.
func (r *rig) step(op []byte, at []uint64, out *[2]counting) {
	queue := int(op[1]) % len(r.q)
	port := (int(op[1]) / 2) % len(r.host)
	switch op[0] % 8 {
	case 0:
		if len(r.q) <= controlTx {
			break
		}
		d := r.q[controlTx]
		copy(d.Bytes(at[controlTx], controlLen), message(uint32(op[1]%4), uint16(op[2]), uint16(op[4])))
		r.send(controlTx, virtqtest.Seg{Addr: at[controlTx], Len: controlLen})
	case 1: // any chain, but a queue for the guest's bytes gets none that is readable
		write := op[4]%2 == 1 || queue%2 == 1 && queue != controlTx
		r.send(queue, virtqtest.Seg{Addr: at[queue], Len: uint32(op[2]), Write: write},
			virtqtest.Seg{Addr: at[queue] + 300, Len: uint32(op[3]), Write: write})
	case 2:
		queue = []int{1, 5}[port]
		n := 1 + int(op[2])*int(op[3])%(64<<10-1)
		d := r.q[queue]
		if d.Free() == 0 || port > 0 && r.a.Features&featureMultiport == 0 { // whose bytes are dropped
			break
		}
		out[port].fill(d.Bytes(at[queue], n))
		r.send(queue, virtqtest.Seg{Addr: at[queue], Len: uint32(n)})
		if len(r.broken) == 0 {
			r.wait(queue) // the memory is used again
		}
	case 3:
		r.stop()
		r.activate()
	case 4:
		r.dev.mu.Lock()
		waits := len(r.dev.ports[port].in) > 0
		r.dev.mu.Unlock()
		if !waits {
			go r.host[port].Write(make([]byte, op[2]))
		}
	case 5:
		r.host[port].Close()
	case 6:
		features := r.dev.Features() &^ (virtio.FeatureIndirectDesc | virtio.FeatureEventIdx)
		if op[1]&1 != 0 {
			features &^= featureMultiport
		}
		if op[1]&2 != 0 {
			features &^= featureSize
		}
		r.reset(features)
		for i, d := range r.q { // whose memory is where that of the old driver was
			if got := d.Alloc(64 << 10); got != at[i] {
				r.t.Fatalf("memory at %#x, and %#x before", got, at[i])
			}
		}
	case 7:
		cols, rows := uint16(op[1])<<8|uint16(op[2]), uint16(op[3])
		if r.dev.Resize(cols, rows); cols != 0 && rows != 0 {
			r.cols, r.rows = cols, rows
		}
	}
}

// send makes a chain available, and returns when the device has it.
func (r *rig) send(queue int, segs ...virtqtest.Seg) {
	d := r.q[queue]
	for ok := true; ok; {
		_, _, ok = d.Used()
	}
	if d.Free() < len(segs) {
		return
	}
	r.put(queue, segs...)
	if err := r.dev.workers[queue].Barrier(); err != nil {
		r.t.Fatal(err)
	}
}
