package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"

	"gvm/kvmapi/nowait"
	"gvm/plot"
)

// benchPanel is one of several plots side by side: requests per second over requests in flight.
type benchPanel struct {
	title  string
	curves []benchCurve // in the order of the legend, the same in all panels
}

type benchCurve struct {
	name   string
	points map[int][]float64 // thousands of requests per second of each round, by depth
}

// add adds a measurement to the panel's curve with that name.
func (p *benchPanel) add(name string, depth int, kIOPS float64) {
	i := slices.IndexFunc(p.curves, func(c benchCurve) bool { return c.name == name })
	if i < 0 {
		i = len(p.curves)
		p.curves = append(p.curves, benchCurve{name, map[int][]float64{}})
	}
	p.curves[i].points[depth] = append(p.curves[i].points[depth], kIOPS)
}

// plotFlag returns --plot of the benchmarks over depths.
func plotFlag() cli.Flag {
	return &cli.StringFlag{Name: "plot",
		Usage:     "draw the medians, with the lowest and highest, to `FILE`, whose name ends with .svg or .png",
		TakesFile: true}
}

// checkPlot checks --plot before anything is measured.
func checkPlot(path string) error {
	if path == "" {
		return nil
	}
	if _, err := plotFormat(path); err != nil {
		return fmt.Errorf("--plot %w", err)
	}
	if _, err := os.Stat(filepath.Dir(path)); err != nil {
		return fmt.Errorf("--plot: %w", nowait.CreateError(path, err))
	}
	if _, err := plotter(); err != nil {
		return fmt.Errorf("--plot: %w", err)
	}
	return nil
}

// panel describes the panel, with the medians of the rounds.
func (p *benchPanel) panel() plot.Panel {
	d := plot.Panel{Title: p.title}
	for _, c := range p.curves {
		curve := plot.Curve{Name: c.name}
		for _, depth := range slices.Sorted(maps.Keys(c.points)) {
			v := slices.Sorted(slices.Values(c.points[depth]))
			curve.Rates = append(curve.Rates, plot.Rate{Depth: depth, Median: v[len(v)/2],
				Low: v[0], High: v[len(v)-1]})
		}
		d.Curves = append(d.Curves, curve)
	}
	return d
}

// writeBenchPlot draws the panels into the file at path, whose extension selects the format.
func writeBenchPlot(path string, panels []benchPanel) error {
	var p plot.Plot
	for i := range panels {
		p.Rates = append(p.Rates, panels[i].panel())
	}
	return writePlot(path, &p)
}
