// Package traceplot makes a plot of the latencies of traces: each request over the time of
// the run, and below that their distribution.
package traceplot

import (
	"cmp"
	"errors"
	"math"
	"slices"
	"time"

	"gvm/devices/scsi/trace"
	"gvm/plot"
)

// Plot collects requests for a plot. Operations have colours, sources
// (backends or files) have shapes and dashes.
type Plot struct {
	Title string

	series map[name]*series
	cells  int  // of all series
	shift  uint // of times: the width of a cell
}

type name struct{ op, source string }

// series is a line of the legend with its dots.
type series struct {
	name
	count   uint64
	latency trace.Latency
	cells   map[cell]bool // cells with a dot
}

// cell is a place on the scatter plot: one dot shows all requests in it.
type cell struct{ at, latency int64 }

const (
	maxCells       = 200_000 // cells kept; with more they become wider
	cellsPerDecade = 100     // of latency
	firstShift     = 10      // cells of a microsecond

	// With more dots than maxDots, those that would cover each other on the plot are drawn as one:
	// they share a column and a row of a fiftieth of a decade.
	maxDots = 8000
	columns = 300
	rowSpan = cellsPerDecade / 50

	maxOps   = plot.Colours - 1 // with a colour of their own
	otherOps = "all others"
)

// Add adds a request that began at the given time after the start of its run.
func (p *Plot) Add(source, op string, at, latency time.Duration) {
	if p.series == nil {
		p.series, p.shift = map[name]*series{}, firstShift
	}
	s := p.series[name{op, source}]
	if s == nil {
		s = &series{name: name{op, source}, cells: map[cell]bool{}}
		p.series[s.name] = s
	}
	s.count++
	latency = max(latency, 1)
	s.latency.Add(latency)
	c := cell{int64(at) >> p.shift, int64(math.Round(math.Log10(float64(latency)) * cellsPerDecade))}
	if !s.cells[c] {
		s.cells[c] = true
		p.cells++
	}
	for p.cells > maxCells {
		p.widen()
	}
}

// widen makes cells twice as wide.
func (p *Plot) widen() {
	p.shift, p.cells = p.shift+1, 0
	for _, s := range p.series {
		cells := map[cell]bool{}
		for c := range s.cells {
			cells[cell{c.at >> 1, c.latency}] = true
		}
		s.cells = cells
		p.cells += len(cells)
	}
}

// drawn returns the series to draw: the most frequent first, and the less frequent operations as
// one.
func (p *Plot) drawn() (list []*series, ops, sources []string) {
	counts := map[string]uint64{}
	for n, s := range p.series {
		counts[n.op] += s.count
		if !slices.Contains(sources, n.source) {
			sources = append(sources, n.source)
		}
	}
	slices.Sort(sources)
	for op := range counts {
		ops = append(ops, op)
	}
	slices.SortFunc(ops, func(a, b string) int { return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b)) })
	for _, s := range p.series {
		if i := slices.Index(ops, s.op); i < maxOps || len(ops) == maxOps+1 {
			list = append(list, s)
			continue
		}
		n := name{otherOps, s.source}
		i := slices.IndexFunc(list, func(o *series) bool { return o.name == n })
		if i < 0 {
			i = len(list)
			list = append(list, &series{name: n, cells: map[cell]bool{}})
		}
		list[i].merge(s)
	}
	if len(ops) > maxOps+1 {
		ops = append(ops[:maxOps:maxOps], otherOps)
	}
	slices.SortFunc(list, func(a, b *series) int {
		return cmp.Or(cmp.Compare(slices.Index(ops, a.op), slices.Index(ops, b.op)), cmp.Compare(a.source, b.source))
	})
	return list, ops, sources
}

func (s *series) merge(o *series) {
	s.count += o.count
	s.latency.Merge(&o.latency)
	for c := range o.cells {
		s.cells[c] = true
	}
}

// span returns the number of cells of a column of the plot, and of a row: 1 if all dots can be
// drawn.
func (p *Plot) span() (column, row int64) {
	if p.cells <= maxDots {
		return 1, 1
	}
	first, last := int64(math.MaxInt64), int64(0)
	for _, s := range p.series {
		for c := range s.cells {
			first, last = min(first, c.at), max(last, c.at)
		}
	}
	return 1 + (last-first)/columns, rowSpan
}

// points returns the dots of the series, in seconds and nanoseconds.
func (s *series) points(shift uint, column, row int64) []plot.Point {
	coarse := map[cell]cell{} // one of its cells, so that every dot is at a request
	for c := range s.cells {
		at := cell{c.at / column, c.latency / row}
		if o, ok := coarse[at]; !ok || c.latency > o.latency || c.latency == o.latency && c.at < o.at {
			coarse[at] = c
		}
	}
	var xys []plot.Point
	for _, c := range coarse {
		xys = append(xys, plot.Point{
			(float64(c.at) + 0.5) * float64(uint64(1)<<shift) / 1e9,
			math.Pow(10, float64(c.latency)/cellsPerDecade),
		})
	}
	slices.SortFunc(xys, func(a, b plot.Point) int { return slices.Compare(a[:], b[:]) })
	return xys
}

// shares returns the steps of the distribution: the percentage of requests that took no longer than
// a latency.
func (s *series) shares() []plot.Point {
	xys := []plot.Point{{float64(max(s.latency.Quantile(0), 1)), 0}}
	var sum uint64
	for _, b := range s.latency.Buckets() {
		sum += b.Count
		xys = append(xys, plot.Point{float64(b.UpTo), 100 * float64(sum) / float64(s.count)})
	}
	return xys
}

// ErrEmpty reports that there is no request to draw.
var ErrEmpty = errors.New("no request to plot")

// Latencies describes the plot.
func (p *Plot) Latencies() (*plot.Latencies, error) {
	if len(p.series) == 0 {
		return nil, ErrEmpty
	}
	list, ops, sources := p.drawn()
	column, row := p.span()
	l := &plot.Latencies{Title: p.Title, Sources: sources, Low: math.Inf(1)}
	for _, op := range ops {
		l.Operations = append(l.Operations, plot.Operation{Name: op})
	}
	for _, s := range list {
		op := slices.Index(ops, s.op)
		l.Operations[op].Count += s.count
		l.Series = append(l.Series, plot.Series{
			Operation: op, Source: slices.Index(sources, s.source),
			Dots: s.points(p.shift, column, row), Shares: s.shares(),
		})
		l.Low = min(l.Low, float64(s.latency.Quantile(0)))
		l.High = max(l.High, float64(s.latency.Quantile(1)))
	}
	return l, nil
}
