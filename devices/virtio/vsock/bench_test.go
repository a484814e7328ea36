package vsock

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// BenchmarkStream compares a connection with a socketpair, in turns: how long the one takes for
// the other's work, 1 is as long. The driver of the connection waits for each packet that it
// sends.
func BenchmarkStream(b *testing.B) {
	const size = 1 << 20
	for _, bench := range []struct {
		name    string
		program func(io.ReadWriter) // and the guest's part meanwhile
		vsock   func(*benchGuest)
		pair    func(io.ReadWriter)
	}{
		{"ToGuest",
			func(c io.ReadWriter) { c.Write(make([]byte, size)) },
			func(g *benchGuest) { g.receive(size) },
			func(p io.ReadWriter) { io.CopyN(io.Discard, p, size) }},
		{"FromGuest",
			func(c io.ReadWriter) { io.CopyN(io.Discard, c, size) },
			func(g *benchGuest) { g.send(size) },
			func(p io.ReadWriter) { p.Write(make([]byte, size)) }},
		{"RoundTrip",
			func(c io.ReadWriter) { io.CopyN(c, c, 100) },
			func(g *benchGuest) {
				for range 100 {
					g.send(1)
					g.receive(1)
				}
			},
			func(p io.ReadWriter) {
				for range 100 {
					p.Write(make([]byte, 1))
					io.ReadFull(p, make([]byte, 1))
				}
			}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			r := newRig(b, 200)
			g := &benchGuest{rig: r, free: largeBuffer}
			c := r.connect(1, 1024, largeBuffer)
			fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK, 0)
			if err != nil {
				b.Fatal(err)
			}
			near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
			defer near.Close()
			defer far.Close()
			both := func(program func(io.ReadWriter), with io.ReadWriter, guest func()) time.Duration {
				start, done := time.Now(), make(chan struct{})
				go func() {
					program(with)
					close(done)
				}()
				guest()
				<-done
				return time.Since(start)
			}
			var vsock, pair time.Duration
			for b.Loop() {
				vsock += both(bench.program, c, func() { bench.vsock(g) })
				pair += both(bench.program, near, func() { bench.pair(far) })
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(vsock)/float64(pair), "socketpairs")
		})
	}
}

// benchGuest is the guest's side of a connection.
type benchGuest struct {
	*rig
	tx, rx, told uint32
	free         int // the host's space
}

func (g *benchGuest) header(op uint16) header {
	g.told = g.rx
	return header{op: op, srcPort: 1, dstPort: 1024, bufAlloc: largeBuffer, fwdCnt: g.rx}
}

// receive receives so many bytes.
func (g *benchGuest) receive(n int) {
	for n > 0 {
		n -= g.packet()
		if g.rx-g.told >= largeBuffer/2 {
			g.rig.send(g.header(opCreditUpdate))
		}
	}
}

func (g *benchGuest) packet() int {
	h, _ := g.rig.receive()
	g.rx += h.len
	g.free = int(h.bufAlloc) - int(g.tx-h.fwdCnt)
	return int(h.len)
}

// send sends so many bytes.
func (g *benchGuest) send(n int) {
	data := make([]byte, maxPacket)
	for n > 0 {
		k := min(n, maxPacket, g.free)
		if k == 0 {
			g.packet()
			continue
		}
		g.rig.send(g.header(opRW), data[:k]...)
		g.tx += uint32(k)
		g.free -= k
		n -= k
	}
}

// BenchmarkBridge moves 1 GiB each way over 1,000 connections at a time, half of them made by each
// side, and compares the checksums.
func BenchmarkBridge(b *testing.B) {
	const streams, size = 1000, 1 << 30 / 1000
	r := newBridged(b, func(*Bridge) {})
	defer r.stop()
	accepted := r.listen(52, streams)
	l := r.listenHost(1024)
	var sums [2][streams][2]hash.Hash // by direction, of the sender and the receiver
	both := func(i int, side int, c io.ReadWriter, finish func()) {
		var sender sync.WaitGroup
		sender.Go(func() {
			var seed [32]byte
			binary.LittleEndian.PutUint64(seed[:], uint64(2*i+side))
			if _, err := io.CopyN(io.MultiWriter(c, sums[side][i][0]), rand.NewChaCha8(seed), size); err != nil {
				b.Error(err)
			}
			finish()
		})
		if n, err := io.Copy(sums[1-side][i][1], c); n != size || err != nil {
			b.Errorf("stream %d: %d bytes, %v", i, n, err)
		}
		sender.Wait()
	}
	const host, guest = 0, 1
	port := uint32(0)
	b.SetBytes(2 * streams * size)
	for b.Loop() {
		var all sync.WaitGroup
		for i := range streams {
			for side := range sums {
				sums[side][i] = [2]hash.Hash{sha256.New(), sha256.New()}
			}
			var u *net.UnixConn
			var g *socket
			if i%2 == 0 {
				u, _ = r.client("CONNECT 52\n")
				g = <-accepted
			} else {
				port++
				g = r.connect(key{port, 1024}, 50_000)
				c, err := l.AcceptUnix()
				if err != nil {
					b.Fatal(err)
				}
				u = c
			}
			all.Go(func() {
				both(i, host, u, func() { u.CloseWrite() })
				u.Close()
			})
			all.Go(func() {
				both(i, guest, g, func() { g.shutdown(shutSend) })
				g.shutdown(shutBoth)
			})
		}
		all.Wait()
		for i := range streams {
			for side := range sums {
				if s := sums[side][i]; !bytes.Equal(s[0].Sum(nil), s[1].Sum(nil)) {
					b.Errorf("stream %d: the checksums differ", i)
				}
			}
		}
		r.idle()
	}
}
