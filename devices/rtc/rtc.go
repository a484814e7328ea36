// Package rtc is the MC146818 real-time clock and CMOS memory of a PC, on the host's clock.
// Sections are those of Motorola's data sheet (ADI850).
//
// The registers and the flags of register C are computed when the guest reads them. A timer runs
// only for an event whose interrupt is enabled and whose flag the guest has cleared by reading it:
// a guest that uses no interrupt, or does not service it, causes no wake-ups on the host.
package rtc

import (
	"sync"
	"time"

	"gvm/panics"
)

// Port is the first of the two I/O ports: the index, then the data. IRQ is the ISA interrupt.
const (
	Port = 0x70
	Size = 2
	IRQ  = 8
)

// Registers; the FADT's CENTURY field has the century's.
const (
	regSeconds    = 0x00
	regMinutes    = 0x02
	regHours      = 0x04
	regDayOfWeek  = 0x06
	regDayOfMonth = 0x07
	regMonth      = 0x08
	regYear       = 0x09
	regA          = 0x0a
	regB          = 0x0b
	regC          = 0x0c
	regD          = 0x0d

	// Century is the index of the century's register.
	Century = 0x32
)

const (
	uip      = 1 << 7 // A: update in progress
	aDivider = 7 << 4 // A: divider control
	aRunning = 2 << 4 // A: a divider above this is held in reset
	aRate    = 0xf    // A: rate of the periodic interrupt
	aDefault = 0x26   // A: 32.768 kHz time base, 1.024 kHz rate

	bSET = 1 << 7 // B: the time is being set; updates stop
	bUIE = 1 << 4 // B: enables the update-ended interrupt
	bDM  = 1 << 2 // B: binary, else BCD
	b24  = 1 << 1 // B: 24 hours, else 12

	// The flags of C have the bits of their enables in B.
	cIRQ = 1 << 7
	cPF  = 1 << 6
	cAF  = 1 << 5
	cUF  = 1 << 4
	cAll = cPF | cAF | cUF

	dVRT = 1 << 7 // D: RAM and time are valid

	hourPM   = 1 << 7 // of an hour in 12-hour mode
	dontCare = 3 << 6 // of an alarm byte
)

const (
	// uipLead is how long before an update UIP is set: a driver that reads UIP clear has this long
	// to read the time (t_BUC).
	uipLead = 244 * time.Microsecond

	// firstUpdate is the fraction of a second at which the clock starts after the divider's reset:
	// the first update is half a second later.
	firstUpdate = 500 * time.Millisecond

	timeBase = 32768 // Hz

	// minClocks bounds the timer's rate at 1,024 Hz. PF keeps the rate of register A; above the
	// bound one interrupt stands for several periods.
	minClocks = timeBase / 1024

	// maxSleep bounds the timer: an alarm follows the host's clock, which may be set; the timer
	// does not.
	maxSleep = time.Minute
)

// Config has a clock's connections; the zero value is useful.
type Config struct {
	Now func() time.Time // the host's clock; nil is time.Now

	// IRQ sets the level of the interrupt line, which is high from an event whose interrupt is
	// enabled to the read of register C. Alarm is called when both the alarm's flag and its enable
	// bit become set. Both are called with the device's lock held: they must not block or call
	// back.
	IRQ   func(level bool)
	Alarm func()

	// Battery keeps time and memory over a restart of the machine; nil is a new one.
	Battery *Battery
}

// Battery is the part of a clock that survives a reset: the time and the memory. The zero value is
// at the host's time in UTC. One clock at a time may use it.
type Battery struct {
	ram      [128]byte // every register; those of the time are current only while it is held
	base, at time.Time // the guest's time was base at the host's time at
}

// RTC is the clock. Close must be called, or its timer stays.
type RTC struct {
	cfg Config

	mu sync.Mutex
	*Battery
	index  byte
	flags  byte      // C without IRQF
	seen   time.Time // the guest's time up to which flags are set
	active byte      // the flags that hold the line high
	timer  *time.Timer
	wake   time.Time // the guest's time when the timer is due; zero: not set
	closed bool
}

// New returns a clock after the RESET pin, with A and B as firmware sets them.
func New(cfg Config) *RTC {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.IRQ == nil {
		cfg.IRQ = func(bool) {}
	}
	if cfg.Alarm == nil {
		cfg.Alarm = func() {}
	}
	if cfg.Battery == nil {
		cfg.Battery = &Battery{}
	}
	r := &RTC{cfg: cfg, Battery: cfg.Battery}
	if r.at.IsZero() {
		r.at = r.host()
		r.base = r.at
	}
	r.ram[regA] = aDefault
	r.ram[regB] = b24
	r.seen = r.time()
	return r
}

// Close stops the timer; the line keeps its level.
func (r *RTC) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.disarm()
}

// host returns the host's clock without its monotonic reading, so that the guest's clock follows
// when the host's is set.
func (r *RTC) host() time.Time { return r.cfg.Now().Round(0).UTC() }

// time returns the guest's time. While the clock is held, its fraction is the phase of the divider
// and the rest is in the registers.
func (r *RTC) time() time.Time { return r.base.Add(r.host().Sub(r.at)) }

// running reports whether the divider runs, updating whether the time does too.
func (r *RTC) running() bool  { return r.ram[regA]&aDivider <= aRunning }
func (r *RTC) updating() bool { return r.running() && r.ram[regB]&bSET == 0 }

// Read reads the data port; the index port reads as ones.
func (r *RTC) Read(off uint64, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range p {
		p[i] = 0xff
		if off+uint64(i) == 1 {
			p[i] = r.get()
		}
	}
}

// Write sets the index, without its top bit, the NMI mask, or the register that the index selects.
func (r *RTC) Write(off uint64, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, v := range p {
		switch off + uint64(i) {
		case 0:
			r.index = v & 0x7f
		case 1:
			r.set(v)
		}
	}
}

// encode and decode convert a number to and from the format selected by DM; hour and fromHour do so
// for hours, in the format of the 24/12 bit.
func (r *RTC) encode(v int) byte {
	if r.ram[regB]&bDM != 0 {
		return byte(v)
	}
	return byte(v/10<<4 | v%10)
}

func (r *RTC) decode(b byte) int {
	if r.ram[regB]&bDM != 0 {
		return int(b)
	}
	return int(b>>4)*10 + int(b&0xf)
}

func (r *RTC) hour(h int) byte {
	if r.ram[regB]&b24 != 0 {
		return r.encode(h)
	}
	b := r.encode((h+11)%12 + 1)
	if h >= 12 {
		b |= hourPM
	}
	return b
}

func (r *RTC) fromHour(b byte) int {
	if r.ram[regB]&b24 != 0 {
		return r.decode(b)
	}
	h := r.decode(b&^hourPM) % 12
	if b&hourPM != 0 {
		h += 12
	}
	return h
}

// load updates the registers of the time, unless the guest holds them.
func (r *RTC) load() {
	if !r.updating() {
		return
	}
	t := r.seen
	year := t.Year()
	if year < 0 {
		year += 10000 // month or day 0 in year 0 carries below it
	}
	for reg, v := range map[byte]int{
		regSeconds: t.Second(), regMinutes: t.Minute(),
		regDayOfWeek: int(t.Weekday()) + 1, regDayOfMonth: t.Day(), regMonth: int(t.Month()),
		regYear: year % 100, Century: year / 100 % 100,
	} {
		r.ram[reg] = r.encode(v)
	}
	r.ram[regHours] = r.hour(t.Hour())
}

// adopt makes the clock continue from the registers and a fraction of a second. A field out of its
// range carries into the next; the day of the week follows from the date.
func (r *RTC) adopt(fraction time.Duration) {
	f := func(reg byte) int { return r.decode(r.ram[reg]) }
	r.at = r.host()
	r.base = time.Date(f(Century)*100+f(regYear), time.Month(f(regMonth)), f(regDayOfMonth),
		r.fromHour(r.ram[regHours]), f(regMinutes), f(regSeconds), int(fraction), time.UTC)
	r.seen = r.base
	r.disarm()
}

func (r *RTC) get() byte {
	r.elapse()
	r.load()
	v := r.ram[r.index]
	switch r.index {
	case regA:
		if r.updating() && time.Duration(r.seen.Nanosecond()) >= time.Second-uipLead {
			v |= uip
		}
	case regC:
		v = r.flags
		if r.flags&r.ram[regB]&cAll != 0 {
			v |= cIRQ
		}
		r.flags = 0
	case regD:
		v = dVRT
	}
	r.signal()
	return v
}

func (r *RTC) set(v byte) {
	r.elapse()
	r.load()
	phase := time.Duration(r.seen.Nanosecond())
	switch r.index {
	case regA:
		was := r.running()
		r.ram[regA] = v &^ uip
		if r.running() && !was {
			r.adopt(firstUpdate)
		}
		r.disarm() // the rate may have changed
	case regB:
		was := r.ram[regB]
		if v&bSET&^was != 0 {
			v &^= bUIE // a rising SET clears it
		}
		r.ram[regB] = v
		if was&^v&bSET != 0 {
			r.adopt(phase)
		}
	case regC, regD:
	case regSeconds, regMinutes, regHours, regDayOfMonth, regMonth, regYear, Century:
		r.ram[r.index] = v
		if r.updating() {
			r.adopt(phase)
		}
	default:
		r.ram[r.index] = v
	}
	r.signal()
}

// period returns the periodic interrupt's period in clocks of the time base, or 0. Rates 1 and 2 of
// this time base are those of 8 and 9 (table 5).
func (r *RTC) period() int64 {
	rate := r.ram[regA] & aRate
	switch rate {
	case 0:
		return 0
	case 1, 2:
		rate += 7
	}
	return 1 << (rate - 1)
}

// clocks returns how many clocks of the time base precede t.
func clocks(t time.Time) int64 {
	return t.Unix()*timeBase + int64(t.Nanosecond())*timeBase/int64(time.Second)
}

// elapse sets the flags of the events since its last call. After the host's clock was set back
// there are none.
func (r *RTC) elapse() {
	from, t := r.seen, r.time()
	r.seen = t
	if !r.running() || !t.After(from) {
		return
	}
	if p := r.period(); p != 0 && clocks(t)/p != clocks(from)/p {
		r.flags |= cPF
	}
	if !r.updating() {
		return
	}
	if t.Unix() == from.Unix() {
		return
	}
	r.flags |= cUF
	if a := r.nextAlarm(from); !a.IsZero() && !a.After(t) {
		r.flags |= cAF
	}
}

// nextAlarm returns the first second after t that the alarm bytes match, or zero if no time matches
// them.
func (r *RTC) nextAlarm(t time.Time) time.Time {
	matches := func(reg, now byte) bool {
		alarm := r.ram[reg+1]
		return alarm&dontCare == dontCare || alarm == now
	}
	var hours [24]bool
	var minutes, seconds [60]bool
	var some [3]bool
	for i := range 60 {
		minutes[i] = matches(regMinutes, r.encode(i))
		seconds[i] = matches(regSeconds, r.encode(i))
		some[0], some[1] = some[0] || minutes[i], some[1] || seconds[i]
	}
	for i := range 24 {
		hours[i] = matches(regHours, r.hour(i))
		some[2] = some[2] || hours[i]
	}
	if some != [3]bool{true, true, true} {
		return time.Time{}
	}
	// Each field that does not match advances to its next value, and those below it to 0.
	for t = time.Unix(t.Unix()+1, 0).UTC(); ; {
		switch h, m, s := t.Clock(); {
		case !hours[h]:
			t = t.Truncate(time.Hour).Add(time.Hour)
		case !minutes[m]:
			t = t.Truncate(time.Minute).Add(time.Minute)
		case !seconds[s]:
			t = t.Add(time.Second)
		default:
			return t
		}
	}
}

// signal drives the line and sets the timer by the flags and their enable bits. The caller has
// called elapse.
func (r *RTC) signal() {
	enabled := r.ram[regB] & cAll
	active := r.flags & enabled
	if (active != 0) != (r.active != 0) {
		r.cfg.IRQ(active != 0)
	}
	if active&^r.active&cAF != 0 {
		r.cfg.Alarm()
	}
	r.active = active

	var next time.Time
	sooner := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	waits := enabled &^ r.flags // a flag that is set causes no new event
	if p := r.period(); waits&cPF != 0 && active == 0 && p != 0 && r.running() {
		p = max(p, minClocks)
		at := (clocks(r.seen)/p + 1) * p
		ns := (at%timeBase*int64(time.Second) + timeBase - 1) / timeBase
		sooner(time.Unix(at/timeBase, ns).UTC())
	}
	if waits&cUF != 0 && active == 0 && r.updating() {
		sooner(time.Unix(r.seen.Unix()+1, 0).UTC())
	}
	if waits&cAF != 0 && r.updating() {
		sooner(r.nextAlarm(r.seen))
	}
	r.arm(next)
}

// arm sets the timer to next, or stops it if next is zero.
func (r *RTC) arm(next time.Time) {
	if next.Equal(r.wake) || r.closed {
		return
	}
	if next.IsZero() {
		r.disarm()
		return
	}
	r.wake = next
	d := min(next.Sub(r.seen), maxSleep)
	if r.timer == nil {
		r.timer = time.AfterFunc(d, panics.Func(r.fire))
	} else {
		r.timer.Reset(d)
	}
}

func (r *RTC) disarm() {
	if r.wake = (time.Time{}); r.timer != nil {
		r.timer.Stop()
	}
}

// fire is called by the timer.
func (r *RTC) fire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	r.wake = time.Time{}
	r.elapse()
	r.signal()
}
