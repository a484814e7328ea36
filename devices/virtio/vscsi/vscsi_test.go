package vscsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// fake is a target that answers as the test says and notes its calls.
type fake struct {
	submit func(*scsi.Command)

	mu       sync.Mutex
	calls    []string
	response scsi.TaskResponse
	onReset  func() // during NexusReset
}

func (f *fake) Submit(c *scsi.Command) { f.submit(c) }

func (f *fake) note(format string, args ...any) scsi.TaskResponse {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	return f.response
}

func (f *fake) taken() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *fake) AbortTask(n scsi.NexusID, l scsi.LUN, tag uint64) scsi.TaskResponse {
	return f.note("abort task %d %#x %#x", n, uint64(l), tag)
}
func (f *fake) AbortTaskSet(n scsi.NexusID, l scsi.LUN) scsi.TaskResponse {
	return f.note("abort task set %d %#x", n, uint64(l))
}
func (f *fake) ClearTaskSet(n scsi.NexusID, l scsi.LUN) scsi.TaskResponse {
	return f.note("clear task set %d %#x", n, uint64(l))
}
func (f *fake) LogicalUnitReset(l scsi.LUN) scsi.TaskResponse {
	return f.note("logical unit reset %#x", uint64(l))
}
func (f *fake) PowerOn() { f.note("power on") }

func (f *fake) NexusReset(n scsi.NexusID) scsi.TaskResponse {
	if f.onReset != nil {
		f.onReset()
	}
	return f.note("nexus reset %d", n)
}
func (f *fake) QueryTask(n scsi.NexusID, l scsi.LUN, tag uint64) scsi.TaskResponse {
	return f.note("query task %d %#x %#x", n, uint64(l), tag)
}
func (f *fake) QueryTaskSet(n scsi.NexusID, l scsi.LUN) scsi.TaskResponse {
	return f.note("query task set %d %#x", n, uint64(l))
}

// rig is a device with a driver on each of its queues.
type rig struct {
	t      testing.TB
	dev    *Device
	mem    *guestmem.Memory
	q      []*virtqtest.Driver
	a      virtio.Activation
	broken chan error
}

const queueSpan = 1 << 20 // of guest memory for each queue, with its buffers

func newRig(t testing.TB, cfg Config, features uint64) *rig {
	t.Helper()
	dev, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dev: dev, mem: guestmem.Heap(0, queueSpan*(2+max(cfg.Queues, 1)))}
	r.activate(features)
	t.Cleanup(func() {
		if err := dev.Reset(); err != nil {
			t.Error(err)
		}
		for _, d := range r.q {
			d.Close()
		}
	})
	return r
}

func (r *rig) activate(features uint64) {
	r.t.Helper()
	for _, d := range r.q {
		d.Close()
	}
	r.q = nil
	r.broken = make(chan error, 4)
	r.a = virtio.Activation{Mem: r.mem, Features: features, Broken: func(err error) { r.broken <- err }}
	for i, size := range r.dev.QueueSizes() {
		d, err := virtqtest.New(r.mem, uint64(i)*queueSpan, size, features)
		if err != nil {
			r.t.Fatal(err)
		}
		r.q = append(r.q, d)
		r.a.Queues = append(r.a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
	}
	if err := r.dev.Activate(r.a); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) publish(q int) {
	r.t.Helper()
	if _, err := r.q[q].Publish(); err != nil {
		r.t.Fatal(err)
	}
}

// send puts one chain in queue q: out cut at the given offsets, and room for
// in bytes, cut likewise. The bytes lie apart from each other.
func (r *rig) send(q int, out []byte, outCuts []int, in int, inCuts []int) (inSegs []virtqtest.Seg) {
	r.t.Helper()
	d := r.q[q]
	var segs []virtqtest.Seg
	pieces := func(n int, cuts []int, write bool) {
		from := 0
		for _, to := range append(slices.Clone(cuts), n) {
			if to > from {
				segs = append(segs, virtqtest.Seg{Addr: d.Alloc(to-from+8) + 3, Len: uint32(to - from), Write: write})
				if !write {
					copy(d.Bytes(segs[len(segs)-1].Addr, to-from), out[from:to])
				}
				from = to
			}
		}
	}
	pieces(len(out), outCuts, false)
	n := len(segs)
	pieces(in, inCuts, true)
	if _, ok := d.Add(segs...); !ok {
		r.t.Fatal("no free descriptors")
	}
	r.publish(q)
	return segs[n:]
}

// roundTrip sends one chain and returns the written bytes, cut to the used
// length; what lies behind that must not have been touched.
func (r *rig) roundTrip(q int, out []byte, outCuts []int, in int, inCuts []int) []byte {
	r.t.Helper()
	segs := r.send(q, out, outCuts, in, inCuts)
	return r.result(q, segs)
}

func (r *rig) result(q int, segs []virtqtest.Seg) []byte {
	r.t.Helper()
	_, written, err := r.q[q].Wait()
	if err != nil {
		r.t.Fatal(err)
	}
	var b []byte
	for _, s := range segs {
		b = append(b, r.q[q].Bytes(s.Addr, int(s.Len))...)
	}
	for i, v := range b[written:] {
		if v != 0 {
			r.t.Fatalf("byte %d was written, the used length is %d", int(written)+i, written)
		}
	}
	return b[:written]
}

// header is a virtio_scsi_req_cmd for the 8 LUN bytes, with 32 bytes of CDB.
func header(lun string, id uint64, attr byte, cdb ...byte) []byte {
	b := make([]byte, 51)
	copy(b, lun)
	binary.LittleEndian.PutUint64(b[8:], id)
	b[16] = attr
	copy(b[19:], cdb)
	return b
}

const lun5 = "\x01\x00\x40\x05\x00\x00\x00\x00" // as Linux writes it

func good(c *scsi.Command) { c.Done(scsi.Result{}) }

func TestConfigSpace(t *testing.T) {
	d, err := New(Config{Target: &fake{}, Queues: 3, RingSize: 128})
	if err != nil {
		t.Fatal(err)
	}
	want := []byte{
		3, 0, 0, 0, // num_queues
		126, 0, 0, 0, // seg_max
		0xff, 0xff, 0, 0, // max_sectors
		128, 0, 0, 0, // cmd_per_lun
		16, 0, 0, 0, // event_info_size
		96, 0, 0, 0, // sense_size
		32, 0, 0, 0, // cdb_size
		0, 0, // max_channel
		0, 0, // max_target
		0xff, 0x3f, 0, 0, // max_lun
	}
	if got := d.Config(); !bytes.Equal(got, want) {
		t.Fatalf("config\n% x, want\n% x", got, want)
	}
	if got := d.QueueSizes(); !slices.Equal(got, []uint16{64, 64, 128, 128, 128}) {
		t.Fatalf("queue sizes %v", got)
	}
	if d.ID() != 8 || d.Features() != 0x30000006 {
		t.Fatalf("ID %d, features %#x", d.ID(), d.Features())
	}
	var _ virtio.ConfigWriter = d
	var _ Target = (*scsi.Target)(nil)
}

func TestWriteConfig(t *testing.T) {
	for _, tt := range []struct {
		name       string
		off        uint32
		p          []byte
		sense, cdb uint32
	}{
		{"sense_size", 20, []byte{18, 0, 0, 0}, 18, 32},
		{"sense_size 0", 20, []byte{0, 0, 0, 0}, 0, 32},
		{"sense_size too large", 20, []byte{253, 0, 0, 0}, 252, 32},
		{"sense_size huge", 20, []byte{0, 0, 0, 0xff}, 252, 32},
		{"cdb_size", 24, []byte{16, 0, 0, 0}, 96, 16},
		{"cdb_size too small", 24, []byte{0, 0, 0, 0}, 96, 6},
		{"cdb_size too large", 24, []byte{0, 1, 1, 0}, 96, 260},
		{"both at once", 20, []byte{40, 0, 0, 0, 12, 0, 0, 0}, 40, 12},
		{"one byte", 24, []byte{10}, 96, 10},
		{"other fields", 0, bytes.Repeat([]byte{0x55}, 20), 96, 32},
		{"the rest", 28, bytes.Repeat([]byte{0x55}, 8), 96, 32},
		{"past the end", 24, bytes.Repeat([]byte{7}, 13), 96, 32},
	} {
		d, err := New(Config{Target: &fake{}})
		if err != nil {
			t.Fatal(err)
		}
		want := d.Config()
		binary.LittleEndian.PutUint32(want[20:], tt.sense)
		binary.LittleEndian.PutUint32(want[24:], tt.cdb)
		d.WriteConfig(tt.off, tt.p)
		if got := d.Config(); !bytes.Equal(got, want) {
			t.Errorf("%s: config\n% x, want\n% x", tt.name, got, want)
		}
		if err := d.Reset(); err != nil {
			t.Fatal(err)
		}
		if b := d.Config(); b[20] != 96 || b[24] != 32 {
			t.Errorf("%s: after reset sense_size %d, cdb_size %d", tt.name, b[20], b[24])
		}
	}
}

func TestNewRejects(t *testing.T) {
	for _, cfg := range []Config{
		{}, {Target: &fake{}, Queues: -1}, {Target: &fake{}, Queues: 1025},
		{Target: &fake{}, RingSize: 2}, {Target: &fake{}, RingSize: 100}, {Target: &fake{}, RingSize: 2048},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v is accepted", cfg)
		}
	}
}

// TestCommand follows every field of a request and of its response.
func TestCommand(t *testing.T) {
	var got scsi.Command
	var out []byte
	f := &fake{submit: func(c *scsi.Command) {
		got = *c
		got.CDB = bytes.Clone(c.CDB)
		out = bytes.Join(c.Out, nil)
		copy(c.In[0], "DATA")
		c.Done(scsi.Result{Status: scsi.CheckCondition, Sense: []byte{0x70, 1, 2}, Residual: 2})
	}}
	r := newRig(t, Config{Target: f, Nexus: 7}, virtio.FeatureEventIdx)
	resp := r.roundTrip(2, header(lun5, 0x1122334455667788, 2, 0x28, 1, 2, 3, 4, 5, 6, 7, 8, 9), nil, 108+6, nil)
	if got.LUN != 0x4005000000000000 || got.Tag != 0x1122334455667788 || got.Attr != scsi.HeadOfQueue || got.Nexus != 7 {
		t.Errorf("command %+v", got)
	}
	if want := append([]byte{0x28, 1, 2, 3, 4, 5, 6, 7, 8, 9}, make([]byte, 22)...); !bytes.Equal(got.CDB, want) ||
		len(out) != 0 {
		t.Errorf("CDB % x, data-out % x", got.CDB, out)
	}
	want := make([]byte, 112)
	copy(want, []byte{3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0x70, 1, 2})
	copy(want[108:], "DATA")
	if !bytes.Equal(resp, want) {
		t.Errorf("response\n% x, want\n% x", resp, want)
	}

	// Data-out: nothing is written behind the response, with any residual.
	f.submit = func(c *scsi.Command) {
		out = bytes.Join(c.Out, nil)
		if len(c.In) != 0 {
			t.Errorf("%d data-in buffers", len(c.In))
		}
		c.Done(scsi.Result{Residual: 1})
	}
	resp = r.roundTrip(2, append(header(lun5, 1, 0, 0x2a), "payload"...), nil, 108, nil)
	if string(out) != "payload" || len(resp) != 108 || resp[4] != 1 || resp[0] != 0 || resp[10] != 0 || resp[11] != 0 {
		t.Errorf("data-out %q, response % x", out, resp)
	}
}

// TestEverySplit cuts both parts of a request at every offset (2.7.4).
func TestEverySplit(t *testing.T) {
	f := &fake{submit: func(c *scsi.Command) {
		if c.CDB[0] != 0x28 {
			data := bytes.Join(c.Out, nil)
			c.Done(scsi.Result{Status: scsi.CheckCondition, Sense: data[:40], Residual: uint32(len(data))})
			return
		}
		for _, b := range c.In {
			for i := range b {
				b[i] = 0x77
			}
		}
		c.Done(scsi.Result{})
	}}
	r := newRig(t, Config{Target: f}, virtio.FeatureIndirectDesc)
	out := header(lun5, 1, 0, 0x2a)
	for i := range 50 {
		out = append(out, byte(i+1))
	}
	wantOut := make([]byte, 108)
	copy(wantOut, []byte{40, 0, 0, 0, 50, 0, 0, 0, 0, 0, 2, 0})
	copy(wantOut[12:], out[51:91])
	for cut := range out {
		for _, cuts := range [][]int{{cut}, {cut, cut + 1}} {
			if got := r.roundTrip(2, out, cuts, 108, []int{1 + cut}); !bytes.Equal(got, wantOut) {
				t.Fatalf("data-out cut at %v:\n% x", cuts, got)
			}
		}
	}
	wantIn := append(make([]byte, 108), bytes.Repeat([]byte{0x77}, 30)...)
	for cut := range 138 {
		for _, cuts := range [][]int{{cut}, {cut, cut + 1}} {
			if got := r.roundTrip(2, header(lun5, 1, 0, 0x28), []int{cut % 51}, 138, cuts); !bytes.Equal(got, wantIn) {
				t.Fatalf("data-in cut at %v:\n% x", cuts, got)
			}
		}
	}
	var each []int
	for i := range 51 {
		each = append(each, i)
	}
	if got := r.roundTrip(2, out, each, 108, each); !bytes.Equal(got, wantOut) {
		t.Fatalf("one byte in each descriptor:\n% x", got)
	}
}

func TestResponseCodes(t *testing.T) {
	for _, tt := range []struct {
		name   string
		res    scsi.Result
		status byte
		code   byte
	}{
		{"good", scsi.Result{}, 0, 0},
		{"check condition", scsi.Result{Status: scsi.CheckCondition, Sense: []byte{0x70}}, 2, 0},
		{"busy", scsi.Result{Status: scsi.Busy}, 8, 0},
		{"reservation conflict", scsi.Result{Status: scsi.ReservationConflict}, 0x18, 0},
		{"no LUN", scsi.Result{Status: scsi.CheckCondition, NoLUN: true}, 2, 0},
		{"overrun", scsi.Result{Overrun: true}, 0, 1},
		{"aborted", scsi.Result{Status: scsi.TaskAborted, Abort: scsi.AbortedByTask}, 0x40, 2},
		{"reset", scsi.Result{Status: scsi.TaskAborted, Abort: scsi.AbortedByReset}, 0x40, 4},
		{"aborted in a way of later", scsi.Result{Status: scsi.TaskAborted, Abort: 77}, 0x40, 9},
	} {
		f := &fake{submit: func(c *scsi.Command) { c.Done(tt.res) }}
		r := newRig(t, Config{Target: f}, 0)
		resp := r.roundTrip(2, header(lun5, 1, 0, 0), nil, 108, nil)
		if len(resp) != 108 || resp[10] != tt.status || resp[11] != tt.code {
			t.Errorf("%s: % x", tt.name, resp[:12])
		}
	}
}

func TestAddress(t *testing.T) {
	for _, tt := range []struct {
		lun  string
		want scsi.LUN // as the target gets it
		code byte     // when it does not
	}{
		{"\x01\x00\x00\x00\x00\x00\x00\x00", 0, 0},
		{"\x01\x00\x00\x05\x00\x00\x00\x00", 0x0005 << 48, 0},
		{"\x01\x00\x40\x05\x00\x00\x00\x00", 0x4005 << 48, 0},
		{"\x01\x00\x7f\xff\x00\x00\x00\x00", 0x7fff << 48, 0},
		{"\x01\x00\xc1\x01\x00\x00\x00\x00", scsi.ReportLUNsWLUN, 0},
		{"\xc1\x01\x00\x00\x00\x00\x00\x00", scsi.ReportLUNsWLUN, 0},
		{"\x01\x00\x00\x05\x00\x01\x00\x00", 0x00050001 << 32, 0},
		{"\x01\x01\x00\x00\x00\x00\x00\x00", 0, 3},
		{"\x01\xff\x40\x00\x00\x00\x00\x00", 0, 3},
		{"\x00\x00\x00\x00\x00\x00\x00\x00", 0, 3},
		{"\x02\x00\x00\x00\x00\x00\x00\x00", 0, 3},
		{"\xc1\x01\x00\x00\x00\x00\x00\x01", 0, 3},
	} {
		asked := false
		f := &fake{submit: func(c *scsi.Command) {
			asked = true
			if c.LUN != tt.want {
				t.Errorf("% x: LUN %#x", tt.lun, uint64(c.LUN))
			}
			good(c)
		}}
		r := newRig(t, Config{Target: f}, 0)
		resp := r.roundTrip(2, header(tt.lun, 1, 0, 0), nil, 108+4, nil)
		if resp[11] != tt.code || asked != (tt.code == 0) {
			t.Errorf("% x: response %d, target asked %v", tt.lun, resp[11], asked)
		}
		if tt.code != 0 && (len(resp) != 108 || resp[4] != 4) {
			t.Errorf("% x: written %d, residual %d", tt.lun, len(resp), resp[4])
		}
	}
}

// TestNoBidirectional: without VIRTIO_SCSI_F_INOUT such a request fails at once.
func TestNoBidirectional(t *testing.T) {
	f := &fake{submit: func(*scsi.Command) { t.Error("submitted") }}
	r := newRig(t, Config{Target: f}, 0)
	resp := r.roundTrip(2, append(header(lun5, 1, 0, 0x53), 1, 2, 3), nil, 108+4, nil)
	if resp[11] != 9 || resp[4] != 7 || len(resp) != 108 {
		t.Fatalf("% x", resp[:12])
	}
}

func TestSenseAndCDBSize(t *testing.T) {
	var cdb []byte
	f := &fake{submit: func(c *scsi.Command) {
		cdb = bytes.Clone(c.CDB)
		copy(c.In[0], "in")
		c.Done(scsi.Result{Status: scsi.CheckCondition, Sense: []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}})
	}}
	r := newRig(t, Config{Target: f}, 0)
	for _, tt := range []struct{ sense, cdb, senseLen int }{{96, 32, 10}, {8, 16, 8}, {0, 6, 0}, {252, 260, 10},
		{10, 12, 10}} {
		r.dev.WriteConfig(20, []byte{byte(tt.sense), 0, 0, 0, byte(tt.cdb), byte(tt.cdb >> 8), 0, 0})
		hdr := append(header(lun5, 1, 0)[:19], bytes.Repeat([]byte{0xcd}, tt.cdb)...)
		resp := r.roundTrip(2, hdr, nil, 12+tt.sense+2, nil)
		if len(cdb) != tt.cdb || cdb[tt.cdb-1] != 0xcd {
			t.Errorf("%+v: CDB of %d bytes", tt, len(cdb))
		}
		if len(resp) != 12+tt.sense+2 || int(resp[0]) != tt.senseLen || string(resp[12+tt.sense:]) != "in" {
			t.Fatalf("%+v: response % x", tt, resp)
		}
		if sense := resp[12 : 12+tt.senseLen]; tt.senseLen > 0 &&
			(sense[0] != 1 || int(sense[tt.senseLen-1]) != tt.senseLen) {
			t.Errorf("%+v: sense % x", tt, sense)
		}
	}
}

// TestBrokenRequests: a request that the device cannot answer breaks it, until a reset.
func TestBrokenRequests(t *testing.T) {
	f := &fake{submit: good}
	tmf := make([]byte, 24)
	an := make([]byte, 16)
	an[0] = 1
	for _, tt := range []struct {
		name string
		q    int
		out  []byte
		in   int
		rule string
	}{
		{"header short by one", 2, header(lun5, 1, 0)[:50], 108, "virtio 1.3, 5.6.6.1"},
		{"no header", 2, nil, 108, "virtio 1.3, 5.6.6.1"},
		{"response short by one", 2, header(lun5, 1, 0), 107, "virtio 1.3, 5.6.6.1"},
		{"no response", 3, header(lun5, 1, 0), 0, "virtio 1.3, 5.6.6.1"},
		{"control without type", 0, tmf[:3], 1, "virtio 1.3, 5.6.6.2"},
		{"control of unknown type", 0, append([]byte{3}, tmf...), 8, "virtio 1.3, 5.6.6.2"},
		{"short TMF", 0, tmf[:23], 1, "virtio 1.3, 5.6.6.2"},
		{"TMF without response", 0, tmf, 0, "virtio 1.3, 5.6.6.2"},
		{"short AN", 0, an[:15], 5, "virtio 1.3, 5.6.6.2"},
		{"AN with short response", 0, an, 4, "virtio 1.3, 5.6.6.2"},
		{"short event buffer", 1, nil, 15, "virtio 1.3, 5.6.6.3.1"},
	} {
		r := newRig(t, Config{Target: f, Queues: 2}, 0)
		r.send(tt.q, tt.out, nil, tt.in, nil)
		var g *virtq.GuestError
		if err := <-r.broken; !errors.As(err, &g) || g.Rule != tt.rule {
			t.Errorf("%s: %v", tt.name, err)
		}
		if err := r.dev.Reset(); err != nil {
			t.Fatal(err)
		}
		r.activate(0)
		if resp := r.roundTrip(2, header(lun5, 1, 0), nil, 108, nil); resp[11] != 0 {
			t.Errorf("%s: after reset % x", tt.name, resp)
		}
	}
}

func TestActivateChecksRings(t *testing.T) {
	f := &fake{submit: good}
	r := newRig(t, Config{Target: f}, 0)
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	a := virtio.Activation{Mem: r.mem, Broken: func(error) {}}
	for _, d := range r.q {
		a.Queues = append(a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
	}
	a.Queues[1].Device = 1 << 40
	var g *virtq.GuestError
	if err := r.dev.Activate(a); !errors.As(err, &g) {
		t.Fatalf("error %v", err)
	}
	a.Queues[1].Size = 0 // a driver may leave a queue alone
	if err := r.dev.Activate(a); err != nil {
		t.Fatal(err)
	}
	if resp := r.roundTrip(2, header(lun5, 1, 0), nil, 108, nil); resp[11] != 0 {
		t.Fatalf("% x", resp)
	}
}
