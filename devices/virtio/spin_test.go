package virtio

import (
	"testing"
	"time"
)

func us(n int) time.Duration { return time.Duration(n) * time.Microsecond }

// testSpin is a spin whose clock advances by step at each reading, and whose thread keeps its core.
func testSpin(max, step time.Duration) *spin {
	var now time.Duration
	return &spin{max: max, rest: minRest, next: minRest,
		clock:    func() time.Duration { now += step; return now },
		switches: func() int64 { return 0 },
		all:      func() int64 { return 0 }}
}

func never() bool { return false }

// TestSpin: looking grows while events come soon, ends with the first that does not,
// and is never longer than it may be.
func TestSpin(t *testing.T) {
	s := testSpin(us(50), us(1))
	for i, step := range []struct{ waited, now int }{
		{1000, 0}, {10, 4}, {10, 8}, {10, 16}, {10, 32}, {10, 50}, {0, 50}, {1, 0}, {50, 4}, {47, 0},
	} {
		s.waited(us(step.waited))
		if s.now != us(step.now) {
			t.Errorf("step %d: looks for %v, want %v", i, s.now, us(step.now))
		}
	}
	var calls int
	if s.until(func() bool { calls++; return true }) || calls > 0 {
		t.Error("it looks although that does not pay")
	}
	s.now = time.Hour
	if !s.until(func() bool { calls++; return calls == 3 }) || calls != 3 {
		t.Errorf("%d looks until the third found something", calls)
	}
	s.now = us(5)
	if s.until(func() bool { calls++; return false }) || calls != 3+5 {
		t.Errorf("%d looks in 5 µs at 1 µs each, or it found nothing and says it did", calls-3)
	}
	off := testSpin(0, us(1))
	for range 10 * maxRest {
		if off.waited(0); off.now != 0 {
			t.Fatal("it looks although it must not")
		}
	}
}

// TestSpinTrial: events that only sleeping keeps further apart than max are found by a trial,
// which comes more rarely while it finds nothing.
func TestSpinTrial(t *testing.T) {
	s := testSpin(us(50), us(1))
	trials := 0
	for range 1 << 20 {
		if s.waited(us(80)); s.now == s.max {
			trials++
			s.until(never)
		}
	}
	if trials < (1<<20)/maxRest || trials > (1<<20)/maxRest+10 {
		t.Errorf("%d trials in %d sleeps, want one in %d", trials, 1<<20, maxRest)
	}
	for s.now == 0 {
		s.waited(us(80))
	}
	if !s.until(func() bool { return true }) || s.now != s.max {
		t.Errorf("a trial that finds an event: it looks for %v from then on, want %v", s.now, s.max)
	}
	s.waited(us(80))
	for sleeps := 0; s.now == 0; sleeps++ {
		if s.waited(us(80)); sleeps > maxRest {
			t.Fatal("no trial after one that found an event")
		}
	}
}

// TestSpinCrowded: when looks gave their core to another thread several times in succession, there is
// none for a while. One that an interrupt or the host kept from its core goes on.
func TestSpinCrowded(t *testing.T) {
	s := testSpin(25*2*preempted, 2*preempted)
	s.now = s.max
	calls := 0
	if s.until(func() bool { calls++; return false }) || calls != 25 || s.now != s.max {
		t.Errorf("%d looks at a core of its own, and %v from then on", calls, s.now)
	}
	given := int64(0)
	s.switches = func() int64 { return given }
	for _, found := range []int{2, 1, crowded} { // an event after so many looks that gave the core away
		for i := range found {
			calls = 0
			if s.until(func() bool { calls++; given++; return false }) || calls != 1 {
				t.Errorf("%d looks, want one", calls)
			}
			if crowd := i == crowded-1; (s.now == 0) != crowd {
				t.Errorf("it looks for %v after %d looks that gave the core away", s.now, i+1)
			}
		}
		s.until(func() bool { return true })
	}
	for i := range aloneAgain {
		if s.waited(us(1)); s.now != 0 {
			t.Fatalf("it looks after %d sleeps", i+1)
		}
	}
	if s.waited(us(1)); s.now != minSpin {
		t.Errorf("it looks for %v when it may again, want %v", s.now, minSpin)
	}
}

// TestSpinShared: while the sleeps end on the core of the guest's CPU, which then gives it up, there
// is no look. Switches that are fewer, or that come in longer sleeps, end no looks.
func TestSpinShared(t *testing.T) {
	for _, test := range []struct {
		name             string
		switches, waited int // in each aloneAgain sleeps, and the µs of one
		looks            bool
	}{
		{"alone", 0, 10, true},
		{"noise", aloneAgain/sleepsBeside - 1, 10, true},
		{"shared", aloneAgain / sleepsBeside, 10, false},
		{"shared, with delays", aloneAgain, 1000, false},
		{"a guest that rests", 10 * aloneAgain, 1001, true},
	} {
		s := testSpin(us(2000), us(1))
		given := int64(1000) // before the thread began
		s.all = func() int64 { given += int64(test.switches); return given }
		s.allBefore = given
		for range aloneAgain {
			s.waited(us(test.waited))
		}
		looks := false
		for range 3 * aloneAgain {
			looks = looks || s.now > 0
			s.waited(us(test.waited))
		}
		if looks != test.looks {
			t.Errorf("%s: it looks: %v, want %v", test.name, looks, test.looks)
		}
		test.switches = 0
		for range aloneAgain + minRest {
			s.waited(us(test.waited))
		}
		if s.waited(us(1)); s.now == 0 {
			t.Errorf("%s: it does not look when no thread gives up its core any more", test.name)
		}
	}
}
