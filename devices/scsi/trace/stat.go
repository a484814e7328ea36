package trace

import (
	"cmp"
	"slices"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Latency is a distribution of latencies, exact to a tenth of a percent.
type Latency struct{ h *hdrhistogram.Histogram }

// maxLatency is the longest latency that is distinguished from longer ones.
const maxLatency = time.Hour

// Add counts d.
func (l *Latency) Add(d time.Duration) {
	if l.h == nil {
		l.h = hdrhistogram.New(1, int64(maxLatency), 3)
	}
	_ = l.h.RecordValue(int64(min(max(d, 0), maxLatency))) // fails for none of these
}

// Merge adds the counts of o.
func (l *Latency) Merge(o *Latency) {
	if l.h == nil {
		l.h = hdrhistogram.New(1, int64(maxLatency), 3)
	}
	if o.h != nil {
		l.h.Merge(o.h)
	}
}

// Quantile returns the latency that a fraction q, from 0 to 1, of all does not exceed: 0 is the
// least, 1 the greatest.
func (l *Latency) Quantile(q float64) time.Duration {
	switch {
	case l.h == nil:
		return 0
	case q <= 0:
		return time.Duration(l.h.Min())
	}
	return time.Duration(l.h.ValueAtPercentile(100 * q))
}

// Bucket counts latencies.
type Bucket struct {
	UpTo  time.Duration // and not less than the bucket's before it
	Count uint64
}

// Buckets returns the counts of all latencies that occurred, in ascending order.
func (l *Latency) Buckets() []Bucket {
	var out []Bucket
	if l.h != nil {
		for _, b := range l.h.Distribution() {
			if b.Count > 0 {
				out = append(out, Bucket{time.Duration(b.To), uint64(b.Count)})
			}
		}
	}
	return out
}

// Row is the counts of Stats for one operation in one source.
type Row struct {
	Source, Op string
	Count      uint64
	Errors     uint64 // Record.Failed
	Bytes      uint64 // transferred, both ways
	Latency    Latency
}

// Stats counts the requests of any number of traces.
type Stats struct {
	Requests, Errors, Lost uint64
	rows                   map[[2]string]*Row
}

// Add counts r for source, a backend or a file.
func (s *Stats) Add(source string, r *Record) {
	switch r.Kind {
	case Command, TaskManagement:
	case Lost:
		s.Lost += r.Count
		return
	default:
		return
	}
	key := [2]string{source, r.Op()}
	row := s.rows[key]
	if row == nil {
		if s.rows == nil {
			s.rows = map[[2]string]*Row{}
		}
		row = &Row{Source: key[0], Op: key[1]}
		s.rows[key] = row
	}
	s.Requests++
	row.Count++
	if r.Failed() {
		s.Errors++
		row.Errors++
	}
	if n := uint64(r.Out) + uint64(r.In); r.Kind == Command && r.Missing&NoResidual == 0 {
		row.Bytes += n - min(n, uint64(r.Residual))
	} else if r.Kind == Command && !r.Failed() {
		row.Bytes += n
	}
	row.Latency.Add(r.Latency)
}

// Rows returns the counts, the most frequent operation first and its sources together.
func (s *Stats) Rows() []*Row {
	var rows []*Row
	counts := map[string]uint64{}
	for _, r := range s.rows {
		rows = append(rows, r)
		counts[r.Op] += r.Count
	}
	slices.SortFunc(rows, func(a, b *Row) int {
		return cmp.Or(cmp.Compare(counts[b.Op], counts[a.Op]), cmp.Compare(a.Op, b.Op), cmp.Compare(a.Source, b.Source))
	})
	return rows
}

// Backend returns the backend that served r: "process", "vhost" or "unknown".
func (h *Header) Backend(r *Record) string {
	if int(r.Device) < len(h.Devices) {
		if b := h.Devices[r.Device].Backend; b == "process" || b == "vhost" {
			return b
		}
	}
	return "unknown"
}
