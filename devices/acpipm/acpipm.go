// Package acpipm is the fixed hardware of ACPI power management (ACPI 6.4,
// 4.8): the PM1a event and control blocks, the PM timer, the power button, and
// the reset control register at 0xcf9. There is no SMI command port, so the
// machine is in ACPI mode from the start and SCI_EN always reads as set. There
// are no general-purpose events.
package acpipm

import (
	"math/bits"
	"sync"
	"time"
)

// Port is the default place of the register blocks. They are one range: PM1a_EVT at +0 (4 bytes),
// PM1a_CNT at +4 (2 bytes), PM_TMR at +8 (4 bytes).
const (
	Port       = 0x600
	Size       = 12
	OffEvent   = 0
	OffControl = 4
	OffTimer   = 8
)

// SleepTypeS5 is the SLP_TYP value of the soft-off state, for the DSDT's \_S5.
const SleepTypeS5 = 5

// ResetPort is the reset control register; writing ResetValue there resets the machine. The port
// lies inside PCI's CONFIG_ADDRESS (0xcf8, 4 bytes), which takes only 32-bit accesses: a one-byte
// access at 0xcf9 goes to this register.
const (
	ResetPort  = 0xcf9
	ResetValue = rstCPU | sysRST

	sysRST  = 1 << 1 // hard reset, else the processors' INIT
	rstCPU  = 1 << 2 // a write of 1 resets
	fullRST = 1 << 3 // a power cycle
)

const (
	gblEN     = 1 << 5  // PM1_EN; also GBL_STS
	pwrbtnSTS = 1 << 8  // PM1_STS; also PWRBTN_EN in PM1_EN
	rtcSTS    = 1 << 10 // PM1_STS; also RTC_EN in PM1_EN
	sciEN     = 1 << 0  // PM1_CNT
	gblRLS    = 1 << 2  // PM1_CNT, reads as zero
	slpTYP    = 10      // PM1_CNT, 3 bits
	slpEN     = 1 << 13 // PM1_CNT, reads as zero

	// TMR_EN is not among them: the timer is 32 bits wide (FADT TMR_VAL_EXT), and its carry, once
	// in 20 minutes, raises no event.
	enables = gblEN | pwrbtnSTS | rtcSTS

	timerHz = 3579545
)

// Config connects the registers to the machine. Every function is called on the thread of the vCPU
// that wrote the register.
type Config struct {
	PowerOff func() // the guest entered S5
	Reset    func() // the guest wrote the reset control register

	// SCI sets the level of the system control interrupt. It is called when the
	// level changes, with the device's lock held: it must not call back.
	SCI func(level bool)

	// Now is a monotonic clock for the PM timer; nil is the host's monotonic clock since New.
	Now func() time.Duration
}

// PM is the device at Port; ResetControl returns the one at ResetPort.
type PM struct {
	cfg Config

	mu                   sync.Mutex
	status, enable, cntl uint16
	sci                  bool
	rst                  byte
}

// New returns the registers in their state after reset.
func New(cfg Config) *PM {
	if cfg.Now == nil {
		start := time.Now()
		cfg.Now = func() time.Duration { return time.Since(start) }
	}
	return &PM{cfg: cfg}
}

// PowerButton presses the power button, which asks the guest to shut down. It reports whether the
// guest listens: until the guest's ACPI driver enables the event, the button only sets its status
// bit.
func (d *PM) PowerButton() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status |= pwrbtnSTS
	d.update()
	return d.enable&pwrbtnSTS != 0
}

// RTCAlarm signals the alarm of the real-time clock, which wakes a sleeping guest: in
// suspend-to-idle Linux waits for this event and not for the clock's interrupt.
func (d *PM) RTCAlarm() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status |= rtcSTS
	d.update()
}

// Reset puts the registers into their state after reset. The timer continues.
func (d *PM) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status, d.enable, d.cntl, d.rst = 0, 0, 0, 0
	d.update()
}

func (d *PM) update() {
	if level := d.status&d.enable != 0; level != d.sci {
		d.sci = level
		d.cfg.SCI(level)
	}
}

func (d *PM) timer() uint32 {
	hi, lo := bits.Mul64(uint64(d.cfg.Now()), timerHz)
	q, _ := bits.Div64(hi%uint64(time.Second), lo, uint64(time.Second))
	return uint32(q)
}

// Read reads the registers' bytes; gaps between blocks read as zero.
func (d *PM) Read(off uint64, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	tmr := d.timer() // once, so that its bytes are consistent
	regs := [Size]byte{
		byte(d.status), byte(d.status >> 8), byte(d.enable), byte(d.enable >> 8),
		byte(d.cntl | sciEN), byte(d.cntl >> 8), 0, 0,
		byte(tmr), byte(tmr >> 8), byte(tmr >> 16), byte(tmr >> 24),
	}
	clear(p)
	if off < Size {
		copy(p, regs[off:])
	}
}

// Write takes any run of the registers' bytes. Writing ones clears status bits; the timer is
// read-only.
func (d *PM) Write(off uint64, p []byte) {
	sleep := false
	d.mu.Lock()
	for i, v := range p {
		v := uint16(v)
		switch off + uint64(i) {
		case 0:
			d.status &^= v
		case 1:
			d.status &^= v << 8
		case 2:
			d.enable = (d.enable&0xff00 | v) & enables
		case 3:
			d.enable = (d.enable&0x00ff | v<<8) & enables
		case 4:
			d.cntl = d.cntl&0xff00 | v&^(sciEN|gblRLS)
		case 5:
			d.cntl = d.cntl&0x00ff | v<<8&^slpEN
			sleep = v<<8&slpEN != 0 && d.cntl>>slpTYP&7 == SleepTypeS5
		}
	}
	d.update()
	d.mu.Unlock()
	if sleep {
		d.cfg.PowerOff()
	}
}

// ResetControl is the register at ResetPort, one byte wide.
type ResetControl struct{ d *PM }

// ResetControl returns the handler for ResetPort.
func (d *PM) ResetControl() ResetControl { return ResetControl{d} }

// Read returns the type of reset that was written last.
func (r ResetControl) Read(_ uint64, p []byte) {
	r.d.mu.Lock()
	defer r.d.mu.Unlock()
	clear(p)
	if len(p) > 0 {
		p[0] = r.d.rst
	}
}

// Write stores the type of reset, all of which are the same here, and resets when the byte's bit 2
// is set.
func (r ResetControl) Write(_ uint64, p []byte) {
	if len(p) == 0 {
		return
	}
	r.d.mu.Lock()
	r.d.rst = p[0] & (sysRST | fullRST)
	r.d.mu.Unlock()
	if p[0]&rstCPU != 0 {
		r.d.cfg.Reset()
	}
}
