package main

import (
	"fmt"
	"io"
	"math/bits"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"gvm/devices/scsi/trace"
)

func traceStat(c *cli.Context, files []string) error {
	var s trace.Stats
	source := sources(files)
	for _, path := range files {
		if err := eachRecord(c, path, func(*trace.Header) {}, func(h *trace.Header, r *trace.Record) error {
			s.Add(source(path, h, r), r)
			return nil
		}); err != nil {
			return err
		}
	}
	if c.Bool("json") {
		return statJSON(c.App.Writer, &s)
	}
	return statTable(c.App.Writer, &s)
}

var quantiles = []struct {
	name string
	q    float64
}{{"min", 0}, {"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"max", 1}}

func statJSON(w io.Writer, s *trace.Stats) error {
	type bucket struct {
		From  int64  `json:"from_ns"`
		Count uint64 `json:"count"`
	}
	type row struct {
		Source    string           `json:"source"`
		Op        string           `json:"op"`
		Count     uint64           `json:"count"`
		Errors    uint64           `json:"errors"`
		Bytes     uint64           `json:"bytes"`
		Latency   map[string]int64 `json:"latency_ns"`
		Histogram []bucket         `json:"histogram"`
	}
	v := struct {
		Requests uint64 `json:"requests"`
		Errors   uint64 `json:"errors"`
		Lost     uint64 `json:"lost"`
		Ops      []row  `json:"operations"`
	}{s.Requests, s.Errors, s.Lost, []row{}}
	for _, r := range s.Rows() {
		o := row{r.Source, r.Op, r.Count, r.Errors, r.Bytes, map[string]int64{}, nil}
		for _, q := range quantiles {
			o.Latency[q.name] = int64(r.Latency.Quantile(q.q))
		}
		for i, n := range octaves(&r.Latency) {
			if n > 0 {
				o.Histogram = append(o.Histogram, bucket{1 << i, n})
			}
		}
		v.Ops = append(v.Ops, o)
	}
	return writeJSON(w, v)
}

// octaves counts latencies by powers of two nanoseconds.
func octaves(l *trace.Latency) (counts [64]uint64) {
	for _, b := range l.Buckets() {
		counts[bits.Len64(uint64(max(b.UpTo, 1)))-1] += b.Count
	}
	return counts
}

func statTable(w io.Writer, s *trace.Stats) error {
	rows := s.Rows()
	first, last := 63, 0
	for _, r := range rows {
		for i, n := range octaves(&r.Latency) {
			if n > 0 {
				first, last = min(first, i), max(last, i)
			}
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "COUNT\tERRORS\tBYTES\t")
	for _, q := range quantiles {
		fmt.Fprintf(t, "%s\t", strings.ToUpper(q.name))
	}
	fmt.Fprint(t, "  LATENCIES\t OPERATION\n")
	for _, r := range rows {
		fmt.Fprintf(t, "%d\t%d\t%s\t", r.Count, r.Errors, about(r.Bytes))
		for _, q := range quantiles {
			fmt.Fprintf(t, "%s\t", short(r.Latency.Quantile(q.q)))
		}
		fmt.Fprintf(t, "  %s\t %s, %s\n", bars(octaves(&r.Latency), first, last), r.Op, r.Source)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	text := fmt.Sprintf("\n%d requests, %d of them with errors", s.Requests, s.Errors)
	if s.Lost > 0 {
		text += fmt.Sprintf("; %d more could not be recorded", s.Lost)
	}
	if len(rows) > 0 {
		text += fmt.Sprintf("\nlatencies: each place is a doubling, from %s on; "+
			"its height is the share of the operation's requests", short(1<<first))
	}
	_, err := fmt.Fprintln(w, text)
	return err
}

// about formats a number of bytes with three digits.
func about(n uint64) string {
	v, unit := float64(n), ""
	for _, u := range []string{"K", "M", "G", "T", "P"} {
		if v < 1000 {
			break
		}
		v, unit = v/1024, u
	}
	if unit == "" {
		return strconv.FormatUint(n, 10)
	}
	return fmt.Sprintf("%.3g%s", v, unit)
}

// bars draws counts[first] to counts[last] as bars, scaled to the largest.
func bars(counts [64]uint64, first, last int) string {
	var most uint64
	for _, n := range counts {
		most = max(most, n)
	}
	s := ""
	for _, n := range counts[first : last+1] {
		if n == 0 {
			s += "·"
			continue
		}
		s += string([]rune("▁▂▃▄▅▆▇█")[uint64(7*(float64(n)/float64(most)))])
	}
	return s
}
