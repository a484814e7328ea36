package traceplot

import (
	"errors"
	"slices"
	"testing"
	"time"

	"gvm/plot"
)

// TestCells has more requests than cells are kept.
func TestCells(t *testing.T) {
	p := &Plot{}
	for i := range 2 * maxCells {
		p.Add("process", "READ(10)", time.Duration(i)*10*time.Microsecond, time.Duration(i))
	}
	if p.cells > maxCells || p.cells < maxCells/4 || p.shift <= firstShift {
		t.Errorf("%d cells of %d", p.cells, 1<<p.shift)
	}
}

// TestShares has a distribution of four requests.
func TestShares(t *testing.T) {
	p := &Plot{}
	for _, latency := range []time.Duration{100, 200, 200, 900} {
		p.Add("process", "x", 0, latency)
	}
	l, err := p.Latencies()
	if err != nil {
		t.Fatal(err)
	}
	got := l.Series[0].Shares
	want := []plot.Point{{100, 0}, {100, 25}, {200, 75}, {900, 100}}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestEmpty(t *testing.T) {
	if _, err := new(Plot).Latencies(); !errors.Is(err, ErrEmpty) {
		t.Errorf("nothing: %v", err)
	}
}
