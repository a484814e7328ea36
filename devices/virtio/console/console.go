// Package console is the virtio console device with multiple ports (virtio 1.3, 5.3): named streams
// of bytes between programs of the guest and this process, of which the first may be a console of
// the guest's kernel, such as hvc0. A driver without VIRTIO_CONSOLE_F_MULTIPORT takes port 0 for a
// console, and gets it only if it is one.
//
// A device whose one port is a console does not offer VIRTIO_CONSOLE_F_MULTIPORT, because then the
// driver reads the console's size in configuration space. VIRTIO_CONSOLE_RESIZE of the other way
// has columns before rows (5.3.6.2), and most versions of Linux read rows before columns.
//
// Each port has two goroutines, which read and write its stream. The workers of the queues never
// wait for a stream: bytes of the guest go through a bounded buffer, and chains that do not fit
// wait in their queue's order. So a stop of the device waits for no stream either.
package console

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
	"gvm/panics"
)

// Queue numbers (5.3.2) and sizes. Port 0 has the first two queues, port n queues 2n+2 and 2n+3.
const (
	controlRx = 2 // to the driver
	controlTx = 3

	queueSize = 64
)

// Feature bits (5.3.3).
const (
	featureSize      = 1 << 0 // VIRTIO_CONSOLE_F_SIZE
	featureMultiport = 1 << 1 // VIRTIO_CONSOLE_F_MULTIPORT
)

// MaxPorts bounds the ports of a device: each queue has a thread.
const MaxPorts = 16

// maxName bounds a port's name: drivers' buffers for control messages hold a few kilobytes.
const maxName = 256

// bufferLen is how many bytes wait in the device in each direction of a port.
const bufferLen = 64 << 10

// closePatience bounds the wait of Close for streams that do not take the guest's last bytes.
const closePatience = 500 * time.Millisecond

// Port is a stream of the guest.
type Port struct {
	Name string // by which the guest finds it
	// Stream gets the guest's bytes by Write, and its Read's bytes go to the guest, which has to open
	// the port first. The device's Close closes it, which ends a Read and a Write. For the guest an
	// error of either is the end of the other side.
	Stream io.ReadWriteCloser
	// Console makes the port a console of the guest's kernel, which opens it itself and waits for each
	// Write of the guest's bytes: they have to be quick. It is for the first port of a device.
	Console bool
}

// Device is a console device.
type Device struct {
	ports   []*port
	workers virtio.Workers

	// mu guards the fields below, and all of every port. It is taken before a worker's lock.
	mu        sync.Mutex
	multiport bool   // the driver has VIRTIO_CONSOLE_F_MULTIPORT
	cols      uint16 // of the console; 0: unknown
	rows      uint16
	changed   func()   // tells the driver of a change of the size; nil: it does not want that, or is not there
	due       bool     // the next driver that wants it is told
	started   bool     // the goroutines of the ports
	closed    bool     // Close was called
	control   []buffer // of the driver, for control messages
	drained   sync.Cond
}

// buffer is a chain that waits.
type buffer struct {
	w *virtio.Worker
	c *virtq.Chain
}

// New returns a device. The error names the port and its fault.
func New(ports []Port) (*Device, error) {
	if len(ports) == 0 || len(ports) > MaxPorts {
		return nil, fmt.Errorf("virtio-console: %d ports: want 1 to %d", len(ports), MaxPorts)
	}
	d := &Device{}
	d.drained.L = &d.mu
	names := map[string]bool{}
	for i, p := range ports {
		if p.Name == "" || len(p.Name) > maxName || names[p.Name] {
			return nil, fmt.Errorf("virtio-console: port %d has the name %q: want one of its own, of 1 to %d bytes",
				i, p.Name, maxName)
		}
		names[p.Name] = true
		if p.Console && i > 0 {
			return nil, fmt.Errorf("virtio-console: port %d is a console: want port 0", i)
		}
		d.ports = append(d.ports, newPort(d, i, p))
	}
	return d, nil
}

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDConsole }

// alone reports whether the only port is a console.
func (d *Device) alone() bool { return len(d.ports) == 1 && d.ports[0].console }

// Features implements virtio.Device.
func (d *Device) Features() uint64 {
	features := uint64(virtio.FeatureIndirectDesc | virtio.FeatureEventIdx)
	if d.ports[0].console {
		features |= featureSize
	}
	if !d.alone() {
		features |= featureMultiport
	}
	return features
}

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 {
	sizes := make([]uint16, 2*len(d.ports)+2)
	if d.alone() {
		sizes = sizes[:2] // no queues for control messages
	}
	for i := range sizes {
		sizes[i] = queueSize
	}
	return sizes
}

// Config implements virtio.Device: struct virtio_console_config (5.3.4) without emerg_wr.
func (d *Device) Config() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	b := []byte{4: byte(len(d.ports)), 11: 0}
	binary.LittleEndian.PutUint16(b, d.cols)
	binary.LittleEndian.PutUint16(b[2:], d.rows)
	return b
}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	d.mu.Lock()
	d.multiport = a.Features&featureMultiport != 0
	if p := d.ports[0]; p.console && !d.multiport {
		p.guestOpen = true // the driver does not say so
	}
	if !d.started && !d.closed {
		d.started = true
		for _, p := range d.ports {
			panics.Go(p.readStream)
			panics.Go(p.writeStream)
		}
	}
	d.mu.Unlock()
	err := d.workers.Start(a, func(i int) (virtio.Handler, time.Duration) {
		switch {
		case i == controlRx:
			return d.addControl, 0
		case i == controlTx:
			return d.message, 0
		}
		p := d.ports[max(i/2-1, 0)]
		if i%2 == 0 {
			return p.addRx, 0
		}
		return p.addTx, 0
	})
	if err != nil {
		return fmt.Errorf("virtio-console: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if a.Features&featureSize == 0 {
		return nil
	}
	if d.changed = a.ConfigChanged; d.due {
		d.due = false
		d.changed()
	}
	return nil
}

// Resize sets the size of the console, in characters, and tells the driver. A size of 0 columns or
// rows is none, and changes nothing. Of several sizes that the driver has not taken it gets the
// last one, and so does one that starts later.
func (d *Device) Resize(cols, rows uint16) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if cols == 0 || rows == 0 || cols == d.cols && rows == d.rows || !d.ports[0].console {
		return
	}
	d.cols, d.rows = cols, rows
	if d.changed != nil {
		d.changed()
	} else {
		d.due = true
	}
	if d.ports[0].ready {
		d.ports[0].owe(resize)
		d.tell()
	}
}

// Stop implements virtio.Device. Ports that the driver opened stay open, and bytes that a stream
// has for the guest, and a new size, wait.
func (d *Device) Stop(ctx context.Context) ([]uint16, error) { return d.stop(ctx, d.dropBuffers) }

// Reset implements virtio.Device.
func (d *Device) Reset() error {
	_, err := d.stop(context.Background(), func() {
		d.dropBuffers()
		d.mu.Lock()
		defer d.mu.Unlock()
		d.multiport = false
		for _, p := range d.ports {
			p.forget()
		}
	})
	d.mu.Lock()
	defer d.mu.Unlock()
	d.due = d.cols != 0
	return err
}

func (d *Device) stop(ctx context.Context, halted func()) ([]uint16, error) {
	bases, err := d.workers.Stop(ctx, halted)
	if err != nil {
		return nil, fmt.Errorf("virtio-console: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed = nil
	return bases, nil
}

// dropBuffers drops the chains that wait. If the device continues, they are taken again.
func (d *Device) dropBuffers() {
	d.mu.Lock()
	defer d.mu.Unlock()
	drop(&d.control)
	for _, p := range d.ports {
		drop(&p.rx)
		drop(&p.tx)
	}
}

func drop(buffers *[]buffer) {
	for _, b := range *buffers {
		b.w.Drop(b.c)
	}
	*buffers = nil
}

// Close closes the streams of the ports. It is called once the device is reset, and gives streams a
// moment to take the guest's last bytes.
func (d *Device) Close() error {
	d.mu.Lock()
	late := false
	timer := time.AfterFunc(closePatience, panics.Func(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		late = true
		d.drained.Broadcast()
	}))
	defer timer.Stop()
	for d.started && !late && !d.empty() {
		d.drained.Wait()
	}
	d.closed = true
	for _, p := range d.ports {
		p.wake.Broadcast()
	}
	d.mu.Unlock()
	var errs []error
	for _, p := range d.ports {
		if err := p.stream.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close the stream of port %s: %w", p.name, err))
		}
	}
	return errors.Join(errs...)
}

// empty reports whether the streams have taken all bytes of the guest. The caller holds mu.
func (d *Device) empty() bool {
	for _, p := range d.ports {
		if !p.hostGone && (p.writing || len(p.out) > 0) {
			return false
		}
	}
	return true
}

// Events of control messages (5.3.6.2).
const (
	deviceReady = 0 // VIRTIO_CONSOLE_DEVICE_READY, of the driver
	deviceAdd   = 1 // VIRTIO_CONSOLE_DEVICE_ADD
	portReady   = 3 // VIRTIO_CONSOLE_PORT_READY, of the driver
	consolePort = 4 // VIRTIO_CONSOLE_CONSOLE_PORT
	resize      = 5 // VIRTIO_CONSOLE_RESIZE
	portOpen    = 6 // VIRTIO_CONSOLE_PORT_OPEN, of both
	portName    = 7 // VIRTIO_CONSOLE_PORT_NAME
)

const controlLen = 8 // struct virtio_console_control: id, event, value

// message serves the queue of the driver's control messages.
func (d *Device) message(w *virtio.Worker, c *virtq.Chain) error {
	var b [controlLen]byte
	if n := c.Out.Len(); n < controlLen || c.In.Len() > 0 {
		return guestErr("5.3.6.2", "control message of %d bytes, with room for %d", n, c.In.Len())
	}
	c.Out.Read(b[:])
	id := binary.LittleEndian.Uint32(b[:])
	event, value := binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:])
	d.mu.Lock()
	defer d.mu.Unlock()
	defer w.Complete(c, 0)
	switch {
	case !d.multiport:
	case event == deviceReady && value == 1:
		for _, p := range d.ports {
			p.owe(deviceAdd)
		}
	case id >= uint32(len(d.ports)): // the driver knows ports that the device does not: nothing to do
	case event == portReady && value == 1:
		p := d.ports[id]
		p.ready = true
		p.owe(portName)
		if p.console {
			p.owe(consolePort)
			if d.cols != 0 {
				p.owe(resize)
			}
		}
		if !p.hostGone {
			p.owe(portOpen)
		}
	case event == portOpen:
		d.ports[id].guestOpen = value == 1
		d.ports[id].send()
	}
	d.tell()
	return nil
}

// addControl serves the queue of buffers for control messages.
func (d *Device) addControl(w *virtio.Worker, c *virtq.Chain) error {
	if n := c.In.Len(); n < controlLen || c.Out.Len() > 0 {
		return guestErr("5.3.6.2", "buffer of %d bytes for control messages, and %d that are readable", n, c.Out.Len())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.control = append(d.control, buffer{w, c})
	d.tell()
	return nil
}

// messages are the device's events in the order in which a port's are sent: Linux ignores the size
// of a port that is no console yet.
var messages = [...]uint16{deviceAdd, consolePort, portName, portOpen, resize}

// tell sends the control messages that are owed while there are buffers. The caller holds mu.
func (d *Device) tell() {
	for _, p := range d.ports {
		for _, event := range messages {
			if p.owed&(1<<event) == 0 {
				continue
			}
			if len(d.control) == 0 {
				return
			}
			p.owed &^= 1 << event
			value := uint16(1)
			if event == portOpen && p.hostGone || event == resize { // which has no value
				value = 0
			}
			m := binary.LittleEndian.AppendUint32(nil, uint32(p.id))
			m = binary.LittleEndian.AppendUint16(m, event)
			m = binary.LittleEndian.AppendUint16(m, value)
			switch event {
			case portName:
				m = append(m, p.name...)
			case resize: // struct virtio_console_resize
				m = binary.LittleEndian.AppendUint16(m, d.cols)
				m = binary.LittleEndian.AppendUint16(m, d.rows)
			}
			to := d.control[0]
			d.control = d.control[1:]
			n, _ := to.c.In.Write(m) // a driver with small buffers gets the beginning of a long name
			to.w.Complete(to.c, uint32(n))
		}
	}
}

func guestErr(section, format string, args ...any) error {
	return &virtq.GuestError{Rule: "virtio 1.3, " + section, What: fmt.Sprintf(format, args...)}
}
