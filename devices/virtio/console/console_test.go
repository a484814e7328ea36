package console

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtq"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
	"gvm/inspect"
)

const queueSpan = 1 << 20 // of guest memory for each queue

const hvc = "hvc" // the name of a port that is a console

// rig is a device with the driver's side of its queues, and the host's side of its streams.
type rig struct {
	t      testing.TB
	dev    *Device
	a      virtio.Activation
	q      []*virtqtest.Driver
	broken chan error
	host   []net.Conn

	changes    atomic.Int32 // of configuration space
	cols, rows uint16       // of the fuzz target's last size
}

func newRig(t testing.TB, features uint64, names ...string) *rig {
	t.Helper()
	r := &rig{t: t, broken: make(chan error, 10)}
	var ports []Port
	for _, name := range names {
		near, far := net.Pipe()
		ports = append(ports, Port{name, far, name == hvc})
		r.host = append(r.host, near)
	}
	var err error
	if r.dev, err = New(ports); err != nil {
		t.Fatal(err)
	}
	sizes := r.dev.QueueSizes()
	r.a = virtio.Activation{Mem: guestmem.Heap(0, len(sizes)*queueSpan), Features: features,
		Broken: func(err error) { r.broken <- err }, ConfigChanged: func() { r.changes.Add(1) }}
	for i, size := range sizes {
		d, err := virtqtest.New(r.a.Mem, uint64(i)*queueSpan, size, features)
		if err != nil {
			t.Fatal(err)
		}
		r.q = append(r.q, d)
		r.a.Queues = append(r.a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
	}
	r.activate()
	t.Cleanup(func() {
		for _, h := range r.host {
			h.Close()
		}
		if err := errors.Join(r.dev.Reset(), r.dev.Close()); err != nil {
			t.Error(err)
		}
		for _, d := range r.q {
			d.Close()
		}
	})
	return r
}

func (r *rig) activate() {
	r.t.Helper()
	if err := r.dev.Activate(r.a); err != nil {
		r.t.Fatal(err)
	}
}

// stop stops the device; activate continues.
func (r *rig) stop() {
	r.t.Helper()
	bases, err := r.dev.Stop(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for i, base := range bases {
		r.a.Queues[i].Base = base
	}
}

// put makes a chain available.
func (r *rig) put(queue int, segs ...virtqtest.Seg) {
	r.t.Helper()
	if _, ok := r.q[queue].Add(segs...); !ok {
		r.t.Fatal("no room for a chain")
	}
	if _, err := r.q[queue].Publish(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) wait(queue int) uint32 {
	r.t.Helper()
	_, n, err := r.q[queue].Wait()
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// say sends a control message.
func (r *rig) say(id uint32, event, value uint16) {
	r.t.Helper()
	d := r.q[controlTx]
	at := d.Alloc(controlLen)
	copy(d.Bytes(at, controlLen), message(id, event, value))
	r.put(controlTx, virtqtest.Seg{Addr: at, Len: controlLen})
	r.wait(controlTx)
}

func message(id uint32, event, value uint16) []byte {
	b := binary.LittleEndian.AppendUint32(nil, id)
	return binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(b, event), value)
}

// hear takes a control message.
func (r *rig) hear() string {
	r.t.Helper()
	d := r.q[controlRx]
	at := d.Alloc(1024)
	r.put(controlRx, virtqtest.Seg{Addr: at, Len: 1024, Write: true})
	return string(d.Bytes(at, int(r.wait(controlRx))))
}

func (r *rig) expect(id uint32, event, value uint16, name string) {
	r.t.Helper()
	if got, want := r.hear(), string(message(id, event, value))+name; got != want {
		r.t.Fatalf("control message % x, want % x", got, want)
	}
}

// setUp acts as Linux does for a port that it learns of.
func (r *rig) setUp(id uint32) {
	r.t.Helper()
	r.say(id, portReady, 1)
	if r.dev.ports[id].console {
		r.expect(id, consolePort, 1, "")
	}
	r.expect(id, portName, 1, r.dev.ports[id].name)
	r.expect(id, portOpen, 1, "")
}

// open does Linux's steps for a port that a program opens.
func (r *rig) open(id uint32) {
	r.t.Helper()
	r.setUp(id)
	r.say(id, portOpen, 1)
}

func rxOf(id int) int {
	if id == 0 {
		return 0
	}
	return 2*id + 2
}

// reset resets the device, which then has a new driver.
func (r *rig) reset(features uint64) {
	r.t.Helper()
	if err := r.dev.Reset(); err != nil {
		r.t.Fatal(err)
	}
	r.a.Features = features
	for i, old := range r.q {
		old.Close()
		d, err := virtqtest.New(r.a.Mem, uint64(i)*queueSpan, old.Size, features)
		if err != nil {
			r.t.Fatal(err)
		}
		r.q[i], r.a.Queues[i] = d, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call}
	}
	r.activate()
}

// bothWays sends bytes of the guest and of the host through an open port.
func (r *rig) bothWays(id int) {
	r.t.Helper()
	rx := rxOf(id)
	data := make([]byte, 200<<10)
	rand.Read(data)
	d := r.q[rx+1]
	at := d.Alloc(len(data))
	copy(d.Bytes(at, len(data)), data)
	r.put(rx+1, virtqtest.Seg{Addr: at, Len: 1000}, virtqtest.Seg{Addr: at + 1000, Len: uint32(len(data) - 1000)})
	got := make([]byte, len(data))
	if _, err := io.ReadFull(r.host[id], got); err != nil || !bytes.Equal(got, data) {
		r.t.Errorf("port %d: the guest's bytes differ: %v", id, err)
	}
	r.wait(rx + 1)
	go r.host[id].Write(data)
	d = r.q[rx]
	at = d.Alloc(40000)
	for got = got[:0]; len(got) < len(data); {
		r.put(rx, virtqtest.Seg{Addr: at, Len: 10, Write: true}, virtqtest.Seg{Addr: at + 10, Len: 39990, Write: true})
		got = append(got, d.Bytes(at, int(r.wait(rx)))...)
	}
	if !bytes.Equal(got, data) {
		r.t.Errorf("port %d: the host's bytes differ", id)
	}
}

// TestPorts: the driver learns of each port, and bytes go both ways unchanged.
func TestPorts(t *testing.T) {
	r := newRig(t, featureMultiport, "gvm.agent", "another")
	if r.dev.ID() != 3 || len(r.dev.QueueSizes()) != 6 || !bytes.Equal(r.dev.Config(), []byte{4: 2, 11: 0}) {
		t.Fatalf("queues %v, configuration % x", r.dev.QueueSizes(), r.dev.Config())
	}
	r.say(0xffffffff, deviceReady, 1)
	r.expect(0, deviceAdd, 1, "")
	r.expect(1, deviceAdd, 1, "")
	for id := range uint32(2) {
		r.open(id)
		r.bothWays(int(id))
	}
}

// TestConsole: a console that is the only port needs no control messages, and a driver learns its
// size, and each change of it, by configuration space.
func TestConsole(t *testing.T) {
	r := newRig(t, featureSize, hvc)
	want := func(changes int32, cols, rows byte) {
		t.Helper()
		if got := r.changes.Load(); got != changes {
			t.Errorf("%d changes, want %d", got, changes)
		}
		if got := r.dev.Config(); !bytes.Equal(got, []byte{cols, 0, rows, 0, 1, 11: 0}) {
			t.Errorf("configuration % x, want %d columns and %d rows", got, cols, rows)
		}
	}
	if f := r.dev.Features(); f&featureSize == 0 || f&featureMultiport != 0 || len(r.dev.QueueSizes()) != 2 {
		t.Fatalf("features %#x, queues %v", f, r.dev.QueueSizes())
	}
	r.bothWays(0)
	r.dev.Resize(0, 24)
	r.dev.Resize(80, 0)
	want(0, 0, 0)
	r.dev.Resize(132, 43)
	r.dev.Resize(132, 43)
	want(1, 132, 43)
	r.stop()
	r.dev.Resize(100, 50)
	r.dev.Resize(101, 51)
	want(1, 101, 51)
	r.activate()
	want(2, 101, 51)
	r.stop()
	r.activate()
	want(2, 101, 51)
	r.reset(featureSize)
	want(3, 101, 51)
	r.bothWays(0)
	r.reset(0) // a driver that does not want to know
	r.dev.Resize(90, 30)
	want(3, 90, 30)
	r.reset(featureSize)
	want(4, 90, 30)
	var node inspect.Node
	node.Nodes, _ = r.dev.Inspect()
	for path, want := range map[string]any{"multiport": false, "cols": uint16(90), "rows": uint16(30),
		"port/0/console": true, "port/0/guest_open": true} {
		if got := node.Get(path); got != want {
			t.Errorf("%s is %v, want %v", path, got, want)
		}
	}
}

// TestConsolePort: a driver of several ports learns which is a console before it gets its size, of
// which only the last one counts.
func TestConsolePort(t *testing.T) {
	const features = featureMultiport | featureSize
	r := newRig(t, features, hvc, "another")
	if f := r.dev.Features(); f&features != features || len(r.dev.QueueSizes()) != 6 {
		t.Fatalf("features %#x, queues %v", f, r.dev.QueueSizes())
	}
	r.setUp(0)
	due := func(want bool) {
		t.Helper()
		r.dev.mu.Lock()
		defer r.dev.mu.Unlock()
		for _, p := range r.dev.ports {
			if got := p.owed != 0; got != (want && p.console) {
				t.Errorf("port %d owes %#x", p.id, p.owed)
			}
		}
	}
	due(false)
	for rows := range uint16(100) {
		r.dev.Resize(300, rows)
	}
	due(true)
	r.expect(0, resize, 0, "\x2c\x01\x63\x00")
	due(false)
	r.say(0, portOpen, 1)
	r.bothWays(0)
	r.setUp(1)
	due(false)

	r.dev.Resize(80, 24)
	r.stop()
	r.dev.Resize(81, 25)
	r.activate()
	r.expect(0, resize, 0, "\x51\x00\x19\x00")

	r.dev.Resize(82, 26) // which the driver does not take
	r.reset(features)
	r.dev.Resize(83, 27)
	due(false)
	for range 2 {
		r.setUp(0)
		r.expect(0, resize, 0, "\x53\x00\x1b\x00")
		due(false)
	}
	r.reset(featureSize) // a driver of one port takes it for a console
	r.bothWays(0)
	r.put(5, virtqtest.Seg{Addr: r.q[5].Alloc(100 << 10), Len: 100 << 10})
	r.wait(5) // the other port's bytes are dropped
}

// TestOpen: bytes wait for a program that opens the port, and the guest learns of the stream's end.
func TestOpen(t *testing.T) {
	r := newRig(t, featureMultiport, "a")
	d := r.q[0]
	at := d.Alloc(10)
	r.put(0, virtqtest.Seg{Addr: at, Len: 10, Write: true})
	wrote := make(chan error, 1)
	go func() {
		_, err := r.host[0].Write([]byte("early"))
		wrote <- err
	}()
	if err := <-wrote; err != nil { // the device has read it
		t.Fatal(err)
	}
	if _, _, ok := d.Used(); ok {
		t.Error("bytes came before the port was open")
	}
	r.open(0)
	if n := r.wait(0); string(d.Bytes(at, int(n))) != "early" {
		t.Errorf("%d bytes", n)
	}
	r.host[0].Close()
	r.expect(0, portOpen, 0, "")
	r.put(1, virtqtest.Seg{Addr: at, Len: 10})
	r.wait(1) // dropped
	r.say(0, portReady, 1)
	r.expect(0, portName, 1, "a") // and no open
	r.say(9, portReady, 1)        // a port that there is not
	r.say(0, deviceReady, 0)      // a driver that has failed
	r.stop()
	r.activate()
	var node inspect.Node
	node.Nodes, _ = r.dev.Inspect()
	for path, want := range map[string]any{"port/0/name": "a", "port/0/guest_open": true, "port/0/host_open": false} {
		if got := node.Get(path); got != want {
			t.Errorf("%s is %v, want %v", path, got, want)
		}
	}
}

// TestBackPressure: a stream that takes nothing makes the guest wait, and not the device's stop. No
// byte is lost or doubled by it.
func TestBackPressure(t *testing.T) {
	r := newRig(t, featureMultiport, "a")
	r.open(0)
	d := r.q[1]
	const n = 150 << 10
	at := d.Alloc(n)
	var c counting
	c.fill(d.Bytes(at, n))
	r.put(1, virtqtest.Seg{Addr: at, Len: n})
	for range 3 {
		if err := r.dev.workers[1].Barrier(); err != nil {
			t.Fatal(err)
		}
		if _, _, ok := d.Used(); ok {
			t.Fatal("a chain was given back before its bytes had room")
		}
		r.stop()
		r.activate()
	}
	got := make([]byte, n)
	if _, err := io.ReadFull(r.host[0], got); err != nil {
		t.Fatal(err)
	}
	if err := new(counting).check(got); err != nil {
		t.Error(err)
	}
	r.wait(1)
}

// TestWithoutMultiport: port 0 is no console.
func TestWithoutMultiport(t *testing.T) {
	r := newRig(t, 0, "a")
	d := r.q[1]
	for range 3 {
		r.put(1, virtqtest.Seg{Addr: d.Alloc(100 << 10), Len: 100 << 10})
		r.wait(1)
	}
	r.say(0, portReady, 1)
	r.host[0].Close()
}

// TestClose: a stream that takes nothing and has nothing does not hold up the end. One that is only
// slow gets the last bytes.
func TestClose(t *testing.T) {
	for _, slow := range []bool{false, true} {
		r := newRig(t, featureMultiport, "a")
		r.open(0)
		d := r.q[1]
		at := d.Alloc(4)
		copy(d.Bytes(at, 4), "last")
		r.put(1, virtqtest.Seg{Addr: at, Len: 4})
		r.wait(1)
		if err := r.dev.Reset(); err != nil {
			t.Fatal(err)
		}
		read := make(chan string, 1)
		if slow {
			go func() {
				b, _ := io.ReadAll(r.host[0])
				read <- string(b)
			}()
		}
		if err := r.dev.Close(); err != nil {
			t.Fatal(err)
		}
		if slow {
			if got := <-read; got != "last" {
				t.Errorf("%q", got)
			}
		} else if b, err := io.ReadAll(r.host[0]); err != nil || len(b) > 0 {
			t.Errorf("%q, %v: want a closed stream", b, err)
		}
	}
}

func TestRules(t *testing.T) {
	for name, tt := range map[string]struct {
		queue int
		seg   virtqtest.Seg
	}{
		"a short message":            {controlTx, virtqtest.Seg{Len: 7}},
		"a writable message":         {controlTx, virtqtest.Seg{Len: 8, Write: true}},
		"a short control buffer":     {controlRx, virtqtest.Seg{Len: 7, Write: true}},
		"a readable control buffer":  {controlRx, virtqtest.Seg{Len: 100}},
		"a readable receive buffer":  {0, virtqtest.Seg{Len: 100}},
		"a writable transmit buffer": {5, virtqtest.Seg{Len: 100, Write: true}},
	} {
		r := newRig(t, featureMultiport, "a", "b")
		r.put(tt.queue, tt.seg)
		var g *virtq.GuestError
		if err := <-r.broken; !errors.As(err, &g) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNew(t *testing.T) {
	for want, ports := range map[string][]Port{
		"0 ports":                 {},
		"17 ports":                make([]Port, 17),
		`port 0 has the name ""`:  {{}},
		`port 1 has the name "a"`: {{Name: "a"}, {Name: "a"}},
		"of 1 to 256 bytes":       {{Name: strings.Repeat("x", 257)}},
		"port 1 is a console":     {{Name: "a"}, {Name: "b", Console: true}},
	} {
		if _, err := New(ports); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// counting is a stream of bytes, each one more than the one before.
type counting struct{ n byte }

func (c *counting) fill(p []byte) {
	for i := range p {
		p[i] = c.n
		c.n += 7
	}
}

func (c *counting) check(p []byte) error {
	for i, b := range p {
		if b != c.n {
			return fmt.Errorf("byte %d of %d is %d, want %d", i, len(p), b, c.n)
		}
		c.n += 7
	}
	return nil
}

// slot is a buffer of a queue in TestStopAndContinue.
type slot struct {
	d       *virtqtest.Driver
	at      uint64
	len     int
	rx      bool
	data    *counting // of the queue
	message []byte
}

func (s *slot) Next() []virtqtest.Seg {
	switch {
	case s.message != nil:
		copy(s.d.Bytes(s.at, s.len), s.message)
	case !s.rx:
		s.data.fill(s.d.Bytes(s.at, s.len))
	}
	return []virtqtest.Seg{{Addr: s.at, Len: 3, Write: s.rx}, {Addr: s.at + 3, Len: uint32(s.len - 3), Write: s.rx}}
}

func (s *slot) Check(n uint32) error {
	if !s.rx || s.data == nil {
		return nil
	}
	if n == 0 {
		return errors.New("an empty buffer")
	}
	return s.data.check(s.d.Bytes(s.at, int(n)))
}

func TestStopAndContinue(t *testing.T) {
	for features, rounds := range map[uint64]int{featureMultiport: 50, featureMultiport | virtio.FeatureEventIdx: 200,
		featureSize: 100} {
		var ports []Port
		var host sync.WaitGroup
		var near []net.Conn
		alone := features&featureMultiport == 0
		for i := range map[bool]int{false: 2, true: 1}[alone] {
			n, far := net.Pipe()
			near, ports = append(near, n), append(ports, Port{fmt.Sprint(i), far, alone})
			host.Go(func() {
				var out counting
				for k := 1; ; k = k*5%3331 + 1 {
					b := make([]byte, k)
					out.fill(b)
					if _, err := n.Write(b); err != nil {
						return
					}
				}
			})
			host.Go(func() {
				var in counting
				for b := make([]byte, 10000); ; {
					k, err := n.Read(b)
					if err := in.check(b[:k]); err != nil {
						t.Error(err)
					}
					if err != nil {
						return
					}
				}
			})
		}
		dev, err := New(ports)
		if err != nil {
			t.Fatal(err)
		}
		virtiotest.StopAndContinue(t, dev, guestmem.Heap(0, 6*virtiotest.QueueSpan), virtiotest.Load{
			Rounds: rounds, Features: features,
			Slots: func(queue int, d *virtqtest.Driver) (slots []virtiotest.Slot) {
				add := func(s slot) {
					s.d, s.at = d, d.Alloc(s.len)
					slots = append(slots, &s)
				}
				data := new(counting)
				switch queue {
				case controlRx: // left alone: the messages that are owed stay
				case controlTx:
					add(slot{len: 8, message: message(0, portOpen, 1)})
					add(slot{len: 8, message: message(1, portOpen, 1)})
					add(slot{len: 8, message: message(1, portReady, 1)})
				default:
					for i := range 20 {
						add(slot{len: 100 + i*i*90, rx: queue%2 == 0, data: data})
					}
				}
				return slots
			},
		})
		for _, n := range near {
			n.Close()
		}
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
		host.Wait()
	}
}
