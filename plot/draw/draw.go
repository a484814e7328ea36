// Package draw draws plots. Only cmd/gvm-plot imports it: see package plot.
package draw

import (
	"errors"
	"fmt"
	"image/color"
	"io"

	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"

	"gvm/plot"
)

// Write draws p into w.
func Write(w io.Writer, p *plot.Plot) error {
	var c canvas
	var err error
	switch {
	case p.Version != plot.Version:
		return fmt.Errorf("plot: want version %d of the description, have %d", plot.Version, p.Version)
	case p.Format != "svg" && p.Format != "png":
		return fmt.Errorf("plot: format %q is neither svg nor png", p.Format)
	case p.Latencies != nil:
		c, err = latencies(p.Latencies, p.Format)
	case len(p.Rates) > 0:
		c, err = rates(p.Rates, p.Format)
	default:
		err = errors.New("nothing to draw")
	}
	if err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	_, err = c.WriteTo(w)
	return err
}

// canvas is a page that can be written to a file.
type canvas interface {
	vg.CanvasSizer
	io.WriterTo
}

// page makes a white canvas, and returns it and its part inside the margin.
func page(format string, width, height vg.Length) (canvas, draw.Canvas) {
	var c canvas
	if format == "svg" {
		c = vgsvg.New(width, height)
	} else {
		c = vgimg.PngCanvas{Canvas: vgimg.NewWith(vgimg.UseWH(width, height), vgimg.UseDPI(120))}
	}
	all := draw.New(c)
	all.SetColor(color.White)
	all.Fill(all.Path())
	return c, draw.Crop(all, vg.Points(8), -vg.Points(8), vg.Points(8), -vg.Points(8))
}
