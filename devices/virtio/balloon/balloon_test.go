package balloon

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

// pagesAt is where the pages of tests are, behind the rings of the queues.
const pagesAt = 8 << 20

// rig is a device and the driver's side of its queues.
type rig struct {
	t       testing.TB
	dev     *Device
	a       virtio.Activation
	q       []*virtqtest.Driver
	at      []uint64 // a page for data of each queue
	changes int
	broken  chan error
}

func newRig(t testing.TB, c guestmem.Config, features uint64) *rig {
	t.Helper()
	c.Size = guestmem.MinSize
	mem, err := guestmem.Map(c)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dev: New(), broken: make(chan error, 10)}
	r.a = virtio.Activation{Mem: mem, Features: features | virtio.FeatureEventIdx,
		Broken: func(err error) { r.broken <- err }, ConfigChanged: func() { r.changes++ }}
	for i, size := range r.dev.QueueSizes() {
		d, err := virtqtest.New(mem, uint64(i)*virtiotest.QueueSpan, size, r.a.Features)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.Close)
		r.q, r.at = append(r.q, d), append(r.at, d.Alloc(64<<10))
		r.a.Queues = append(r.a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
	}
	r.activate()
	t.Cleanup(func() {
		if err := errors.Join(r.dev.Reset(), mem.Close()); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) activate() {
	r.t.Helper()
	if err := r.dev.Activate(r.a); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) stop() {
	r.t.Helper()
	bases, err := r.dev.Stop(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	for i, b := range bases {
		r.a.Queues[i].Base = b
	}
}

func (r *rig) send(queue int, segs ...virtqtest.Seg) {
	r.t.Helper()
	r.q[queue].Add(segs...)
	if _, err := r.q[queue].Publish(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) wait(queue int) {
	r.t.Helper()
	if _, written, err := r.q[queue].Wait(); err != nil || written != 0 {
		r.t.Fatalf("%d bytes written, %v", written, err)
	}
}

// out puts data into the queue's page and returns the buffer.
func (r *rig) out(queue int, data []byte) virtqtest.Seg {
	copy(r.q[queue].Bytes(r.at[queue], len(data)), data)
	return virtqtest.Seg{Addr: r.at[queue], Len: uint32(len(data))}
}

func pfns(pages ...uint32) (b []byte) {
	for _, p := range pages {
		b = binary.LittleEndian.AppendUint32(b, p)
	}
	return b
}

// fill writes to every page of the test.
func (r *rig) fill() []byte {
	b, err := r.a.Mem.Slice(pagesAt, 16*PageSize)
	if err != nil {
		r.t.Fatal(err)
	}
	copy(b, bytes.Repeat([]byte{7}, len(b)))
	return b
}

// gone returns the pages that read as zeros.
func gone(b []byte) (pages []int) {
	for i := range len(b) / PageSize {
		switch p := b[i*PageSize:][:PageSize]; {
		case bytes.Equal(p, make([]byte, PageSize)):
			pages = append(pages, i)
		case !bytes.Equal(p, bytes.Repeat([]byte{7}, PageSize)):
			pages = append(pages, -i) // neither
		}
	}
	return pages
}

var kinds = map[string]guestmem.Config{"private": {}, "shared": {Shared: true}}

// TestInflate: the pages of the balloon are given back to the host, and no others.
func TestInflate(t *testing.T) {
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, kind, r0)
			b := r.fill()
			const p = pagesAt / PageSize
			r.send(inflate, r.out(inflate, pfns(p+9, p+2, p+8, p+10, p+8)))
			r.wait(inflate)
			if got := fmt.Sprint(gone(b)); got != "[2 8 9 10]" {
				t.Errorf("pages %s went", got)
			}
			b[8*PageSize] = 7 // used without a word, as after VIRTIO_BALLOON_F_DEFLATE_ON_OOM
			r.send(deflate, r.out(deflate, pfns(p+8, p+9)))
			r.wait(deflate)
			r.dev.mu.Lock()
			defer r.dev.mu.Unlock()
			if r.dev.inflated != 5 || r.dev.deflated != 2 || r.dev.err != nil {
				t.Errorf("%d inflated, %d deflated, %v", r.dev.inflated, r.dev.deflated, r.dev.err)
			}
		})
	}
}

const r0 = featureStats | featureDeflateOnOOM | featureReporting

// TestReport: a driver reports in the queue that the specification numbers, or in Linux's. Only
// whole pages go, and none of a guest whose free pages have other contents than zeros.
func TestReport(t *testing.T) {
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			for _, queue := range []int{hints, reporting} {
				for _, tt := range []struct {
					features uint64
					poison   []byte
					want     string
				}{{0, nil, "[0 1 5]"}, {featurePagePoison, pfns(0), "[0 1 5]"}, {featurePagePoison, pfns(0xaaaaaaaa), "[]"}} {
					r := newRig(t, kind, r0|tt.features)
					r.dev.WriteConfig(offPoisonVal, tt.poison)
					b := r.fill()
					r.send(queue, virtqtest.Seg{Addr: pagesAt, Len: 2 * PageSize, Write: true},
						virtqtest.Seg{Addr: pagesAt + 4*PageSize + 1, Len: 3*PageSize - 2, Write: true},
						virtqtest.Seg{Addr: pagesAt + 9*PageSize + 1, Len: PageSize, Write: true})
					r.wait(queue)
					if got := fmt.Sprint(gone(b)); got != tt.want {
						t.Errorf("queue %d, poison % x: pages %s went, want %s", queue, tt.poison, got, tt.want)
					}
				}
			}
		})
	}
}

// TestBadPages: a page that is not RAM breaks the device, and gives back nothing else.
func TestBadPages(t *testing.T) {
	for _, page := range []uint32{guestmem.MinSize / PageSize, 1<<32 - 1, 0xfee00} {
		r := newRig(t, guestmem.Config{}, r0)
		b := r.fill()
		r.send(inflate, r.out(inflate, pfns(page)))
		var g *virtq.GuestError
		if err := <-r.broken; !errors.As(err, &g) {
			t.Errorf("page %#x: %v", page, err)
		}
		if got := gone(b); got != nil {
			t.Errorf("page %#x: pages %d went", page, got)
		}
	}
}

// TestLocked: memory that the host cannot take back is no fault of the guest's.
func TestLocked(t *testing.T) {
	r := newRig(t, guestmem.Config{}, r0)
	b := r.fill()
	if err := unix.Mlock(b[:PageSize]); err != nil {
		t.Fatal(err)
	}
	r.send(inflate, r.out(inflate, pfns(pagesAt/PageSize)))
	r.wait(inflate)
	r.dev.mu.Lock()
	defer r.dev.mu.Unlock()
	if got := gone(b); got != nil || !errors.Is(r.dev.err, unix.EINVAL) {
		t.Errorf("pages %d went, %v", got, r.dev.err)
	}
}

// TestConfig: the size reaches the driver, at once or when it runs again, and outlives it.
func TestConfig(t *testing.T) {
	r := newRig(t, guestmem.Config{}, r0)
	if r.dev.Resize(3*PageSize + 5); r.changes != 1 {
		t.Errorf("%d changes", r.changes)
	}
	r.dev.WriteConfig(0, bytes.Repeat([]byte{0xff}, configLen)) // only actual and poison_val are the driver's
	want := append(pfns(3), 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff)
	if got := r.dev.Config(); !bytes.Equal(got, want) {
		t.Errorf("% x, want % x", got, want)
	}
	r.stop()
	if r.dev.Resize(PageSize); r.changes != 1 {
		t.Errorf("%d changes while stopped", r.changes)
	}
	if r.activate(); r.changes != 2 {
		t.Errorf("%d changes after a stop", r.changes)
	}
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if got, want := r.dev.Config(), append(pfns(1), make([]byte, 12)...); !bytes.Equal(got, want) {
		t.Errorf("after a reset % x, want % x", got, want)
	}
	r.dev.Resize(2 * PageSize) // which the next driver finds
	for i := range r.a.Queues {
		r.a.Queues[i].Base = 0
	}
	if r.activate(); r.changes != 2 || r.dev.State(t.Context()).Size != 2*PageSize {
		t.Errorf("%d changes for a driver that starts", r.changes)
	}
}

// stat is struct virtio_balloon_stat.
func stat(tag uint16, v uint64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16(nil, tag), v)
}

func text(s State) (b string) {
	for _, n := range s.Stats {
		b += fmt.Sprintf("%s %v,", n.Name, n.Value)
	}
	return b
}

// TestStats: the driver sends statistics when they are wanted, and never waits for the device.
func TestStats(t *testing.T) {
	r := newRig(t, guestmem.Config{}, r0)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if s := r.dev.State(t.Context()); s.Stats != nil {
		t.Errorf("statistics of no driver: %v", s)
	}
	ready := func() {
		t.Helper()
		if err := r.dev.workers[statistics].Barrier(); err != nil {
			t.Fatal(err)
		}
	}
	r.send(statistics, r.out(statistics, nil)) // without anything
	ready()
	done := make(chan State)
	for round, tt := range []struct {
		data []byte
		want string
	}{
		{append(stat(4, 77), stat(5, 1<<40)...), "memfree 77,memtot 1099511627776,"},
		{append(append(stat(16, 1), stat(1, 3)...), 1, 2, 3), "swap_out 3,"},
		{append(stat(10, 1), stat(10, 2)...), "oom_kill 2,"},
	} {
		go func() { done <- r.dev.State(t.Context()) }()
		r.wait(statistics)
		r.send(statistics, r.out(statistics, tt.data))
		if s := <-done; text(s) != tt.want {
			t.Errorf("round %d: %s, want %s", round, text(s), tt.want)
		}
		r.stop() // the buffer is taken again
		r.activate()
		ready()
	}
	if s := r.dev.State(over); text(s) != "oom_kill 2," {
		t.Errorf("a driver that does not answer: %v", s)
	}
}

// TestTwoStats: a driver has one buffer in the queue at a time.
func TestTwoStats(t *testing.T) {
	r := newRig(t, guestmem.Config{}, r0)
	r.send(statistics, r.out(statistics, stat(1, 1)))
	r.send(statistics, r.out(statistics, stat(1, 1)))
	var g *virtq.GuestError
	if err := <-r.broken; !errors.As(err, &g) {
		t.Error(err)
	}
}

// pages is a request of a driver.
type pages struct {
	d       *virtqtest.Driver
	addr    uint64
	reports bool
}

func (p pages) Next() []virtqtest.Seg {
	page := p.addr + PageSize
	p.d.Bytes(page, 1)[0] = 7
	if p.reports {
		return []virtqtest.Seg{{Addr: page, Len: PageSize, Write: true}}
	}
	copy(p.d.Bytes(p.addr, 4), pfns(uint32(page/PageSize)))
	return []virtqtest.Seg{{Addr: p.addr, Len: 4}}
}

func (p pages) Check(written uint32) error {
	if v := p.d.Bytes(p.addr+PageSize, 1)[0]; written != 0 || v != 0 {
		return fmt.Errorf("%d bytes written, the page has %d", written, v)
	}
	return nil
}

func TestStopAndContinue(t *testing.T) {
	mem, err := guestmem.Map(guestmem.Config{Size: guestmem.MinSize})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for features, rounds := range map[uint64]int{r0: 50, r0 | virtio.FeatureEventIdx: 300} {
		virtiotest.StopAndContinue(t, New(), mem, virtiotest.Load{
			Rounds: rounds, Features: features,
			Slots: func(queue int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				if queue == deflate || queue == statistics {
					return nil
				}
				for i := range uint64(20) {
					addr := pagesAt + (uint64(queue)*20+i)*2*PageSize
					slots = append(slots, pages{d, addr, queue >= hints})
				}
				return slots
			},
		})
	}
}

// FuzzDriver has a driver that does anything. Each 4 bytes are one step, and those that follow a
// step of inflating are the numbers of pages. Only pages that the driver named may lose their
// contents.
func FuzzDriver(f *testing.F) {
	f.Add([]byte("\x00\x02\x00\x00\x00\x08\x00\x00\x03\x08\x00\x00\x02\x14\x00\x00\x05\x00\x00\x00\x04\x10\x10\x01"))
	f.Add([]byte("\x02\x0a\x00\x00\x06\x00\x00\x00\x02\x20\x00\x00\x06\x00\x00\x00\x01\x10\x00\x00\x05\x00\x00\x00"))
	f.Add([]byte("\x07\xaa\x00\x00\x04\x00\x30\x01\x02\x01\x00\x00\x02\x01\x00\x00"))
	f.Fuzz(func(t *testing.T, ops []byte) {
		r := newRig(t, guestmem.Config{}, r0|featurePagePoison)
		b := r.fill()
		named := map[int]bool{}
		const first = pagesAt / PageSize
		over, cancel := context.WithCancel(t.Context())
		cancel()
		for ops = ops[:min(len(ops), 4*64)]; len(ops) >= 4 && len(r.broken) == 0; {
			op := ops[:4]
			ops = ops[4:]
			var segs []virtqtest.Seg
			queue := int(op[0] % 8)
			switch queue {
			case inflate:
				n := min(int(op[1]), len(ops)&^3)
				for i := range n / 4 { // mostly pages of the test
					page := binary.LittleEndian.Uint32(ops[4*i:])
					if page < 32 {
						page += first
					}
					binary.LittleEndian.PutUint32(ops[4*i:], page)
					named[int(page)-first] = true
				}
				segs, ops = []virtqtest.Seg{r.out(queue, ops[:n])}, ops[n:]
			case deflate, statistics:
				segs = []virtqtest.Seg{r.out(queue, bytes.Repeat(op, int(op[1])))}
			case hints, reporting:
				addr, n := pagesAt+uint64(op[1])<<8, uint32(op[2])<<8|uint32(op[3])
				segs = []virtqtest.Seg{{Addr: addr, Len: n, Write: op[3]&1 == 0}}
				for i := range b {
					if i%PageSize == 0 && uint64(i) >= addr-pagesAt && uint64(i)+PageSize <= addr-pagesAt+uint64(n) {
						named[i/PageSize] = true
					}
				}
			case 5:
				r.dev.State(over)
			case 6:
				r.stop()
				r.activate()
			case 7:
				r.dev.WriteConfig(uint32(op[1]%13), op[1:])
				r.dev.Resize(uint64(op[1]) << 12)
			}
			if segs == nil || r.q[queue].Free() == 0 {
				continue
			}
			for ok := true; ok; {
				_, _, ok = r.q[queue].Used()
			}
			r.send(queue, segs...)
			if err := r.dev.workers[queue].Barrier(); err != nil {
				t.Fatal(err)
			}
		}
		for i := range b {
			if b[i] != 7 && !named[i/PageSize] {
				t.Fatalf("byte %#x of page %d was changed", i, i/PageSize)
			}
		}
		r.dev.Inspect()
	})
}
