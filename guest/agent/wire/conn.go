package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"gvm/panics"
)

// ErrClosed is the error of a Write to a stream whose receiver takes no more, and of a Read or
// Write after the stream's own Close.
var ErrClosed = errors.New("the stream is closed")

const (
	stdin = iota
	stdout
	stderr
	streams
)

var streamNames = [streams]string{"stdin", "stdout", "stderr"}

// conn is either end. Only its reader goroutine reads rw, and it never writes: the two ends'
// readers could wait for each other otherwise.
type conn struct {
	rw     io.ReadWriteCloser
	frames *frameReader

	writeMu sync.Mutex // held while a frame is written
	out     []byte

	mu   sync.Mutex // guards the streams and the fields below
	cond sync.Cond  // something changed
	in   [streams]*receiver
	to   [streams]*sender
	err  error         // the connection's end
	gone chan struct{} // closed when err is set
}

func newConn(rw io.ReadWriteCloser) *conn {
	c := &conn{rw: rw, frames: newFrameReader(rw), gone: make(chan struct{})}
	c.cond.L = &c.mu
	return c
}

func (c *conn) receiver(i, window int) *receiver {
	window = min(max(window, 1), MaxWindow)
	c.in[i] = &receiver{c: c, stream: i, window: window, credit: window}
	return c.in[i]
}

func (c *conn) sender(i int) *sender {
	c.to[i] = &sender{c: c, stream: i}
	return c.to[i]
}

// start starts the reader, which gives the frames that belong to no stream to other, and announces
// the receivers' windows.
func (c *conn) start(other func(frame) error) error {
	panics.Go(func() {
		err := errors.New("the reader of frames panicked")
		defer func() { c.end(err) }()
		err = c.read(other)
	})
	for _, r := range c.in {
		if r != nil {
			if err := c.window(r.stream, r.window); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *conn) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.gone)
		c.cond.Broadcast()
	}
}

func (c *conn) read(other func(frame) error) error {
	for {
		f, err := c.frames.next()
		if err != nil {
			return unexpected(err)
		}
		switch f.typ {
		case frameData, frameWindow, frameClose, frameStop:
			err = c.streamFrame(f)
		default:
			err = other(f)
		}
		if err != nil {
			return err
		}
	}
}

func (c *conn) streamFrame(f frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.cond.Broadcast()
	if f.stream >= streams {
		return fmt.Errorf("frame %d of stream %d: there are %d", f.typ, f.stream, streams)
	}
	in, to := c.in[f.stream], c.to[f.stream]
	name := streamNames[f.stream]
	switch {
	case in != nil && f.typ == frameData:
		if in.eof || len(f.payload) > in.credit {
			return fmt.Errorf("%d bytes of %s: there is room for %d", len(f.payload), name, in.credit)
		}
		in.credit -= len(f.payload)
		if !in.closed {
			in.data.Write(f.payload)
		}
	case in != nil && f.typ == frameClose:
		in.eof = true
	case to != nil && f.typ == frameWindow && len(f.payload) == 4:
		n := binary.LittleEndian.Uint32(f.payload)
		if n > MaxWindow || to.credit+int(n) > MaxWindow {
			return fmt.Errorf("room for %d more bytes of %s: the limit is %d", n, name, MaxWindow)
		}
		to.credit += int(n)
	case to != nil && f.typ == frameStop:
		to.stopped = true
	default:
		return fmt.Errorf("frame %d of %d bytes is wrong for %s", f.typ, len(f.payload), name)
	}
	return nil
}

// endInputs ends all streams from the other end.
func (c *conn) endInputs() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.in {
		if r != nil {
			r.eof = true
		}
	}
	c.cond.Broadcast()
}

func (c *conn) write(typ frameType, stream int, payload ...byte) error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	c.out = appendFrame(c.out[:0], frame{typ, stream, payload})
	if _, err := c.rw.Write(c.out); err != nil {
		return fmt.Errorf("write to the other end: %w", err)
	}
	return nil
}

func (c *conn) window(stream, n int) error {
	return c.write(frameWindow, stream, binary.LittleEndian.AppendUint32(nil, uint32(n))...)
}

// close ends the connection: every Read, Write and Wait returns.
func (c *conn) close() error {
	c.end(ErrClosed)
	return c.rw.Close()
}

// receiver is the end of a stream that reads.
type receiver struct {
	c      *conn
	stream int
	window int

	// c.mu guards these.
	data   bytes.Buffer // at most window bytes
	credit int          // bytes that the sender may still send
	eof    bool         // the sender closed
	closed bool         // Close was called
}

// Read returns io.EOF after the sender's Close.
func (r *receiver) Read(p []byte) (int, error) {
	n, grant, err := r.take(p)
	if err == nil && grant > 0 {
		err = r.c.window(r.stream, grant)
		if n > 0 {
			err = nil // the connection's end is the next Read's error
		}
	}
	return n, err
}

func (r *receiver) take(p []byte) (n, grant int, _ error) {
	c := r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case r.closed:
			return 0, 0, ErrClosed
		case r.data.Len() > 0:
			n, _ = r.data.Read(p)
			// A window frame for each quarter: small reads do not make a frame each.
			if free := r.window - r.data.Len() - r.credit; !r.eof && c.err == nil && free >= max(r.window/4, 1) {
				grant = free
				r.credit += grant
			}
			return n, grant, nil
		case r.eof:
			return 0, 0, io.EOF
		case c.err != nil:
			return 0, 0, c.err
		case len(p) == 0:
			return 0, 0, nil
		}
		c.cond.Wait()
	}
}

// Close tells the sender that no more is taken.
func (r *receiver) Close() error {
	c := r.c
	c.mu.Lock()
	tell := !r.closed && !r.eof && c.err == nil
	r.closed = true
	r.data = bytes.Buffer{}
	c.cond.Broadcast()
	c.mu.Unlock()
	if tell {
		return c.write(frameStop, r.stream)
	}
	return nil
}

// sender is the end of a stream that writes.
type sender struct {
	c      *conn
	stream int

	order sync.Mutex // held by one Write or Close

	// c.mu guards these.
	credit  int
	stopped bool // the receiver takes no more
	closed  bool // Close was called
}

// Write waits for the receiver's room.
func (s *sender) Write(p []byte) (written int, _ error) {
	s.order.Lock()
	defer s.order.Unlock()
	for written < len(p) {
		n, err := s.reserve(min(len(p)-written, MaxPayload))
		if err != nil {
			return written, err
		}
		if err := s.c.write(frameData, s.stream, p[written:written+n]...); err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

// reserve waits for credit and takes up to most of it.
func (s *sender) reserve(most int) (int, error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case s.stopped || s.closed:
			return 0, ErrClosed
		case c.err != nil:
			return 0, c.err
		case s.credit > 0:
			n := min(s.credit, most)
			s.credit -= n
			return n, nil
		}
		c.cond.Wait()
	}
}

// Close ends the stream: the receiver reads all that was written, and then io.EOF.
func (s *sender) Close() error {
	c := s.c
	c.mu.Lock()
	tell := !s.closed && c.err == nil
	s.closed = true
	c.cond.Broadcast()
	c.mu.Unlock()
	if !tell {
		return nil
	}
	s.order.Lock() // after a Write that has reserved credit
	defer s.order.Unlock()
	return c.write(frameClose, s.stream)
}
