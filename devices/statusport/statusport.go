// Package statusport is a device of two I/O ports by which a program in the guest says that it
// lives and how its work ended. It needs no driver: Linux lets a program use ports by ioperm(2) or
// /dev/port. It is the last way for an agent whose kernel has neither vsock, nor a virtio console,
// nor a second UART.
//
// The program writes a value to the first port and then a kind to the second one, which makes a
// report of the two.
package statusport

import "sync"

// The ports. Reads return the bytes of Magic, by which a program finds the device.
const (
	Port  = 0x508
	Size  = 2
	Magic = "gv"
)

// Kind is the kind of a report.
type Kind byte

// The kinds. Others are reported too, for the caller to refuse.
const (
	Alive    Kind = 1 // the program runs; the value is the version of its protocol
	Exited   Kind = 2 // the work ended with the exit status of the value
	Signaled Kind = 3 // the work was killed by the signal of the value
	Failed   Kind = 4 // the work did not start: the value is its errno
)

// Report is one report of the guest.
type Report struct {
	Kind  Kind
	Value byte
}

// Device is the register of the value, and of the kind.
type Device struct {
	report func(Report)

	mu      sync.Mutex
	value   byte
	reports uint64
	last    Report
}

// New returns a device that calls report, on the vCPU's thread.
func New(report func(Report)) *Device { return &Device{report: report} }

// Read returns Magic.
func (d *Device) Read(off uint64, p []byte) {
	for i := range p {
		p[i] = 0xff
		if n := off + uint64(i); n < Size {
			p[i] = Magic[n]
		}
	}
}

// Write sets the value, or makes a report of it.
func (d *Device) Write(off uint64, p []byte) {
	for i, b := range p {
		switch off + uint64(i) {
		case 0:
			d.mu.Lock()
			d.value = b
			d.mu.Unlock()
		case 1:
			d.mu.Lock()
			r := Report{Kind(b), d.value}
			d.reports++
			d.last = r
			d.mu.Unlock()
			d.report(r)
		}
	}
}

// State returns the register of the value, the number of reports, and the last one. It is for the
// machine to show: this package is a part of programs in guests too, and stays small.
func (d *Device) State() (value byte, reports uint64, last Report) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.value, d.reports, d.last
}
