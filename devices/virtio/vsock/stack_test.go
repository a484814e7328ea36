package vsock

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// stack is the sockets of a guest. It is as a kernel's: connections in both directions, credit, and
// data that can be read after the end of its connection.
type stack struct {
	*rig
	txMu   sync.Mutex // held to send
	ending atomic.Bool
	done   chan struct{}

	mu        sync.Mutex
	sockets   map[key]*socket
	listeners map[uint32]chan *socket
}

type socket struct {
	s *stack
	key
	changed *sync.Cond // of stack.mu, which guards what follows

	established, reset bool
	in                 []byte
	alloc              uint32
	rxCnt, fwdCnt      uint32
	txCnt              uint32
	peerAlloc, peerFwd uint32
	shut, peerShut     uint32
}

func newStack(r *rig) *stack {
	s := &stack{rig: r, done: make(chan struct{}), sockets: map[key]*socket{}, listeners: map[uint32]chan *socket{}}
	go s.run()
	return s
}

// run takes packets until end.
func (s *stack) run() {
	defer close(s.done)
	d := s.q[rxQueue]
	for {
		if head, n, ok := d.Used(); ok {
			h, data := s.take(head, n)
			s.packet(h, data)
		} else if !d.EnableCalls() {
			if _, err := d.Call.Wait(); err != nil || s.ending.Load() {
				return
			}
		}
	}
}

func (s *stack) end() {
	s.ending.Store(true)
	_ = s.q[rxQueue].Call.Signal()
	<-s.done
}

func (s *stack) sendNow(h header, data ...byte) {
	s.txMu.Lock()
	defer s.txMu.Unlock()
	s.send(h, data...)
}

func (s *stack) packet(h header, data []byte) {
	s.mu.Lock()
	reply, replies := s.handle(h, data)
	s.mu.Unlock()
	if replies {
		s.sendNow(reply)
	}
}

// handle handles a packet. The caller holds mu.
func (s *stack) handle(h header, data []byte) (reply header, replies bool) {
	k := key{h.dstPort, h.srcPort}
	reply = header{op: opRST, srcPort: k.guestPort, dstPort: k.hostPort}
	so := s.sockets[k]
	switch {
	case so == nil && h.op == opRequest && s.listeners[k.guestPort] != nil:
		so = s.add(k, 10_000)
		so.established, so.peerAlloc = true, h.bufAlloc
		s.listeners[k.guestPort] <- so
		return so.header(opResponse), true
	case so == nil:
		return reply, h.op != opRST
	}
	defer so.changed.Broadcast()
	so.peerAlloc, so.peerFwd = h.bufAlloc, h.fwdCnt
	switch h.op {
	case opResponse:
		so.established = true
	case opRW:
		so.rxCnt += h.len
		so.in = append(so.in, data...)
		if uint32(len(so.in)) > so.alloc || so.peerShut&shutSend != 0 {
			s.t.Errorf("%d bytes, %d at a time, %v: more than the credit of %d", so.rxCnt, len(so.in), so.peerShut, so.alloc)
		}
	case opShutdown:
		if so.peerShut |= h.flags; so.peerShut == shutBoth {
			delete(s.sockets, k)
			so.reset = true
			return reply, true
		}
	case opRST:
		delete(s.sockets, k)
		so.reset = true
	case opCreditUpdate:
	default:
		s.t.Errorf("%+v", h)
	}
	return reply, false
}

func (s *stack) add(k key, alloc uint32) *socket {
	so := &socket{s: s, key: k, changed: sync.NewCond(&s.mu), alloc: alloc}
	s.sockets[k] = so
	return so
}

func (so *socket) header(op uint16) header {
	return header{op: op, srcPort: so.guestPort, dstPort: so.hostPort, bufAlloc: so.alloc, fwdCnt: so.fwdCnt}
}

// connect connects to the host.
func (s *stack) connect(k key, alloc uint32) *socket {
	s.mu.Lock()
	so := s.add(k, alloc)
	h := so.header(opRequest)
	s.mu.Unlock()
	s.sendNow(h)
	s.mu.Lock()
	defer s.mu.Unlock()
	for !so.established && !so.reset {
		so.changed.Wait()
	}
	return so
}

func (so *socket) Write(p []byte) (n int, err error) {
	for n < len(p) {
		so.s.mu.Lock()
		free := 0
		for {
			if so.reset || so.peerShut&shutReceive != 0 || so.shut&shutSend != 0 {
				so.s.mu.Unlock()
				return n, syscall.EPIPE
			}
			if free = int(so.peerAlloc) - int(so.txCnt-so.peerFwd); free > 0 {
				break
			}
			so.changed.Wait()
		}
		k := min(free, len(p)-n, maxPacket)
		so.txCnt += uint32(k)
		h := so.header(opRW)
		so.s.mu.Unlock()
		so.s.sendNow(h, p[n:n+k]...)
		n += k
	}
	return n, nil
}

func (so *socket) Read(p []byte) (n int, err error) {
	so.s.mu.Lock()
	for len(so.in) == 0 {
		if so.reset || so.peerShut&shutSend != 0 {
			so.s.mu.Unlock()
			return 0, io.EOF
		}
		so.changed.Wait()
	}
	n = copy(p, so.in)
	so.in = so.in[n:]
	so.fwdCnt += uint32(n)
	h, reset := so.header(opCreditUpdate), so.reset
	so.s.mu.Unlock()
	if !reset {
		so.s.sendNow(h) // perhaps after one with a newer count
	}
	return n, nil
}

func (so *socket) shutdown(flags uint32) {
	so.s.mu.Lock()
	so.shut |= flags
	h := so.header(opShutdown)
	h.flags = so.shut
	reset := so.reset
	so.s.mu.Unlock()
	if !reset {
		so.s.sendNow(h)
	}
}

// kill resets the connection.
func (so *socket) kill() {
	so.s.mu.Lock()
	delete(so.s.sockets, so.key)
	so.reset = true
	so.changed.Broadcast()
	h := so.header(opRST)
	so.s.mu.Unlock()
	so.s.sendNow(h)
}

// side is one end of a transfer.
type side interface {
	io.ReadWriter
	finish() // no more data follows
	close()
}

type hostSide struct{ *Conn }

func (h hostSide) finish() { h.CloseWrite() }
func (h hostSide) close()  { h.Close() }

type guestSide struct{ *socket }

func (g guestSide) finish() { g.shutdown(shutSend) }
func (g guestSide) close()  { g.shutdown(shutBoth) }

// content returns the bytes that a side sends.
func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	var s [32]byte
	s[0], s[1] = byte(seed), byte(seed>>8)
	rand.NewChaCha8(s).Read(b)
	return b
}

// move sends out and receives in. A side that quits closes when it has sent and received half.
func move(a side, out []byte, in int, quits bool) (got []byte, err error) {
	if quits {
		out, in = out[:len(out)/2], in/2
	}
	var writer sync.WaitGroup
	var failed error
	writer.Go(func() {
		for len(out) > 0 && failed == nil {
			n := min(len(out), 1+len(out)*7%9001)
			_, failed = a.Write(out[:n])
			out = out[n:]
		}
		if failed == nil && !quits {
			a.finish()
		}
	})
	got = make([]byte, in+1)
	if quits {
		got = got[:in]
	}
	n, err := io.ReadFull(a, got)
	if quits {
		a.close() // which ends the writer, if it waits
	}
	writer.Wait()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		err = nil
	}
	switch {
	case errors.Is(failed, syscall.EPIPE), errors.Is(failed, syscall.ECONNRESET), errors.Is(failed, net.ErrClosed):
		failed = nil
	}
	return got[:n], errors.Join(err, failed)
}

// TestTransfers moves random data both ways over many connections at a time, made by either side.
// Some end early, by the program, by the guest or by a reset, and the device is stopped and
// continued all the while. A side gets the other's bytes, from its beginning and in order; all of
// it if no side ends early.
func TestTransfers(t *testing.T) {
	const streams, each = 12, 6
	s := newStack(newRig(t, 50))
	accepted := map[uint32]chan *Conn{}
	for port := range uint32(streams) {
		accepted[2000+port] = make(chan *Conn, 1)
		s.listeners[3000+port] = make(chan *socket, 1)
	}
	s.dev.cfg.Accept = func(port uint32, c *Conn) bool {
		accepted[port] <- c
		return true
	}
	var ends [4]atomic.Int64
	transfer := func(id int, random *rand.Rand) error {
		stream := uint32(id / each)
		var h *Conn
		var g *socket
		if random.IntN(2) == 0 {
			g = s.connect(key{uint32(10_000 + id), 2000 + stream}, 1+random.Uint32N(100_000))
			h = <-accepted[2000+stream]
		} else {
			var err error
			if h, err = s.dev.Dial(t.Context(), 3000+stream); err != nil {
				return err
			}
			g = <-s.listeners[3000+stream]
		}
		toGuest := content(uint64(2*id), random.IntN(400_000))
		toHost := content(uint64(2*id+1), random.IntN(400_000))
		const clean, hostQuits, guestQuits, kills = 0, 1, 2, 3
		end := random.IntN(4)
		ends[end].Add(1)
		if end == kills {
			timer := time.AfterFunc(time.Duration(random.IntN(3000))*time.Microsecond, g.kill)
			defer timer.Stop()
		}
		var gotHost, gotGuest []byte
		var errs [2]error
		var sides sync.WaitGroup
		sides.Go(func() { gotHost, errs[0] = move(hostSide{h}, toGuest, len(toHost), end == hostQuits) })
		sides.Go(func() { gotGuest, errs[1] = move(guestSide{g}, toHost, len(toGuest), end == guestQuits) })
		sides.Wait()
		g.shutdown(shutBoth)
		h.Close()
		if !bytes.HasPrefix(toHost, gotHost) || !bytes.HasPrefix(toGuest, gotGuest) ||
			end == clean && (len(gotHost) != len(toHost) || len(gotGuest) != len(toGuest)) {
			return fmt.Errorf("end %d: host got %d of %d, guest %d of %d", end,
				len(gotHost), len(toHost), len(gotGuest), len(toGuest))
		}
		return errors.Join(errs[:]...)
	}
	var programs sync.WaitGroup
	for stream := range streams {
		programs.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(stream)))
			for i := range each {
				if err := transfer(stream*each+i, random); err != nil {
					t.Errorf("stream %d, transfer %d: %v", stream, i, err)
				}
			}
		})
	}
	over, stops := make(chan struct{}), 0
	go func() {
		programs.Wait()
		close(over)
	}()
	for done := false; !done; stops++ {
		select {
		case <-over:
			done = true
		case <-time.After(time.Millisecond):
			s.rig.stop()
			s.activate()
		}
	}
	for held := 1; held > 0; { // the last packets of the ends
		s.dev.mu.Lock()
		held = s.dev.held
		s.dev.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	s.end()
	s.empty()
	t.Logf("%d clean, %d ended by the program, %d by the guest, %d reset; %d stops",
		ends[0].Load(), ends[1].Load(), ends[2].Load(), ends[3].Load(), stops)
}
