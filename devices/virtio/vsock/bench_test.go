package vsock

import (
	"io"
	"os"
	"syscall"
	"testing"
	"time"
)

// BenchmarkStream compares a connection with a socketpair, in turns: how long the one takes for what
// the other does, 1 is as long. The driver of the connection waits for each packet that it sends.
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
