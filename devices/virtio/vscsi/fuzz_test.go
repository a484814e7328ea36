package vscsi

import (
	"bytes"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

// FuzzRequest sends requests to every queue, mostly of the right form, on a
// target that ends the command as the input says. Each chain is
// answered or breaks the device; the used length is within the chain.
func FuzzRequest(f *testing.F) {
	f.Add([]byte{2, 51, 108, 0, 0, 0, 0, 0}, header(lun5, 1, 0, 0x28))
	f.Add([]byte{2, 80, 140, 0, 0, 0, 0, 0}, append(headerPI(9, 0, 0x2a), 1))
	f.Add([]byte{2, 59, 255, 0, 0, 0, 0, 0}, append(headerPI(0, 24, 0x28), 1))
	f.Add([]byte{2, 60, 108, 20, 3, 0, 0, 9, 0, 24, 1, 3, 0, 0, 0, 0}, header(lun5, 1, 2, 0x2a))
	f.Add([]byte{2, 51, 140, 7, 30, 1, 5, 200, 2, 40, 150, 90, 4, 0, 99, 2},
		header("\xc1\x01\x00\x00\x00\x00\x00\x00", 1, 0, 0xa0))
	f.Add([]byte{0, 24, 1, 0, 0, 0, 0, 0, 0, 24, 2, 1, 1, 0, 0, 0}, tmf(5, lun5, 0))
	f.Add([]byte{0, 16, 5, 9, 1, 0, 0, 0, 1, 0, 16, 0, 0, 0, 0, 1}, append([]byte{1, 0, 0, 0}, lun5...))
	f.Add([]byte{1, 0, 16, 0, 4, 7, 0, 3, 2, 70, 108, 0, 0, 2, 8, 6}, header(lun5, 1, 3, 0x12))
	f.Fuzz(func(t *testing.T, ops, image []byte) {
		var op []byte
		target := &fake{submit: func(c *scsi.Command) {
			if len(c.CDB) < 6 || (len(c.In) > 0 && len(c.Out) > 0) {
				t.Errorf("CDB of %d bytes, %d in, %d out", len(c.CDB), len(c.In), len(c.Out))
			}
			for _, b := range c.In {
				b[0] = op[6]
			}
			c.Done(scsi.Result{
				Status: scsi.Status(op[6]), Sense: image, Residual: uint32(op[7]) << (op[6] % 25),
				Overrun: op[5]&1 != 0, Abort: scsi.Abort(op[5] >> 6),
			})
		}}
		features := uint64(featureHotplug | virtio.FeatureIndirectDesc)
		if len(image)%2 == 0 {
			features |= featureProtection
		}
		r := newRig(t, Config{Target: target, RingSize: 16, Protection: true}, features)
		ops = ops[:min(len(ops), 8*64)]
		for ; len(ops) >= 8 && len(r.broken) == 0; ops = ops[8:] {
			op = ops[:8]
			if op[0]&0x80 != 0 {
				r.dev.WriteConfig(uint32(op[1])%40, op[2:6])
			}
			if op[0]&0x40 != 0 {
				r.dev.Event(EventType(op[1]%4), scsi.LUN(op[2])<<48, Reason(op[3]%4))
			}
			q := int(op[0] % 3)
			d := r.q[q]
			if d.Free() < 8 {
				break // event buffers without events
			}
			out := append(bytes.Clone(image), make([]byte, 1024)...)[:int(op[1])+int(op[5]&6)*64]
			if q == requestQueue && len(out) > 16 {
				out[0] = 1
				out[1] &= 0x80
			}
			in := int(op[2]) + int(op[5]&24)*8
			var segs []virtqtest.Seg
			for _, part := range []struct {
				n, cut int
				write  bool
			}{{len(out), int(op[3]), false}, {in, int(op[4]), true}} {
				addr := d.Alloc(part.n + 16)
				if !part.write {
					copy(d.Bytes(addr, part.n), out)
				}
				cut := min(part.cut, part.n)
				segs = append(segs, virtqtest.Seg{Addr: addr, Len: uint32(cut), Write: part.write},
					virtqtest.Seg{Addr: addr + uint64(cut), Len: uint32(part.n - cut), Write: part.write})
			}
			d.AddIndirect(int(op[5]>>5)%5, segs...)
			r.publish(q)
			if err := r.dev.workers[q].Barrier(); err != nil {
				t.Fatal(err)
			}
			_, written, ok := d.Used()
			most := in
			if q == eventQueue {
				most = eventLen // it may be an older buffer
			}
			if int(written) > most {
				t.Fatalf("used length %d of %d", written, most)
			}
			if !ok && q != eventQueue && len(r.broken) == 0 {
				t.Fatal("request neither answered nor broken")
			}
		}
	})
}
