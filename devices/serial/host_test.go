package serial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 ^ i>>8*13)
	}
	return b
}

// gate is an output that blocks until it is opened.
type gate struct {
	open chan struct{}
	bytes.Buffer
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	return g.Buffer.Write(p)
}

// fill sends until the transmitter has no room and returns the bytes sent.
func fill(u *UART) []byte {
	bytes, n := pattern(4*lineSize), 0
	for ; in(u, regLSR)&lsrTHRE != 0; n++ {
		u.Write(regRBR, bytes[n:n+1])
	}
	return bytes[:n]
}

func in(u *UART, reg uint64) byte {
	b := []byte{0}
	u.Read(reg, b)
	return b[0]
}

// TestOutputBlocked: THRE stays clear while the host takes no output, a byte written anyway waits,
// room raises the interrupt, and no byte is lost.
func TestOutputBlocked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &gate{open: make(chan struct{})}
		edges := make(chan struct{}, 1<<20)
		u := New(Config{Out: out, Raise: func() { edges <- struct{}{} }})
		u.Write(regIIR, []byte{0x01})
		u.Write(regMCR, []byte{0x0b})
		want := fill(u)
		for i := range 15 { // the FIFO has more room than THRE shows
			u.Write(regRBR, []byte{byte('a' + i)})
			want = append(want, byte('a'+i))
		}
		u.Write(regIER, []byte{0x02})
		if id := in(u, regIIR); id != 0xc1 || len(edges) != 0 {
			t.Errorf("transmitter full: IIR %#x, %d edges", id, len(edges))
		}
		written := make(chan struct{})
		go func() { // a vCPU that does not read LSR
			u.Write(regRBR, []byte("!"))
			close(written)
		}()
		synctest.Wait()
		select {
		case <-written:
			t.Error("a byte for a full transmitter does not wait")
		default:
		}
		close(out.open)
		<-written
		<-edges
		want = append(want, '!')
		if err := u.Close(); err != nil || !bytes.Equal(out.Bytes(), want) {
			t.Errorf("%d bytes out, want %d; %v", out.Len(), len(want), err)
		}
	})
}

// TestStop: Stop releases a waiting vCPU and input, and no byte sent is lost.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &gate{open: make(chan struct{})}
		u := New(Config{Out: out, Raise: func() {}})
		want := append(fill(u), "XY"...)
		var join sync.WaitGroup
		join.Go(func() {
			for _, b := range []byte("XY") {
				u.Write(regRBR, []byte{b})
			}
		})
		join.Go(func() {
			if n, err := u.Input().Write([]byte("unread")); n != 0 || !errors.Is(err, ErrStopped) {
				t.Errorf("input: %d, %v", n, err)
			}
		})
		synctest.Wait() // both wait
		u.Stop()
		join.Wait()
		if err := u.Input().Break(); !errors.Is(err, ErrStopped) {
			t.Errorf("break after stop: %v", err)
		}
		close(out.open)
		for range 2 {
			if err := u.Close(); err != nil || !bytes.Equal(out.Bytes(), want) {
				t.Errorf("%d bytes out, want %d; %v", out.Len(), len(want), err)
			}
		}
		u.Write(regRBR, []byte("z")) // must not wait, nor reach the output
		if !bytes.Equal(out.Bytes(), want) {
			t.Error("output after Close")
		}
	})
}

// TestResetKeepsOutput: output sent before the guest resets is written.
func TestResetKeepsOutput(t *testing.T) {
	out := &gate{open: make(chan struct{})}
	u := New(Config{Out: out, Raise: func() {}})
	u.Write(regIIR, []byte{0x01})
	want := append(fill(u), "last words"...)
	for _, b := range want[len(want)-10:] {
		u.Write(regRBR, []byte{b})
	}
	u.Reset()
	if lsr := in(u, regLSR); lsr != 0x60 {
		t.Errorf("LSR after reset %#x", lsr)
	}
	close(out.open)
	if err := u.Close(); err != nil || !bytes.Equal(out.Bytes(), want) {
		t.Errorf("%d bytes out, want %d; %v", out.Len(), len(want), err)
	}
}

// sink takes n bytes of each write, counts the writes, and fails with err.
type sink struct {
	n     int
	err   error
	calls int
}

func (s *sink) Write(p []byte) (int, error) {
	s.calls++
	return min(s.n, len(p)), s.err
}

func TestOutputError(t *testing.T) {
	broken := errors.New("broken pipe")
	for _, c := range []struct {
		name string
		out  sink
		want error
	}{
		{"error", sink{0, broken, 0}, broken},
		{"short write", sink{1, nil, 0}, io.ErrShortWrite},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := New(Config{Out: &c.out, Raise: func() {}})
			for range 3 * lineSize { // the guest does not wait
				u.Write(regRBR, []byte{'o'})
			}
			if err := u.Close(); !errors.Is(err, c.want) {
				t.Errorf("Close: %v, want %v", err, c.want)
			}
			if c.out.calls != 1 {
				t.Errorf("%d writes, want none after the first failed", c.out.calls)
			}
		})
	}
}

// TestInputWaitsForRTS: nothing is received before the guest asserts RTS, nor in loopback, so that
// a driver's start-up loses no input.
func TestInputWaitsForRTS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := New(Config{Out: io.Discard, Raise: func() {}})
		defer u.Close()
		var join sync.WaitGroup
		join.Go(func() {
			if n, err := io.WriteString(u.Input(), "early"); n != 5 || err != nil {
				t.Errorf("input: %d, %v", n, err)
			}
		})
		for _, mcr := range []byte{0x00, 0x09, 0x1b, 0x00} {
			u.Write(regMCR, []byte{mcr})
			if synctest.Wait(); in(u, regLSR)&lsrDR != 0 {
				t.Errorf("MCR %#x: input came", mcr)
			}
		}
		u.Write(regIIR, []byte{0x07})
		u.Write(regMCR, []byte{0x0b})
		join.Wait()
		var got []byte
		for in(u, regLSR)&lsrDR != 0 {
			got = append(got, in(u, regRBR))
		}
		if string(got) != "early" {
			t.Errorf("received %q", got)
		}
	})
}

// TestInputPolled: a driver that polls the receiver without RTS, like kgdb's, gets input one
// character at a time. Other uses of LSR take none, so that a driver's start-up loses no input, and
// the rest waits for the driver that sets RTS.
func TestInputPolled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := New(Config{Out: io.Discard, Raise: func() {}})
		defer u.Close()
		var join sync.WaitGroup
		join.Go(func() {
			if n, err := io.WriteString(u.Input(), "$?#3f and the rest"); n != 18 || err != nil {
				t.Errorf("input: %d, %v", n, err)
			}
		})
		lsr := func() byte {
			synctest.Wait()
			v := in(u, regLSR)
			if synctest.Wait(); len(u.rx) > 1 {
				t.Fatalf("%d characters in the receiver", len(u.rx))
			}
			return v
		}
		quiet := func(what string) {
			t.Helper()
			if lsr()&lsrDR != 0 {
				t.Errorf("%s: input came", what)
			}
		}
		print := func(n int) { // as consoles do: poll for an empty transmitter before and after each byte
			for range n {
				in(u, regIER)
				quiet("before a byte")
				u.Write(regRBR, []byte{'o'})
				quiet("after a byte")
				quiet("at the end of a line")
			}
		}
		get := func() byte { // poll_get_char until it has one
			for range 10 * pollsAlone {
				if lsr()&lsrDR != 0 {
					return in(u, regRBR)
				}
			}
			t.Fatal("polled in vain")
			return 0
		}
		u.Write(regMCR, []byte{0x01}) // a console's set-up asserts only DTR
		print(100)
		var got []byte
		for range 3 {
			got = append(got, get())
		}
		print(1) // an answer, and polling continues
		for range 2 {
			got = append(got, get())
		}
		print(100)
		u.Write(regIIR, []byte{0x07}) // a driver starts, and clears the receiver
		quiet("start-up")
		in(u, regRBR)
		u.Write(regMCR, []byte{0x1b}) // loopback disconnects the line
		for range 3 * pollsAlone {
			quiet("loopback")
		}
		u.Write(regMCR, []byte{0x0b})
		for synctest.Wait(); in(u, regLSR)&lsrDR != 0; synctest.Wait() {
			got = append(got, in(u, regRBR))
		}
		if join.Wait(); string(got) != "$?#3f and the rest" {
			t.Errorf("received %q", got)
		}
	})
}

// TestBreakPolled: a break reaches a polling driver, with its NUL, and keeps its place among the
// characters.
func TestBreakPolled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := New(Config{Out: io.Discard, Raise: func() {}})
		defer u.Close()
		var join sync.WaitGroup
		join.Go(func() {
			for _, err := range []error{write(u, "a"), u.Input().Break(), write(u, "g")} {
				if err != nil {
					t.Error(err)
				}
			}
		})
		for _, want := range []char{{'a', 0}, {0, lsrBI}, {'g', 0}} {
			var lsr byte
			for lsr&lsrDR == 0 {
				synctest.Wait()
				lsr = in(u, regLSR)
			}
			if got := (char{in(u, regRBR), lsr & lsrErrs}); got != want {
				t.Errorf("received %+v, want %+v", got, want)
			}
		}
		join.Wait()
	})
}

// TestSysRq: the break and the key stay together beside other input, and a receiver that takes
// nothing does not hold them.
func TestSysRq(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := New(Config{Out: io.Discard, Raise: func() {}})
		defer u.Close()
		late := errors.New("late")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, late)
		defer cancel()
		if err := u.Input().SysRq(ctx, 'b'); err != late {
			t.Errorf("without a driver: %v", err)
		}
		var join sync.WaitGroup
		join.Go(func() {
			if err := write(u, strings.Repeat("x", 3*fifoSize)); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait() // it waits for the driver
		behind, cancel := context.WithTimeoutCause(t.Context(), time.Second, late)
		defer cancel()
		if err := u.Input().SysRq(behind, 'b'); err != late {
			t.Errorf("behind other input: %v", err)
		}
		join.Go(func() {
			if err := u.Input().SysRq(t.Context(), 'w'); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		u.Write(regIIR, []byte{fcrEnable})
		u.Write(regMCR, []byte{mcrRTS})
		var got []char
		for len(got) < 3*fifoSize+2 {
			synctest.Wait()
			for lsr := in(u, regLSR); lsr&lsrDR != 0; lsr = in(u, regLSR) {
				got = append(got, char{in(u, regRBR), lsr & lsrErrs})
			}
		}
		join.Wait()
		if i := slices.Index(got, char{0, lsrBI}); i < 0 || got[i+1] != (char{'w', 0}) {
			t.Errorf("received %+v", got)
		}
	})
}

func write(u *UART, s string) error {
	_, err := io.WriteString(u.Input(), s)
	return err
}

// TestEcho echoes 1 MiB by a driver that uses only edges and that, like Linux's, leaves its handler
// after a number of rounds.
func TestEcho(t *testing.T) {
	const total = 1 << 20
	var out bytes.Buffer
	edge := make(chan struct{}, 1)
	u := New(Config{Out: &out, Raise: func() {
		select { // the interrupt controller holds one edge
		case edge <- struct{}{}:
		default:
		}
	}})
	want := pattern(total)
	var join sync.WaitGroup
	join.Go(func() {
		for b := want; len(b) > 0; {
			n := min(len(b), 777)
			if _, err := u.Input().Write(b[:n]); err != nil {
				t.Error(err)
				return
			}
			b = b[n:]
		}
	})
	u.Write(regIIR, []byte{0x81})
	u.Write(regIER, []byte{0x07})
	u.Write(regMCR, []byte{0x0b})
	var queue []byte
	for received, sent := 0, 0; sent < total; {
		<-edge
		for round := 0; round < 3; round++ {
			id := in(u, regIIR)
			if id == 0xc1 {
				break
			}
			for in(u, regLSR)&lsrDR != 0 {
				queue = append(queue, in(u, regRBR))
				received++
			}
			if in(u, regLSR)&lsrTHRE != 0 {
				n := min(16, len(queue))
				for _, b := range queue[:n] {
					u.Write(regRBR, []byte{b})
				}
				queue, sent = queue[n:], sent+n
			}
			// A driver disables transmitter interrupts while it has nothing to send.
			ier := byte(0x05)
			if len(queue) > 0 {
				ier |= 0x02
			}
			u.Write(regIER, []byte{ier})
		}
	}
	join.Wait()
	if err := u.Close(); err != nil || !bytes.Equal(out.Bytes(), want) {
		t.Errorf("%d bytes echoed, equal: %v; %v", out.Len(), bytes.Equal(out.Bytes(), want), err)
	}
}

// BenchmarkTransmit also reports the number of bytes per host write.
func BenchmarkTransmit(b *testing.B) {
	out := sink{n: 1 << 30}
	u := New(Config{Out: &out, Raise: func() {}})
	for b.Loop() {
		u.Write(regRBR, []byte{'x'})
	}
	if err := u.Close(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)/float64(out.calls), "bytes/write")
}
