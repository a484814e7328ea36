package draw

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"slices"
	"strconv"

	gonum "gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"gvm/plot"
	"gvm/text"
)

// medians are a curve's points, with the lowest and the highest of the rounds.
type medians struct {
	plotter.XYs
	plotter.YErrors
}

// rates draws the panels side by side.
func rates(panels []plot.Panel, format string) (canvas, error) {
	var row []*gonum.Plot
	high := 0.0
	for i := range panels {
		p, err := panel(&panels[i])
		if err != nil {
			return nil, err
		}
		row = append(row, p)
		high = max(high, p.Y.Max)
	}
	for _, p := range row {
		p.Y.Min, p.Y.Max = 0, high*1.02 // the same for all panels
	}
	c, all := page(format, 11*vg.Inch, 5*vg.Inch)
	tiles := draw.Tiles{Rows: 1, Cols: len(row), PadX: vg.Points(18)}
	for i, cell := range gonum.Align([][]*gonum.Plot{row}, tiles, all)[0] {
		row[i].Draw(cell)
	}
	return c, nil
}

func panel(b *plot.Panel) (*gonum.Plot, error) {
	p := gonum.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = b.Title, "requests in flight", "thousands of requests per second"
	p.Title.Padding = vg.Points(6)
	p.X.Scale = gonum.LogScale{}
	p.Legend.Top, p.Legend.Left = true, true
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = color.Gray{0xdd}, color.Gray{0xdd}
	p.Add(grid)
	var depths []int
	for i, c := range b.Curves {
		var m medians
		for _, r := range c.Rates {
			m.XYs = append(m.XYs, plotter.XY{X: float64(r.Depth), Y: r.Median})
			m.YErrors = append(m.YErrors, struct{ Low, High float64 }{r.Median - r.Low, r.High - r.Median})
			depths = append(depths, r.Depth)
		}
		line, dots, err := plotter.NewLinePoints(m.XYs)
		if err != nil {
			return nil, fmt.Errorf("plot of %s: %w", c.Name, err)
		}
		bars, err := plotter.NewYErrorBars(m)
		if err != nil {
			return nil, fmt.Errorf("plot of %s: %w", c.Name, err)
		}
		line.Color, line.Width, line.Dashes = plotutil.Color(i), vg.Points(1.4), plotutil.Dashes(i)
		dots.Color, dots.Shape, bars.Color = plotutil.Color(i), plotutil.Shape(i), plotutil.Color(i)
		p.Add(line, dots, bars)
		p.Legend.Add(text.Printable(c.Name), line, dots)
	}
	if len(depths) == 0 {
		return nil, errors.New("a panel without a rate")
	}
	slices.Sort(depths)
	depths = slices.Compact(depths)
	var ticks gonum.ConstantTicks
	for _, d := range depths {
		ticks = append(ticks, gonum.Tick{Value: float64(d), Label: strconv.Itoa(d)})
	}
	p.X.Tick.Marker = ticks
	// Leave room on both sides, also for a single depth.
	p.X.Min, p.X.Max = float64(depths[0])/1.2, float64(depths[len(depths)-1])*1.2
	p.Y.Max = math.Max(p.Y.Max, 1)
	return p, nil
}
