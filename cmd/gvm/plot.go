package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"gvm/plot"
)

// plotFormat returns the format of a file name's extension.
func plotFormat(path string) (string, error) {
	format := strings.TrimPrefix(strings.ToLower(filepath.Ext(path)), ".")
	if format != "svg" && format != "png" {
		return "", fmt.Errorf("%q: want a file name that ends with .svg or .png", path)
	}
	return format, nil
}

// plotter returns a command that draws plots: gvm-plot, beside gvm or in $PATH. A gvm built by `go
// run` or a plain `go build` knows its source path, and uses go run with that of gvm-plot.
func plotter() (*exec.Cmd, error) {
	const name = "gvm-plot"
	path, beside := besideProgram(name)
	if path != "" {
		return exec.Command(path), nil
	}
	if _, file, _, ok := runtime.Caller(0); ok && filepath.IsAbs(file) { // not after a build with -trimpath
		c := exec.Command("go", "run", ".")
		c.Dir = filepath.Join(filepath.Dir(filepath.Dir(file)), name)
		if _, err := os.Stat(c.Dir); err == nil && c.Err == nil {
			return c, nil
		}
	}
	return nil, configError{fmt.Errorf("the program that draws plots is missing: put gvm-plot, "+
		"which make build makes beside gvm, at %s or into $PATH", beside)}
}

// besideProgram finds a program of gvm's: beside gvm, else in $PATH, else path is "". beside is the
// first place.
func besideProgram(name string) (path, beside string) {
	beside = name
	if exe, err := os.Executable(); err == nil {
		beside = filepath.Join(filepath.Dir(exe), name)
	}
	for _, candidate := range []string{beside, name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path, beside
		}
	}
	return "", beside
}

// writePlot draws p into the file at path, whose extension selects the format.
func writePlot(path string, p *plot.Plot) error {
	format, err := plotFormat(path)
	if err != nil {
		return err
	}
	p.Version, p.Format = plot.Version, format
	description, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("draw %s: %w", path, err)
	}
	c, err := plotter()
	if err != nil {
		return err
	}
	var errs bytes.Buffer
	c.Stdin, c.Stderr = bytes.NewReader(description), &errs
	drawn, err := c.Output()
	if err != nil {
		if line, _, _ := strings.Cut(errs.String(), "\n"); line != "" {
			err = errors.New(line)
		}
		return fmt.Errorf("draw %s: %w", path, err)
	}
	return writeOutput(path, drawn)
}
