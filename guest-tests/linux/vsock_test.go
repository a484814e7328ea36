package linux

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/devices/virtio/vhostvsock"
	"gvm/devices/virtio/vsock"
	"gvm/guest-tests/lab"
	"gvm/guestmem"
	"gvm/kvmapi/nowait"
	"gvm/machine"
	"gvm/vmm"
)

// vsockEcho is what TestShare does with a running guest/vsockecho, and with the guest's balloon.
type vsockEcho struct {
	*testing.T
	m        *machine.Machine
	accepted chan *vsock.Conn
}

// rebindVsock takes the device from its driver, and gives it back.
const rebindVsock = `
cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport
device=$(echo virtio*)
echo $device >unbind && echo $device >bind && say rebound
cd /
`

// config returns the device's configuration.
func (e *vsockEcho) config() *vsock.Config {
	return &vsock.Config{CID: 77, Accept: func(port uint32, c *vsock.Conn) bool {
		time.Sleep(20 * time.Millisecond) // a signal reaches the guest's connect, which waits for the answer
		if port == 2000 {
			e.accepted <- c
		}
		return port == 2000
	}}
}

// accept waits for a connection of the guest.
func (e *vsockEcho) accept() *vsock.Conn {
	select {
	case c := <-e.accepted:
		return c
	case <-e.m.Ended():
		e.Fatal("the guest ended")
		return nil
	}
}

func (e *vsockEcho) dial(port uint32) *vsock.Conn {
	c, err := e.m.DialVsock(e.Context(), port)
	if err != nil {
		e.Fatal(err)
	}
	return c
}

// all does everything, with so many connections of the guest.
func (e *vsockEcho) all(streams int) {
	first := e.accept() // so the guest listens
	if _, err := e.m.DialVsock(e.Context(), 4000); !errors.Is(err, syscall.ECONNREFUSED) {
		e.Error(err)
	}
	e.exchange(first, 8<<20, e.whenFull)
	var sides sync.WaitGroup
	for range streams - 1 {
		for _, c := range []*vsock.Conn{e.accept(), e.dial(3000)} {
			sides.Go(func() { e.exchange(c, 300_000, func() {}) })
		}
	}
	if err := errors.Join(e.m.Pause(e.Context()), e.m.Resume()); err != nil {
		e.Error(err)
	}
	sides.Wait()
	e.balloon()
	idle := e.dial(3000)
	e.dial(3001) // the guest ends
	if n, err := idle.Read(make([]byte, 1)); err != io.EOF && err != syscall.ECONNRESET {
		e.Errorf("after the end of the guest's program: %d, %v", n, err)
	}
}

// balloon has the guest give 64 MiB back, take them again, and report free pages.
func (e *vsockEcho) balloon() {
	for _, size := range []uint64{64 << 20, 0} {
		if _, err := e.m.ResizeBalloon(control.ResizeBalloon{Size: size}); err != nil {
			e.Error(err)
		}
		e.until(func() bool {
			b, err := e.m.Balloon(e.Context())
			if err != nil || b.Guest != control.Told {
				e.Fatalf("%+v, %v", b, err)
			}
			free, _ := b.Stats.Get("memfree").(uint64)
			return b.Actual == size && 0 < free && free < 512<<20-size
		})
	}
	e.until(func() bool {
		for path, v := range e.inspect() {
			if strings.HasSuffix(path, "/reported_bytes") && v != "0" {
				return true
			}
		}
		return false
	})
}

// duplex is the host's end of a connection.
type duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// exchanges counts them: each has other bytes.
var exchanges atomic.Uint64

// exchange sends bytes and expects to get them back, and the end of each side after them. It reads
// after ready.
func (e *vsockEcho) exchange(c duplex, n int64, ready func()) {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], exchanges.Add(1))
	var writer sync.WaitGroup
	writer.Go(func() {
		if _, err := io.CopyN(c, rand.NewChaCha8(seed), n); err != nil {
			e.Error(err)
		}
		if err := c.CloseWrite(); err != nil {
			e.Error(err)
		}
	})
	ready()
	got, err := io.Copy(same{rand.NewChaCha8(seed)}, c)
	writer.Wait()
	if err != nil || got != n {
		e.Errorf("%d of %d bytes came back: %v", got, n, err)
	}
	if err := c.Close(); err != nil {
		e.Error(err)
	}
}

// same is a writer that fails unless it gets the bytes of a reader.
type same struct{ as io.Reader }

func (s same) Write(p []byte) (int, error) {
	want := make([]byte, len(p))
	if _, err := io.ReadFull(s.as, want); err != nil {
		return 0, err
	}
	if !bytes.Equal(p, want) {
		return 0, errors.New("other bytes came back")
	}
	return len(p), nil
}

// whenFull waits until a guest that sends back all that it gets, to a program that does not read,
// has filled the buffers of both sides. A Write waits then.
func (e *vsockEcho) whenFull() {
	e.until(func() bool {
		values := e.inspect()
		for path, left := range values {
			of, ok := strings.CutSuffix(path, "/to_write")
			if ok && left != "0" && values[of+"/buffered"] == values[of+"/buf_alloc"] {
				return true
			}
		}
		return false
	})
}

// until waits for a state of the guest.
func (e *vsockEcho) until(reached func() bool) {
	for !reached() {
		select {
		case <-e.m.Ended():
			e.Fatal("the guest ended")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// inspect returns the machine's state, by path.
func (e *vsockEcho) inspect() map[string]string {
	n, err := e.m.Inspect(e.Context(), "")
	if err != nil {
		e.Fatal(err)
	}
	values := map[string]string{}
	for path, v := range n.Values("") {
		values[path] = fmt.Sprint(v)
	}
	return values
}

// socket is a socket of the host's own vsock (AF_VSOCK), by vhost-vsock.
type socket struct{ *os.File }

func newSocket() (int, error) {
	return unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
}

func (s socket) CloseWrite() error { return unix.Shutdown(int(s.Fd()), unix.SHUT_WR) }

// dialSocket connects to a port of the guest.
func dialSocket(t *testing.T, cid, port uint32) socket {
	t.Helper()
	fd, err := newSocket()
	must(t, err)
	s := socket{os.NewFile(uintptr(fd), fmt.Sprintf("vsock %d:%d", cid, port))}
	t.Cleanup(func() { s.Close() })
	must(t, nowait.Connect(fd, &unix.SockaddrVM{CID: cid, Port: port}))
	return s
}

// TestVhostVsock moves data between the guest's program, which sends all of it back, and programs
// of the host, over the kernel's sockets, while the machine is paused and after the guest's driver
// was bound anew.
func TestVhostVsock(t *testing.T) {
	const cid, streams = 77, 20
	listener, err := newSocket()
	must(t, err)
	defer unix.Close(listener)
	must(t, unix.Bind(listener, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: 2000}))
	must(t, unix.Listen(listener, streams))
	accepted := make(chan socket, streams)
	go func() { // until the listener is shut down
		for {
			fd, _, err := unix.Accept(listener)
			if err != nil {
				return
			}
			accepted <- socket{os.NewFile(uintptr(fd), "accepted")}
		}
	}()
	defer unix.Shutdown(listener, unix.SHUT_RDWR)
	g := guest{
		kernel:  kernel(t, "cloud"),
		modules: []string{"vmw_vsock_virtio_transport"},
		files:   map[string]string{"bin/vsockecho": lab.Program("vsockecho")},
		script:  rebindVsock + fmt.Sprintf("vsockecho -connect %d && say echoed\nklog", streams),
	}
	console := &watcher{when: func(string) {}}
	notes := make(chan string, 100)
	spec := machine.Spec{Memory: guestmem.Config{Size: 256 << 20}, Console: machine.Output(console),
		VhostVsock: &vhostvsock.Config{CID: cid}, Note: func(s string) { notes <- s }}
	e := &vsockEcho{T: t, m: g.launch(t, spec)}
	if _, err := machine.Start(t.Context(), machine.Spec{Memory: spec.Memory, VhostVsock: spec.VhostVsock}); err == nil ||
		!machine.IsConfig(err) || !errors.Is(err, vhostvsock.ErrInUse) {
		t.Errorf("a second machine with the CID: %v", err)
	}
	accept := func() socket {
		select {
		case s := <-accepted:
			return s
		case <-e.m.Ended():
			t.Fatalf("the guest ended:\n%s", console.all.String())
			return socket{}
		}
	}
	e.exchange(accept(), 8<<20, func() {}) // so the guest listens
	var sides sync.WaitGroup
	for range streams - 1 {
		for _, s := range []socket{accept(), dialSocket(t, cid, 3000)} {
			sides.Go(func() { e.exchange(s, 300_000, func() {}) })
		}
	}
	must(t, errors.Join(e.m.Pause(t.Context()), e.m.Resume()))
	sides.Wait()
	n, err := e.m.Inspect(t.Context(), "")
	must(t, err)
	taken := 0
	for path, v := range n.Values("") {
		if strings.HasSuffix(path, "/running") && v == true {
			taken++
		}
	}
	if taken != 1 {
		t.Errorf("%d devices run", taken)
	}
	idle := dialSocket(t, cid, 3000)
	dialSocket(t, cid, 3001) // the guest ends
	out, err := e.m.Wait()
	if err != nil || out.Ending != vmm.PoweredOff || !strings.Contains(console.all.String(), "= rebound") {
		t.Errorf("%v, %v, %v:\n%s", out.Ending, out.Err, err, console.all.String())
	}
	if n, err := idle.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Errorf("after the machine's end: %d bytes, %v", n, err)
	}
	close(notes)
	for s := range notes {
		t.Errorf("note: %s", s)
	}
	result{console: strings.ReplaceAll(console.all.String(), "\r", "")}.kernelLog(t, 1)
}

// TestVsockBridge moves data by --vsock unix, with a part of what TestVsockStreams has.
func TestVsockBridge(t *testing.T) { vsockBridge(t, 20_000) }

// vsockBridge moves data over a thousand connections at a time between the guest's program, which
// sends all of it back, and programs of the host, by --vsock unix: size bytes each way over each of
// them. Each side has made half of them. The end of the guest's program ends those that are open.
func vsockBridge(t *testing.T, size int64) {
	const streams = 500 // of each side
	path := filepath.Join(t.TempDir(), "vsock")
	l, err := net.Listen("unix", path+"_2000")
	must(t, err)
	defer l.Close()
	p := start(t, nil, append(guest{
		kernel:  kernel(t, "cloud"),
		modules: []string{"vmw_vsock_virtio_transport"},
		files:   map[string]string{"bin/vsockecho": lab.Program("vsockecho")},
		script:  fmt.Sprintf("vsockecho -connect %d && say echoed\nklog", streams),
	}.build(t), "--vsock", "unix,path="+path)...)
	go func() { // so that Accept does not wait for a guest that is lost
		<-p.done
		l.Close()
	}()
	fatal := func(err error) {
		p.end().fatalf(t, "%v", err)
	}
	accept := func() duplex {
		c, err := l.Accept()
		if err != nil {
			fatal(err)
		}
		return c.(*net.UnixConn)
	}
	dial := func(port int) duplex {
		c, err := net.Dial("unix", path)
		if err != nil {
			fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fmt.Fprintf(c, "CONNECT %d\n", port)
		var answer []byte
		for b := make([]byte, 1); !bytes.HasSuffix(answer, []byte("\n")); answer = append(answer, b...) {
			if _, err := c.Read(b); err != nil {
				fatal(err)
			}
		}
		if !strings.HasPrefix(string(answer), "OK ") {
			fatal(fmt.Errorf("port %d: %s", port, answer))
		}
		return c.(*net.UnixConn)
	}
	all := []duplex{accept()} // so the guest listens
	for range streams - 1 {
		all = append(all, dial(3000), accept())
	}
	all = append(all, dial(3000))
	e := &vsockEcho{T: t}
	var sides sync.WaitGroup
	for _, c := range all {
		sides.Go(func() { e.exchange(c, size, func() {}) })
	}
	sides.Wait()
	idle := []duplex{dial(3000), dial(3000)}
	dial(3001) // the guest ends
	r := p.wait()
	r.wantStatus(t, 0)
	r.want(t, map[string]string{"echoed": ""})
	for _, c := range idle {
		if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("after the machine's end: %d bytes, %v", n, err)
		}
	}
	r.kernelLog(t, 1)
}
