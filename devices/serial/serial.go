// Package serial is a 16550A UART after National's PC16550D data sheet, on an infinitely fast line:
// a byte leaves the transmitter as soon as the host has room for it, and a receive time-out passes
// as soon as it could begin. A slow side loses no byte in either direction.
package serial

import (
	"errors"
	"io"
	"sync"

	"gvm/panics"
)

// The places of the two UARTs of a PC, and their ISA interrupts, which are edge-triggered.
const (
	COM1    = 0x3f8
	COM1IRQ = 4
	COM2    = 0x2f8
	COM2IRQ = 3
	Size    = 8
)

// ErrStopped is the error of input after Stop.
var ErrStopped = errors.New("serial: the port is stopped")

// Registers (PC16550D table II).
const (
	regRBR = 0 // read; THR on write; DLL with DLAB
	regIER = 1 // DLM with DLAB
	regIIR = 2 // read; FCR on write
	regLCR = 3
	regMCR = 4
	regLSR = 5
	regMSR = 6
	regSCR = 7
)

const (
	ierRDI  = 1 << 0 // received data available, and time-out
	ierTHRI = 1 << 1 // transmitter holding register empty
	ierRLSI = 1 << 2 // receiver line status
	ierMSI  = 1 << 3 // modem status
	ierAll  = ierRDI | ierTHRI | ierRLSI | ierMSI

	iirNone    = 0x01
	iirMSI     = 0x00
	iirTHRI    = 0x02
	iirRDI     = 0x04
	iirRLSI    = 0x06
	iirTimeout = 0x0c
	iirFIFO    = 0xc0 // FIFOs are enabled

	fcrEnable  = 1 << 0
	fcrClearRX = 1 << 1
	fcrClearTX = 1 << 2

	lcrBreak = 1 << 6
	lcrDLAB  = 1 << 7

	mcrDTR  = 1 << 0
	mcrRTS  = 1 << 1
	mcrOUT1 = 1 << 2
	mcrOUT2 = 1 << 3 // gates the interrupt on a PC
	mcrLoop = 1 << 4
	mcrAll  = mcrDTR | mcrRTS | mcrOUT1 | mcrOUT2 | mcrLoop

	lsrDR   = 1 << 0 // data ready
	lsrOE   = 1 << 1 // overrun
	lsrPE   = 1 << 2 // parity error
	lsrFE   = 1 << 3 // framing error
	lsrBI   = 1 << 4 // break
	lsrTHRE = 1 << 5 // transmitter holding register empty
	lsrTEMT = 1 << 6 // transmitter empty
	lsrFIFO = 1 << 7 // an error is somewhere in the receiver FIFO
	lsrErrs = lsrOE | lsrPE | lsrFE | lsrBI

	msrTERI = 1 << 2 // trailing edge of RI; the other deltas are any change
	msrCTS  = 1 << 4
	msrDSR  = 1 << 5
	msrRI   = 1 << 6
	msrDCD  = 1 << 7

	// connected is the state of the modem lines with a terminal that is always there.
	connected = msrCTS | msrDSR | msrDCD

	fifoSize = 16

	// pollsAlone is the number of successive reads of LSR after which the driver counts as polling
	// the receiver (Linux: poll_get_char for kgdb and kdb, a boot loader's getc). A driver that
	// waits for room to send finds it with the first read. A polling driver may not set RTS. It
	// waits for one character and takes it at once, so it gets one; the rest stays with the
	// terminal, for the driver that comes later.
	pollsAlone = 16
)

var triggers = [4]int{1, 4, 8, 14} // FCR bits 7:6

// Config has a UART's connections.
type Config struct {
	// Out receives the guest's output, in order, from one goroutine.
	Out io.Writer

	// Raise makes one edge of the interrupt line. It is called with the
	// device's lock held: it must not block or call back.
	Raise func()
}

// char is a received character with its errors.
type char struct{ data, errs byte }

// UART is the device. Close must be called, or its goroutine stays.
type UART struct {
	cfg  Config
	feed chan struct{} // has room for one: serializes input; taken before mu

	mu       sync.Mutex
	ier      byte
	fcr      byte
	lcr      byte
	mcr      byte
	scr      byte
	dll, dlm byte
	errs     byte // LSR's error bits
	delta    byte // MSR's low half
	thre     bool // a THRE interrupt is pending, whether enabled or not
	shown    bool // LSR had THRE when the driver last read it, and it has not sent since
	causes   byte // the causes of the high interrupt line, as IER bits
	rx       []char
	tx       []byte // the transmitter FIFO
	polls    int    // successive reads of LSR that found both FIFOs empty

	rxEmpty sync.Cond // input waits for the receiver
	txRoom  sync.Cond // a vCPU waits for the transmitter

	out     []byte        // bytes that left the transmitter and are not written yet
	work    sync.Cond     // run waits for out, or closing
	stopped bool          // Stop was called: all waiting ends
	closing bool          // run ends when out is empty
	closed  bool          // run has ended: output is dropped
	err     error         // the first one of Config.Out
	done    chan struct{} // closed once run has ended
}

// New returns a UART in its state after reset, its output running.
func New(cfg Config) *UART {
	u := &UART{cfg: cfg, feed: make(chan struct{}, 1), done: make(chan struct{})}
	u.rxEmpty.L, u.txRoom.L, u.work.L = &u.mu, &u.mu, &u.mu
	u.reset()
	panics.Go(u.run)
	return u
}

// Reset puts the registers and FIFOs into their state after the machine's reset. Output that the
// guest has sent is kept.
func (u *UART) Reset() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.send(len(u.tx))
	u.reset()
	u.txRoom.Broadcast()
	u.rxEmpty.Broadcast()
}

func (u *UART) reset() {
	u.ier, u.fcr, u.lcr, u.mcr, u.scr, u.dll, u.dlm = 0, 0, 0, 0, 0, 0x0c, 0
	u.errs, u.delta, u.thre, u.shown, u.causes = 0, 0, false, false, 0
	u.rx, u.tx, u.polls = nil, nil, 0
}

// Read reads registers, one for each byte of p.
func (u *UART) Read(off uint64, p []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range p {
		p[i] = u.read(off + uint64(i))
	}
	u.update()
}

// Write writes registers, one for each byte of p. A byte for a full transmitter, which a driver
// would have seen in LSR, waits for room or Stop.
func (u *UART) Write(off uint64, p []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, v := range p {
		u.write(off+uint64(i), v)
	}
	u.update()
}

func (u *UART) read(reg uint64) byte {
	dlab := u.lcr&lcrDLAB != 0
	if reg != regLSR && (reg != regRBR || dlab) {
		u.polls = 0
	}
	switch reg {
	case regRBR:
		if dlab {
			return u.dll
		}
		return u.receive()
	case regIER:
		if dlab {
			return u.dlm
		}
		return u.ier
	case regIIR:
		id := u.iir()
		if id == iirTHRI {
			u.thre = false
		}
		if u.fcr&fcrEnable != 0 {
			id |= iirFIFO
		}
		return id
	case regLCR:
		return u.lcr
	case regMCR:
		return u.mcr
	case regLSR:
		return u.lsr()
	case regMSR:
		v := u.modem() | u.delta
		u.delta = 0
		return v
	case regSCR:
		return u.scr
	}
	return 0xff
}

func (u *UART) write(reg uint64, v byte) {
	dlab := u.lcr&lcrDLAB != 0
	u.polls = 0
	switch reg {
	case regRBR:
		if dlab {
			u.dll = v
			return
		}
		u.transmit(v)
	case regIER:
		if dlab {
			u.dlm = v
			return
		}
		// Enabling the interrupt while the register is empty makes it pending again: drivers start
		// sending that way.
		if v&^u.ier&ierTHRI != 0 && len(u.tx) == 0 {
			u.thre = true
		}
		u.ier = v & ierAll
	case regIIR:
		u.control(v)
	case regLCR:
		if v&^u.lcr&lcrBreak != 0 && u.mcr&mcrLoop != 0 {
			u.accept(char{errs: lsrBI})
		}
		u.lcr = v
	case regMCR:
		was := u.modem()
		u.mcr = v & mcrAll
		is := u.modem()
		u.delta |= (was ^ is) >> 4 &^ msrTERI
		if was&^is&msrRI != 0 {
			u.delta |= msrTERI
		}
		u.rxEmpty.Broadcast()
	case regSCR:
		u.scr = v
	}
}

// control handles a write to FCR.
func (u *UART) control(v byte) {
	if (v^u.fcr)&fcrEnable != 0 {
		v |= fcrClearRX | fcrClearTX // a change of mode clears both
	} else if v&fcrEnable == 0 {
		return // the other bits are written only together with this one
	}
	if v&fcrClearRX != 0 {
		u.rx = nil
		u.errs &= lsrOE
		u.rxEmpty.Broadcast()
	}
	if v&fcrClearTX != 0 && len(u.tx) > 0 {
		u.tx = nil
		u.thre = true
		u.txRoom.Broadcast()
	}
	u.fcr = v &^ (fcrClearRX | fcrClearTX)
}

// capacity returns how many characters each FIFO holds.
func (u *UART) capacity() int {
	if u.fcr&fcrEnable != 0 {
		return fifoSize
	}
	return 1
}

// modem returns the modem lines in MSR's high half. In loopback they are the outputs: DTR is DSR,
// RTS is CTS, OUT1 is RI, OUT2 is DCD.
func (u *UART) modem() byte {
	if u.mcr&mcrLoop == 0 {
		return connected
	}
	var v byte
	for _, w := range [...]struct{ out, in byte }{{mcrDTR, msrDSR}, {mcrRTS, msrCTS}, {mcrOUT1, msrRI},
		{mcrOUT2, msrDCD}} {
		if u.mcr&w.out != 0 {
			v |= w.in
		}
	}
	return v
}

func (u *UART) lsr() byte {
	v := u.lineStatus()
	u.errs, u.shown = 0, v&lsrTHRE != 0
	if v == lsrTHRE|lsrTEMT {
		if u.polls = min(u.polls+1, pollsAlone); u.polls == pollsAlone {
			u.rxEmpty.Broadcast()
		}
	}
	return v
}

// lineStatus returns LSR. A read of it clears errs.
func (u *UART) lineStatus() byte {
	v := u.errs
	if len(u.rx) > 0 {
		v |= lsrDR
	}
	if len(u.tx) == 0 {
		v |= lsrTHRE | lsrTEMT
	}
	if u.fcr&fcrEnable != 0 {
		for i, c := range u.rx {
			// The errors of the character on top are in LSR until it is read.
			if c.errs != 0 && (i > 0 || v&lsrErrs&^lsrOE != 0) {
				v |= lsrFIFO
			}
		}
	}
	return v
}

// pending returns the pending interrupts that IER enables, as IER bits.
func (u *UART) pending() byte {
	var v byte
	if u.errs != 0 {
		v |= ierRLSI
	}
	if len(u.rx) > 0 {
		v |= ierRDI
	}
	if u.thre {
		v |= ierTHRI
	}
	if u.delta != 0 {
		v |= ierMSI
	}
	return v & u.ier
}

// iir returns the pending interrupt of the highest priority.
func (u *UART) iir() byte {
	p := u.pending()
	switch {
	case p&ierRLSI != 0:
		return iirRLSI
	case p&ierRDI != 0:
		if u.fcr&fcrEnable == 0 || len(u.rx) >= triggers[u.fcr>>6] {
			return iirRDI
		}
		return iirTimeout
	case p&ierTHRI != 0:
		return iirTHRI
	case p&ierMSI != 0:
		return iirMSI
	}
	return iirNone
}

// update drives the interrupt line. The line of a UART is high while any cause is pending, and an
// edge-triggered controller sees only its rise. An edge that was serviced for an earlier cause, or
// that came while the input was masked, must not be the last one. So update makes another edge
// whenever the set of causes changes and is not empty. At worst a handler finds no work.
func (u *UART) update() {
	var c byte
	if u.mcr&(mcrOUT2|mcrLoop) == mcrOUT2 { // in loopback the OUT2 pin is inactive
		c = u.pending()
	}
	if c != u.causes && c != 0 {
		u.cfg.Raise()
	}
	u.causes = c
}

// receive takes the character in RBR.
func (u *UART) receive() byte {
	if len(u.rx) == 0 {
		return 0
	}
	c := u.rx[0]
	u.rx = u.rx[1:]
	u.errs &= lsrOE
	if len(u.rx) > 0 {
		u.errs |= u.rx[0].errs
	} else {
		u.rxEmpty.Broadcast()
	}
	return c.data
}

// accept puts a character into the receiver; a full receiver overruns.
func (u *UART) accept(c char) {
	if len(u.rx) == u.capacity() {
		u.errs |= lsrOE
		if u.fcr&fcrEnable != 0 {
			return // the FIFO keeps its content; RBR is overwritten
		}
		u.rx = nil
	}
	if len(u.rx) == 0 {
		u.errs |= c.errs
	}
	u.rx = append(u.rx, c)
}

// transmit handles a write to THR.
func (u *UART) transmit(b byte) {
	if u.mcr&mcrLoop != 0 {
		u.accept(char{data: b})
		u.thre = true
		return
	}
	// The write lowers the line if it is high for THRE alone, and it rises when the byte has gone. A
	// driver may wait for that edge that reads LSR in its handler and not IIR. After IIR the causes
	// have no THRE: a driver that sends a batch without another read gets one edge for it.
	if u.shown {
		u.shown = false
		u.causes &^= ierTHRI
	}
	for len(u.tx) >= u.capacity() {
		u.update()
		u.txRoom.Wait()
	}
	u.tx = append(u.tx, b)
	u.thre = false
	u.drain()
}
