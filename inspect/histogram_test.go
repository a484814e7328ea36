package inspect

import (
	"encoding/json"
	"math"
	"testing"
	"time"
)

// TestHistogram: a time is in the bucket whose end is the first above it, and quantiles are within
// a bucket of the truth.
func TestHistogram(t *testing.T) {
	for _, tt := range []struct{ d, end time.Duration }{
		{-1, 256}, {0, 256}, {255, 256}, {256, 320}, {319, 320}, {320, 384}, {511, 512}, {512, 640},
		{time.Millisecond, 1 << 20}, {1<<35 - 1, 1 << 35}, {1 << 35, 5 << 33}, {math.MaxInt64, 5 << 33},
	} {
		var h Histogram
		h.Add(tt.d, 3)
		if h.Below(tt.end) != 3 || h.Below(tt.end-1) != 0 || h.Count() != 3 {
			t.Errorf("%d: %d below %d, %d below %d, of %d", tt.d, h.Below(tt.end), tt.end, h.Below(tt.end-1), tt.end-1,
				h.Count())
		}
	}
	var h Histogram
	if h.Quantile(.5) != 0 || h.Count() != 0 {
		t.Errorf("empty: %v", h.Quantile(.5))
	}
	for i := range 1000 {
		h.Add(time.Duration(i+1)*time.Microsecond, 2)
	}
	for q, want := range map[float64]time.Duration{.5: 500e3, .9: 900e3, .99: 990e3, 1: 1e6} {
		if got := h.Quantile(q); got < want*9/10 || got > want*11/10 {
			t.Errorf("quantile %v: %v, want %v", q, got, want)
		}
	}
	if h.Sum() != 1001*time.Millisecond {
		t.Errorf("sum %v", h.Sum())
	}
	before := h
	h.Add(time.Second, 1)
	if d := h.Since(before); d.Count() != 1 || d.Sum() != time.Second || d.Quantile(.5) < 900*time.Millisecond {
		t.Errorf("since: %d, %v, %v", d.Count(), d.Sum(), d.Quantile(.5))
	}
	if d := before.Since(h); d != before {
		t.Errorf("since one that began again: %+v", d)
	}
	b, err := json.Marshal(h.Node("latency"))
	var n Node
	if err != nil || json.Unmarshal(b, &n) != nil || HistogramOf(n) != h || HistogramOf(h.Node("")) != h {
		t.Errorf("%v: %s", err, b)
	}
}
