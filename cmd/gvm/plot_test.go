package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gvm/plot"
)

// TestPlotter looks for gvm-plot in each place.
func TestPlotter(t *testing.T) {
	if c, err := plotter(); err != nil || filepath.Base(c.Path) != "gvm-plot" {
		t.Errorf("in $PATH: %v, %v", c, err)
	}
	golang, err := exec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	only := t.TempDir()
	if err := os.Symlink(golang, filepath.Join(only, "go")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", only)
	c, err := plotter()
	if err != nil || strings.Join(c.Args, " ") != "go run ." {
		t.Fatalf("in a source tree: %v, %v", c, err)
	}
	if _, err := os.Stat(filepath.Join(c.Dir, "main.go")); err != nil {
		t.Error(err)
	}
	t.Setenv("PATH", t.TempDir())
	if c, err := plotter(); err == nil {
		t.Errorf("nowhere: %v", c)
	}
}

// TestPlotterMissing: gvm measures nothing if it cannot draw the plot.
func TestPlotterMissing(t *testing.T) {
	c := command(t, "bench", "disk", "--plot", "x.svg", "--json", "x.json")
	c.Env = append(c.Env, "PATH="+t.TempDir())
	r := gvmRuns(t, c)
	want := "gvm: --plot: the program that draws plots is missing: put gvm-plot, " +
		"which make build makes beside gvm, at " +
		filepath.Join(filepath.Dir(self(t)), "gvm-plot") + " or into $PATH\n"
	if _, err := os.Stat(filepath.Join(c.Dir, "x.json")); r.errs != want || r.status == 0 || err == nil {
		t.Errorf("status %d, %v: %s", r.status, err, r.errs)
	}
}

// TestPlotterFails: gvm passes on the error of gvm-plot, and leaves no file.
func TestPlotterFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.svg")
	err := writePlot(path, &plot.Plot{})
	if err == nil || err.Error() != "draw "+path+": gvm-plot: plot: nothing to draw" {
		t.Error(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("there is a file")
	}
}
