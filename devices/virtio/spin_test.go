package virtio

import (
	"testing"
	"time"
)

// TestSpin: looking grows while events come soon, ends with the first that does not,
// and is never longer than it may be.
func TestSpin(t *testing.T) {
	us := func(n int) time.Duration { return time.Duration(n) * time.Microsecond }
	s := spin{max: us(50)}
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
	s.now = us(1)
	if s.until(func() bool { return false }) {
		t.Error("it found nothing, and says it did")
	}
	never := spin{}
	never.waited(0)
	if never.now != 0 {
		t.Error("it looks although it must not")
	}
}
