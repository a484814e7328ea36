package linux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvm/control"
	"gvm/devices/virtio/vsock"
	"gvm/machine"
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

// exchange sends bytes and expects to get them back, and the end of each side after them. It reads
// after ready.
func (e *vsockEcho) exchange(c *vsock.Conn, n int, ready func()) {
	out := content(fmt.Sprintf("%p", c), n)
	var writer sync.WaitGroup
	writer.Go(func() {
		if _, err := c.Write(out); err != nil {
			e.Error(err)
		}
		if err := c.CloseWrite(); err != nil {
			e.Error(err)
		}
	})
	ready()
	in, err := io.ReadAll(c)
	writer.Wait()
	if err != nil || !bytes.Equal(in, out) {
		e.Errorf("%d of %d bytes came back, or others: %v", len(in), n, err)
	}
	if err := c.Close(); err != nil {
		e.Error(err)
	}
}

// whenFull waits until a guest that sends back all that it gets, to a program that does not read, has
// filled the buffers of both sides. A Write waits then.
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
