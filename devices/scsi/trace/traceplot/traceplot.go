// Package traceplot draws the latencies of traces: each request over the time of
// the run, and below that their distribution.
package traceplot

import (
	"cmp"
	"errors"
	"fmt"
	"image/color"
	"io"
	"math"
	"slices"
	"strconv"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"

	"gvm/devices/scsi/trace"
	"gvm/text"
)

// Plot collects requests and draws them. Operations have colours, sources
// (backends or files) have shapes and dashes.
type Plot struct {
	Title string

	series map[name]*series
	cells  int  // of all series
	shift  uint // of times: the width of a cell
}

type name struct{ op, source string }

// series is what has a line in the legend.
type series struct {
	name
	count   uint64
	latency trace.Latency
	cells   map[cell]bool // where there is a dot
}

// cell is a place on the scatter plot: however many requests fall into one, one
// dot shows them.
type cell struct{ at, latency int64 }

const (
	maxCells       = 200_000 // that are kept; they become wider when there are more
	cellsPerDecade = 100     // of latency
	firstShift     = 10      // cells of a microsecond

	// When there are more dots than maxDots, those that would cover each other
	// on the plot are one: they are in the same one of columns, and in rows of
	// a fiftieth of a decade.
	maxDots = 8000
	columns = 300
	rowSpan = cellsPerDecade / 50

	width, height = 11 * vg.Inch, 8.5 * vg.Inch
	legendWidth   = 2.7 * vg.Inch
	pngDPI        = 120
	maxOps        = 7 // with a colour of their own
	otherOps      = "all others"
)

// Colours that people with any kind of colour vision tell apart (M. Okabe and
// K. Ito, "Color Universal Design", 2008), and grey for the rest.
var colours = []color.RGBA{
	{0x00, 0x72, 0xb2, 0xff}, {0xd5, 0x5e, 0x00, 0xff}, {0x00, 0x9e, 0x73, 0xff}, {0xcc, 0x79, 0xa7, 0xff},
	{0xe6, 0x9f, 0x00, 0xff}, {0x56, 0xb4, 0xe9, 0xff}, {0x00, 0x00, 0x00, 0xff}, {0x99, 0x99, 0x99, 0xff},
}

var shapes = []draw.GlyphDrawer{draw.CircleGlyph{}, draw.CrossGlyph{}, draw.PyramidGlyph{}, draw.RingGlyph{}}

var dashes = [][]vg.Length{nil, {vg.Points(6), vg.Points(3)}, {vg.Points(2), vg.Points(2)}, {vg.Points(8), vg.Points(2), vg.Points(2), vg.Points(2)}}

// Add adds a request that began at a time since the start of its run.
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

// drawn are the series as they are drawn: with the less frequent operations as
// one, the most frequent first.
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

// span is how many cells make a column of the plot, and how many a row: 1 when
// all dots can be drawn.
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

// points are the dots of the series, in seconds and nanoseconds.
func (s *series) points(shift uint, column, row int64) plotter.XYs {
	coarse := map[cell]cell{} // one of those in it, so that no dot is where no request was
	for c := range s.cells {
		at := cell{c.at / column, c.latency / row}
		if o, ok := coarse[at]; !ok || c.latency > o.latency || c.latency == o.latency && c.at < o.at {
			coarse[at] = c
		}
	}
	var xys plotter.XYs
	for _, c := range coarse {
		xys = append(xys, plotter.XY{
			X: (float64(c.at) + 0.5) * float64(uint64(1)<<shift) / 1e9,
			Y: math.Pow(10, float64(c.latency)/cellsPerDecade),
		})
	}
	slices.SortFunc(xys, func(a, b plotter.XY) int { return cmp.Or(cmp.Compare(a.X, b.X), cmp.Compare(a.Y, b.Y)) })
	return xys
}

// shares are the steps of the distribution: which percentage of the requests
// took no longer than a latency.
func (s *series) shares() plotter.XYs {
	xys := plotter.XYs{{X: float64(max(s.latency.Quantile(0), 1)), Y: 0}}
	var sum uint64
	for _, b := range s.latency.Buckets() {
		sum += b.Count
		xys = append(xys, plotter.XY{X: float64(b.UpTo), Y: 100 * float64(sum) / float64(s.count)})
	}
	return xys
}

// ErrEmpty says that there is no request to draw.
var ErrEmpty = errors.New("no request to plot")

// Write draws the plot, in the format "svg" or "png".
func (p *Plot) Write(w io.Writer, format string) error {
	if len(p.series) == 0 {
		return ErrEmpty
	}
	over, share, legend, err := p.plots()
	if err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	var canvas interface {
		vg.CanvasSizer
		io.WriterTo
	}
	switch format {
	case "svg":
		canvas = vgsvg.New(width, height)
	case "png":
		canvas = vgimg.PngCanvas{Canvas: vgimg.NewWith(vgimg.UseWH(width, height), vgimg.UseDPI(pngDPI))}
	default:
		return fmt.Errorf("plot: format %q is neither svg nor png", format)
	}
	all := draw.New(canvas)
	all.SetColor(color.White)
	all.Fill(all.Path())
	all = draw.Crop(all, vg.Points(8), -vg.Points(8), vg.Points(8), -vg.Points(8))
	column := [][]*plot.Plot{{over}, {share}}
	cells := plot.Align(column, draw.Tiles{Rows: 2, Cols: 1, PadY: vg.Points(14)}, draw.Crop(all, 0, -legendWidth, 0, 0))
	over.Draw(cells[0][0])
	share.Draw(cells[1][0])
	legend.Draw(draw.Crop(all, all.Size().X-legendWidth+vg.Points(12), 0, 0, -vg.Points(24)))
	_, err = canvas.WriteTo(w)
	return err
}

func sans(size float64) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: vg.Points(size)}
}

func newPlot(title, x, y string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = text.Printable(title), x, y
	p.Title.Padding = vg.Points(6)
	p.Title.TextStyle.Font = sans(13)
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.Label.TextStyle.Font, a.Tick.Label.Font = sans(10.5), sans(9.5)
		a.Label.Padding = vg.Points(3)
	}
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = color.Gray{0xdd}, color.Gray{0xdd}
	p.Add(grid)
	return p
}

// plots makes both plots and their legend.
func (p *Plot) plots() (over, share *plot.Plot, legend *plot.Legend, err error) {
	over = newPlot(p.Title, "time since the start of the run (s)", "latency")
	share = newPlot("", "latency", "requests that took no longer (%)")
	l := plot.NewLegend()
	l.Top, l.Left = true, true
	l.TextStyle.Font = sans(9.5)
	l.Padding = vg.Points(4)
	l.ThumbnailWidth = vg.Points(24)

	list, ops, sources := p.drawn()
	column, row := p.span()
	counts := map[string]uint64{}
	low, high := math.Inf(1), 0.0
	for _, s := range list {
		colour := colours[slices.Index(ops, s.op)]
		source := slices.Index(sources, s.source)
		dots, err := plotter.NewScatter(s.points(p.shift, column, row))
		if err != nil {
			return nil, nil, nil, err
		}
		dots.GlyphStyle = dot(colour, source)
		line, err := plotter.NewLine(s.shares())
		if err != nil {
			return nil, nil, nil, err
		}
		line.StepStyle = plotter.PostStep
		line.LineStyle = stroke(colour, source)
		over.Add(dots)
		share.Add(line)
		counts[s.op] += s.count
		low = min(low, float64(s.latency.Quantile(0)))
		high = max(high, float64(s.latency.Quantile(1)))
	}
	for i, op := range ops {
		l.Add(fmt.Sprintf("%s: %d", shorten(op), counts[op]), sample(colours[i], 0)...)
	}
	if len(sources) > 1 {
		for i, source := range sources {
			l.Add(shorten(source), sample(color.RGBA{A: 0xff}, i)...)
		}
	}
	// Half a decade at least, so that there are labels.
	low = max(low, 1)
	if wide := math.Sqrt(5 * low / high); wide > 1 {
		low, high = low/wide, high*wide
	}
	for _, a := range []*plot.Axis{&over.Y, &share.X} {
		a.Min, a.Max = low/1.25, high*1.25
		a.Scale, a.Tick.Marker = plot.LogScale{}, durations{}
	}
	over.X.Tick.Marker = round{8}
	share.Y.Min, share.Y.Max, share.Y.Tick.Marker = 0, 100, round{5}
	return over, share, &l, nil
}

// dot and stroke are how a colour and a source look.
func dot(c color.RGBA, source int) draw.GlyphStyle {
	return draw.GlyphStyle{Color: color.NRGBA{c.R, c.G, c.B, 0xa0}, Radius: vg.Points(1.8), Shape: shapes[source%len(shapes)]}
}

func stroke(c color.RGBA, source int) draw.LineStyle {
	return draw.LineStyle{Color: c, Width: vg.Points(1.4), Dashes: dashes[source%len(dashes)]}
}

// sample is what a line of the legend shows.
func sample(c color.RGBA, source int) []plot.Thumbnailer {
	s := dot(c, source)
	s.Radius *= 2
	return []plot.Thumbnailer{&plotter.Line{LineStyle: stroke(c, source)}, &plotter.Scatter{GlyphStyle: s}}
}

// shorten makes a name fit the legend.
func shorten(s string) string {
	const room = 26
	s = text.Printable(s)
	if r := []rune(s); len(r) > room {
		return string(r[:room-1]) + "…"
	}
	return s
}

// round marks an axis at up to so many round numbers, besides the ends.
type round struct{ marks int }

// Ticks implements plot.Ticker.
func (r round) Ticks(low, high float64) []plot.Tick {
	step := math.Pow10(int(math.Floor(math.Log10((high - low) / float64(r.marks)))))
	for _, f := range []float64{2, 2.5, 2} { // 1, 2, 5, 10
		if (high-low)/step > float64(r.marks) {
			step *= f
		}
	}
	var ticks []plot.Tick
	for i := math.Ceil(low / step); i*step <= high; i++ {
		ticks = append(ticks, plot.Tick{Value: i * step, Label: strconv.FormatFloat(i*step, 'g', 10, 64)})
	}
	return ticks
}

// durations marks a logarithmic axis of nanoseconds.
type durations struct{}

// Ticks implements plot.Ticker.
func (durations) Ticks(low, high float64) []plot.Tick {
	var ticks []plot.Tick
	wide := math.Log10(high/low) > 3
	for decade := math.Pow10(int(math.Floor(math.Log10(low)))); decade <= high; decade *= 10 {
		for i := 1.0; i < 10; i++ {
			v := decade * i
			if v < low || v > high {
				continue
			}
			t := plot.Tick{Value: v}
			if i == 1 || !wide && (i == 2 || i == 5) {
				t.Label = time.Duration(math.Round(v)).String()
			}
			ticks = append(ticks, t)
		}
	}
	return ticks
}
