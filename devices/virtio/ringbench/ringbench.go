// Package ringbench measures a virtio SCSI host device (virtio 1.3, 5.6) from
// the driver's side of its rings, without a virtual machine: random reads or
// writes, a fixed number of them in flight in each queue, through the doorbells and
// interrupts that a guest's would go through.
package ringbench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
	"gvm/kvmapi/eventfd"
	"gvm/panics"
)

const (
	requestQueue = 2 // the first one (5.6.2)

	headerLen   = 51 // struct virtio_scsi_req_cmd's device-readable part with a CDB of 32 bytes (5.6.6.1)
	responseLen = 108
	tagOff      = 8
	cdbOff      = 19

	testUnitReady = 0x00
	read16        = 0x88
	write16       = 0x8a

	pageSize = 4096
)

// Load is the driver's work, on LUN 0.
type Load struct {
	Queues int // request queues that are used, each from a thread of its own
	Depth  int // requests in flight in each of them
	Size   int // bytes of each request, a multiple of BlockSize
	Write  bool
	Poll   bool // the driver looks for answers all the time, and wants no interrupts
	// BlockSize and Blocks are the unit's logical block size in bytes and capacity.
	BlockSize int
	Blocks    uint64
	Time      time.Duration
}

// Result is the outcome of a Load.
type Result struct {
	Requests uint64
	Elapsed  time.Duration // from the first request to the last answer
	CPU      time.Duration // that the process used meanwhile, the driver's part included
	Allocs   uint64        // on the Go heap meanwhile, those of the driver included, which has none for a request
	Latency  trace.Latency // from the request in the ring to its answer taken out
}

// Run activates the device, puts the load on it and resets it. An answer other than
// GOOD is an error.
func Run(dev virtio.Device, l Load) (res Result, err error) {
	sizes := dev.QueueSizes()
	switch {
	case l.Queues < 1 || requestQueue+l.Queues > len(sizes):
		return res, fmt.Errorf("ring benchmark: %d queues: the device has %d", l.Queues, len(sizes)-requestQueue)
	case l.Depth < 1 || l.Depth > int(sizes[requestQueue]):
		return res, fmt.Errorf("ring benchmark: depth %d: the queue has %d entries", l.Depth, sizes[requestQueue])
	case l.BlockSize < 1 || l.Size < l.BlockSize || l.Size%l.BlockSize != 0:
		return res, fmt.Errorf("ring benchmark: requests of %d bytes on blocks of %d", l.Size, l.BlockSize)
	case uint64(l.Size/l.BlockSize) > l.Blocks:
		return res, fmt.Errorf("ring benchmark: requests of %d bytes on %d blocks of %d", l.Size, l.Blocks, l.BlockSize)
	}
	// A queue's memory: its data, then what virtqtest puts there, rings, headers,
	// responses and indirect tables.
	data := uint64(l.Depth*l.Size+pageSize-1) &^ (pageSize - 1)
	step := data + uint64(sizes[requestQueue])*1024
	mem, err := guestmem.Map(guestmem.Config{Size: max(step*uint64(l.Queues), guestmem.MinSize)})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, mem.Close()) }()

	d := &drive{load: l, broken: make(chan struct{})}
	a := virtio.Activation{
		Mem:           mem,
		Features:      dev.Features()&(virtio.FeatureIndirectDesc|virtio.FeatureEventIdx) | virtio.FeatureVersion1,
		Queues:        make([]virtio.Queue, len(sizes)),
		Broken:        d.breaks,
		ConfigChanged: func() {},
	}
	idle, err := eventfd.New() // of the queues that are left alone
	if err != nil {
		return res, err
	}
	defer idle.Close()
	for i := range a.Queues {
		a.Queues[i].Kick, a.Queues[i].Call = idle, idle
	}
	for i := range l.Queues {
		base := uint64(i) * step
		q, err := virtqtest.New(mem, base+data, sizes[requestQueue+i], a.Features)
		if err != nil {
			return res, err
		}
		defer q.Close()
		d.queues = append(d.queues, newQueue(q, base, l))
		a.Queues[requestQueue+i] = virtio.Queue{Layout: q.Layout, Kick: q.Kick, Call: q.Call}
	}
	if err := dev.Activate(a); err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, dev.Reset()) }()
	return d.run()
}

// drive is one Run.
type drive struct {
	load   Load
	queues []*queue

	once   sync.Once
	err    error         // why it broke
	broken chan struct{} // closed then
}

// breaks is told that the device has given up.
func (d *drive) breaks(err error) {
	d.once.Do(func() {
		d.err = err
		close(d.broken)
		for _, q := range d.queues {
			_ = q.Call.Signal() // wakes it
		}
	})
}

func (d *drive) run() (res Result, err error) {
	if err := d.ready(); err != nil {
		return res, err
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu, start := processCPU(), time.Now()
	var threads sync.WaitGroup
	errs := make([]error, len(d.queues))
	for i, q := range d.queues {
		threads.Go(panics.Func(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			errs[i] = d.drive(q, start)
		}))
	}
	threads.Wait()
	res.Elapsed, res.CPU = time.Since(start), processCPU()-cpu
	runtime.ReadMemStats(&after)
	res.Allocs = after.Mallocs - before.Mallocs
	for _, q := range d.queues {
		res.Requests += q.done
		res.Latency.Merge(&q.latency)
	}
	return res, errors.Join(errs...)
}

// processCPU is the CPU time that the process has used.
func processCPU() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// queue is a driver with its requests.
type queue struct {
	*virtqtest.Driver
	slots   []slot
	byHead  []*slot // those in flight
	random  *rand.PCG
	done    uint64
	latency trace.Latency
}

// slot is one request and its memory.
type slot struct {
	header, response []byte
	segs             []virtqtest.Seg // header, data-out, response, data-in
	sent             time.Time
}

func newQueue(d *virtqtest.Driver, data uint64, l Load) *queue {
	q := &queue{
		Driver: d,
		byHead: make([]*slot, d.Size),
		random: rand.NewPCG(1, data), // the same requests in every run
	}
	for i := range l.Depth {
		header, response := d.Alloc(headerLen), d.Alloc(responseLen)
		s := slot{
			header: d.Bytes(header, headerLen), response: d.Bytes(response, responseLen),
			segs: []virtqtest.Seg{{Addr: header, Len: headerLen}, {Addr: response, Len: responseLen, Write: true}},
		}
		payload := virtqtest.Seg{Addr: data + uint64(i*l.Size), Len: uint32(l.Size), Write: !l.Write}
		if l.Write {
			s.segs = slices.Insert(s.segs, 1, payload)
		} else {
			s.segs = append(s.segs, payload)
		}
		s.header[0], s.header[2] = 1, 0x40 // target 0, LUN 0 (5.6.6.1)
		binary.LittleEndian.PutUint64(s.header[tagOff:], uint64(i))
		cdb := s.header[cdbOff:]
		if cdb[0] = read16; l.Write {
			cdb[0] = write16
		}
		binary.BigEndian.PutUint32(cdb[10:], uint32(l.Size/l.BlockSize))
		q.slots = append(q.slots, s)
	}
	return q
}

// ready takes the unit attention condition that the first command ends with.
func (d *drive) ready() error {
	q := d.queues[0]
	s := &q.slots[0]
	op := s.header[cdbOff]
	s.header[cdbOff] = testUnitReady
	response := 1
	if d.load.Write {
		response = 2
	}
	q.Add(s.segs[0], s.segs[response])
	if _, err := q.Publish(); err != nil {
		return err
	}
	_, err := d.wait(q)
	s.header[cdbOff] = op
	return err
}

// drive keeps the queue full until the time is over, and waits for the rest.
func (d *drive) drive(q *queue, start time.Time) error {
	span := d.load.Blocks - uint64(d.load.Size/d.load.BlockSize) + 1
	now := start
	send := func(s *slot) {
		lba := q.random.Uint64() % span
		binary.BigEndian.PutUint64(s.header[cdbOff+2:], lba)
		s.response[10], s.response[11] = 0xff, 0xff
		s.sent = now
		head, _ := q.AddIndirect(0, s.segs...) // a descriptor is free for each slot
		q.byHead[head] = s
	}
	for i := range q.slots {
		send(&q.slots[i])
	}
	flying := len(q.slots)
	for flying > 0 {
		if _, err := q.Publish(); err != nil {
			return err
		}
		head, err := d.wait(q)
		if err != nil {
			return err
		}
		now = time.Now()
		for ok := true; ok; head, _, ok = q.Used() {
			s := q.byHead[head]
			if status, response := s.response[10], s.response[11]; status != 0 || response != 0 {
				return fmt.Errorf("ring benchmark: a request at LBA %d ended with status %#02x, response %d",
					binary.BigEndian.Uint64(s.header[cdbOff+2:]), status, response)
			}
			q.done++
			q.latency.Add(now.Sub(s.sent))
			if now.Sub(start) < d.load.Time {
				send(s)
			} else {
				flying--
			}
		}
	}
	return nil
}

// wait returns a chain that the device has used.
func (d *drive) wait(q *queue) (head uint16, err error) {
	for {
		if head, _, ok := q.Used(); ok {
			return head, nil
		}
		select {
		case <-d.broken:
			return 0, fmt.Errorf("the device broke: %w", d.err)
		default:
		}
		if d.load.Poll || q.EnableCalls() {
			continue
		}
		if _, err := q.Call.Wait(); err != nil {
			return 0, err
		}
	}
}
