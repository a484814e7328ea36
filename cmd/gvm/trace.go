package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/devices/scsi/trace"
	"gvm/devices/scsi/trace/traceplot"
	"gvm/machine/disk"
	"gvm/plot"
	"gvm/text"
)

// exitDiffers is the exit status of `gvm trace diff` for traces that differ.
const exitDiffers = 1

func traceCommand() *cli.Command {
	jsonFlag := &cli.BoolFlag{Name: "json", Usage: "write JSON"}
	return &cli.Command{
		Name:  "trace",
		Usage: "look at the SCSI requests that gvm run --trace recorded",
		Description: `gvm run --trace FILE records every SCSI request of a run with its answer and
its latency, for disks of either backend. These commands read such files.`,
		Subcommands: []*cli.Command{
			{
				Name:      "show",
				Usage:     "list the requests, in the order of their answers",
				ArgsUsage: "FILE",
				Description: `BLOCKS are the first logical block and the number of blocks; FUA and UNMAP
are bits of the CDB. For a command without blocks that is the page, the tag
of the task that a task management function is about, or the bytes of an
unknown CDB. Q is the request queue. In LUN, wlun is the REPORT LUNS
well-known logical unit, and none is no address of the target.

EXAMPLES
   gvm trace show run.trace
   gvm trace show run.trace --lun 1 --op "WRITE(10)"
   gvm trace show run.trace --errors
   gvm trace show run.trace --min-latency 10ms --json | jq .cdb`,
				Flags: []cli.Flag{
					&cli.IntFlag{Name: "lun", Usage: "only requests to logical unit `N`",
						Value: -1, DefaultText: "all"},
					&cli.StringFlag{Name: "op",
						Usage: "only the operation `NAME|CODE`: a name or the beginning of one, " +
							"or a number such as 0x2a"},
					&cli.BoolFlag{Name: "errors",
						Usage: "only requests that did not end well; unit attentions are among them"},
					&cli.DurationFlag{Name: "min-latency",
						Usage: "only requests that took `DURATION` or longer, such as 500us"},
					&cli.BoolFlag{Name: "json", Usage: "write JSON, one object on a line for each request"},
				},
				Action: onFiles(1, 1, traceShow),
			},
			{
				Name:      "stat",
				Usage:     "count requests, errors and bytes, with latencies, by operation",
				ArgsUsage: "FILE...",
				Description: `Backends are counted apart, and so are files when there are several.

EXAMPLES
   gvm trace stat run.trace
   gvm trace stat process.trace vhost.trace --json`,
				Flags:  []cli.Flag{jsonFlag},
				Action: onFiles(1, 64, traceStat),
			},
			{
				Name:      "diff",
				Usage:     "show where two guests' requests or answers differ",
				ArgsUsage: "A B",
				Description: `The requests of each logical unit are aligned in the order in which they were
made. gvm shows those of one trace only (- and +), and those whose response,
status, sense data, residual or length differs (~). Times, tags, queues, and
the order of requests that both have do not count.

The exit status is 0 when nothing differs, 1 when something does, and 2 or 3
when a trace cannot be read.

EXAMPLES
   gvm trace diff process.trace vhost.trace
   gvm trace diff before.trace after.trace --json | jq .changed`,
				Flags:  []cli.Flag{jsonFlag},
				Action: onFiles(2, 2, traceDiff),
			},
			{
				Name:      "plot",
				Usage:     "draw latencies over time, and their distribution",
				ArgsUsage: "FILE...",
				Description: `Operations have colours; backends, and files when there are several, have
shapes.

EXAMPLES
   gvm trace plot run.trace -o latency.svg
   gvm trace plot process.trace vhost.trace -o compare.png`,
				Flags: []cli.Flag{&cli.StringFlag{Name: "output", Aliases: []string{"o"},
					Usage: "`FILE` to write, whose name ends with .svg or .png", TakesFile: true}},
				Action: onFiles(1, 64, tracePlot),
			},
		},
	}
}

// onFiles returns an action on least to most files.
func onFiles(least, most int, do func(*cli.Context, []string) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		if n := c.NArg(); n < least || n > most {
			return usageError{fmt.Errorf("want %s %s, and got %s", c.Command.HelpName, c.Command.ArgsUsage,
				text.Count(n, "file"))}
		}
		return do(c, c.Args().Slice())
	}
}

// traceError classifies an error of a trace file: one that the user can correct, or the host's
// failure to read the file.
func traceError(path string, err error) error {
	err = fmt.Errorf("%s: %w", path, err)
	if bad := (*trace.FormatError)(nil); errors.As(err, &bad) {
		return configError{err}
	}
	return disk.ImageError{Err: err}
}

// openTrace opens a trace, and returns a function that closes it.
func openTrace(path string) (*trace.Reader, func(), error) {
	f, err := openInput(path)
	if err != nil {
		return nil, nil, err
	}
	r, err := trace.NewReader(f)
	if err != nil {
		f.Close()
		return nil, nil, traceError(path, err)
	}
	return r, func() { f.Close() }, nil
}

// eachRecord calls do for every record of a trace, and notes a truncated one.
func eachRecord(c *cli.Context, path string, header func(*trace.Header),
	do func(*trace.Header, *trace.Record) error) error {
	r, done, err := openTrace(path)
	if err != nil {
		return err
	}
	defer done()
	header(&r.Header)
	var rec trace.Record
	for {
		err := r.Next(&rec)
		if err == io.EOF {
			noteCut(c, path, r)
			return nil
		}
		if err != nil {
			return traceError(path, err)
		}
		if err := do(&r.Header, &rec); err != nil {
			return err
		}
	}
}

func noteCut(c *cli.Context, path string, r *trace.Reader) {
	if n := r.Cut(); n > 0 {
		fmt.Fprintf(c.App.ErrWriter, "gvm: %s ends inside a record, of which %d bytes are left out: "+
			"its gvm was killed, ran out of disk space or runs still\n", text.Printable(path), n)
	}
}

// opFilter returns a filter for the value of --op.
func opFilter(s string) (func(*trace.Record) bool, error) {
	if code, err := strconv.ParseUint(s, 0, 8); err == nil {
		return func(r *trace.Record) bool {
			return r.Kind == trace.Command && len(r.CDB) > 0 && r.CDB[0] == byte(code)
		}, nil
	}
	if s != "" && s[0] >= '0' && s[0] <= '9' {
		return nil, fmt.Errorf("--op %s: want a name or an operation code from 0 to 0xff", text.Word(s))
	}
	begins := func(name string) bool { return s != "" && len(name) >= len(s) && strings.EqualFold(name[:len(s)], s) }
	all := trace.Ops()
	if !slices.ContainsFunc(all, begins) {
		return nil, text.OneOfNames("--op ", s, append(shortNames(all), "an operation code such as 0x2a"))
	}
	return func(r *trace.Record) bool { return begins(r.Op()) }, nil
}

// shortNames returns the beginnings of the names of operations that the target knows, up to the
// length of the CDB or the service action.
func shortNames(ops []string) (names []string) {
	for _, op := range ops {
		name := op
		if i := strings.IndexAny(op, "(,"); i > 0 {
			name = op[:i]
		}
		unknown := strings.HasPrefix(op, "operation code ") || strings.Contains(op, ", service action ")
		if !unknown && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func traceShow(c *cli.Context, files []string) error {
	op := func(*trace.Record) bool { return true }
	if c.IsSet("op") {
		var err error
		if op, err = opFilter(c.String("op")); err != nil {
			return usageError{err}
		}
	}
	lun := c.Int("lun")
	if c.IsSet("lun") && (lun < 0 || lun > 16383) {
		return usageError{fmt.Errorf("--lun %d: want 0 to 16383", lun)}
	}
	if least := c.Duration("min-latency"); least < 0 {
		return usageError{fmt.Errorf("--min-latency %v: want 0 or more", least)}
	}
	w := &report{w: c.App.Writer}
	header := func(h *trace.Header) {
		w.printHeader(h)
		w.printf("%14s %2s %-5s %-24s %-20s %10s %9s  %s", "TIME (s)", "Q", "LUN", "OPERATION", "BLOCKS OR DETAIL",
			"DATA", "LATENCY", "OUTCOME")
	}
	if c.Bool("json") {
		header = func(*trace.Header) {}
	}
	err := eachRecord(c, files[0], header, func(_ *trace.Header, r *trace.Record) error {
		if n, ok := r.UnitNumber(); lun >= 0 && (!ok || n != lun) ||
			c.Bool("errors") && !r.Failed() ||
			r.Latency < c.Duration("min-latency") || !op(r) {
			return nil
		}
		if c.Bool("json") {
			b, err := json.Marshal(r)
			if err != nil {
				return err
			}
			w.printf("%s", b)
		} else {
			w.printRecord("", r)
		}
		return w.err
	})
	if e := w.flush(); err == nil { // else perhaps the same error
		err = e
	}
	return err
}

// report writes printable lines, through a buffer, until one fails.
type report struct {
	w   io.Writer
	buf bytes.Buffer
	err error
}

func (l *report) printf(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	l.buf.WriteString(text.Printable(strings.TrimRight(line, " ")) + "\n")
	if l.buf.Len() > 64<<10 {
		_ = l.flush()
	}
}

func (l *report) flush() error {
	if l.err == nil {
		_, l.err = l.buf.WriteTo(l.w)
	}
	return l.err
}

func (l *report) printHeader(h *trace.Header) {
	l.printf("# gvm %s on Linux %s, started %s", h.GVM, h.Kernel, h.Start.Format(time.RFC3339))
	for _, d := range h.Devices {
		for _, k := range d.Disks {
			l.printf("# %s: lun %d, serial %s, %s in blocks of %d", d.Backend, k.LUN, k.Serial,
				text.FormatSize(k.Size), k.BlockSize)
		}
	}
}

func (l *report) printRecord(mark string, r *trace.Record) {
	queue, data, latency := "", "", ""
	if r.Kind == trace.Command && r.Missing&trace.NoQueue == 0 {
		queue = strconv.Itoa(int(r.Queue))
	}
	if r.Out > 0 {
		data = fmt.Sprintf("out %d", r.Out)
	}
	if r.In > 0 {
		data += fmt.Sprintf(" in %d", r.In)
	}
	if r.Kind == trace.Command || r.Kind == trace.TaskManagement {
		latency = short(r.Latency)
	}
	l.printf("%s%14.6f %2s %-5s %-24s %-20s %10s %9s  %s", mark, r.Time.Seconds(), queue, r.Unit(), r.Op(), r.Detail(),
		strings.TrimSpace(data), latency, r.Outcome())
}

// short formats a duration with three digits: 12.3µs.
func short(d time.Duration) string {
	for unit := time.Duration(1); ; unit *= 10 {
		if r := d.Round(unit); r < 1000*unit {
			return r.String()
		}
	}
}

// sources returns a function that names a request's source: its backend, and its file if there are
// several. Files go by their base names if these differ.
func sources(files []string) func(string, *trace.Header, *trace.Record) string {
	if len(files) == 1 {
		return func(_ string, h *trace.Header, r *trace.Record) string { return h.Backend(r) }
	}
	names, bases := map[string]string{}, map[string]bool{}
	for _, path := range files {
		names[path] = text.Printable(filepath.Base(path))
		bases[names[path]] = true
	}
	if len(bases) < len(names) {
		for path := range names {
			names[path] = text.Printable(path)
		}
	}
	return func(path string, h *trace.Header, r *trace.Record) string {
		return names[path] + " (" + h.Backend(r) + ")"
	}
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func traceDiff(c *cli.Context, files []string) error {
	var readers [2]*trace.Reader
	for i, path := range files {
		r, done, err := openTrace(path)
		if err != nil {
			return err
		}
		defer done()
		readers[i] = r
	}
	d, err := trace.Compare(readers[0], readers[1])
	var side *trace.SideError
	if errors.As(err, &side) {
		return traceError(files[side.Side], side.Err)
	}
	for i, r := range readers {
		noteCut(c, files[i], r)
	}
	if c.Bool("json") {
		err = diffJSON(c.App.Writer, files, d)
	} else {
		err = diffText(c.App.Writer, d)
	}
	if err == nil && !d.Same() {
		err = endError{exitDiffers, fmt.Errorf("%s and %s differ", files[0], files[1])}
	}
	return err
}

func diffJSON(w io.Writer, files []string, d *trace.Diff) error {
	type change struct {
		What []string      `json:"what"`
		A    *trace.Record `json:"a"`
		B    *trace.Record `json:"b"`
	}
	v := struct {
		A        text.Name       `json:"a"`
		B        text.Name       `json:"b"`
		Same     bool            `json:"same"`
		Requests int             `json:"requests"`
		Moved    int             `json:"in_another_order"`
		LostA    uint64          `json:"lost_in_a"`
		LostB    uint64          `json:"lost_in_b"`
		Changed  []change        `json:"changed"`
		OnlyA    []*trace.Record `json:"only_a"`
		OnlyB    []*trace.Record `json:"only_b"`
	}{text.Name(files[0]), text.Name(files[1]), d.Same(), d.Requests, d.Moved, d.LostA, d.LostB, []change{},
		append([]*trace.Record{}, d.OnlyA...), append([]*trace.Record{}, d.OnlyB...)}
	for _, x := range d.Changed {
		v.Changed = append(v.Changed, change{x.What, x.A, x.B})
	}
	return writeJSON(w, v)
}

func diffText(out io.Writer, d *trace.Diff) error {
	w := &report{w: out}
	for _, r := range d.OnlyA {
		w.printRecord("-", r)
	}
	for _, r := range d.OnlyB {
		w.printRecord("+", r)
	}
	for _, x := range d.Changed {
		w.printf("~%14.6f %2s %-5s %-24s %-20s %s", x.A.Time.Seconds(), "", x.A.Unit(), x.A.Op(), x.A.Detail(),
			strings.Join(x.What, ", "))
		a, b := x.Outcomes()
		w.printf("    a: %s", a)
		w.printf("    b: %s", b)
	}
	w.printf("%d requests in both (%d in another order), %d answered differently; %d only in a, %d only in b",
		d.Requests, d.Moved, len(d.Changed), len(d.OnlyA), len(d.OnlyB))
	for i, n := range []uint64{d.LostA, d.LostB} {
		if n > 0 {
			w.printf("%d requests of %c could not be recorded", n, 'a'+i)
		}
	}
	return w.flush()
}

func tracePlot(c *cli.Context, files []string) error {
	out := c.String("output")
	if _, err := plotFormat(out); err != nil {
		return usageError{fmt.Errorf("-o %w", err)}
	}
	p := traceplot.Plot{Title: "SCSI request latency"}
	source := sources(files)
	for _, path := range files {
		if err := eachRecord(c, path, func(h *trace.Header) {
			if len(files) == 1 {
				p.Title = fmt.Sprintf("SCSI request latency: %s (gvm %s on Linux %s)",
					filepath.Base(path), h.GVM, h.Kernel)
			}
		}, func(h *trace.Header, r *trace.Record) error {
			if r.Kind == trace.Command || r.Kind == trace.TaskManagement {
				p.Add(source(path, h, r), r.Op(), r.Time, r.Latency)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	l, err := p.Latencies()
	if err != nil {
		return configError{fmt.Errorf("%s: %w", strings.Join(files, ", "), err)}
	}
	return writePlot(out, &plot.Plot{Latencies: l})
}
