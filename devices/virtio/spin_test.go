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
		clock:      func() time.Duration { now += step; return now },
		switches:   func() int64 { return 0 },
		all:        func() int64 { return 0 },
		interrupts: func() uint64 { return 0 },
		asked:      func() bool { return true },
		place:      placement{leave: func() int { return -1 }}}
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

// TestSpinLost: after two waits for another thread's slices, which took a quarter of the time,
// there is no look for a while, unless many events came meanwhile. An interrupt, and a host that
// keeps the core from the thread, end no looks.
func TestSpinLost(t *testing.T) {
	const turn = 4 * time.Millisecond // of each of two threads that share a core
	for _, test := range []struct {
		name     string
		away, on time.Duration // from the core, and on it before that
		given    int64         // times that another thread took the core
		events   int           // in that time
		rests    bool
	}{
		{"interrupt", slice, slice, 1, 0, false},
		{"host", turn, turn, 0, 0, false},
		{"busy thread", turn, turn, 1, 0, true},
		{"busy thread, slow guest", turn, turn, 1, int(2*turn/us(50)) - 1, true},
		{"busy thread, fast guest", turn, turn, 1, int(2 * turn / us(50)), false},
		{"rare", turn, 3 * turn, 1, 0, false},
	} {
		now, given := time.Hour, int64(0)
		s := testSpin(us(50), 0)
		s.clock = func() time.Duration { return now }
		s.switches = func() int64 { return given }
		look := func() bool {
			given += test.given
			now += test.away
			return false
		}
		s.now = s.max
		if s.until(look); s.now == 0 {
			t.Errorf("%s: one wait in an hour ends the looks", test.name)
		}
		for range test.events {
			s.until(func() bool { return true })
		}
		now += test.on
		if s.until(look); (s.now == 0) != test.rests {
			t.Errorf("%s: it looks for %v then", test.name, s.now)
		}
		for i := 0; test.rests && i < crowdRest; i++ {
			if s.waited(us(1)); s.now != 0 {
				t.Fatalf("%s: it looks after %d sleeps", test.name, i+1)
			}
		}
		if s.waited(0); s.now == 0 {
			t.Errorf("%s: it does not look when it may again", test.name)
		}
	}
}

// TestSpinShared: while the sleeps end on the core of the guest's CPU, which then gives it up,
// there is no look. Switches that are fewer, or that come in longer sleeps, end no looks. The
// thread leaves that core if the guest takes few interrupts meanwhile and asks for none.
func TestSpinShared(t *testing.T) {
	for _, test := range []struct {
		name             string
		switches, waited int // in each aloneAgain sleeps, and the µs of one
		interrupts       int // in the same
		asks             bool
		looks, leaves    bool
	}{
		{"alone", 0, 10, 0, false, true, false},
		{"noise", aloneAgain/sleepsBeside - 1, 10, 0, false, true, false},
		{"shared", aloneAgain / sleepsBeside, 10, 0, false, false, true},
		{"shared, few interrupts", aloneAgain, 10, aloneAgain/sleepsBeside - 1, false, false, true},
		{"shared, interrupts", aloneAgain, 10, aloneAgain / sleepsBeside, false, false, false},
		{"shared, early answers", aloneAgain, 10, 0, true, false, false},
		{"shared, with delays", aloneAgain, 1000, 0, false, false, true},
		{"a guest that rests", 10 * aloneAgain, 1001, 0, false, true, false},
	} {
		s := testSpin(us(2000), us(1))
		given := int64(1000) // before the thread began
		s.all = func() int64 { given += int64(test.switches); return given }
		s.allBefore = given
		sent, left := uint64(0), 0
		s.interrupts = func() uint64 { sent += uint64(test.interrupts); return sent }
		s.asked = func() bool { return test.asks }
		s.place.stay = 10 // no trial
		s.place.leave = func() int { left++; return 0 }
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
		if test.leaves && left != 4 || !test.leaves && left != 0 {
			t.Errorf("%s: it left its core %d times in 4, want all or none: %v", test.name, left, test.leaves)
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

// TestSpinLostAndShared: sleeps on the core of the guest's CPU do not shorten a longer rest.
func TestSpinLostAndShared(t *testing.T) {
	s := testSpin(us(50), us(1))
	s.crowd = crowdRest
	s.all = func() int64 { return aloneAgain }
	for range aloneAgain {
		s.waited(us(10))
	}
	if want := crowdRest - aloneAgain; s.crowd != want {
		t.Errorf("%d sleeps left without a look, want %d", s.crowd, want)
	}
}

// TestSpinTrialOfCore: a thread that finds events by looking tries the other core after reviewed of
// them, and sleeps there. It stays if the events come much faster, and looks again if not.
func TestSpinTrialOfCore(t *testing.T) {
	for _, faster := range []bool{true, false} {
		var now time.Duration
		s := testSpin(us(2000), 0)
		s.clock = func() time.Duration { return now }
		sent, core := uint64(0), 0
		s.interrupts = func() uint64 { sent += reviewed; return sent }
		s.place = placement{next: minStay, leave: func() int { core = 1 - core; return 1 - core },
			take: func(c int) { core = c }}
		found := func(d time.Duration) { s.until(func() bool { now += d; return true }) }
		s.now = s.max
		for range reviewed {
			if core != 0 {
				t.Fatal("it moves before it has found enough events")
			}
			found(us(100))
		}
		if core != 1 || !s.place.quiet {
			t.Fatalf("after %d events it is on core %d, quiet: %v", reviewed, core, s.place.quiet)
		}
		took := us(100)
		if faster {
			took = us(50)
		}
		for range settled + aloneAgain {
			now += took
			if s.waited(took); s.now > 0 && core == 1 {
				t.Fatal("it looks on trial")
			}
		}
		if !faster { // and if they are even slower, sooner
			for s.place.before == 0 {
				found(us(100))
			}
			for range settled + slower {
				now += us(101)
				s.waited(us(101))
			}
		}
		if want := map[bool]int{true: 1, false: 0}[faster]; core != want || s.place.quiet != faster {
			t.Errorf("faster %v: core %d, quiet %v", faster, core, s.place.quiet)
		}
		if s.waited(us(1)); (s.now == 0) != faster {
			t.Errorf("faster %v: it looks for %v", faster, s.now)
		}
	}
}

// TestSpinTrialBeside: a thread that sleeps on the core of the guest's CPU looks on the other one
// on trial, unless another thread there was in its way.
func TestSpinTrialBeside(t *testing.T) {
	for _, crowd := range []int{0, crowdRest} {
		s := testSpin(us(50), us(1))
		s.crowd = crowd
		given := int64(0)
		s.all = func() int64 { given += aloneAgain; return given }
		s.place.leave = func() int { return 0 }
		for range aloneAgain {
			s.waited(us(10))
		}
		if s.place.before == 0 || (s.now > 0) != (crowd == 0) {
			t.Errorf("crowd %d: trial at %v, it looks for %v", crowd, s.place.before, s.now)
		}
	}
}
