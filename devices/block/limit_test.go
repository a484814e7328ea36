package block_test

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"gvm/devices/block"
)

// limited takes places for requests of the sizes, one after another, and returns when each was
// admitted.
func limited(t *testing.T, requests, bytes block.Limit, sizes ...uint64) []time.Duration {
	t.Helper()
	l, err := block.NewLimiter(requests, bytes)
	if err != nil {
		t.Fatal(err)
	}
	start, at := time.Now(), make([]time.Duration, len(sizes))
	var done sync.WaitGroup
	for i, n := range sizes {
		p := &block.Place{}
		if l.Take(p, n) {
			continue
		}
		done.Go(func() {
			<-p.Turn()
			at[i] = time.Since(start)
			if !l.Take(p, n) {
				t.Errorf("request %d had its turn and is not admitted", i)
			}
		})
		synctest.Wait()
	}
	done.Wait()
	return at
}

func TestLimiter(t *testing.T) {
	type seconds []float64
	const kib = 1 << 10
	for name, v := range map[string]struct {
		requests, bytes block.Limit
		sizes           []uint64
		want            seconds
	}{
		"requests": {block.Limit{Rate: 4, Burst: 1}, block.Limit{}, make([]uint64, 5),
			seconds{0, 0.25, 0.5, 0.75, 1}},
		"the default burst": {block.Limit{Rate: 20}, block.Limit{}, make([]uint64, 4), seconds{0, 0, 0.05, 0.1}},
		"a low rate":        {block.Limit{Rate: 1}, block.Limit{}, make([]uint64, 2), seconds{0, 1}},
		"a burst":           {block.Limit{Rate: 1, Burst: 3}, block.Limit{}, make([]uint64, 5), seconds{0, 0, 0, 1, 2}},
		"bytes": {block.Limit{}, block.Limit{Rate: 4 * kib, Burst: 4 * kib}, []uint64{2 * kib, 2 * kib, 2 * kib, 2 * kib},
			seconds{0, 0, 0.5, 1}},
		"one larger than bursts": {block.Limit{}, block.Limit{Rate: kib, Burst: kib}, []uint64{3 * kib, 3 * kib},
			seconds{2, 5}},
		"both": {block.Limit{Rate: 1, Burst: 1}, block.Limit{Rate: kib, Burst: 2 * kib},
			[]uint64{2 * kib, 2 * kib, 2 * kib}, seconds{0, 2, 4}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				at := limited(t, v.requests, v.bytes, v.sizes...)
				for i, want := range v.want {
					if got := at[i].Seconds(); got < want-1e-6 || got > want+1e-6 {
						t.Errorf("request %d is admitted after %gs, want %gs", i, got, want)
					}
				}
			})
		})
	}
}

// TestLimiterRefills: after a time without requests there is a burst again, and no more.
func TestLimiterRefills(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := block.NewLimiter(block.Limit{Rate: 1, Burst: 2}, block.Limit{})
		for range 3 {
			var places [3]block.Place
			for i := range places {
				if got := l.Take(&places[i], 0); got != (i < 2) {
					t.Errorf("request %d: %v", i, got)
				}
			}
			start := time.Now()
			<-places[2].Turn()
			if d := time.Since(start).Round(time.Millisecond); d != time.Second {
				t.Errorf("the third is admitted after %v", d)
			}
			time.Sleep(time.Minute)
		}
	})
}

// TestLimiterGivesBack: a place that is given back costs nothing but the time that its request has
// had, and its wait gives the others no burst.
func TestLimiterGivesBack(t *testing.T) {
	for name, v := range map[string]struct {
		give int           // the place that is given back, of four requests of 1, 50, 1 and 1 bytes
		at   time.Duration // and when
		want []time.Duration
	}{
		"first in the queue": {1, 10 * time.Second, []time.Duration{0, -1, 10 * time.Second, 11 * time.Second}},
		"last in the queue":  {3, 10 * time.Second, []time.Duration{0, 50 * time.Second, 51 * time.Second, -1}},
		"admitted":           {0, 0, []time.Duration{0, 49 * time.Second, 50 * time.Second, 51 * time.Second}},
		"admitted and old":   {0, time.Minute, []time.Duration{0, 50 * time.Second, 51 * time.Second, 52 * time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, _ := block.NewLimiter(block.Limit{}, block.Limit{Rate: 1, Burst: 1})
				start, at := time.Now(), []time.Duration{0, -1, -1, -1}
				var places [4]block.Place
				for i, n := range []uint64{1, 50, 1, 1} {
					if !l.Take(&places[i], n) {
						go func() {
							select {
							case <-places[i].Turn():
								at[i] = time.Since(start).Round(time.Millisecond)
							case <-time.After(5 * time.Minute):
							}
						}()
					}
					synctest.Wait()
				}
				time.Sleep(v.at)
				l.GiveBack(&places[v.give])
				l.GiveBack(&places[v.give]) // has no effect
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if !slices.Equal(at, v.want) {
					t.Errorf("admitted after %v, want %v", at, v.want)
				}
			})
		})
	}
}

func TestLimiterRefused(t *testing.T) {
	for _, l := range []block.Limit{{Burst: 1}, {Rate: 1<<40 + 1}, {Rate: 1, Burst: 1<<40 + 1}} {
		if _, err := block.NewLimiter(l, block.Limit{}); err == nil {
			t.Errorf("%+v requests are taken", l)
		}
		if _, err := block.NewLimiter(block.Limit{}, l); err == nil {
			t.Errorf("%+v bytes are taken", l)
		}
	}
	if l, err := block.NewLimiter(block.Limit{}, block.Limit{}); l != nil || err != nil {
		t.Errorf("no limits: %v, %v", l, err)
	}
}

func BenchmarkLimiter(b *testing.B) {
	l, _ := block.NewLimiter(block.Limit{Rate: block.MaxRate}, block.Limit{Rate: block.MaxRate})
	b.ReportAllocs()
	for range b.N {
		if p := new(block.Place); !l.Take(p, 1) {
			b.Fatal("it waits")
		}
	}
}

// TestLimiterGivesBackPart: of two admitted requests of 4 bytes, a second of the rate each, the
// first is given back after a time: the part that has not drained is left for a third one of 7
// bytes, and no more.
func TestLimiterGivesBackPart(t *testing.T) {
	for at, want := range map[time.Duration]time.Duration{ // the third is admitted at
		0:               time.Second,
		2 * time.Second: 3 * time.Second,
		5 * time.Second: 5 * time.Second,
	} {
		synctest.Test(t, func(t *testing.T) {
			l, _ := block.NewLimiter(block.Limit{}, block.Limit{Rate: 1, Burst: 10})
			start := time.Now()
			var places [3]block.Place
			if !l.Take(&places[0], 4) || !l.Take(&places[1], 4) {
				t.Fatal("a burst is not admitted")
			}
			time.Sleep(at)
			l.GiveBack(&places[0])
			l.GiveBack(&places[0]) // has no effect
			if !l.Take(&places[2], 7) {
				<-places[2].Turn()
			}
			if got := time.Since(start).Round(time.Millisecond); got != want {
				t.Errorf("given back at %v: the third is admitted at %v, want %v", at, got, want)
			}
		})
	}
}

// TestLimiterAfterRest: a time without requests counts for a burst and no more, also for a request
// larger than that.
func TestLimiterAfterRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := block.NewLimiter(block.Limit{}, block.Limit{Rate: 1, Burst: 1})
		time.Sleep(10 * time.Second)
		start := time.Now()
		var p block.Place
		if l.Take(&p, 3) {
			t.Fatal("it does not wait")
		}
		<-p.Turn()
		if got := time.Since(start).Round(time.Millisecond); got != 2*time.Second {
			t.Errorf("admitted after %v", got)
		}
	})
}

// TestLimiterGivesBackRequest: a request that is given back leaves room for another.
func TestLimiterGivesBackRequest(t *testing.T) {
	l, _ := block.NewLimiter(block.Limit{Rate: 1, Burst: 1}, block.Limit{})
	for range 3 {
		var p block.Place
		if !l.Take(&p, 1) {
			t.Error("it waits")
		}
		l.GiveBack(&p)
	}
}
