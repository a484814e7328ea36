// Package rtc is the MC146818 real-time clock and CMOS memory of a PC, told by
// the host's clock. It has no alarm, periodic or update interrupt: what a
// driver writes there is kept and read back, and register C stays zero.
package rtc

import (
	"sync"
	"time"
)

// Port is the first of the two I/O ports: the index, then the data.
const (
	Port = 0x70
	Size = 2
)

// Registers, by the MC146818 data sheet; the century is where the FADT's
// CENTURY field says.
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
	aDefault = 0x26   // A: 32.768 kHz time base, 1.024 kHz rate

	bSET = 1 << 7 // B: the time is being set; updates stop
	bDM  = 1 << 2 // B: binary, else BCD
	b24  = 1 << 1 // B: 24 hours, else 12

	dVRT = 1 << 7 // D: RAM and time are valid

	// uipLead is how long before an update UIP is set: a driver that reads it
	// clear has this long for reading the time (data sheet, t_BUC).
	uipLead = 244 * time.Microsecond
)

// RTC is the clock. Its format is fixed, BCD and 24 hours: register B says so
// and does not let it be changed.
type RTC struct {
	now func() time.Time

	mu     sync.Mutex
	index  byte
	ram    [128]byte     // every register; those of the time are current only while bSET is
	offset time.Duration // the guest's clock less the host's
}

// New returns a clock at the host's time in UTC. now is the host's clock; nil
// means time.Now.
func New(now func() time.Time) *RTC {
	if now == nil {
		now = time.Now
	}
	r := &RTC{now: now}
	r.ram[regA] = aDefault
	r.ram[regB] = b24
	return r
}

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

// Write sets the index, whose top bit is the NMI mask and no part of it, or
// the register it names.
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

// update brings the registers of the time up to date, unless the guest holds
// them still, and returns the nanoseconds since the second began.
func (r *RTC) update() time.Duration {
	if r.ram[regB]&bSET != 0 {
		return 0
	}
	t := r.now().UTC().Add(r.offset)
	for reg, v := range map[byte]int{
		regSeconds: t.Second(), regMinutes: t.Minute(), regHours: t.Hour(),
		regDayOfWeek: int(t.Weekday()) + 1, regDayOfMonth: t.Day(), regMonth: int(t.Month()),
		regYear: t.Year() % 100, Century: t.Year() / 100 % 100,
	} {
		r.ram[reg] = byte(v/10<<4 | v%10)
	}
	return time.Duration(t.Nanosecond())
}

// adopt makes the clock go on from what the registers say. A field out of its
// range carries into the next; the day of the week follows from the date.
func (r *RTC) adopt() {
	f := func(reg byte) int { return int(r.ram[reg]>>4)*10 + int(r.ram[reg]&0xf) }
	now := r.now().UTC()
	r.offset = time.Date(f(Century)*100+f(regYear), time.Month(f(regMonth)), f(regDayOfMonth),
		f(regHours), f(regMinutes), f(regSeconds), now.Nanosecond(), time.UTC).Sub(now)
}

func (r *RTC) get() byte {
	since := r.update()
	switch r.index {
	case regA:
		if since >= time.Second-uipLead {
			return r.ram[regA] | uip
		}
	case regC:
		return 0
	case regD:
		return dVRT
	}
	return r.ram[r.index]
}

func (r *RTC) set(v byte) {
	r.update()
	switch r.index {
	case regA:
		r.ram[regA] = v &^ uip
	case regB:
		held := r.ram[regB]&bSET != 0
		r.ram[regB] = v&^bDM | b24
		if held && v&bSET == 0 {
			r.adopt()
		}
	case regC, regD:
	case regSeconds, regMinutes, regHours, regDayOfMonth, regMonth, regYear, Century:
		r.ram[r.index] = v
		if r.ram[regB]&bSET == 0 {
			r.adopt()
		}
	default:
		r.ram[r.index] = v
	}
}
