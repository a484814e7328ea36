package console

import (
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

// FuzzDriver has a driver that does anything, and streams that take all. Each 6 bytes are one step.
// The bytes of each stream come in their order and once.
func FuzzDriver(f *testing.F) {
	const (
		ready  = "\x00\x00\x00\x00\x01\x00" // DEVICE_READY
		port   = "\x00\x00\x03\x00\x01\x00" // PORT_READY
		open   = "\x00\x00\x06\x00\x01\x00"
		shut   = "\x00\x00\x06\x00\x00\x00"
		hear   = "\x01\x02\x08\xff\x01\x00"
		rx     = "\x01\x00\x20\x10\x01\x00"
		tx     = "\x02\x01\xff\x10\x00\x00"
		stop   = "\x03\x00\x00\x00\x00\x00"
		write  = "\x04\x00\x20\x00\x00\x00"
		closed = "\x05\x00\x00\x00\x00\x00"
		reset  = "\x06\x00\x00\x00\x00\x00"
	)
	f.Add([]byte(ready + hear + hear + port + hear + hear + open + rx + write + tx + stop + tx + write + rx))
	f.Add([]byte(open + tx + tx + tx + tx + stop + tx + shut + write + rx + stop + open + closed + tx + hear))
	f.Add([]byte(port + rx + write + open + reset + open + rx + tx))
	f.Fuzz(func(t *testing.T, ops []byte) {
		r := newRig(t, featureMultiport, "a", "b")
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
	})
}

// step does one step. Data that the driver sends is what its port's stream wants next.
func (r *rig) step(op []byte, at []uint64, out *[2]counting) {
	queue := int(op[1]) % len(r.q)
	port := (int(op[1]) / 2) % 2
	switch op[0] % 7 {
	case 0:
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
		if d.Free() == 0 {
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
		if err := r.dev.Reset(); err != nil {
			r.t.Fatal(err)
		}
		for i, old := range r.q { // a new driver, whose memory is where that of the old one was
			old.Close()
			d, err := virtqtest.New(r.a.Mem, uint64(i)*queueSpan, old.Size, r.a.Features)
			if err != nil {
				r.t.Fatal(err)
			}
			if got := d.Alloc(64 << 10); got != at[i] {
				r.t.Fatalf("memory at %#x, and %#x before", got, at[i])
			}
			r.q[i], r.a.Queues[i] = d, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call}
		}
		r.activate()
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
