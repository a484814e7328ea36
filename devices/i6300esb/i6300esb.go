// Package i6300esb is the watchdog timer of Intel's 6300ESB I/O controller hub (Intel 300641), a
// PCI function that Linux's driver i6300esb knows. A guest enables it and has to reload it before
// its two stages have run out, one after the other. The first one does nothing: its interrupt,
// which is no PCI interrupt, is not wired.
package i6300esb

import (
	"encoding/binary"
	"sync"
	"time"

	"gvm/devices/pci"
	"gvm/inspect"
	"gvm/panics"
)

// Registers of configuration space, from regConfig on, and their bits.
const (
	regConfig = 0x60 // WDT Configuration
	offLock   = 8    // WDT Lock, at 0x68

	outputDisable = 1 << 5 // WDT_OUTPUT: the end of the second stage does nothing
	fastClock     = 1 << 2 // WDT_PRE_SEL: 1 MHz instead of 1 kHz
	intType       = 3      // WDT_INT_TYPE
	freeRunning   = 1 << 2 // WDT_TOUT_CNF: the first stage follows the second
	enable        = 1 << 1 // WDT_ENABLE
	locked        = 1 << 0 // WDT_LOCK: the register keeps its value until a reset
)

// Registers in memory (BAR 0), and bits of the last. Before each write they are unlocked by 0x80
// and 0x86 written to reload.
const (
	preload1 = 0x0 // of the first stage, 20 bits
	preload2 = 0x4
	reload   = 0xc
	barSize  = 0x10

	unlock1       = 0x80
	unlock2       = 0x86
	reloadTimer   = 1 << 8 // WDT_RELOAD: begins the first stage again
	reloadTimeout = 1 << 9 // WDT_TIMEOUT: the second stage has ended; cleared by writing 1
	preloadMask   = 1<<20 - 1
)

// A stage takes a millisecond at least: a guest cannot keep the host busy with it.
const shortest = time.Millisecond

// tooLate is how late a timer comes only if this process was stopped meanwhile, and the guest with
// it: the stage begins again.
const tooLate = time.Second

// Kept is the state that outlives a reset of the machine.
type Kept struct {
	Timeout bool // the second stage has ended
}

// Config describes a watchdog.
type Config struct {
	Kept *Kept
	// Expired is called at the end of the second stage. It may take its time, but has to return for
	// Close.
	Expired func()
}

// Device is a watchdog. A nil *Device is none: Pause, Resume and Close do nothing.
type Device struct {
	cfg Config
	fn  *pci.Function
	// The clock, of package time but in tests.
	now   func() time.Duration
	after func(time.Duration, func()) (stop func() bool)

	calls sync.WaitGroup // of Expired

	mu      sync.Mutex // below the function's lock
	config  byte
	lock    byte
	preload [2]uint32
	unlock  int           // steps of the sequence that were written: 0 to 2
	stage   int           // 1 or 2; 0: it does not count
	left    time.Duration // of the stage, while its timer does not run
	end     time.Duration // of the stage, by now, while its timer runs
	stop    func() bool   // stops the timer; nil: it does not run
	timer   int           // counts timers: one that was stopped too late is an earlier one
	paused  bool
	closed  bool
}

// New returns a watchdog that does not count.
func New(c Config) (*Device, error) {
	d := &Device{cfg: c, now: inspect.Clock}
	d.after = func(t time.Duration, f func()) func() bool { return time.AfterFunc(t, panics.Func(f)).Stop }
	d.fn = pci.NewFunction(pci.FunctionConfig{Name: "watchdog", Vendor: 0x8086, Device: 0x25ab,
		Class: 0x088000, // other system peripheral
		Reset: d.reset, Inspect: d.inspect})
	if err := d.fn.AddBAR(pci.BAR{Index: 0, Size: barSize, Handler: (*registers)(d)}); err != nil {
		return nil, err
	}
	d.fn.AddRegisters(regConfig, pci.Capability{
		Body:     make([]byte, offLock+1),
		Writable: []byte{outputDisable | fastClock | intType, 0, 0, 0, 0, 0, 0, 0, freeRunning | enable | locked},
		OnWrite:  d.configure,
	})
	return d, d.reset()
}

// Function returns the PCI function, for the caller to put on a bus.
func (d *Device) Function() *pci.Function { return d.fn }

// reset is a reset of the function.
func (d *Device) reset() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.config, d.lock, d.unlock = 0, 0, 0
	d.preload = [2]uint32{preloadMask, preloadMask}
	d.begin(0)
	return nil
}

// configure follows a write to the registers of configuration space.
func (d *Device) configure(body []byte, off, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.config = body[0]
	if off+n > offLock && d.lock&locked == 0 {
		was := d.lock & enable
		d.lock = body[offLock]
		if is := d.lock & enable; is == 0 {
			d.begin(0)
		} else if was == 0 {
			d.begin(1)
		}
	}
	body[offLock] = d.lock
}

// registers is BAR 0.
type registers Device

// Read implements pci.Handler.
func (r *registers) Read(off uint64, p []byte) {
	d := (*Device)(r)
	d.mu.Lock()
	defer d.mu.Unlock()
	var b [barSize + 8]byte
	binary.LittleEndian.PutUint32(b[preload1:], d.preload[0])
	binary.LittleEndian.PutUint32(b[preload2:], d.preload[1])
	if d.cfg.Kept.Timeout {
		binary.LittleEndian.PutUint16(b[reload:], reloadTimeout)
	}
	copy(p, b[off:])
}

// Write implements pci.Handler. A write that is no step of the sequence ends it.
func (r *registers) Write(off uint64, p []byte) {
	d := (*Device)(r)
	d.mu.Lock()
	defer d.mu.Unlock()
	var b [8]byte
	copy(b[:], p)
	v := binary.LittleEndian.Uint32(b[:])
	unlock := d.unlock
	d.unlock = 0
	switch {
	case off == reload && v == unlock1:
		d.unlock = 1
	case off == reload && v == unlock2 && unlock == 1:
		d.unlock = 2
	case unlock < 2:
	case off == preload1 && len(p) == 4:
		d.preload[0] = v & preloadMask
	case off == preload2 && len(p) == 4:
		d.preload[1] = v & preloadMask
	case off == reload && len(p) >= 2:
		if v&reloadTimeout != 0 {
			d.cfg.Kept.Timeout = false
		}
		if v&reloadTimer != 0 && d.lock&enable != 0 {
			d.begin(1)
		}
	}
}

// begin begins a stage, or stops the timer with 0. The caller holds mu.
func (d *Device) begin(stage int) {
	d.halt()
	if d.stage = stage; stage == 0 {
		return
	}
	// The clocks are the 33 MHz of PCI, divided by 2^15 or 2^5.
	shift := 15
	if d.config&fastClock != 0 {
		shift = 5
	}
	d.left = max(time.Duration(d.preload[stage-1])<<shift*1000/33, shortest)
	d.run()
}

// run has the timer of the stage run for the time that is left. The caller holds mu.
func (d *Device) run() {
	if d.stage == 0 || d.paused || d.closed {
		return
	}
	d.timer++
	n := d.timer
	d.end = d.now() + d.left
	d.stop = d.after(d.left, func() { d.over(n) })
}

// halt stops the timer. The caller holds mu.
func (d *Device) halt() {
	if d.stop == nil {
		return
	}
	d.stop()
	d.stop = nil
	d.timer++
	d.left = max(d.end-d.now(), 0)
}

// over is the end of a timer.
func (d *Device) over(timer int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if timer != d.timer {
		return
	}
	d.stop = nil
	switch {
	case d.now()-d.end > tooLate:
		d.begin(d.stage)
		return
	case d.stage == 1:
		d.begin(2)
		return
	}
	d.stage = 0 // until a reload
	if d.config&outputDisable == 0 {
		d.cfg.Kept.Timeout = true
		d.calls.Add(1)
		panics.Unlocked(&d.mu, func() {
			defer d.calls.Done()
			d.cfg.Expired()
		})
	}
	if again := byte(freeRunning | enable); timer == d.timer && d.lock&again == again {
		d.begin(1)
	}
}

// Pause stops the clock while the guest does not run, and Resume lets it go on.
func (d *Device) Pause() {
	if d != nil {
		d.setPaused(true)
	}
}

// Resume ends a Pause.
func (d *Device) Resume() {
	if d != nil {
		d.setPaused(false)
	}
}

func (d *Device) setPaused(paused bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused == paused {
		return
	}
	if d.paused = paused; paused {
		d.halt()
	} else {
		d.run()
	}
}

// Close stops the timer, and waits for Expired.
func (d *Device) Close() {
	if d == nil {
		return
	}
	d.mu.Lock()
	d.closed = true
	d.begin(0)
	d.mu.Unlock()
	d.calls.Wait()
}

func (d *Device) inspect() inspect.Node {
	return inspect.Locked("watchdog", &d.mu, func() []inspect.Node {
		left := d.left
		if d.stop != nil {
			left = d.end - d.now()
		}
		return []inspect.Node{
			inspect.Bits("config", d.config), inspect.Bits("lock", d.lock),
			inspect.Int("preload1", d.preload[0]), inspect.Int("preload2", d.preload[1]),
			inspect.Int("stage", d.stage), {Name: "left", Value: inspect.Age(left)},
			inspect.Bool("timeout", d.cfg.Kept.Timeout),
		}
	})
}
