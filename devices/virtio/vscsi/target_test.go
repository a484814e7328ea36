package vscsi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

// newTarget is a real target with a unit of 1 MiB at each LUN.
func newTarget(t testing.TB, luns ...int) *scsi.Target {
	t.Helper()
	target := scsi.NewTarget()
	for _, n := range luns {
		u, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(1 << 20), Serial: fmt.Sprintf("UNIT%d", n)})
		if err != nil {
			t.Fatal(err)
		}
		lun, _ := scsi.EncodeLUN(n)
		if err := target.Attach(lun, u); err != nil {
			t.Fatal(err)
		}
	}
	return target
}

func linuxLUN(n int) string { return string([]byte{1, 0, 0x40 | byte(n>>8), byte(n), 0, 0, 0, 0}) }

func inquiry(n byte) []byte { return []byte{0x12, 0, 0, 0, n, 0} }

func rw10(op byte, lba uint32, blocks byte) []byte {
	b := make([]byte, 10)
	b[0], b[8] = op, blocks
	binary.BigEndian.PutUint32(b[2:], lba)
	return b
}

// TestRealTarget does the first steps of a Linux driver, on the real target.
func TestRealTarget(t *testing.T) {
	r := newRig(t, Config{Target: newTarget(t, 0, 2, 300), Queues: 2}, virtio.FeatureEventIdx|virtio.FeatureIndirectDesc)
	do := func(lun string, cdb []byte, out []byte, in int) (code, status byte, sense, data []byte, resid uint32) {
		t.Helper()
		resp := r.roundTrip(2, append(header(lun, 1, 0, cdb...), out...), []int{19, 51}, 108+in, []int{12, 108})
		n := binary.LittleEndian.Uint32(resp)
		return resp[11], resp[10], resp[12 : 12+n], resp[108:], binary.LittleEndian.Uint32(resp[4:])
	}
	tur := make([]byte, 6)
	for _, lun := range []int{0, 2, 300} {
		if _, status, sense, _, _ := do(linuxLUN(lun), tur, nil, 0); status != 2 || sense[2] != 6 || sense[12] != 0x29 {
			t.Fatalf("LUN %d: first command: status %d, sense % x", lun, status, sense)
		}
		block := bytes.Repeat([]byte{byte(lun), 0xb1}, 512)
		if code, status, sense, _, resid := do(linuxLUN(lun), rw10(0x2a, 7, 2), block, 0); code != 0 || status != 0 ||
			resid != 0 {
			t.Fatalf("LUN %d: write: %d, %d, % x, residual %d", lun, code, status, sense, resid)
		}
	}
	for _, lun := range []int{0, 2, 300} {
		want := append(make([]byte, 512), bytes.Repeat([]byte{byte(lun), 0xb1}, 512)...)
		if code, status, _, data, resid := do(linuxLUN(lun), rw10(0x28, 6, 3), nil, 1536); code != 0 || status != 0 ||
			resid != 0 || !bytes.Equal(data, want) {
			t.Errorf("LUN %d: read: %d, %d, residual %d, right data: %v", lun, code, status, resid, bytes.Equal(data, want))
		}
	}
	// The scan of a LUN without a unit: qualifier 011b, no unit type.
	if code, status, _, data, resid := do(linuxLUN(1), inquiry(36), nil, 36); code != 0 || status != 0 ||
		len(data) != 36 || data[0] != 0x7f || resid != 0 {
		t.Errorf("INQUIRY of no unit: %d, %d, % x", code, status, data)
	}
	if code, status, sense, _, _ := do(linuxLUN(1), tur, nil, 0); code != 0 || status != 2 || sense[2] != 5 ||
		sense[12] != 0x25 {
		t.Errorf("TEST UNIT READY of no unit: %d, %d, % x", code, status, sense)
	}
	// A short answer leaves a residual, and its length is exact.
	if _, _, _, data, resid := do(linuxLUN(0), inquiry(255), nil, 255); len(data)+int(resid) != 255 || len(data) < 36 ||
		len(data) != 5+int(data[4]) {
		t.Errorf("INQUIRY of 255: %d bytes and residual %d", len(data), resid)
	}
	// More to transfer than the buffer holds.
	if code, _, _, data, resid := do(linuxLUN(0), inquiry(255), nil, 10); code != 1 || len(data) != 10 || resid != 0 {
		t.Errorf("INQUIRY into 10 bytes: %d, %d bytes, residual %d", code, len(data), resid)
	}
	for _, lun := range []string{linuxLUN(0), "\xc1\x01\x00\x00\x00\x00\x00\x00", "\x01\x00\xc1\x01\x00\x00\x00\x00"} {
		_, status, sense, data, _ := do(lun, []byte{0xa0, 11: 0, 8: 0, 9: 64}, nil, 64)
		if status == 2 && sense[12] == 0x29 { // the well-known unit's own unit attention
			_, status, _, data, _ = do(lun, []byte{0xa0, 11: 0, 8: 0, 9: 64}, nil, 64)
		}
		want := []byte{0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0x41, 0x2c, 0, 0, 0, 0, 0, 0}
		if status != 0 || !bytes.Equal(data, want) {
			t.Errorf("REPORT LUNS at % x: status %d, % x", lun, status, data)
		}
	}
	if resp := r.roundTrip(0, tmf(5, linuxLUN(2), 0), nil, 1, nil); resp[0] != 0 {
		t.Errorf("LOGICAL UNIT RESET: %d", resp[0])
	}
	if resp := r.roundTrip(0, tmf(5, linuxLUN(1), 0), nil, 1, nil); resp[0] != 12 {
		t.Errorf("LOGICAL UNIT RESET of no unit: %d", resp[0])
	}
	if _, status, sense, _, _ := do(linuxLUN(2), tur, nil, 0); status != 2 || sense[2] != 6 || sense[12] != 0x29 ||
		sense[13] != 3 {
		t.Errorf("after the reset: status %d, sense % x", status, sense)
	}
	if _, status, _, _, _ := do(linuxLUN(0), tur, nil, 0); status != 0 {
		t.Errorf("LUN 0 felt the reset of LUN 2")
	}
}

// TestStress has two request queues write and read blocks of their own while
// units are reset, and the device with everything in flight now and then.
func TestStress(t *testing.T) {
	target := newTarget(t, 0, 1)
	r := newRig(t, Config{Target: target, Queues: 2, RingSize: 64}, virtio.FeatureEventIdx)
	for round := range 6 {
		var wg sync.WaitGroup
		for q := 2; q < 4; q++ {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if err := writeAndRead(r.q[q], linuxLUN(q-2), 150, byte(16*round+q)); err != nil {
					t.Error(err)
				}
			}()
		}
		for i := range 20 {
			if resp := r.roundTrip(0, tmf(5, linuxLUN(i%2), 0), nil, 1, nil); resp[0] != 0 {
				t.Errorf("reset: %d", resp[0])
			}
		}
		wg.Wait()
		for q := 2; q < 4; q++ {
			for i := range 10 {
				r.send(q, header(linuxLUN(i%2), uint64(i), byte(i%3), rw10(0x28, 0, 8)...), nil, 108+4096, nil)
			}
		}
		if err := r.dev.Reset(); err != nil {
			t.Fatal(err)
		}
		if err := r.dev.Activate(virtio.Activation{}); err != nil { // no queue in use: the driver is away
			t.Fatal(err)
		}
		if err := r.dev.Reset(); err != nil {
			t.Fatal(err)
		}
		r.activate(virtio.FeatureEventIdx)
	}
}

// writeAndRead keeps four requests in flight, each a block of its own: first
// written, then read back. Requests that a reset ends are tried again.
func writeAndRead(d *virtqtest.Driver, lun string, blocks int, tag byte) error {
	type slot struct {
		hdr, resp, data uint64
		lba             int
		reading         bool
	}
	var slots [4]slot
	byHead := map[uint16]*slot{}
	next := 0
	content := func(lba int) []byte { return bytes.Repeat([]byte{tag, byte(lba), byte(lba >> 8), 0x5a}, 128) }
	send := func(s *slot) error {
		op := byte(0x2a)
		if s.reading {
			op = 0x28
		}
		copy(d.Bytes(s.hdr, 51), header(lun, uint64(s.lba), 0, rw10(op, uint32(s.lba), 1)...))
		copy(d.Bytes(s.data, 512), content(s.lba))
		if s.reading {
			clear(d.Bytes(s.data, 512))
		}
		segs := []virtqtest.Seg{{Addr: s.hdr, Len: 51}, {Addr: s.data, Len: 512}, {Addr: s.resp, Len: 108, Write: true}}
		if s.reading {
			segs[1], segs[2] = segs[2], virtqtest.Seg{Addr: s.data, Len: 512, Write: true}
		}
		head, ok := d.Add(segs...)
		if !ok {
			return fmt.Errorf("no room")
		}
		byHead[head] = s
		_, err := d.Publish()
		return err
	}
	inFlight := 0
	for i := range slots {
		slots[i] = slot{d.Alloc(51), d.Alloc(108), d.Alloc(512), next, false}
		next++
		inFlight++
		if err := send(&slots[i]); err != nil {
			return err
		}
	}
	for inFlight > 0 {
		head, _, err := d.Wait()
		if err != nil {
			return err
		}
		s := byHead[head]
		resp := d.Bytes(s.resp, 108)
		switch code, status := resp[11], resp[10]; {
		case code == sOK && status == 0:
			if s.reading {
				if !bytes.Equal(d.Bytes(s.data, 512), content(s.lba)) {
					return fmt.Errorf("block %d: wrong data", s.lba)
				}
				if next == blocks {
					inFlight--
					continue
				}
				s.lba = next
				next++
			}
			s.reading = !s.reading
		case code == sReset, code == sOK && status == 2 && resp[12+2] == 6:
		default:
			return fmt.Errorf("block %d: response %d, status %d, sense % x", s.lba, code, status, resp[12:30])
		}
		if err := send(s); err != nil {
			return err
		}
	}
	return nil
}

// TestPowerOn turns the write cache off, power-cycles, and finds it as it was.
func TestPowerOn(t *testing.T) {
	target := newTarget(t, 0)
	d, err := New(Config{Target: target})
	if err != nil {
		t.Fatal(err)
	}
	wce := func() bool {
		t.Helper()
		page := make([]byte, 64)
		for { // past the unit attention
			r := scsitest.Run(target, &scsi.Command{CDB: []byte{0x1a, 0x08, 0x08, 0, 64, 0}, In: [][]byte{page}})
			if r.Status == scsi.Good {
				return page[6]&4 != 0
			}
			if r.Status != scsi.CheckCondition || r.Sense[2] != byte(scsi.UnitAttention) {
				t.Fatalf("MODE SENSE: %+v", r)
			}
		}
	}
	if !wce() {
		t.Fatal("the cache is off at first")
	}
	off := make([]byte, 24)
	off[4], off[5] = 0x08, 0x12 // the caching page, WCE clear
	r := scsitest.Run(target, &scsi.Command{CDB: []byte{0x15, 0x10, 0, 0, 24, 0}, Out: [][]byte{off}})
	if r.Status != scsi.Good || wce() {
		t.Fatalf("MODE SELECT: %+v, cache on: %v", r, wce())
	}
	if err := d.Reset(); err != nil || wce() {
		t.Errorf("after a device reset: %v, cache on: %v", err, wce())
	}
	d.PowerOn()
	if !wce() {
		t.Error("the cache is off after a power cycle")
	}
}
