package rtc

import (
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// lines records a clock's outputs, under a fake clock that starts at midnight, 1 January 2000.
type lines struct {
	*RTC
	t *testing.T

	// Guarded by RTC.mu.
	irq    bool
	rises  []time.Duration // since the start
	alarms int
}

func interrupts(t *testing.T, f func(t *testing.T, l *lines)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l, start := &lines{t: t}, time.Now()
		l.RTC = New(Config{
			IRQ: func(level bool) {
				if level == l.irq {
					t.Errorf("the line is told %v twice", level)
				}
				if l.irq = level; level {
					l.rises = append(l.rises, time.Since(start))
				}
			},
			Alarm: func() { l.alarms++ },
		})
		defer l.Close()
		f(t, l)
	})
}

// pass lets time pass, and then the resulting events.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (l *lines) want(what string, reg, v byte) {
	l.t.Helper()
	if got := read(l.RTC, reg); got != v {
		l.t.Errorf("%s: register %#02x reads %#02x, want %#02x", what, reg, got, v)
	}
}

func (l *lines) wantLine(what string, level bool, rises ...time.Duration) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.irq != level || !slices.Equal(l.rises, rises) {
		l.t.Errorf("%s: line %v after rises at %v, want %v after %v", what, l.irq, l.rises, level, rises)
	}
}

// wantIdle checks that no timer is set, so that the guest causes no wake-ups.
func (l *lines) wantIdle(what string) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.wake.IsZero() || l.timer != nil && l.timer.Stop() {
		l.t.Errorf("%s: a timer runs", what)
	}
}

func TestUpdateEnded(t *testing.T) {
	interrupts(t, func(t *testing.T, l *lines) {
		l.want("no second is over", 0x0c, 0)
		l.wantIdle("nothing is enabled")
		pass(1500 * time.Millisecond)
		l.wantLine("nothing is enabled", false)
		l.want("UF and the others need no enable bit", 0x0c, 0x50)
		l.want("the read cleared it", 0x0c, 0x00)
		pass(500 * time.Millisecond)
		write(l.RTC, 0x0b, 0x12)
		l.wantLine("UF was set when UIE was", true, 2*time.Second)
		l.wantIdle("UF is not cleared")
		l.want("IRQF", 0x0c, 0xd0)
		l.wantLine("read", false, 2*time.Second)
		pass(1200 * time.Millisecond)
		l.wantLine("the next second", true, 2*time.Second, 3*time.Second)
		pass(10 * time.Second)
		l.wantLine("the flag is not cleared", true, 2*time.Second, 3*time.Second)
		l.wantIdle("the flag is not cleared")
		write(l.RTC, 0x0b, 0x02)
		l.wantLine("disabled", false, 2*time.Second, 3*time.Second)
		write(l.RTC, 0x0b, 0x12)
		l.wantLine("enabled again", true, 2*time.Second, 3*time.Second, 13200*time.Millisecond)
		l.want("both", 0x0c, 0xd0)
		write(l.RTC, 0x0b, 0x92)
		l.want("the rise of SET clears UIE", 0x0b, 0x82)
		pass(5 * time.Second)
		l.want("no updates while SET is", 0x0c, 0x40)
		l.want("the time stands still", 0x00, 0x13)
		l.wantIdle("SET")
	})
}

// TestAlarm matches every alarm byte, with and without don't-cares, in every format.
func TestAlarm(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		name    string
		b       byte
		s, m, h byte
		want    []time.Duration // from midnight, each after the one before
	}{
		{"BCD", 0x22, 0x56, 0x34, 0x12, []time.Duration{12*time.Hour + 34*time.Minute + 56*time.Second, day}},
		{"binary", 0x26, 56, 34, 12, []time.Duration{12*time.Hour + 34*time.Minute + 56*time.Second, day}},
		{"12 hours, PM", 0x20, 0x56, 0x34, 0x92, []time.Duration{12*time.Hour + 34*time.Minute + 56*time.Second, day}},
		{"12 hours, AM", 0x20, 0x56, 0x34, 0x12, []time.Duration{34*time.Minute + 56*time.Second, day}},
		{"12 hours, binary, PM", 0x24, 5, 0, 0x8b, []time.Duration{23*time.Hour + 5*time.Second, day}},
		{"every second", 0x22, 0xc0, 0xff, 0xd5, []time.Duration{time.Second, time.Second, time.Second}},
		{"every minute", 0x22, 0x07, 0xc0, 0xc0, []time.Duration{7 * time.Second, time.Minute, time.Minute}},
		{"every hour", 0x22, 0x00, 0x30, 0xff, []time.Duration{30 * time.Minute, time.Hour, time.Hour}},
		{"every second of a minute", 0x22, 0xc0, 0x01, 0x00, []time.Duration{time.Minute, time.Second}},
		{"every minute of the last hour", 0x22, 0x59, 0xc0, 0x23,
			[]time.Duration{23*time.Hour + 59*time.Second, time.Minute}},
		{"midnight", 0x22, 0, 0, 0, []time.Duration{day, day}},
		{"BCD that is none", 0x22, 0x5a, 0xc0, 0xc0, nil},
		{"no such minute", 0x22, 0xc0, 0x60, 0xc0, nil},
		{"no such hour", 0x22, 0xc0, 0xc0, 0x24, nil},
		{"24 hours in 12-hour mode", 0x20, 0xc0, 0xc0, 0x13, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			interrupts(t, func(t *testing.T, l *lines) {
				for reg, v := range map[byte]byte{1: c.s, 3: c.m, 5: c.h, 0x0b: c.b} {
					write(l.RTC, reg, v)
				}
				if c.want == nil {
					l.wantIdle(c.name)
					pass(2 * day)
				}
				var at []time.Duration
				var sum time.Duration
				for _, d := range c.want {
					pass(d)
					sum += d
					at = append(at, sum)
					l.want("IRQF and AF", 0x0c, 0xf0)
				}
				l.wantLine(c.name, false, at...)
				l.mu.Lock()
				defer l.mu.Unlock()
				if l.alarms != len(at) {
					t.Errorf("%d alarms told, want %d", l.alarms, len(at))
				}
			})
		})
	}
}

// TestAlarmFollowsTime: setting the time moves the alarm, and an alarm that the change skips does
// not happen.
func TestAlarmFollowsTime(t *testing.T) {
	interrupts(t, func(t *testing.T, l *lines) {
		for reg, v := range map[byte]byte{1: 0x00, 3: 0x00, 5: 0x08, 0x0b: 0x22} {
			write(l.RTC, reg, v)
		}
		pass(time.Second)
		write(l.RTC, 0x04, 0x07)
		pass(58 * time.Minute)
		write(l.RTC, 0x02, 0x59)
		pass(10 * time.Second)
		write(l.RTC, 0x00, 0x55)
		pass(5 * time.Second)
		l.wantLine("08:00:00", true, 58*time.Minute+16*time.Second)
		l.want("AF", 0x0c, 0xf0)
		write(l.RTC, 0x04, 0x07)
		write(l.RTC, 0x04, 0x09)
		pass(20 * time.Hour)
		l.want("stepped over", 0x0c, 0x50)
		l.wantLine("stepped over", false, 58*time.Minute+16*time.Second)
	})
}

// TestAlarmHostClock: an alarm follows the host's clock, even when that is set.
func TestAlarmHostClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var set atomic.Int64
		var alarms atomic.Int32
		r := New(Config{Now: func() time.Time { return time.Now().Add(time.Duration(set.Load())) },
			Alarm: func() { alarms.Add(1) }})
		defer r.Close()
		for reg, v := range map[byte]byte{1: 0x00, 3: 0x00, 5: 0x08, 0x0b: 0x22} {
			write(r, reg, v)
		}
		pass(time.Hour)
		set.Store(int64(6*time.Hour + 55*time.Minute)) // 07:55
		pass(6 * time.Minute)
		if alarms.Load() != 1 {
			t.Errorf("%d alarms, want 1", alarms.Load())
		}
		set.Add(-int64(time.Hour))
		check(t, r, map[byte]byte{0x0c: 0xf0})
		pass(50 * time.Minute)
		check(t, r, map[byte]byte{0x04: 0x07, 0x0c: 0x50})
		pass(15 * time.Minute)
		check(t, r, map[byte]byte{0x04: 0x08, 0x0c: 0xf0})
	})
}

// TestPeriodic reads PF at each rate of table 5, and counts interrupts for a second.
func TestPeriodic(t *testing.T) {
	for rate, hz := range []int{0, 256, 128, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2} {
		interrupts(t, func(t *testing.T, l *lines) {
			write(l.RTC, 0x0a, 0x20|byte(rate))
			if rate > 0 {
				period := time.Second / time.Duration(hz)
				pass(period - time.Microsecond)
				l.want("before the period's end", 0x0c, 0x00)
				pass(2 * time.Microsecond)
				l.want("after it", 0x0c, 0x40)
				l.want("cleared", 0x0c, 0x00)
			}
			l.wantIdle("PIE is clear")
			time.Sleep(time.Second - time.Duration(time.Now().Nanosecond()))
			l.want("the second's end", 0x0c, map[bool]byte{true: 0x10, false: 0x50}[rate == 0])
			write(l.RTC, 0x0b, 0x42)
			for end := time.Now().Add(time.Second); !time.Now().After(end); {
				pass(10 * time.Microsecond)
				l.mu.Lock()
				high := l.irq
				l.mu.Unlock()
				if high {
					read(l.RTC, 0x0c)
				}
			}
			l.mu.Lock()
			n := len(l.rises)
			l.mu.Unlock()
			if want := min(hz, 1024); n != want {
				t.Errorf("rate %d: %d interrupts in a second, want %d", rate, n, want)
			}
		})
	}
}

// TestPeriodicUnread: a guest that sets the highest rate and does not service the interrupt causes
// one wake-up.
func TestPeriodicUnread(t *testing.T) {
	interrupts(t, func(t *testing.T, l *lines) {
		write(l.RTC, 0x0a, 0x23)
		write(l.RTC, 0x0b, 0x42)
		pass(time.Hour)
		l.wantLine("an hour", true, time.Second/1024+1) // rounded up
		l.wantIdle("an hour")
	})
}

// TestSetHalfSecond sets the time as Linux does: SET, the divider in reset, the registers, SET
// clear, the divider released. The first update is 0.5 s later.
func TestSetHalfSecond(t *testing.T) {
	interrupts(t, func(t *testing.T, l *lines) {
		pass(300 * time.Millisecond)
		read(l.RTC, 0x0c)
		write(l.RTC, 0x0b, 0x92)
		write(l.RTC, 0x0a, 0x76)
		write(l.RTC, 0x00, 0x41)
		write(l.RTC, 0x0b, 0x12)
		pass(5 * time.Second)
		l.want("in reset", 0x00, 0x41)
		l.want("in reset", 0x0c, 0x00)
		l.wantIdle("in reset")
		write(l.RTC, 0x0a, 0x26)
		pass(499 * time.Millisecond)
		l.want("before the first update", 0x00, 0x41)
		l.wantLine("before the first update", false)
		pass(time.Millisecond)
		l.want("after it", 0x00, 0x42)
		l.wantLine("after it", true, 5800*time.Millisecond)
	})
}

// TestFormats shows the time in each format, and sets it.
func TestFormats(t *testing.T) {
	now := time.Date(2031, 12, 24, 0, 59, 58, 0, time.UTC)
	for _, c := range []struct {
		b    byte
		hour int
		want map[byte]byte
	}{
		{0x02, 0, map[byte]byte{0: 0x58, 2: 0x59, 4: 0x00, 7: 0x24, 9: 0x31, 0x32: 0x20}},
		{0x06, 23, map[byte]byte{0: 58, 2: 59, 4: 23, 7: 24, 9: 31, 0x32: 20}},
		{0x00, 0, map[byte]byte{4: 0x12}},
		{0x00, 11, map[byte]byte{4: 0x11}},
		{0x00, 12, map[byte]byte{4: 0x92}},
		{0x00, 23, map[byte]byte{4: 0x91}},
		{0x04, 0, map[byte]byte{4: 12}},
		{0x04, 13, map[byte]byte{4: 0x81}},
	} {
		at := now.Add(time.Duration(c.hour) * time.Hour)
		r := New(Config{Now: func() time.Time { return at }})
		write(r, 0x0b, c.b)
		check(t, r, c.want)
		at = at.Add(7 * time.Hour)
		write(r, 0x0b, c.b|0x80)
		for reg, v := range c.want {
			write(r, reg, v)
		}
		write(r, 0x0b, c.b)
		check(t, r, c.want)
		write(r, 0x0b, 0x02)
		check(t, r, map[byte]byte{4: byte(c.hour/10<<4 | c.hour%10)})
	}
}

// TestBattery: time and memory survive a reset, interrupts and formats do not. A driver that was
// setting the time does not leave the clock stopped.
func TestBattery(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	c := Config{Now: func() time.Time { return now }, Battery: &Battery{}}
	r := New(c)
	write(r, 0x32, 0x99) // 7,900 years exceed a Duration
	write(r, 0x04, 0x05)
	write(r, 0x40, 0x5a)
	write(r, 0x0b, 0xf6)
	write(r, 0x0a, 0x7f)
	r.Close()
	now = now.Add(time.Hour)
	check(t, New(c), map[byte]byte{0x04: 0x06, 0x09: 0x26, 0x32: 0x99, 0x40: 0x5a, 0x0a: 0x26, 0x0b: 0x02, 0x0c: 0x00})
}

// TestClosed: after Close the timer has no effect.
func TestClosed(t *testing.T) {
	interrupts(t, func(t *testing.T, l *lines) {
		write(l.RTC, 0x0b, 0x12)
		l.Close()
		pass(time.Minute)
		l.wantLine("closed", false)
	})
}
