package acpipm

import (
	"bytes"
	"fmt"
	"testing"
	"time"
)

// machine records the registers' effects, in order.
type machine struct {
	*PM
	now    time.Duration
	events []string
}

func newMachine() *machine {
	m := new(machine)
	say := func(s string) func() { return func() { m.events = append(m.events, s) } }
	m.PM = New(Config{
		PowerOff: say("off"), Reset: say("reset"),
		SCI: func(level bool) { say(fmt.Sprint("SCI ", level))() },
		Now: func() time.Duration { return m.now },
	})
	return m
}

func (m *machine) want(t *testing.T, what string, events ...string) {
	t.Helper()
	if fmt.Sprint(m.events) != fmt.Sprint(events) {
		t.Errorf("%s: events %v, want %v", what, m.events, events)
	}
	m.events = nil
}

func (m *machine) reads(t *testing.T, what string, off uint64, want ...byte) {
	t.Helper()
	p := bytes.Repeat([]byte{0xee}, len(want))
	if m.Read(off, p); !bytes.Equal(p, want) {
		t.Errorf("%s: % x at %d, want % x", what, p, off, want)
	}
}

func TestControl(t *testing.T) {
	for _, c := range []struct {
		name   string
		off    uint64
		p      []byte
		cntl   []byte
		events []string
	}{
		{"S5", 4, []byte{0x01, 0x34}, []byte{0x01, 0x14}, []string{"off"}},
		{"S5 by its high byte", 5, []byte{0x34}, []byte{0x01, 0x14}, []string{"off"}},
		{"S5 as part of a wide write", 2, []byte{0, 0, 0, 0x34}, []byte{0x01, 0x14}, []string{"off"}},
		{"SLP_TYP alone", 4, []byte{0x01, 0x14}, []byte{0x01, 0x14}, nil},
		{"another sleep type", 4, []byte{0x01, 0x30}, []byte{0x01, 0x10}, nil},
		{"SCI_EN cannot be cleared", 4, []byte{0x02, 0x00}, []byte{0x03, 0x00}, nil},
		{"GBL_RLS reads as zero", 4, []byte{0x05, 0x00}, []byte{0x01, 0x00}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine()
			m.Write(c.off, c.p)
			m.want(t, c.name, c.events...)
			m.reads(t, c.name, 4, c.cntl...)
		})
	}
}

func TestPowerButton(t *testing.T) {
	m := newMachine()
	if m.PowerButton() {
		t.Error("a guest without a driver listens")
	}
	m.reads(t, "pressed unheard", 0, 0x00, 0x01, 0x00, 0x00)
	m.want(t, "pressed unheard")
	m.Write(2, []byte{0x20, 0x01})
	m.want(t, "enabled while it is set", "SCI true")
	m.Write(0, []byte{0xff, 0xfe})
	m.reads(t, "other bits cleared", 0, 0x00, 0x01, 0x20, 0x01)
	m.want(t, "other bits cleared")
	m.Write(0, []byte{0x00, 0x01})
	m.want(t, "cleared", "SCI false")
	if !m.PowerButton() {
		t.Error("a guest with a driver does not listen")
	}
	m.PowerButton()
	m.want(t, "pressed twice", "SCI true")
	m.Write(3, []byte{0x00})
	m.want(t, "disabled", "SCI false")
	m.Write(3, []byte{0x01})
	m.PM.Reset()
	m.want(t, "enabled, reset", "SCI true", "SCI false")
	m.reads(t, "after reset", 0, 0, 0, 0, 0, 1, 0)
}

func TestRTCAlarm(t *testing.T) {
	m := newMachine()
	m.RTCAlarm()
	m.reads(t, "not enabled", 0, 0x00, 0x04, 0x00, 0x00)
	m.want(t, "not enabled")
	m.Write(2, []byte{0x00, 0x04})
	m.want(t, "enabled", "SCI true")
	m.RTCAlarm()
	m.Write(0, []byte{0x00, 0x04})
	m.want(t, "cleared", "SCI false")
}

func TestEnableBits(t *testing.T) {
	m := newMachine()
	m.Write(2, []byte{0xff, 0xff})
	m.reads(t, "GBL_EN, PWRBTN_EN and RTC_EN alone", 2, 0x20, 0x05)
}

func TestTimer(t *testing.T) {
	m := newMachine()
	for _, c := range []struct {
		now  time.Duration
		want []byte
	}{
		{0, []byte{0, 0, 0, 0}},
		{time.Second, []byte{0x99, 0x9e, 0x36, 0}},                   // 3579545
		{1001 * time.Second, []byte{0x41, 0x24, 0x92, 0xd5}},         // 3583124545
		{1200 * time.Second, []byte{0x30, 0x6d, 0x07, 0x00}},         // 4295454000 - 2^32
		{100 * 365 * 24 * time.Hour, []byte{0x00, 0xee, 0xcd, 0xcd}}, // 11288453112000000 mod 2^32
		{280 * time.Nanosecond, []byte{1, 0, 0, 0}},                  // 1.0023 ticks
		{279 * time.Nanosecond, []byte{0, 0, 0, 0}},                  // 0.9987 ticks
	} {
		m.now = c.now
		m.reads(t, c.now.String(), 8, c.want...)
		m.reads(t, c.now.String(), 10, c.want[2:]...)
	}
	m.now = time.Second
	m.Write(8, []byte{1, 2, 3, 4})
	m.reads(t, "read-only", 8, 0x99, 0x9e, 0x36, 0)
	m.reads(t, "past the end", 10, 0x36, 0, 0, 0)
	m.reads(t, "outside", 12, 0)
}

func TestResetControl(t *testing.T) {
	for _, c := range []struct {
		name   string
		writes []byte
		reads  byte
		events []string
	}{
		{"as the FADT says", []byte{0x06}, 0x02, []string{"reset"}},
		{"Linux's two steps", []byte{0x02, 0x0e}, 0x0a, []string{"reset"}},
		{"INIT", []byte{0x04}, 0x00, []string{"reset"}},
		{"choice alone", []byte{0x0a}, 0x0a, nil},
		{"other bits", []byte{0xf1}, 0x00, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine()
			for _, v := range c.writes {
				m.ResetControl().Write(0, []byte{v})
			}
			m.ResetControl().Write(0, nil)
			m.want(t, c.name, c.events...)
			p := []byte{0xee}
			if m.ResetControl().Read(0, p); p[0] != c.reads {
				t.Errorf("reads %#x, want %#x", p[0], c.reads)
			}
		})
	}
}
