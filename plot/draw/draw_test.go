package draw

import (
	"io"
	"testing"

	"gvm/plot"
)

// TestRefuses: descriptions that gvm does not write give an error, and no crash.
func TestRefuses(t *testing.T) {
	series := plot.Series{Dots: []plot.Point{{0, 1}}, Shares: []plot.Point{{1, 0}, {1, 100}}}
	for name, p := range map[string]plot.Plot{
		"another version": {Version: plot.Version + 1, Format: "svg", Rates: []plot.Panel{{}}},
		"another format":  {Version: plot.Version, Format: "pdf", Rates: []plot.Panel{{}}},
		"nothing":         {Version: plot.Version, Format: "svg"},
		"no rates":        {Version: plot.Version, Format: "svg", Rates: []plot.Panel{{Title: "x"}}},
		"a missing operation": {Version: plot.Version, Format: "svg",
			Latencies: &plot.Latencies{Sources: []string{"x"}, Series: []plot.Series{series}}},
		"too many operations": {Version: plot.Version, Format: "svg",
			Latencies: &plot.Latencies{Operations: make([]plot.Operation, plot.Colours+1), Sources: []string{"x"},
				Series: []plot.Series{series}}},
		"a missing source": {Version: plot.Version, Format: "svg",
			Latencies: &plot.Latencies{Operations: make([]plot.Operation, 1), Series: []plot.Series{series}}},
	} {
		if err := Write(io.Discard, &p); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
