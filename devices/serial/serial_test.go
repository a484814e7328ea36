package serial

import (
	"bytes"
	"testing"
)

// port is a UART whose edges are counted.
type port struct {
	*UART
	t     *testing.T
	out   *bytes.Buffer // to be read after Close
	edges int
}

func newPort(t *testing.T) *port {
	p := &port{t: t, out: new(bytes.Buffer)}
	p.UART = New(Config{Out: p.out, Raise: func() { p.edges++ }})
	t.Cleanup(func() { p.Close() })
	return p
}

func (p *port) in(reg uint64) byte {
	b := []byte{0}
	p.Read(reg, b)
	return b[0]
}

func (p *port) put(reg uint64, v byte) { p.Write(reg, []byte{v}) }

// want checks registers in the order given: "reg, value" pairs.
func (p *port) want(what string, pairs ...byte) {
	p.t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if got := p.in(uint64(pairs[i])); got != pairs[i+1] {
			p.t.Errorf("%s: register %d reads %#02x, want %#02x", what, pairs[i], got, pairs[i+1])
		}
	}
}

func (p *port) wantEdges(what string, n int) {
	p.t.Helper()
	if p.edges != n {
		p.t.Errorf("%s: %d edges, want %d", what, p.edges, n)
	}
	p.edges = 0
}

// typed sends input that must fit into the receiver.
func (p *port) typed(s string) {
	p.t.Helper()
	if n, err := p.Input().Write([]byte(s)); n != len(s) || err != nil {
		p.t.Fatalf("input %q: %d, %v", s, n, err)
	}
}

func TestReset(t *testing.T) {
	check := func(p *port) {
		t.Helper()
		p.want("after reset", regIER, 0, regIIR, 0x01, regLCR, 0, regMCR, 0, regLSR, 0x60, regMSR, 0xb0, regSCR, 0, regRBR, 0)
		p.put(regLCR, 0x80)
		p.want("divisor after reset", 0, 0x0c, 1, 0x00)
		p.put(regLCR, 0)
	}
	p := newPort(t)
	check(p)
	p.put(regLCR, 0x80)
	p.put(0, 0x11)
	p.put(1, 0x22)
	for reg, v := range map[uint64]byte{regLCR: 0x03, regIER: 0x0f, regIIR: 0xc1, regMCR: 0x0b, regSCR: 0x5a} {
		p.put(reg, v)
	}
	p.typed("lost")
	p.put(regRBR, 'k')
	p.Reset()
	check(p)
	if err := p.Close(); err != nil || p.out.String() != "k" {
		t.Errorf("output %q, %v", p.out, err)
	}
}

func TestRegisters(t *testing.T) {
	for _, c := range []struct {
		name      string
		reg       uint64
		put, want byte
	}{
		{"IER has four bits", regIER, 0xff, 0x0f},
		{"LCR has eight", regLCR, 0x7f, 0x7f},
		{"MCR has five", regMCR, 0xff, 0x1f},
		{"LSR is read-only", regLSR, 0x00, 0x60},
		{"MSR is read-only", regMSR, 0x00, 0xb0},
		{"scratch", regSCR, 0xa5, 0xa5},
		{"FCR without enable stays off", regIIR, 0xc6, 0x01},
		{"FCR enable shows in IIR", regIIR, 0xc1, 0xc1},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPort(t)
			p.put(c.reg, c.put)
			p.want(c.name, byte(c.reg), c.want)
		})
	}
}

func TestDivisorLatch(t *testing.T) {
	p := newPort(t)
	p.put(regIER, 0x05)
	p.put(regLCR, 0x83)
	p.Write(0, []byte{0x34, 0x12}) // one 16-bit write
	p.want("DLAB set", 0, 0x34, 1, 0x12)
	p.put(regLCR, 0x03)
	p.want("DLAB clear", 0, 0x00, regIER, 0x05)
	if p.Close(); p.out.Len() != 0 {
		t.Errorf("the divisor was sent: %q", p.out)
	}
}

// TestDetection follows the steps of Linux's 8250 autoconfiguration that distinguish the 16550A
// from its kin and from an empty address.
func TestDetection(t *testing.T) {
	p := newPort(t)
	p.put(regIER, 0)
	p.want("IER clear", regIER, 0)
	p.put(regIER, 0x0f)
	p.want("IER set", regIER, 0x0f)
	p.put(regIER, 0)
	p.put(regMCR, 0x1a)
	if got := p.in(regMSR) & 0xf0; got != 0x90 {
		t.Errorf("modem lines in loopback %#x, want 0x90", got)
	}
	p.put(regMCR, 0)
	p.put(regLCR, 0xbf)
	p.put(2, 0) // EFR of a 16650
	p.put(regLCR, 0)
	p.put(regIIR, 0x01)
	p.want("16550A: both FIFO bits", regIIR, 0xc1)
	p.put(regLCR, 0x80)
	p.want("no EFR", 2, 0xc1)
	p.put(regLCR, 0xbf)
	p.want("no EFR", 2, 0xc1)
	p.put(regLCR, 0)
	p.put(regIIR, 0x21)
	p.want("no 64-byte FIFO", regIIR, 0xc1)
	p.put(regLCR, 0x80)
	p.put(regIIR, 0x21)
	p.want("no 64-byte FIFO with DLAB", regIIR, 0xc1)
	p.put(regLCR, 0)
	p.put(regIER, 0x40)
	p.want("no UART unit enable bit", regIER, 0)

	// Start-up: is the THRE interrupt raised again each time it is enabled?
	p.put(regMCR, 0x08)
	for range 2 {
		p.put(regIER, 0x02)
		p.want("THRE", regIIR, 0xc2)
		p.put(regIER, 0)
	}
	p.wantEdges("THRE", 2)
}

func TestTransmitInterrupt(t *testing.T) {
	p := newPort(t)
	p.put(regMCR, 0x0b)
	p.put(regIIR, 0x01)
	p.wantEdges("nothing enabled", 0)
	p.put(regIER, 0x02)
	p.wantEdges("enabled while empty", 1)
	p.want("IIR clears it by being read", regIIR, 0xc2, regIIR, 0xc1)
	p.put(regRBR, 'a')
	p.wantEdges("sent", 1)
	p.put(regRBR, 'b')
	p.put(regRBR, 'c')
	p.wantEdges("still pending", 0)
	p.want("pending", regLSR, 0x60, regIIR, 0xc2, regIIR, 0xc1)
	p.put(regIER, 0x02)
	p.want("IER written, not newly enabled", regIIR, 0xc1)
	p.put(regIER, 0x00)
	p.put(regRBR, 'd')
	p.want("not enabled", regIIR, 0xc1)
	p.put(regMCR, 0x03)
	p.put(regIER, 0x02)
	p.wantEdges("OUT2 clear", 0)
	p.want("OUT2 does not change IIR", regIIR, 0xc2)
	if err := p.Close(); err != nil || p.out.String() != "abcd" {
		t.Errorf("output %q, %v", p.out, err)
	}
}

// TestTransmitInterruptByLSR: a driver whose handler reads LSR, and never IIR, gets an interrupt
// for each write that empties the transmitter (PC16550D, table IV: writing THR resets the
// interrupt).
func TestTransmitInterruptByLSR(t *testing.T) {
	p := newPort(t)
	p.put(regMCR, 0x0b)
	p.put(regIER, 0x02)
	p.wantEdges("enabled", 1)
	for range 3 {
		p.want("room", regLSR, 0x60)
		p.put(regRBR, 'x')
		p.wantEdges("sent", 1)
	}
	p.put(regRBR, 'y')
	p.wantEdges("sent without another look", 0)
	if err := p.Close(); err != nil || p.out.String() != "xxxy" {
		t.Errorf("output %q, %v", p.out, err)
	}
}

func TestReceive(t *testing.T) {
	for _, c := range []struct {
		name  string
		fcr   byte
		input string
		iir   byte
	}{
		{"no FIFO", 0x00, "1", 0x04},
		{"trigger 1", 0x01, "1", 0xc4},
		{"below 4", 0x41, "123", 0xcc},
		{"trigger 4", 0x41, "1234", 0xc4},
		{"below 8", 0x81, "1234567", 0xcc},
		{"trigger 8", 0x81, "12345678", 0xc4},
		{"below 14", 0xc1, "1234567890abc", 0xcc},
		{"trigger 14", 0xc1, "1234567890abcd", 0xc4},
		{"full", 0xc1, "1234567890abcdef", 0xc4},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPort(t)
			p.put(regMCR, 0x0b)
			p.put(regIIR, c.fcr)
			p.put(regIER, 0x01)
			p.typed(c.input)
			p.wantEdges("input", 1)
			p.want("input", regIIR, c.iir, regIIR, c.iir, regLSR, 0x61)
			for i := range len(c.input) {
				p.want("data", regRBR, c.input[i])
			}
			p.want("all read", regLSR, 0x60, regIIR, c.fcr&1*0xc0|0x01)
			p.wantEdges("all read", 0)
		})
	}
}

func TestReceiveFallsBelowTrigger(t *testing.T) {
	p := newPort(t)
	p.put(regMCR, 0x0b)
	p.put(regIIR, 0x41)
	p.put(regIER, 0x01)
	p.typed("wxyz")
	p.want("at, then below, the trigger", regIIR, 0xc4, regRBR, 'w', regIIR, 0xcc)
	p.put(regIIR, 0x43)
	p.want("receiver cleared", regIIR, 0xc1, regLSR, 0x60, regRBR, 0)
	p.typed("v")
	p.put(regIIR, 0x00)
	p.want("FIFOs switched off", regIIR, 0x01, regLSR, 0x60)
}

func TestPriority(t *testing.T) {
	p := newPort(t)
	p.put(regIIR, 0x01)
	p.put(regMCR, 0x12) // RTS in loopback: CTS rises, and DSR and DCD fall
	p.put(regRBR, 'q')
	p.put(regLCR, 0x40) // break, received in loopback behind the q
	p.put(regMCR, 0x0b)
	p.put(regIER, 0x0f)
	p.wantEdges("all at once", 1)
	p.want("data first: the break is not on top", regIIR, 0xc4, regLSR, 0xe1, regRBR, 'q')
	p.wantEdges("break on top", 1)
	p.want("line status", regIIR, 0xc6, regIIR, 0xc6, regLSR, 0xf1, regIIR, 0xc4, regLSR, 0x61)
	p.wantEdges("line status serviced, others left", 1)
	p.want("break's data", regRBR, 0, regIIR, 0xc2)
	p.wantEdges("data serviced, and THRE, the modem's left", 2)
	p.want("modem status", regIIR, 0xc0, regIIR, 0xc0, regMSR, 0xba, regIIR, 0xc1, regMSR, 0xb0)
	p.wantEdges("none left", 0)
}

func TestModemDeltas(t *testing.T) {
	for _, c := range []struct {
		name     string
		from, to byte // MCR
		want     byte // MSR
	}{
		{"loop takes the terminal away", 0x00, 0x10, 0x0b},
		{"loop, outputs as the terminal's", 0x0b, 0x1b, 0xb0},
		{"DTR is DSR", 0x10, 0x11, 0x22},
		{"RTS is CTS", 0x10, 0x12, 0x11},
		{"OUT1 is RI, whose rise is no event", 0x10, 0x14, 0x40},
		{"RI's fall is one", 0x14, 0x10, 0x04},
		{"OUT2 is DCD", 0x10, 0x18, 0x88},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPort(t)
			p.put(regMCR, c.from)
			p.in(regMSR)
			p.put(regMCR, c.to)
			p.want("changed", regMSR, c.want, regMSR, c.want&0xf0)
		})
	}
}

func TestOverrun(t *testing.T) {
	t.Run("FIFO keeps its bytes", func(t *testing.T) {
		p := newPort(t)
		p.put(regIIR, 0xc1)
		p.put(regMCR, 0x10)
		for i := range 17 {
			p.put(regRBR, 'A'+byte(i))
		}
		p.want("overrun", regLSR, 0x63, regLSR, 0x61)
		for i := range 16 {
			p.want("kept", regRBR, 'A'+byte(i))
		}
		p.want("the 17th is lost", regLSR, 0x60)
	})
	t.Run("RBR is overwritten", func(t *testing.T) {
		p := newPort(t)
		p.put(regMCR, 0x10)
		p.put(regRBR, 'A')
		p.put(regRBR, 'B')
		p.want("overrun", regLSR, 0x63, regRBR, 'B', regLSR, 0x60)
	})
	t.Run("loopback sends nothing", func(t *testing.T) {
		p := newPort(t)
		p.put(regMCR, 0x10)
		p.put(regRBR, 'A')
		if p.Close(); p.out.Len() != 0 {
			t.Errorf("sent %q", p.out)
		}
	})
}

func TestBreak(t *testing.T) {
	p := newPort(t)
	p.put(regIIR, 0x01)
	p.put(regMCR, 0x0b)
	p.put(regIER, 0x04)
	if err := p.Input().Break(); err != nil {
		t.Fatal(err)
	}
	p.wantEdges("break", 1)
	p.want("break", regIIR, 0xc6, regLSR, 0xf1, regIIR, 0xc1, regLSR, 0x61, regRBR, 0, regLSR, 0x60)
}

// FuzzAccess: no register and no width causes a panic.
func FuzzAccess(f *testing.F) {
	f.Add([]byte{2, 0xc1, 4, 0x1b, 0, 'x', 1, 0x0f, 3, 0x40, 2, 0x07, 4, 0x0b})
	f.Add([]byte{4, 0x10, 0, 1, 0, 2, 2, 1, 0, 3, 0x82, 0, 0x85, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		u := New(Config{Out: new(bytes.Buffer), Raise: func() {}})
		for i := 0; i+1 < len(b); i += 2 {
			if off := uint64(b[i] & 0xf); b[i]&0x80 != 0 {
				u.Read(off, make([]byte, 1+b[i]>>4&7))
			} else {
				u.Write(off, bytes.Repeat(b[i+1:i+2], 1+int(b[i]>>4&7)))
			}
			if len(u.rx) > fifoSize || len(u.tx) > fifoSize {
				t.Fatalf("FIFOs hold %d and %d", len(u.rx), len(u.tx))
			}
		}
		if err := u.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
