package main

import (
	"bytes"
	"fmt"
	"image/color"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"

	"gvm/text"
)

// benchPanel is one of the plots beside each other: requests per second over the
// number of them in flight.
type benchPanel struct {
	title  string
	curves []benchCurve // in the order of the legend, the same in all panels
}

type benchCurve struct {
	name   string
	points map[int][]float64 // the rounds' thousands of requests per second, by depth
}

// add adds a measurement to the panel's curve of that name.
func (p *benchPanel) add(name string, depth int, kIOPS float64) {
	i := slices.IndexFunc(p.curves, func(c benchCurve) bool { return c.name == name })
	if i < 0 {
		i = len(p.curves)
		p.curves = append(p.curves, benchCurve{name, map[int][]float64{}})
	}
	p.curves[i].points[depth] = append(p.curves[i].points[depth], kIOPS)
}

// plotFormat is the format that a file's name ends with.
func plotFormat(path string) (string, error) {
	format := strings.TrimPrefix(strings.ToLower(filepath.Ext(path)), ".")
	if format != "svg" && format != "png" {
		return "", fmt.Errorf("%q: want a file name that ends with .svg or .png", path)
	}
	return format, nil
}

// plotFlag is --plot of the benchmarks over depths.
func plotFlag() cli.Flag {
	return &cli.StringFlag{Name: "plot", Usage: "draw the medians, with the lowest and highest, to `FILE`, whose name ends with .svg or .png", TakesFile: true}
}

// checkPlot tells what is wrong with --plot before anything is measured.
func checkPlot(path string) error {
	if path == "" {
		return nil
	}
	if _, err := plotFormat(path); err != nil {
		return fmt.Errorf("--plot %w", err)
	}
	if _, err := os.Stat(filepath.Dir(path)); err != nil {
		return fmt.Errorf("--plot: %w", err)
	}
	return nil
}

// medians are a curve's points, with the lowest and the highest of the rounds.
type medians struct {
	plotter.XYs
	plotter.YErrors
}

func (c benchCurve) medians() (m medians) {
	var depths []int
	for d := range c.points {
		depths = append(depths, d)
	}
	slices.Sort(depths)
	for _, d := range depths {
		v := slices.Sorted(slices.Values(c.points[d]))
		y := v[len(v)/2]
		m.XYs = append(m.XYs, plotter.XY{X: float64(d), Y: y})
		m.YErrors = append(m.YErrors, struct{ Low, High float64 }{y - v[0], v[len(v)-1] - y})
	}
	return m
}

// writeBenchPlot draws the panels into the file at path, whose name tells the format.
func writeBenchPlot(path string, panels []benchPanel) (err error) {
	format, err := plotFormat(path)
	if err != nil {
		return err
	}
	const width, height = 11 * vg.Inch, 5 * vg.Inch
	var canvas interface {
		vg.CanvasSizer
		io.WriterTo
	}
	if format == "svg" {
		canvas = vgsvg.New(width, height)
	} else {
		canvas = vgimg.PngCanvas{Canvas: vgimg.NewWith(vgimg.UseWH(width, height), vgimg.UseDPI(120))}
	}
	all := draw.New(canvas)
	all.SetColor(color.White)
	all.Fill(all.Path())
	all = draw.Crop(all, vg.Points(8), -vg.Points(8), vg.Points(8), -vg.Points(8))
	var row []*plot.Plot
	high := 0.0
	for i := range panels {
		p, err := panels[i].plot()
		if err != nil {
			return err
		}
		row = append(row, p)
		high = max(high, p.Y.Max)
	}
	for _, p := range row {
		p.Y.Min, p.Y.Max = 0, high*1.02 // to be compared
	}
	tiles := draw.Tiles{Rows: 1, Cols: len(row), PadX: vg.Points(18)}
	for i, c := range plot.Align([][]*plot.Plot{row}, tiles, all)[0] {
		row[i].Draw(c)
	}
	var b bytes.Buffer
	if _, err := canvas.WriteTo(&b); err != nil {
		return fmt.Errorf("draw %s: %w", path, err)
	}
	return writeOutput(path, b.Bytes())
}

func (b *benchPanel) plot() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = b.title, "requests in flight", "thousands of requests per second"
	p.Title.Padding = vg.Points(6)
	p.X.Scale = plot.LogScale{}
	p.Legend.Top, p.Legend.Left = true, true
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = color.Gray{0xdd}, color.Gray{0xdd}
	p.Add(grid)
	var depths []int
	for i, c := range b.curves {
		m := c.medians()
		line, dots, err := plotter.NewLinePoints(m.XYs)
		if err != nil {
			return nil, fmt.Errorf("plot of %s: %w", c.name, err)
		}
		bars, err := plotter.NewYErrorBars(m)
		if err != nil {
			return nil, fmt.Errorf("plot of %s: %w", c.name, err)
		}
		line.Color, line.Width, line.Dashes = plotutil.Color(i), vg.Points(1.4), plotutil.Dashes(i)
		dots.Color, dots.Shape, bars.Color = plotutil.Color(i), plotutil.Shape(i), plotutil.Color(i)
		p.Add(line, dots, bars)
		p.Legend.Add(text.Printable(c.name), line, dots)
		for d := range c.points {
			depths = append(depths, d)
		}
	}
	slices.Sort(depths)
	depths = slices.Compact(depths)
	var ticks plot.ConstantTicks
	for _, d := range depths {
		ticks = append(ticks, plot.Tick{Value: float64(d), Label: strconv.Itoa(d)})
	}
	p.X.Tick.Marker = ticks
	// With room on both sides, also when there is one depth alone.
	p.X.Min, p.X.Max = float64(depths[0])/1.2, float64(depths[len(depths)-1])*1.2
	p.Y.Max = math.Max(p.Y.Max, 1)
	return p, nil
}
