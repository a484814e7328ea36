package inspect

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

// A Histogram's first bucket ends at 1<<firstBits ns, and its last one begins at 1<<lastBits; each
// power of two between has octave buckets.
const (
	firstBits  = 8
	lastBits   = 35
	octaveBits = 2
	octave     = 1 << octaveBits
)

// Histogram counts times in buckets that are at most a quarter wide. The zero value is empty. Its
// owner guards it.
type Histogram struct {
	counts [(lastBits-firstBits)*octave + 2]uint64
	sum    time.Duration
}

// Add counts n events that took d each.
func (h *Histogram) Add(d time.Duration, n uint64) {
	i := 0
	if b := bits.Len64(uint64(max(d, 0))) - 1; b >= firstBits {
		i = min((b-firstBits)*octave+int(d>>(b-octaveBits))&(octave-1)+1, len(h.counts)-1)
	}
	h.counts[i] += n
	h.sum += d * time.Duration(n)
}

// end returns the end of bucket i.
func end(i int) time.Duration {
	if i == 0 {
		return 1 << firstBits
	}
	b, sub := firstBits+(i-1)/octave, (i-1)%octave
	return time.Duration(octave+sub+1) << (b - octaveBits)
}

// Since returns the events of h that came after before, an earlier state of it. If h began again
// meanwhile, these are all.
func (h Histogram) Since(before Histogram) Histogram {
	d := h
	for i, n := range before.counts {
		if h.counts[i] < n {
			return h
		}
		d.counts[i] -= n
	}
	d.sum -= before.sum
	return d
}

// Sum returns the time of all events together.
func (h *Histogram) Sum() time.Duration { return h.sum }

// Count returns the number of events.
func (h *Histogram) Count() uint64 { return h.Below(1<<63 - 1) }

// Below returns the number of events in the buckets that end at d or before.
func (h *Histogram) Below(d time.Duration) (n uint64) {
	for i, c := range h.counts {
		if end(i) > d {
			break
		}
		n += c
	}
	return n
}

// Octaves calls f with the ends of the buckets that are powers of two.
func Octaves(f func(time.Duration)) {
	for b := firstBits; b <= lastBits; b++ {
		f(1 << b)
	}
}

// Quantile returns the time that the part q of the events did not exceed, from 0 to 1; 0 without
// events.
func (h *Histogram) Quantile(q float64) time.Duration {
	want, begin := q*float64(h.Count()), time.Duration(0)
	for i, c := range h.counts {
		if n := float64(c); n > 0 {
			if want <= n {
				return begin + time.Duration(float64(end(i)-begin)*want/n)
			}
			want -= n
		}
		begin = end(i)
	}
	return 0
}

// Node returns a group of h: quantiles, the sum, and by its end, in nanoseconds, the events of each
// bucket that has some.
func (h *Histogram) Node(name string) Node {
	buckets := Group("bucket")
	for i, n := range h.counts {
		if n > 0 {
			buckets.Nodes = append(buckets.Nodes, Count(fmt.Sprint(int64(end(i))), n))
		}
	}
	age := func(name string, d time.Duration) Node { return Node{Name: name, Value: Age(d)} }
	return Group(name, age("p50", h.Quantile(.5)), age("p90", h.Quantile(.9)), age("p99", h.Quantile(.99)),
		age("sum", h.sum), buckets).As(Distribution)
}

// HistogramOf returns the histogram that a node of Node shows.
func HistogramOf(n Node) (h Histogram) {
	for path, v := range n.Values("") {
		number, bucket := fmt.Sprint(v), strings.TrimPrefix(path, "bucket/")
		if age, ok := v.(Age); ok && path == "sum" {
			h.sum = time.Duration(age)
		} else if path == "sum" { // of JSON
			seconds, _ := strconv.ParseFloat(number, 64)
			h.sum = time.Duration(math.Round(seconds * float64(time.Second)))
		}
		for i := range h.counts {
			if bucket == strconv.FormatInt(int64(end(i)), 10) {
				h.counts[i], _ = strconv.ParseUint(number, 10, 64)
			}
		}
	}
	return h
}
