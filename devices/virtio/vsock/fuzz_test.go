package vsock

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
)

// flow is a connection as the driver sees it.
type flow struct {
	live   bool
	tx, rx virtiotest.Counting // from the guest, and to it
	got    uint64              // bytes to the guest
	limit  uint64              // how many of those the guest has said it has space for, at most
}

// user is the program's side of a connection.
type user struct {
	*Conn
	in, out virtiotest.Counting
	writing atomic.Bool
}

// fuzzer is one run of FuzzPackets.
type fuzzer struct {
	*rig
	ctx      context.Context
	flows    map[key]*flow
	dials    int
	programs sync.WaitGroup

	mu    sync.Mutex
	users []*user // those that are not closed
	held  []*Conn // those that Accept held
}

// accept takes connections, and holds those to port 1026.
func (f *fuzzer) accept(port uint32, c *Conn) bool {
	switch {
	case port <= 1000:
		return false
	case port == 1026:
		c.Hold()
		f.mu.Lock()
		defer f.mu.Unlock()
		f.held = append(f.held, c)
	default:
		f.use(c)
	}
	return true
}

// answer accepts or refuses the oldest connection that is held.
func (f *fuzzer) answer(accept bool) {
	f.mu.Lock()
	if len(f.held) == 0 {
		f.mu.Unlock()
		return
	}
	c := f.held[0]
	f.held = f.held[1:]
	f.mu.Unlock()
	if !accept || c.Accept() != nil {
		c.Close()
		return
	}
	f.use(c)
}

func (f *fuzzer) use(c *Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.users = append(f.users, &user{Conn: c})
}

func (f *fuzzer) flow(k key) *flow {
	if f.flows[k] == nil {
		f.flows[k] = new(flow)
	}
	return f.flows[k]
}

// step has the guest or the program do something.
func (f *fuzzer) step(op []byte) {
	n := int(op[3])<<8 | int(op[4])
	var u *user
	f.mu.Lock()
	if len(f.users) > 0 {
		u = f.users[int(op[1])%len(f.users)]
	}
	f.mu.Unlock()
	switch action := op[0] % 16; {
	case action < 7:
		f.packet(op, n)
	case action == 7:
		f.garbage(op)
	case action == 8:
		if len(f.rxAt) < 100 {
			f.addBuffer(f.q[rxQueue].Alloc(headerLen + rxData))
		}
	case action == 9:
		f.stop()
		f.activate()
	case action == 10 && op[1] > 200:
		f.dev.TransportReset()
		clear(f.flows)
	case action == 10:
		f.dial(uint32(op[1] % 4))
	case action == 13 && n%4 == 2:
		f.answer(n%8 == 2)
	case u == nil:
	case action <= 12:
		f.write(u, n%20_000)
	case action == 13 && n%4 == 0:
		u.Close()
		f.mu.Lock()
		f.users = slices.DeleteFunc(f.users, func(o *user) bool { return o == u })
		f.mu.Unlock()
	case action == 13 && n%4 == 3:
		u.CloseRead()
	case action == 13:
		u.CloseWrite()
	default:
		f.read(u, n)
	}
}

// packet sends a packet with a whole header, most of whose fields make sense.
func (f *fuzzer) packet(op []byte, n int) {
	k := key{uint32(op[1] % 4), []uint32{1024, 1025, 1026, 999, firstPort, firstPort + 1, firstPort + 2}[op[1]/4%7]}
	h := header{srcPort: k.guestPort, dstPort: k.hostPort, op: uint16(op[2] % 9), flags: uint32(op[5]),
		bufAlloc: uint32(n) << (op[5] % 17), fwdCnt: uint32(f.flow(k).got)}
	if op[0]&0x80 != 0 {
		h.op = opRW
	}
	if op[0]&0x40 != 0 {
		h.bufAlloc = 8192
	}
	switch op[6] {
	case 1:
		h.fwdCnt += uint32(int8(op[7]))
	case 2:
		h.fwdCnt = uint32(n) << op[7] % 32
	case 3:
		h.kind = uint16(op[7])
	case 4:
		h.dstCID = uint64(op[7])
	case 5:
		h.srcCID = uint64(op[7])
	}
	ours := h.kind <= typeStream && (h.dstCID == 0 || h.dstCID == hostCID) && (h.srcCID == 0 || h.srcCID == guestCID)
	if fl := f.flow(k); ours && uint64(h.fwdCnt) <= fl.got {
		fl.limit = max(fl.limit, uint64(h.fwdCnt)+uint64(min(h.bufAlloc, maxPeerAlloc)))
	}
	var data []byte
	switch {
	case h.op == opRW && ours:
		data = f.flow(k).tx.Fill(make([]byte, n))
	case h.op == opRequest && ours:
		f.dev.mu.Lock()
		if f.dev.conns[k] == nil {
			*f.flow(k) = flow{live: true, limit: uint64(min(h.bufAlloc, maxPeerAlloc))}
			h.fwdCnt = 0
		}
		f.dev.mu.Unlock()
	}
	if op[6] == 6 && data == nil {
		data = make([]byte, n%100)
	}
	f.send(h, data...)
	if h.op == opRST && ours {
		f.check()
		f.flow(k).live = false
	}
}

// garbage sends any chain.
func (f *fuzzer) garbage(op []byte) {
	d := f.q[op[1]%3]
	if d.Free() < 2 {
		return
	}
	copy(d.Bytes(f.txAt, 8), op)
	d.Add(virtqtest.Seg{Addr: f.txAt, Len: uint32(op[2]), Write: op[3]&1 != 0},
		virtqtest.Seg{Addr: f.txAt, Len: uint32(op[4]), Write: op[3]&3 != 0})
	if _, err := d.Publish(); err != nil {
		f.t.Fatal(err)
	}
	if err := f.dev.workers[op[1]%3].Barrier(); err != nil {
		f.t.Fatal(err)
	}
	if op[1]%3 != rxQueue || len(f.broken) > 0 {
		d.Used()
		return
	}
	f.broken <- nil // a buffer that check does not know
}

func (f *fuzzer) dial(port uint32) {
	if f.dials++; f.dials > 8 {
		return
	}
	last := f.lastPort()
	f.programs.Go(func() {
		if c, err := f.dev.Dial(f.ctx, port); err == nil {
			f.use(c)
		}
	})
	for f.lastPort() == last { // it has not begun
		runtime.Gosched()
	}
}

func (f *fuzzer) lastPort() uint32 {
	f.dev.mu.Lock()
	defer f.dev.mu.Unlock()
	return f.dev.lastPort
}

// write has u write n bytes, and returns when they are written, or the Write waits.
func (f *fuzzer) write(u *user, n int) {
	if u.writing.Swap(true) {
		return
	}
	data := u.out.Fill(make([]byte, n))
	f.programs.Go(func() {
		u.Write(data)
		u.writing.Store(false)
	})
	for waits := false; !waits && u.writing.Load(); {
		runtime.Gosched()
		f.dev.mu.Lock()
		waits = u.Conn.writing
		f.dev.mu.Unlock()
	}
}

// read has u read all that is there.
func (f *fuzzer) read(u *user, n int) {
	f.dev.mu.Lock()
	there := u.Conn.in.n
	f.dev.mu.Unlock()
	if there == 0 {
		return
	}
	b := make([]byte, n+1)
	n, err := u.Read(b)
	if err != nil || n != min(there, len(b)) {
		f.t.Fatalf("read %d of %d bytes: %v", n, there, err)
	}
	if err := u.in.Check(b[:n]); err != nil {
		f.t.Fatalf("from the guest: %v", err)
	}
}

// check checks the bytes that came, and the device's memory.
func (f *fuzzer) check() {
	for {
		// take makes the buffer available again, which lets the device send the next packet.
		if err := f.dev.workers[rxQueue].Barrier(); err != nil {
			f.t.Fatal(err)
		}
		head, n, ok := f.q[rxQueue].Used()
		if !ok {
			break
		}
		h, data := f.take(head, n)
		k := key{h.dstPort, h.srcPort}
		fl := f.flow(k)
		switch h.op {
		case opRequest:
			*fl = flow{live: true}
		case opRW:
			if fl.got += uint64(len(data)); !fl.live || len(data) == 0 || fl.got > fl.limit {
				f.t.Fatalf("%d bytes: %+v", len(data), fl)
			}
			if err := fl.rx.Check(data); err != nil {
				f.t.Fatalf("to the guest: %v", err)
			}
		}
	}
	d := f.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	promised := 0
	for k, c := range d.conns {
		promised += int(c.bufAlloc)
		if c.key != k || !c.open || c.in.n > int(c.bufAlloc) || len(c.in.buf) > int(c.bufAlloc) ||
			uint32(c.in.n) != c.rxCnt-c.fwdCnt || c.waiting != slices.Contains(d.ready, c) {
			f.t.Fatalf("%+v", c)
		}
	}
	if len(d.ready) > len(d.conns) || len(d.rsts) > maxRSTs || len(d.conns) > d.held || promised > d.promised {
		f.t.Fatalf("%d ready, %d RSTs, %d connections of %d held, %d bytes of %d promised",
			len(d.ready), len(d.rsts), len(d.conns), d.held, promised, d.promised)
	}
	if len(d.rx) > 0 && len(d.rsts)+len(d.ready) > 0 {
		f.t.Fatalf("%d buffers for %d RSTs and %d connections", len(d.rx), len(d.rsts), len(d.ready))
	}
}

// FuzzPackets has a guest that does anything, and a program that uses its connections. Bytes come
// in their order and once, the guest's credit is never exceeded, the device's memory is bounded,
// and nothing is left at the end.
func FuzzPackets(f *testing.F) {
	const (
		request = "\x40\x00\x01\x20\x00\x00\x00\x00"
		data    = "\x80\x00\x05\x10\x00\x00\x00\x00"
		update  = "\x40\x00\x06\x00\x00\x00\x00\x00"
		reset   = "\x00\x00\x03\x00\x00\x00\x00\x00"
		buffer  = "\x08\x00\x00\x00\x00\x00\x00\x00"
		write   = "\x0b\x00\x00\x30\x00\x00\x00\x00"
		read    = "\x0e\x00\x00\x08\x00\x00\x00\x00"
		end     = "\x0d\x00\x00\x00\x01\x00\x00\x00" // CloseWrite
		close   = "\x0d\x00\x00\x00\x00\x00\x00\x00"
		stop    = "\x09\x00\x00\x00\x00\x00\x00\x00"
		dial    = "\x0a\x01\x00\x00\x00\x00\x00\x00"
		answer  = "\x40\x11\x02\x00\x00\x00\x00\x00"
		deaf    = "\x0d\x00\x00\x00\x03\x00\x00\x00" // CloseRead
		held    = "\x40\x08\x01\x20\x00\x00\x00\x00" // a request to port 1026
		early   = "\x80\x08\x05\x10\x00\x00\x00\x00" // data for it
		accept  = "\x0d\x00\x00\x00\x02\x00\x00\x00"
		refuse  = "\x0d\x00\x00\x00\x06\x00\x00\x00"
	)
	for _, s := range []string{
		request + buffer + data + read + write + buffer + update + stop + buffer + buffer + update,
		request + write + buffer + buffer + buffer + close + reset,
		request + data + close + buffer + buffer + data,
		dial + buffer + answer + write + buffer + "\x0a\xff\x00\x00\x00\x00\x00\x00",
		request + data + data + data + data + "\x80\x00\x05\xff\xff\x00\x00\x00" + data +
			"\x00\x00\x04\x00\x00\x03\x00\x00" + read,
		request + "\x07\x01\x2c\x00\x10\x00\x00\x00" + buffer + "\x07\x01\x01\x00\x10\x00\x00\x00",
		buffer + buffer + request + end + "\x00\x00\x01\x00\x00\x00\x04\x09" + "\x00\x00\x01\x00\x00\x00\x03\x02",
		request + data + deaf + data + buffer + buffer + write + close,
		held + buffer + accept + buffer + early + read + write,
		held + held + refuse + buffer + held + stop + accept,
		held + early + buffer + accept + buffer,
		dial + answer + buffer + write, // the answer comes before the request
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		ctx, cancel := context.WithCancel(t.Context())
		r := &fuzzer{rig: newRig(t, 0), ctx: ctx, flows: map[key]*flow{}}
		r.dev.cfg.Accept = r.accept
		for ops = ops[:min(len(ops), 8*100)]; len(ops) >= 8; ops = ops[8:] {
			r.step(ops[:8])
			if len(r.broken) > 0 {
				break
			}
			r.check()
		}
		cancel()
		if err := r.dev.Reset(); err != nil {
			t.Fatal(err)
		}
		r.programs.Wait()
		for _, u := range r.users {
			u.Close()
		}
		for _, c := range r.held {
			c.Close()
		}
		r.empty()
	})
}
