package vsock

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
	"gvm/inspect"
)

func TestConfig(t *testing.T) {
	for cid, want := range map[uint64]string{
		0: "\x03\x00\x00\x00\x00\x00\x00\x00", 7: "\x07\x00\x00\x00\x00\x00\x00\x00", 1: "!", 2: "!",
		1<<32 - 2: "\xfe\xff\xff\xff\x00\x00\x00\x00", 1<<32 - 1: "!", 1 << 32: "!",
	} {
		d, err := New(Config{CID: cid})
		if err != nil {
			if want != "!" || !strings.Contains(err.Error(), "is reserved: want 3 to 4294967294") {
				t.Errorf("CID %d: %v", cid, err)
			}
			continue
		}
		if got := string(d.Config()); got != want || d.ID() != 19 || len(d.QueueSizes()) != 3 {
			t.Errorf("CID %d: %q", cid, got)
		}
	}
}

// TestGuestConnects: a stream in both directions, ended by the guest and then by the program.
func TestGuestConnects(t *testing.T) {
	r := newRig(t, 8)
	c := r.connect(5000, 1024, 1<<16)
	r.send(header{op: opRW, srcPort: 5000, dstPort: 1024, bufAlloc: 1 << 16}, []byte("hello, ")...)
	r.send(header{op: opRW, srcPort: 5000, dstPort: 1024, bufAlloc: 1 << 16}, []byte("host")...)
	r.send(header{op: opShutdown, flags: shutSend, srcPort: 5000, dstPort: 1024, bufAlloc: 1 << 16})
	if got := readAll(t, c); got != "hello, host" {
		t.Errorf("%q", got)
	}
	if n, err := c.Write([]byte("hello, guest")); n != 12 || err != nil {
		t.Fatal(n, err)
	}
	if h, got := r.expect(opRW, 5000, 1024); string(got) != "hello, guest" || h.fwdCnt != 11 {
		t.Errorf("%q, %+v", got, h)
	}
	r.quiet()
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if h, _ := r.expect(opShutdown, 5000, 1024); h.flags != shutSend {
		t.Errorf("%+v", h)
	}
	if _, err := c.Write([]byte("more")); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if h, _ := r.expect(opShutdown, 5000, 1024); h.flags != shutBoth {
		t.Errorf("%+v", h)
	}
	r.send(header{op: opRST, srcPort: 5000, dstPort: 1024})
	r.quiet()
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	r.empty()
}

// empty checks that the device keeps nothing.
func (r *rig) empty() {
	r.t.Helper()
	r.dev.mu.Lock()
	defer r.dev.mu.Unlock()
	if d := r.dev; len(d.conns) > 0 || d.held != 0 || d.promised != 0 || len(d.ready) > 0 || len(d.rsts) > 0 {
		r.t.Errorf("%d connections, %d held, %d promised, %d ready, %d RSTs",
			len(d.conns), d.held, d.promised, len(d.ready), len(d.rsts))
	}
}

// TestGuestCloses: a guest that closes gets its RST at once; its bytes can still be read.
func TestGuestCloses(t *testing.T) {
	r := newRig(t, 8)
	c := r.connect(5000, 1024, 1<<16)
	r.send(header{op: opRW, srcPort: 5000, dstPort: 1024, bufAlloc: 1 << 16}, []byte("last words")...)
	r.send(header{op: opShutdown, flags: shutReceive, srcPort: 5000, dstPort: 1024, bufAlloc: 1 << 16})
	r.quiet()
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Error(err)
	}
	r.send(header{op: opShutdown, flags: shutSend, srcPort: 5000, dstPort: 1024, bufAlloc: 1 << 16})
	r.expect(opRST, 5000, 1024)
	if got := readAll(t, c); got != "last words" {
		t.Errorf("%q", got)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	r.empty()
}

// TestHostConnects: a connection to the guest, accepted, refused, and given up.
func TestHostConnects(t *testing.T) {
	r := newRig(t, 8)
	dial := func(ctx context.Context) (got chan *Conn, failed chan error) {
		got, failed = make(chan *Conn, 1), make(chan error, 1)
		go func() {
			c, err := r.dev.Dial(ctx, 22)
			got <- c
			failed <- err
		}()
		return got, failed
	}
	got, _ := dial(t.Context())
	h, _ := r.expect(opRequest, 22, firstPort)
	r.send(header{op: opResponse, srcPort: 22, dstPort: h.srcPort, bufAlloc: 100})
	c := <-got
	if n, err := c.Write([]byte("SSH")); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	r.expect(opRW, 22, h.srcPort)

	_, failed := dial(t.Context())
	r.expect(opRequest, 22, firstPort+1)
	r.send(header{op: opRST, srcPort: 22, dstPort: firstPort + 1})
	if err := <-failed; !errors.Is(err, syscall.ECONNREFUSED) ||
		err.Error() != "dial vsock port 22 of the guest: connection refused" {
		t.Error(err)
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	_, failed = dial(ctx)
	r.expect(opRequest, 22, firstPort+2)
	tired := errors.New("tired of it")
	cancel(tired)
	if err := <-failed; !errors.Is(err, tired) {
		t.Error(err)
	}
	r.send(header{op: opResponse, srcPort: 22, dstPort: firstPort + 2})
	r.expect(opRST, 22, firstPort+2)

	_, failed = dial(t.Context())
	r.expect(opRequest, 22, firstPort+3)
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errors.Is(err, ErrNoDriver) {
		t.Error(err)
	}
	if _, err := r.dev.Dial(t.Context(), 22); !errors.Is(err, ErrNoDriver) {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != syscall.ECONNRESET {
		t.Error(err)
	}
	c.Close()
	r.empty()
}

// TestRefused: packets that belong to no connection, and connections that cannot be, get an RST.
func TestRefused(t *testing.T) {
	r := newRig(t, 8)
	for name, h := range map[string]header{
		"a refused port":   {op: opRequest, dstPort: 999},
		"no connection":    {op: opRW, dstPort: 1024},
		"its shutdown":     {op: opShutdown, dstPort: 1024},
		"another response": {op: opResponse, dstPort: 1024},
		"no operation":     {op: opInvalid, dstPort: 1024},
		"an unknown one":   {op: 8, dstPort: 1024},
		"another CID":      {op: opRequest, dstPort: 1024, dstCID: 4},
		"a long CID":       {op: opRequest, dstPort: 1024, dstCID: 1<<32 | hostCID},
		"seqpacket":        {op: opRequest, dstPort: 1024, kind: 2},
		"an unknown type":  {op: opRequest, dstPort: 1024, kind: 0xffff},
		"bytes counted":    {op: opRequest, dstPort: 1024, fwdCnt: 1},
	} {
		t.Run(name, func(t *testing.T) {
			r.t = t
			h.srcPort = 77
			r.send(h)
			want := header{srcCID: max(h.dstCID, hostCID), dstCID: guestCID, srcPort: h.dstPort, dstPort: 77,
				kind: max(h.kind, typeStream), op: opRST}
			if got, _ := r.receive(); got != want {
				t.Errorf("%+v, want %+v", got, want)
			}
			h.op = opRST
			r.send(h)
			r.quiet()
			r.empty()
		})
	}
	r.t = t
	r.send(header{op: opRequest, srcCID: 4, srcPort: 77, dstPort: 1024})
	r.quiet()
	r.empty()
}

// TestImpliedStream: a driver that accepts neither stream sockets nor that they are not implied has
// them.
func TestImpliedStream(t *testing.T) {
	for features, want := range map[uint64]uint16{
		0: opResponse, featureStream: opResponse, featureStream | featureNoImpliedStream: opResponse,
		featureNoImpliedStream: opRST,
	} {
		r := newRig(t, 0)
		if _, err := r.dev.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.a.Features = virtio.FeatureEventIdx | features
		r.activate()
		r.addBuffer(r.q[rxQueue].Alloc(headerLen + rxData))
		r.send(header{op: opRequest, srcPort: 1, dstPort: 1024})
		r.expect(want, 1, 1024)
	}
}

// TestMisbehaviour: a guest that does not keep to the protocol loses its connection.
func TestMisbehaviour(t *testing.T) {
	full := header{op: opRW, len: maxPacket}
	for name, packets := range map[string][]header{
		"more than buf_alloc":    {full, full, full, full, {op: opRW, len: 1}},
		"data after its end":     {{op: opShutdown, flags: shutSend}, {op: opRW, len: 1}},
		"a second request":       {{op: opRequest}},
		"a second response":      {{op: opResponse}},
		"no operation":           {{op: opInvalid}},
		"an unknown operation":   {{op: 900}},
		"bytes not sent":         {{op: opCreditUpdate, fwdCnt: 1}},
		"data in an update":      {{op: opCreditUpdate, len: 1}},
		"data in a request":      {{op: opCreditRequest, len: 1}},
		"data in an end":         {{op: opShutdown, flags: shutBoth, len: 1}},
		"bytes not sent in data": {{op: opRW, len: 1, fwdCnt: 1 << 30}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 8)
			c := r.connect(1, 1024, 1<<16)
			for _, h := range packets {
				r.quiet()
				h.srcPort, h.dstPort = 1, 1024
				r.send(h, make([]byte, h.len)...)
			}
			r.expect(opRST, 1, 1024)
			r.quiet()
			if _, err := c.Write(make([]byte, 1)); err != syscall.ECONNRESET {
				t.Error(err)
			}
			c.Close()
			r.empty()
		})
	}
}

// TestBroken: a driver that breaks the rules of the queues breaks the device.
func TestBroken(t *testing.T) {
	for name, tt := range map[string]struct {
		queue int
		segs  []virtqtest.Seg
	}{
		"packet of 43 bytes":                           {txQueue, []virtqtest.Seg{{Len: 43}}},
		"payload of 4294967295 bytes in buffers of 99": {txQueue, []virtqtest.Seg{{Len: 44}, {Len: 99}}},
		"device-writable buffer in the tx queue":       {txQueue, []virtqtest.Seg{{Len: 44}, {Len: 1, Write: true}}},
		"device-readable buffer in the rx queue":       {rxQueue, []virtqtest.Seg{{Len: 1}, {Len: 99, Write: true}}},
		"rx buffer of 44 bytes: no room for a header and data": {
			rxQueue, []virtqtest.Seg{{Len: 44, Write: true}}},
		"event buffer of 3 bytes": {eventQueue, []virtqtest.Seg{{Len: 3, Write: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 0)
			d := r.q[tt.queue]
			at := d.Alloc(1000)
			for i, b := range d.Bytes(at, 1000) {
				d.Bytes(at, 1000)[i] = b | 0xff
			}
			for i := range tt.segs {
				tt.segs[i].Addr = at
			}
			d.Add(tt.segs...)
			if _, err := d.Publish(); err != nil {
				t.Fatal(err)
			}
			if got := r.guestError(); got != name {
				t.Error(got)
			}
		})
	}
}

// TestWriteWaits: Write never sends more than the guest has space for, and goes on when it has
// more.
func TestWriteWaits(t *testing.T) {
	r := newRig(t, 8)
	c := r.connect(1, 1024, 5000)
	data := make([]byte, 10_000)
	for i := range data {
		data[i] = byte(i * 7 / 3)
	}
	done := make(chan error)
	go func() {
		n, err := c.Write(data)
		if n != len(data) && err == nil {
			err = io.ErrShortWrite
		}
		done <- err
	}()
	var got []byte
	next := func(want int) {
		t.Helper()
		_, b := r.expect(opRW, 1, 1024)
		if got = append(got, b...); len(b) != want {
			t.Fatalf("%d bytes, want %d", len(b), want)
		}
	}
	credit := func(fwd, alloc uint32) {
		r.send(header{op: opCreditUpdate, srcPort: 1, dstPort: 1024, bufAlloc: alloc, fwdCnt: fwd})
	}
	next(4096)
	next(904)
	r.quiet()
	credit(100, 5000)
	next(100)
	credit(0, 50_000) // an older count, and the state of that time
	credit(200, 4900) // the guest takes space back
	r.quiet()
	credit(200, 100)
	r.quiet()
	credit(5100, 1)
	next(1)
	credit(5101, 1<<32-1)
	next(4096)
	next(803)
	if err := <-done; err != nil || !bytes.Equal(got, data) {
		t.Error(err, len(got))
	}
	r.quiet()
}

// TestWrittenAtTheEnd: a Write whose last byte the guest has got does not fail because of anything
// the guest does then.
func TestWrittenAtTheEnd(t *testing.T) {
	r := newRig(t, 8)
	c := r.connect(1, 1024, 0)
	done := make(chan error)
	go func() {
		_, err := c.Write([]byte("bye"))
		done <- err
	}()
	for waits := false; !waits; runtime.Gosched() {
		r.dev.mu.Lock()
		if waits = c.writing; waits { // it learns of both packets at once
			c.receive(&header{op: opCreditUpdate, bufAlloc: 3}, nil)
			c.receive(&header{op: opShutdown, flags: shutBoth, bufAlloc: 3}, nil)
		}
		r.dev.mu.Unlock()
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := c.Write([]byte("x")); err != syscall.EPIPE {
		t.Error(err)
	}
}

// TestReadTells: the guest is told of space when it may need it, and when it asks.
func TestReadTells(t *testing.T) {
	r := newRig(t, 8)
	c := r.connect(1, 1024, 0)
	for range largeBuffer / maxPacket {
		r.send(header{op: opRW, srcPort: 1, dstPort: 1024}, make([]byte, maxPacket)...)
	}
	read := func(n int) {
		t.Helper()
		if k, err := io.ReadFull(c, make([]byte, n)); err != nil {
			t.Fatal(k, err)
		}
	}
	read(largeBuffer/2 - 1)
	r.quiet()
	r.send(header{op: opCreditRequest, srcPort: 1, dstPort: 1024})
	if h, _ := r.expect(opCreditUpdate, 1, 1024); h.fwdCnt != largeBuffer/2-1 || h.bufAlloc != largeBuffer {
		t.Errorf("%+v", h)
	}
	read(largeBuffer / 2)
	if h, _ := r.expect(opCreditUpdate, 1, 1024); h.fwdCnt != largeBuffer-1 {
		t.Errorf("%+v", h)
	}
	read(1)
	r.quiet()
}

// TestTransportReset: the driver is told, once, when it has a buffer for that.
func TestTransportReset(t *testing.T) {
	r := newRig(t, 8)
	c := r.connect(1, 1024, 0)
	r.dev.TransportReset()
	if _, err := c.Read(make([]byte, 1)); err != syscall.ECONNRESET {
		t.Error(err)
	}
	d := r.q[eventQueue]
	at := d.Alloc(8)
	copy(d.Bytes(at, 8), "\xff\xff\xff\xff\xff\xff\xff\xff")
	event := func() {
		t.Helper()
		d.Add(virtqtest.Seg{Addr: at, Len: 8, Write: true})
		if _, err := d.Publish(); err != nil {
			t.Fatal(err)
		}
	}
	wait := func() {
		t.Helper()
		if _, n, err := d.Wait(); n != 4 || err != nil || string(d.Bytes(at, 8)) != "\x00\x00\x00\x00\xff\xff\xff\xff" {
			t.Fatal(n, err, d.Bytes(at, 8))
		}
	}
	event()
	wait()
	event()
	if err := r.dev.workers[eventQueue].Barrier(); err != nil {
		t.Fatal(err)
	}
	if _, _, ok := d.Used(); ok {
		t.Fatal("an event of nothing")
	}
	r.dev.TransportReset()
	wait()
	c.Close()
	r.empty()
	// A driver that starts later has nothing to reset.
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	r.dev.TransportReset()
	if r.dev.resetDue {
		t.Error("a reset is due to no driver")
	}
}

// TestBounds: a guest cannot have the device keep more than its bounds.
func TestBounds(t *testing.T) {
	r := newRig(t, 0)
	for port := range uint32(maxConns + 1) {
		r.send(header{op: opRequest, srcPort: port, dstPort: 2000 + port})
	}
	large, small := uint64(0), uint64(0)
	for _, c := range r.dev.conns {
		switch c.bufAlloc {
		case largeBuffer:
			large++
		case smallBuffer:
			small++
		}
	}
	if large != 128 || small != maxConns-128 || len(r.dev.ready) != maxConns || len(r.dev.rsts) != 1 {
		t.Fatalf("%d and %d connections, %d ready, %d RSTs", large, small, len(r.dev.ready), len(r.dev.rsts))
	}
	if _, err := r.dev.Dial(t.Context(), 22); err == nil ||
		err.Error() != "dial vsock port 22 of the guest: 1024 connections are open" {
		t.Error(err)
	}
	// Connections that the guest resets wait for the program to close them, and nothing else.
	for port := range uint32(maxConns) {
		r.send(header{op: opRST, srcPort: port, dstPort: 2000 + port})
		r.send(header{op: opRequest, srcPort: port, dstPort: 2000 + port})
	}
	if d := r.dev; len(d.conns) != 0 || d.held != maxConns || len(d.ready) != 0 || len(d.rsts) != maxRSTs ||
		d.droppedRSTs != 1 {
		t.Errorf("%d connections, %d held, %d ready, %d RSTs, %d dropped",
			len(d.conns), d.held, len(d.ready), len(d.rsts), d.droppedRSTs)
	}
	for _, c := range r.accepted {
		c.Close()
	}
	r.dev.TransportReset()
	r.empty()
	// Of connections that the program has closed, and the guest has not, some give way to new ones.
	for port := range uint32(2 * maxConns) {
		r.send(header{op: opRequest, srcPort: port, dstPort: 2000 + port})
		r.accepted[2000+port].Close()
	}
	if d := r.dev; len(d.conns) != maxConns || d.held != maxConns || len(d.rsts) != maxRSTs {
		t.Errorf("%d connections, %d held, %d RSTs", len(d.conns), d.held, len(d.rsts))
	}
	r.dev.TransportReset()
	r.empty()
}

// TestCloseEndsWaits: Close ends a Read and a Write, CloseWrite a Write, and so does a reset of the
// device.
func TestCloseEndsWaits(t *testing.T) {
	for name, tt := range map[string]struct {
		end         func(*rig, *Conn) error
		read, write error
	}{
		"Close":      {func(_ *rig, c *Conn) error { return c.Close() }, net.ErrClosed, net.ErrClosed},
		"CloseWrite": {func(_ *rig, c *Conn) error { return c.CloseWrite() }, nil, net.ErrClosed},
		"Reset":      {func(r *rig, _ *Conn) error { return r.dev.Reset() }, syscall.ECONNRESET, syscall.ECONNRESET},
		"the guest": {func(r *rig, _ *Conn) error {
			r.send(header{op: opShutdown, flags: shutBoth, srcPort: 1, dstPort: 1024})
			return nil
		}, io.EOF, syscall.EPIPE},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 8)
			c := r.connect(1, 1024, 2)
			read, wrote := make(chan error), make(chan error)
			go func() {
				_, err := c.Read(make([]byte, 1))
				read <- err
			}()
			for range 2 { // the second waits for the first
				go func() {
					_, err := c.Write(make([]byte, 3))
					wrote <- err
				}()
			}
			r.expect(opRW, 1, 1024) // so the first Write has begun
			if err := tt.end(r, c); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := <-wrote; err != tt.write {
					t.Errorf("Write: %v, want %v", err, tt.write)
				}
			}
			if tt.read == nil {
				r.send(header{op: opRW, srcPort: 1, dstPort: 1024}, 9)
			}
			if err := <-read; err != tt.read {
				t.Errorf("Read: %v, want %v", err, tt.read)
			}
		})
	}
}

func TestInspect(t *testing.T) {
	r := newRig(t, 8)
	c := r.connect(5000, 1024, 1<<16)
	r.send(header{op: opRW, srcPort: 5000, dstPort: 1024, bufAlloc: 1 << 16}, []byte("hello")...)
	c.Read(make([]byte, 2))
	nodes, queues := r.dev.Inspect()
	n := inspect.Group("", nodes...)
	for path, want := range map[string]any{
		"guest_cid": uint64(3), "connections": 1, "connection/1024-5000/state": "established",
		"connection/1024-5000/buffered": 3, "connection/1024-5000/fwd_cnt": uint32(2),
		"connection/1024-5000/rx_cnt": uint32(5), "connection/1024-5000/peer_buf_alloc": uint32(1 << 16),
		"tx_packets": uint64(2), "tx_bytes": uint64(5), "rx_packets": uint64(1),
	} {
		if got := n.Get(path); got != want {
			t.Errorf("%s is %v (%[2]T), want %v (%[3]T)", path, got, want)
		}
	}
	if len(queues) != 3 {
		t.Errorf("%d queues", len(queues))
	}
}
