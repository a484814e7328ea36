package virtio_test

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/panics"
)

const base = 0x10000

// rig is a driver and the parameters of the device under test at DRIVER_OK.
type rig struct {
	*virtqtest.Driver
	a      virtio.Activation
	broken chan error
	poll   time.Duration
}

func newRig(t testing.TB, size uint16, features uint64) *rig {
	t.Helper()
	mem := guestmem.Heap(base, 1<<20)
	d, err := virtqtest.New(mem, base, size, features)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	r := &rig{Driver: d, broken: make(chan error, 10)}
	r.a = virtio.Activation{
		Mem:      mem,
		Features: features,
		Queues:   []virtio.Queue{{Layout: d.Layout, Kick: d.Kick, Call: d.Call}},
		Broken:   func(err error) { r.broken <- err },
	}
	return r
}

func (r *rig) start(t testing.TB, h virtio.Handler) *virtio.Worker {
	t.Helper()
	var ws virtio.Workers
	if err := ws.Start(r.a, func(int) (virtio.Handler, time.Duration) { return h, r.poll }); err != nil {
		t.Fatal(err)
	}
	return ws[0]
}

// stop returns the base.
func stop(t testing.TB, w *virtio.Worker) uint16 {
	t.Helper()
	bases, err := (&virtio.Workers{w}).Stop(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return bases[0]
}

// echo answers a chain with the complement of its bytes.
func echo(w *virtio.Worker, c *virtq.Chain) error {
	var b [8]byte
	n, _ := c.Out.Read(b[:])
	for i := range b {
		b[i] = ^b[i]
	}
	c.In.Write(b[:n])
	w.Complete(c, uint32(n))
	return nil
}

// TestNoLostWakeUp sends bursts with every way of notification; one that is
// lost on either side hangs the test. Each answer is checked against its own
// request. The race detector watches rings and buffers.
func TestNoLostWakeUp(t *testing.T) {
	requests := 20000
	if testing.Short() {
		requests = 2000
	}
	for name, features := range map[string]uint64{
		"flags":     0,
		"event_idx": virtio.FeatureEventIdx,
		"indirect":  virtio.FeatureEventIdx | virtio.FeatureIndirectDesc,
	} {
		for _, how := range []string{"", "/async", "/poll", "/async poll"} {
			t.Run(name+how, func(t *testing.T) {
				async := strings.Contains(how, "async")
				r := newRig(t, 16, features)
				if strings.Contains(how, "poll") {
					r.poll = 50 * time.Microsecond
				}
				handle := virtio.Handler(echo)
				type job struct {
					w *virtio.Worker
					c *virtq.Chain
				}
				jobs := make(chan job, 16)
				var pool sync.WaitGroup
				if async {
					handle = func(w *virtio.Worker, c *virtq.Chain) error {
						jobs <- job{w, c}
						return nil
					}
					for range 3 {
						pool.Add(1)
						go func() {
							defer pool.Done()
							for j := range jobs {
								if err := echo(j.w, j.c); err != nil {
									t.Error(err)
								}
							}
						}()
					}
				}
				w := r.start(t, handle)
				rnd := rand.New(rand.NewSource(3))
				var addr [16]uint64
				var next []int
				for i := range addr {
					addr[i] = r.Alloc(32)
					next = append(next, i)
				}
				buffer := map[uint16]int{} // by head
				sent, got := uint64(0), 0
				value := map[uint16]uint64{}
				reap := func(head uint16, written uint32) {
					i := buffer[head]
					b := r.Bytes(addr[i]+16, 8)
					if have := binary.LittleEndian.Uint64(b); have != ^value[head] || written != 8 {
						t.Fatalf("request %d: answer %#x of %d bytes", value[head], have, written)
					}
					next = append(next, i)
					got++
				}
				for got < requests {
					for burst := 1 + rnd.Intn(6); burst > 0 && len(next) > 0 && r.Free() >= 2; burst-- {
						i := next[len(next)-1]
						sent++
						binary.LittleEndian.PutUint64(r.Bytes(addr[i], 8), sent)
						binary.LittleEndian.PutUint64(r.Bytes(addr[i]+16, 8), 0)
						direct := 2
						if features&virtio.FeatureIndirectDesc != 0 {
							direct = rnd.Intn(3)
						}
						head, ok := r.AddIndirect(direct, virtqtest.Seg{Addr: addr[i], Len: 8},
							virtqtest.Seg{Addr: addr[i] + 16, Len: 8, Write: true})
						if !ok {
							t.Fatal("no room")
						}
						next = next[:len(next)-1]
						buffer[head], value[head] = i, sent
						if rnd.Intn(2) == 0 {
							if _, err := r.Publish(); err != nil {
								t.Fatal(err)
							}
						}
					}
					if _, err := r.Publish(); err != nil {
						t.Fatal(err)
					}
					if rnd.Intn(3) == 0 {
						r.DisableCalls()
					}
					head, written, err := r.Wait()
					if err != nil {
						t.Fatal(err)
					}
					reap(head, written)
					for {
						head, written, ok := r.Used()
						if !ok {
							break
						}
						reap(head, written)
					}
				}
				stop(t, w)
				close(jobs)
				pool.Wait()
			})
		}
	}
}

// TestPolledPingPong adds a chain the moment the last one is used, which is
// when the worker goes from polling to waiting: one kick that it neither asks
// for in time nor makes up for hangs the test.
func TestPolledPingPong(t *testing.T) {
	requests := 150000
	if testing.Short() {
		requests = 20000
	}
	for i, features := range []uint64{0, virtio.FeatureEventIdx, 0, virtio.FeatureEventIdx} {
		r := newRig(t, 4, features)
		r.poll = time.Duration(i/2) * 10 * time.Microsecond
		w := r.start(t, echo)
		r.DisableCalls()
		in, out := r.Alloc(8), r.Alloc(8)
		for range requests {
			r.Add(virtqtest.Seg{Addr: in, Len: 8}, virtqtest.Seg{Addr: out, Len: 8, Write: true})
			if _, err := r.Publish(); err != nil {
				t.Fatal(err)
			}
			for {
				if _, _, ok := r.Used(); ok {
					break
				}
				runtime.Gosched()
			}
		}
		stop(t, w)
	}
}

// TestServesWhatWasThereFirst fills the queue before the worker starts, with
// the kick lost.
func TestServesWhatWasThereFirst(t *testing.T) {
	r := newRig(t, 4, virtio.FeatureEventIdx)
	r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: 8}, virtqtest.Seg{Addr: r.Alloc(8), Len: 8, Write: true})
	if _, err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Kick.Drain(); err != nil {
		t.Fatal(err)
	}
	w := r.start(t, echo)
	if _, written, err := r.Wait(); err != nil || written != 8 {
		t.Fatal(written, err)
	}
	stop(t, w)
}

// TestInterrupts: a driver that sleeps learns of a completed chain although the handler
// waits with the next one, if it said so before, and although the queue never becomes
// empty.
func TestInterrupts(t *testing.T) {
	add := func(r *rig) {
		r.Add(virtqtest.Seg{Addr: base + 1<<19, Len: 8}, virtqtest.Seg{Addr: base + 1<<19 + 8, Len: 8, Write: true})
		if _, err := r.Publish(); err != nil {
			t.Error(err)
		}
	}
	t.Run("before a wait", func(t *testing.T) {
		r, release := newRig(t, 4, virtio.FeatureEventIdx), make(chan struct{})
		add(r)
		add(r)
		n := 0
		w := r.start(t, func(w *virtio.Worker, c *virtq.Chain) error {
			if n++; n == 2 {
				w.Interrupt()
				<-release
			}
			return echo(w, c)
		})
		if _, _, err := r.Wait(); err != nil {
			t.Fatal(err)
		}
		close(release)
		if _, _, err := r.Wait(); err != nil {
			t.Fatal(err)
		}
		stop(t, w)
	})
	t.Run("among many", func(t *testing.T) {
		r := newRig(t, 8, virtio.FeatureEventIdx)
		add(r)
		var told atomic.Bool
		done := make(chan struct{})
		w := r.start(t, func(w *virtio.Worker, c *virtq.Chain) error {
			switch {
			case !told.Load():
				r.Used()
				add(r)
			case done != nil:
				close(done)
				done = nil
			}
			return echo(w, c)
		})
		finished := done
		if _, err := r.Call.Wait(); err != nil {
			t.Fatal(err)
		}
		told.Store(true)
		<-finished
		stop(t, w)
	})
}

// TestBrokenRing: the worker reports it once and serves no more; after a reset
// the same device serves again.
func TestBrokenRing(t *testing.T) {
	r := newRig(t, 4, 0)
	var served atomic.Int32
	h := func(w *virtio.Worker, c *virtq.Chain) error {
		served.Add(1)
		return echo(w, c)
	}
	w := r.start(t, h)
	r.SetAvail(0, 99)
	r.SetAvailIdx(1)
	if err := r.Kick.Signal(); err != nil {
		t.Fatal(err)
	}
	var g *virtq.GuestError
	if err := <-r.broken; !errors.As(err, &g) || g.Rule != "virtio 1.3, 2.7.5" {
		t.Fatalf("broken: %v", err)
	}
	r.SetAvail(0, 0)
	if err := r.Kick.Signal(); err != nil {
		t.Fatal(err)
	}
	stop(t, w)
	if served.Load() != 0 || len(r.broken) != 0 {
		t.Fatalf("served %d, %d more reports", served.Load(), len(r.broken))
	}

	r = newRig(t, 4, 0)
	w = r.start(t, h)
	r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: 8})
	if _, err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Wait(); err != nil {
		t.Fatal(err)
	}
	stop(t, w)
}

func TestHandlerErrorBreaks(t *testing.T) {
	r := newRig(t, 4, 0)
	rule := &virtq.GuestError{Rule: "virtio 1.3, 5.x", What: "bad header"}
	w := r.start(t, func(*virtio.Worker, *virtq.Chain) error { return rule })
	r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: 8})
	if _, err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	if err := <-r.broken; !errors.Is(err, rule) {
		t.Fatal(err)
	}
	stop(t, w) // does not wait for the chain that the handler refused
	if _, _, ok := r.Used(); ok {
		t.Fatal("the refused chain was used")
	}
}

// TestHandlerPanic checks that a panic in a handler reaches the program, which can then stop the
// worker.
func TestHandlerPanic(t *testing.T) {
	panicked := make(chan *panics.Panic, 1)
	defer panics.Handle(func(p *panics.Panic) { panicked <- p })()
	r := newRig(t, 4, 0)
	w := r.start(t, func(w *virtio.Worker, c *virtq.Chain) error {
		w.Complete(c, 0)
		panic("broken")
	})
	r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: 8})
	if _, err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	if p := <-panicked; p.Value != "broken" {
		t.Errorf("%v\n%s", p, p.Stack)
	}
	stop(t, w)
}

// TestStartChecksLayout: no worker starts, not even on a queue that is right.
func TestStartChecksLayout(t *testing.T) {
	r := newRig(t, 4, 0)
	r.a.Queues = append(r.a.Queues, r.a.Queues[0])
	r.a.Queues[1].Desc++
	var ws virtio.Workers
	var g *virtq.GuestError
	err := ws.Start(r.a, func(int) (virtio.Handler, time.Duration) { return echo, 0 })
	if !errors.As(err, &g) || len(ws) > 0 {
		t.Fatalf("error %v, %d workers", err, len(ws))
	}
}

// TestStopWaits: Stop returns after the last completion of an asynchronous
// handler, and takes no more chains.
func TestStopWaits(t *testing.T) {
	r := newRig(t, 8, 0)
	var kept []*virtq.Chain
	taken := make(chan struct{}, 8)
	w := r.start(t, func(w *virtio.Worker, c *virtq.Chain) error {
		kept = append(kept, c)
		taken <- struct{}{}
		return nil
	})
	for range 3 {
		r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: 8, Write: true})
	}
	if _, err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		<-taken
	}
	var completed atomic.Bool
	bases, err := (&virtio.Workers{w}).Stop(t.Context(), func() {
		r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: 8, Write: true})
		if _, err := r.Publish(); err != nil {
			t.Error(err)
		}
		go func() {
			w.Complete(kept[1], 1)
			w.Drop(kept[2])
			completed.Store(true)
			w.Complete(kept[0], 2)
		}()
	})
	if err != nil || !completed.Load() {
		t.Fatalf("Stop returned with chains in flight: %v", err)
	}
	if bases[0] != 2 {
		t.Fatalf("base %d with two of four chains used", bases[0])
	}
	for i, want := range []uint32{1, 2} {
		if _, written, ok := r.Used(); !ok || written != want {
			t.Fatalf("completion %d: %d, %v", i, written, ok)
		}
	}
	if _, _, ok := r.Used(); ok || len(kept) != 3 {
		t.Fatalf("a chain was taken when no more were to be: %d", len(kept))
	}
}

// TestStopGivenUp: a Stop whose context ends, while a handler does not return or a chain is in
// flight, leaves the worker as it was. It takes the chains that were dropped again.
func TestStopGivenUp(t *testing.T) {
	why := errors.New("enough")
	for _, returns := range []bool{false, true} {
		r := newRig(t, 8, 0)
		taken, release := make(chan *virtq.Chain, 8), make(chan struct{})
		w := r.start(t, func(w *virtio.Worker, c *virtq.Chain) error {
			taken <- c
			if !returns {
				<-release
			}
			return nil
		})
		send := func(n uint32) {
			r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: n, Write: true})
			if _, err := r.Publish(); err != nil {
				t.Fatal(err)
			}
		}
		send(1)
		send(2)
		held := <-taken
		ctx, cancel := context.WithCancelCause(t.Context())
		if returns {
			dropped := <-taken
			_, err := (&virtio.Workers{w}).Stop(ctx, func() {
				w.Drop(dropped)
				cancel(why)
			})
			if !errors.Is(err, why) {
				t.Fatalf("stopped with a chain in flight: %v", err)
			}
		} else {
			cancel(why)
			if _, err := (&virtio.Workers{w}).Stop(ctx, nil); !errors.Is(err, why) {
				t.Fatalf("stopped in a handler: %v", err)
			}
			close(release)
		}
		again := <-taken
		send(3)
		last := <-taken
		if held.In.Len() != 1 || again.In.Len() != 2 || last.In.Len() != 3 {
			t.Fatalf("chains of %d, %d and %d bytes", held.In.Len(), again.In.Len(), last.In.Len())
		}
		for _, c := range []*virtq.Chain{last, held, again} {
			w.Complete(c, 0)
		}
		if base := stop(t, w); base != 3 || len(taken) != 0 {
			t.Errorf("base %d, and %d more chains", base, len(taken))
		}
	}
}

// TestStopTakesNoMore: the worker stops between two chains.
func TestStopTakesNoMore(t *testing.T) {
	r := newRig(t, 8, 0)
	entered, quiet := make(chan struct{}, 2), make(chan struct{})
	w := r.start(t, func(w *virtio.Worker, c *virtq.Chain) error {
		entered <- struct{}{}
		<-quiet
		for !r.Kick.Pending() { // until Stop wakes the worker
		}
		return echo(w, c)
	})
	for range 2 {
		r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: 8})
	}
	if _, err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	<-entered
	if _, err := r.Kick.Drain(); err != nil {
		t.Fatal(err)
	}
	close(quiet)
	if base := stop(t, w); base != 1 {
		t.Errorf("base %d after one chain", base)
	}
	if len(entered) != 0 {
		t.Fatal("a chain was taken after Stop")
	}
}

// TestBarrier: after it the handler has every chain that was available before.
func TestBarrier(t *testing.T) {
	r := newRig(t, 64, virtio.FeatureEventIdx)
	var handled atomic.Uint32
	w := r.start(t, func(w *virtio.Worker, c *virtq.Chain) error {
		time.Sleep(time.Microsecond) // lets the caller of Barrier go on, if it may
		handled.Add(1)
		w.Complete(c, 0)
		return nil
	})
	sent := uint32(0)
	addr := r.Alloc(8)
	for round := range 500 {
		for range round % 7 {
			r.Add(virtqtest.Seg{Addr: addr, Len: 8})
			sent++
		}
		if round%2 == 0 {
			r.SetAvailIdx(uint16(sent)) // the kick is on its way, or forgotten
		}
		if _, err := r.Publish(); err != nil {
			t.Fatal(err)
		}
		if err := w.Barrier(); err != nil {
			t.Fatal(err)
		}
		if n := handled.Load(); n != sent {
			t.Fatalf("round %d: handled %d of %d", round, n, sent)
		}
		for {
			if _, _, ok := r.Used(); !ok {
				break
			}
		}
	}
	stop(t, w)
	if err := w.Barrier(); err != nil { // of a stopped worker: returns at once
		t.Fatal(err)
	}
}

// TestBarrierIndexTakenBack: a driver that takes back available chains, against the
// specification, leaves no caller waiting.
func TestBarrierIndexTakenBack(t *testing.T) {
	r := newRig(t, 64, 0)
	r.Add(virtqtest.Seg{Addr: r.Alloc(8), Len: 8})
	if _, err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	handling, release := make(chan struct{}), make(chan struct{})
	w := r.start(t, func(w *virtio.Worker, c *virtq.Chain) error {
		close(handling)
		<-release
		w.Complete(c, 0)
		return nil
	})
	<-handling
	if _, err := r.Kick.Drain(); err != nil { // Publish's
		t.Fatal(err)
	}
	r.SetAvailIdx(2)
	passed := make(chan error)
	go func() { passed <- w.Barrier() }()
	for !r.Kick.Pending() { // Barrier signals it, once it knows the index to wait for
		runtime.Gosched()
	}
	r.SetAvailIdx(1)
	close(release)
	if err := <-passed; err != nil {
		t.Fatal(err)
	}
	stop(t, w)
}

// TestCounts: the state of a queue has its requests, interrupts and latencies. A measured request
// stands for the others until the next one.
func TestCounts(t *testing.T) {
	r := newRig(t, 64, virtio.FeatureEventIdx)
	w := r.start(t, echo)
	const runs, depth = 50, 8
	one := newExchange(r, depth)
	for range runs {
		one.run()
	}
	stop(t, w)
	n := inspect.Group("", virtio.Workers{w}.Inspect()[0]...)
	requests, interrupts := n.Get("requests"), n.Get("interrupts").(uint64)
	if requests != uint64(runs*depth) || interrupts == 0 || interrupts > runs*depth {
		t.Errorf("%v requests, %d interrupts", requests, interrupts)
	}
	latency, err := n.Read(t.Context(), "latency")
	if err != nil {
		t.Fatal(err)
	}
	h := inspect.HistogramOf(latency)
	if count := h.Count(); count < runs*depth || count >= runs*depth+64 || h.Sum() <= 0 || h.Quantile(.5) <= 0 {
		t.Errorf("%d requests, %v: %+v", count, h.Sum(), h)
	}
}

var raceDetector bool

func TestWorkerNoAllocations(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates")
	}
	r := newRig(t, 64, virtio.FeatureEventIdx)
	w := r.start(t, echo)
	one := newExchange(r, 8)
	if n := testing.AllocsPerRun(500, one.run); n != 0 {
		t.Fatalf("%v allocations for %d requests", n, one.depth)
	}
	stop(t, w)
}

type exchange struct {
	r     *rig
	depth int
	segs  []virtqtest.Seg
}

func newExchange(r *rig, depth int) *exchange {
	a := r.Alloc(64)
	return &exchange{r, depth, []virtqtest.Seg{{Addr: a, Len: 8}, {Addr: a + 16, Len: 8, Write: true}}}
}

func (e *exchange) run() {
	for range e.depth {
		e.r.Add(e.segs...)
	}
	if _, err := e.r.Publish(); err != nil {
		panic(err)
	}
	for range e.depth {
		if _, _, err := e.r.Wait(); err != nil {
			panic(err)
		}
	}
}

// BenchmarkWorker is one request through both eventfds, at a queue depth.
func BenchmarkWorker(b *testing.B) {
	for _, bb := range []struct {
		name  string
		depth int
	}{{"depth1", 1}, {"depth32", 32}} {
		b.Run(bb.name, func(b *testing.B) {
			r := newRig(b, 128, virtio.FeatureEventIdx)
			w := r.start(b, echo)
			e := newExchange(r, bb.depth)
			b.ReportAllocs()
			for i := 0; i < b.N; i += bb.depth {
				e.run()
			}
			stop(b, w)
		})
	}
}
