package draw

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"strconv"
	"time"

	gonum "gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"gvm/plot"
	"gvm/text"
)

// Colours that people with any kind of colour vision tell apart (M. Okabe and
// K. Ito, "Color Universal Design", 2008), and grey for the rest.
var colours = [plot.Colours]color.RGBA{
	{0x00, 0x72, 0xb2, 0xff}, {0xd5, 0x5e, 0x00, 0xff}, {0x00, 0x9e, 0x73, 0xff}, {0xcc, 0x79, 0xa7, 0xff},
	{0xe6, 0x9f, 0x00, 0xff}, {0x56, 0xb4, 0xe9, 0xff}, {0x00, 0x00, 0x00, 0xff}, {0x99, 0x99, 0x99, 0xff},
}

var shapes = []draw.GlyphDrawer{draw.CircleGlyph{}, draw.CrossGlyph{}, draw.PyramidGlyph{}, draw.RingGlyph{}}

var dashes = [][]vg.Length{nil, {vg.Points(6), vg.Points(3)}, {vg.Points(2), vg.Points(2)},
	{vg.Points(8), vg.Points(2), vg.Points(2), vg.Points(2)}}

func sans(size float64) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: vg.Points(size)}
}

func newPlot(title, x, y string) *gonum.Plot {
	p := gonum.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = text.Printable(title), x, y
	p.Title.Padding = vg.Points(6)
	p.Title.TextStyle.Font = sans(13)
	for _, a := range []*gonum.Axis{&p.X, &p.Y} {
		a.Label.TextStyle.Font, a.Tick.Label.Font = sans(10.5), sans(9.5)
		a.Label.Padding = vg.Points(3)
	}
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = color.Gray{0xdd}, color.Gray{0xdd}
	p.Add(grid)
	return p
}

// latencies draws both plots and their legend.
func latencies(l *plot.Latencies, format string) (canvas, error) {
	if n := len(l.Operations); n > plot.Colours {
		return nil, fmt.Errorf("%d operations: there are %d colours", n, plot.Colours)
	}
	for _, s := range l.Series {
		if s.Operation < 0 || s.Operation >= len(l.Operations) || s.Source < 0 || s.Source >= len(l.Sources) {
			return nil, errors.New("a series without a name")
		}
	}
	over := newPlot(l.Title, "time since the start of the run (s)", "latency")
	share := newPlot("", "latency", "requests that took no longer (%)")
	legend := gonum.NewLegend()
	legend.Top, legend.Left = true, true
	legend.TextStyle.Font = sans(9.5)
	legend.Padding = vg.Points(4)
	legend.ThumbnailWidth = vg.Points(24)
	for _, s := range l.Series {
		colour := colours[s.Operation]
		dots, err := plotter.NewScatter(xys(s.Dots))
		if err != nil {
			return nil, err
		}
		dots.GlyphStyle = dot(colour, s.Source)
		line, err := plotter.NewLine(xys(s.Shares))
		if err != nil {
			return nil, err
		}
		line.StepStyle = plotter.PostStep
		line.LineStyle = stroke(colour, s.Source)
		over.Add(dots)
		share.Add(line)
	}
	for i, op := range l.Operations {
		legend.Add(fmt.Sprintf("%s: %d", shorten(op.Name), op.Count), sample(colours[i], 0)...)
	}
	if len(l.Sources) > 1 {
		for i, source := range l.Sources {
			legend.Add(shorten(source), sample(color.RGBA{A: 0xff}, i)...)
		}
	}
	// Half a decade at least, so that there are labels.
	low, high := max(l.Low, 1), l.High
	if wide := math.Sqrt(5 * low / high); wide > 1 {
		low, high = low/wide, high*wide
	}
	for _, a := range []*gonum.Axis{&over.Y, &share.X} {
		a.Min, a.Max = low/1.25, high*1.25
		a.Scale, a.Tick.Marker = gonum.LogScale{}, durations{}
	}
	over.X.Tick.Marker = round{8}
	share.Y.Min, share.Y.Max, share.Y.Tick.Marker = 0, 100, round{5}

	const legendWidth = 2.7 * vg.Inch
	c, all := page(format, 11*vg.Inch, 8.5*vg.Inch)
	column := [][]*gonum.Plot{{over}, {share}}
	cells := gonum.Align(column, draw.Tiles{Rows: 2, Cols: 1, PadY: vg.Points(14)},
		draw.Crop(all, 0, -legendWidth, 0, 0))
	over.Draw(cells[0][0])
	share.Draw(cells[1][0])
	legend.Draw(draw.Crop(all, all.Size().X-legendWidth+vg.Points(12), 0, 0, -vg.Points(24)))
	return c, nil
}

func xys(points []plot.Point) plotter.XYs {
	list := make(plotter.XYs, len(points))
	for i, p := range points {
		list[i] = plotter.XY{X: p[0], Y: p[1]}
	}
	return list
}

// dot and stroke return the style of a colour and a source.
func dot(c color.RGBA, source int) draw.GlyphStyle {
	return draw.GlyphStyle{Color: color.NRGBA{c.R, c.G, c.B, 0xa0}, Radius: vg.Points(1.8),
		Shape: shapes[source%len(shapes)]}
}

func stroke(c color.RGBA, source int) draw.LineStyle {
	return draw.LineStyle{Color: c, Width: vg.Points(1.4), Dashes: dashes[source%len(dashes)]}
}

// sample draws the mark of a line of the legend.
func sample(c color.RGBA, source int) []gonum.Thumbnailer {
	s := dot(c, source)
	s.Radius *= 2
	return []gonum.Thumbnailer{&plotter.Line{LineStyle: stroke(c, source)}, &plotter.Scatter{GlyphStyle: s}}
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

// round marks an axis at no more than marks round numbers, besides the ends.
type round struct{ marks int }

// Ticks implements plot.Ticker.
func (r round) Ticks(low, high float64) []gonum.Tick {
	step := math.Pow10(int(math.Floor(math.Log10((high - low) / float64(r.marks)))))
	for _, f := range []float64{2, 2.5, 2} { // 1, 2, 5, 10
		if (high-low)/step > float64(r.marks) {
			step *= f
		}
	}
	var ticks []gonum.Tick
	for i := math.Ceil(low / step); i*step <= high; i++ {
		ticks = append(ticks, gonum.Tick{Value: i * step, Label: strconv.FormatFloat(i*step, 'g', 10, 64)})
	}
	return ticks
}

// durations marks a logarithmic axis of nanoseconds.
type durations struct{}

// Ticks implements plot.Ticker.
func (durations) Ticks(low, high float64) []gonum.Tick {
	var ticks []gonum.Tick
	wide := math.Log10(high/low) > 3
	for decade := math.Pow10(int(math.Floor(math.Log10(low)))); decade <= high; decade *= 10 {
		for i := 1.0; i < 10; i++ {
			v := decade * i
			if v < low || v > high {
				continue
			}
			t := gonum.Tick{Value: v}
			if i == 1 || !wide && (i == 2 || i == 5) {
				t.Label = time.Duration(math.Round(v)).String()
			}
			ticks = append(ticks, t)
		}
	}
	return ticks
}
