// Command gvm-plot draws the plots of gvm, which starts it. It reads the description of a plot
// (package plot) as JSON from standard input and writes the file to standard output.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"gvm/plot"
	"gvm/plot/draw"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Fprintln(os.Stderr, "gvm-plot: takes no arguments: gvm trace plot and gvm bench --plot start it")
		os.Exit(2)
	}
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "gvm-plot: %v\n", err)
		os.Exit(1)
	}
}

func run(r io.Reader, w io.Writer) error {
	var p plot.Plot
	if err := json.NewDecoder(r).Decode(&p); err != nil {
		return fmt.Errorf("read the description of a plot: %w", err)
	}
	return draw.Write(w, &p)
}
