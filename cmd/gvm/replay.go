package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"gvm/broker"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/replay"
	"gvm/devices/virtio/replay/equivalence"
	"gvm/kvmapi/nowait"
	"gvm/machine/disk"
	"gvm/sandbox"
	"gvm/text"
)

func replayCommand() *cli.Command {
	return &cli.Command{
		Name:      "replay",
		Usage:     "send the SCSI requests of a trace to a backend again, without a guest",
		ArgsUsage: "FILE",
		Description: `The requests of a trace (gvm run --trace FILE) go straight to a backend, one
after the other, from the driver's side of the rings: to gvm's own target, or
to /dev/vhost-scsi, which gets memory of gvm's as if it were a guest's. The
disks are empty images as large as those of the trace, under $TMPDIR, and
gone at the end. A command that writes blocks writes made-up ones.

With --backend=process or vhost the answers are compared with those in the
trace: status, sense data, residual and response, as far as the trace has
them. With --backend=both they are compared with each other, and so is the
data read, byte by byte: differences that docs/backends.md lists are counted,
by its rows, and only others are shown. --corpus replays requests that gvm
brings along, good and bad ones of every operation code that one of the
backends has.

The exit status is 0 when no answer differs, or as docs/backends.md lists,
and 1 when one does otherwise. --backend=vhost and both have the needs of
backend=vhost of gvm run.

EXAMPLES
   gvm replay run.trace
   sudo gvm replay run.trace --backend both
   sudo gvm replay --corpus --backend both --all`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "backend", Usage: "`process|vhost|both`", Value: "process"},
			&cli.BoolFlag{Name: "corpus", Usage: "replay the requests that gvm brings along, in place of a FILE's"},
			&cli.BoolFlag{Name: "all",
				Usage: fmt.Sprintf("show every difference, known ones too, and not the first %d alone",
					shownDifferences)},
			&cli.BoolFlag{Name: "json",
				Usage: "one JSON object for each difference, known or not, on a line of its own"},
			&cli.StringFlag{Name: "vhost-abi",
				Usage: "as of gvm run: accept version `N|any` of the kernel's vhost-scsi interface"},
			sandboxFlag("first request"),
		},
		Action: onFiles(0, 1, replayTrace),
	}
}

// shownDifferences bounds the differences printed by default.
const shownDifferences = 20

func replayTrace(c *cli.Context, files []string) (err error) {
	sidesOf := map[string][]string{"process": {"process"}, "vhost": {"vhost"}, "both": {"process", "vhost"}}
	names, ok := sidesOf[c.String("backend")]
	if !ok {
		return usageError{text.OneOf("--backend ", c.String("backend"), sidesOf)}
	}
	abi, err := parseABI(c.String("vhost-abi"))
	if err != nil {
		return usageError{fmt.Errorf("--vhost-abi %w", err)}
	}
	mode, err := parseSandbox(c)
	if err != nil {
		return usageError{err}
	}
	var header trace.Header
	var load func() ([]trace.Record, error)
	switch {
	case c.Bool("corpus") == (len(files) == 1):
		return usageError{errors.New("want gvm replay FILE, or gvm replay --corpus")}
	case c.Bool("corpus"):
		if len(names) == 1 {
			return usageError{errors.New("--corpus has no answers to compare with: add --backend both")}
		}
		h, records := replay.Corpus()
		header, load = h, func() ([]trace.Record, error) { return records, nil }
	default:
		r, done, err := openTrace(files[0])
		if err != nil {
			return err
		}
		defer done()
		if err := hasDisks(files[0], r.Header); err != nil {
			return err
		}
		header, load = r.Header, func() ([]trace.Record, error) {
			records, err := replay.Load(r)
			if err != nil {
				return nil, traceError(files[0], err)
			}
			noteCut(c, files[0], r)
			return records, nil
		}
	}
	// The run now makes things to undo, so that signals end it in order.
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	ctx = nowait.WithOneEnd(ctx)
	defer catchSignals(ctx, stop)()
	// The scratch disks may be on storage that does not answer. The broker and the next gvm remove
	// the rest.
	defer endWithin(ctx, hostPatience, func() {})()
	var sides []replay.Side
	policy := sandbox.Policy{Mode: mode}
	config := disk.Config{Queues: 1, ABI: abi, Note: note}
	shut := func() error { return nil }
	if mode != sandbox.Off && slices.Contains(names, "vhost") { // the broker takes the kernel's targets down
		b := broker.Start(fmt.Sprint("gvm-replay-", os.Getpid()), note, nil)
		defer func() { _ = b.End() }() // the keeper is there too
		config.Files, shut, policy.Uses = b, b.Shut, sandbox.Broker
	}
	for _, name := range names {
		var undo undoList
		defer func() { err = errors.Join(err, undo.all()) }()
		s, err := newSide(ctx, &undo, &policy, name, header, config)
		if err != nil {
			return err
		}
		sides = append(sides, s)
	}
	if err := shut(); err != nil {
		return fmt.Errorf("%w (--sandbox=off runs without)", err)
	}
	if err := enterSandbox(policy, exitBug); err != nil {
		return err
	}
	records, err := nowait.Until(ctx, func() string { return strings.Join(files, " ") + " was read" }, load,
		func([]trace.Record) {})
	if err != nil {
		return err
	}
	w := &report{w: c.App.Writer}
	shown := differences{report: w, names: names, all: c.Bool("all"), asJSON: c.Bool("json")}
	if len(names) == 2 {
		shown.known = equivalence.NewList(header, c.Bool("corpus"))
	}
	sum, err := replay.Run(ctx, records, sides, shown.add)
	if err != nil {
		return errors.Join(w.flush(), err)
	}
	if !c.Bool("json") {
		shown.summary(sum)
	}
	if err := w.flush(); err != nil {
		return err
	}
	return shown.verdict(sum)
}

// differences prints requests whose answers differ in a way that docs/backends.md does not list,
// and counts the listed ones.
type differences struct {
	*report
	names       []string // of the sides
	all, asJSON bool
	known       *equivalence.List // nil: compare the answers with the trace

	unlisted, shown int
}

func (s *differences) add(d *replay.Difference) error {
	var rows []string
	left := d.What
	if s.known != nil {
		rows, left = s.known.Explain(d)
	}
	if len(left) > 0 {
		s.unlisted++
	}
	switch {
	case s.asJSON:
		return s.differenceJSON(s.names, d, rows, left)
	case s.all || len(left) > 0 && s.shown < shownDifferences:
		s.shown++
		s.difference(s.names, d)
		if s.known != nil && len(left) == 0 {
			s.printf("  known    %s", strings.Join(rows, ", "))
		}
	}
	return s.err
}

func (s *differences) summary(sum replay.Summary) {
	if rest := s.unlisted - s.shown; rest > 0 {
		s.printf("… and %d more; --all shows them", rest)
	}
	if known := sum.Different - s.unlisted; s.known == nil {
		s.printf("%d requests, %d answered differently", sum.Requests, sum.Different)
	} else {
		s.printf("%d requests, %d answered differently as docs/backends.md lists, %d otherwise",
			sum.Requests, known, s.unlisted)
		for _, row := range slices.Sorted(maps.Keys(s.known.Used)) {
			if n := s.known.Used[row]; n > 0 {
				s.printf("%7d %s", n, row)
			}
		}
	}
	if sum.Skipped > 0 {
		s.printf("%d requests left out: the trace does not have their parameter lists", sum.Skipped)
	}
	if sum.Lost > 0 {
		s.printf("%d requests could not be recorded", sum.Lost)
	}
}

func (s *differences) verdict(sum replay.Summary) error {
	switch {
	case s.unlisted == 0:
		return nil
	case s.known == nil:
		return endError{exitDiffers, fmt.Errorf("%d of %d answers differ", s.unlisted, sum.Requests)}
	}
	err := fmt.Errorf("%d of %d answers differ in a way that docs/backends.md does not list", s.unlisted, sum.Requests)
	return endError{exitDiffers, err}
}

// hasDisks refuses a trace whose disks are not known.
func hasDisks(path string, h trace.Header) error {
	for i, d := range h.Devices {
		if len(d.Disks) == 0 {
			return configError{fmt.Errorf(
				"%s: device %d has no disks that gvm knows: a run with wwn=… cannot be replayed", path, i)}
		}
	}
	return nil
}

// undoList has functions that undo steps, called in reverse order.
type undoList []func() error

func (u undoList) all() error {
	var errs []error
	for _, undo := range slices.Backward(u) {
		errs = append(errs, undo())
	}
	return errors.Join(errs...)
}

// newSide makes the devices and disks of a trace, served by the named backend, and a driver for
// each. It appends to undo, also on an error, and gives p the rights that undo needs.
func newSide(ctx context.Context, undo *undoList, p *sandbox.Policy, name string, h trace.Header,
	c disk.Config) (replay.Side, error) {
	side := replay.Side{Name: name}
	later := func(f func() error) { *undo = append(*undo, f) }
	dir, err := tempDir("gvm-replay-")
	if err != nil {
		return side, err
	}
	later(func() error { return removeFlat(dir) })
	const changes = sandbox.Read | sandbox.Write | sandbox.Make | sandbox.Remove
	p.Paths = append(p.Paths, sandbox.Path{Name: dir, Rights: changes, Own: true},
		sandbox.Path{Name: filepath.Dir(dir), Rights: sandbox.RemoveDir, Own: true})
	if name == "vhost" {
		p.Uses |= sandbox.Vhost
	}
	for i, d := range h.Devices {
		list, err := scratchDisks(dir, i, name, d.Disks)
		if err != nil {
			return side, err
		}
		ds, err := disk.Open(ctx, list, c)
		if err != nil {
			return side, err
		}
		later(func() error { return ds.Close(ctx, true) })
		dev, err := ds.Device()
		if err != nil {
			return side, err
		}
		host, err := replay.NewHost(ctx, dev)
		if err != nil {
			return side, fmt.Errorf("%s: %w", name, err)
		}
		later(host.Close)
		side.Hosts = append(side.Hosts, host)
	}
	return side, nil
}

// removeFlat removes a directory of files. os.RemoveAll would open its parent, which the sandbox
// refuses.
func removeFlat(dir string) error {
	list, err := os.ReadDir(dir)
	for _, e := range list {
		err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
	}
	return errors.Join(err, os.Remove(dir))
}

// scratchDisks returns disks like those of a device, on new images.
func scratchDisks(dir string, device int, backendName string, like []trace.Disk) ([]disk.Spec, error) {
	by := map[string]disk.Backend{"process": disk.Process, "vhost": disk.Vhost}[backendName]
	var list []disk.Spec
	for _, k := range like {
		cache, known := disk.CacheMode(cmp.Or(k.Cache, "writeback"))
		if !known {
			return nil, configError{fmt.Errorf("the trace has a disk with cache=%s: this gvm does not know that; "+
				"use the gvm that recorded it", k.Cache)}
		}
		path := filepath.Join(dir, fmt.Sprintf("disk-%d-%d", device, k.LUN))
		f, err := nowait.Open(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600, nowait.Regular)
		if err != nil {
			return nil, disk.ImageError{Err: err}
		}
		if err := errors.Join(f.Truncate(int64(k.Size)), f.Close()); err != nil {
			return nil, disk.ImageError{Err: fmt.Errorf("an image of %d bytes: %w", k.Size, err)}
		}
		list = append(list, disk.Spec{
			Path:      path,
			Backend:   by,
			ReadOnly:  k.ReadOnly,
			Serial:    string(k.Serial),
			LUN:       k.LUN,
			Cache:     cache,
			BlockSize: k.BlockSize,
			NoLock:    true, // the directory is gvm's own, on a file system that may have no locks
		})
	}
	return list, nil
}

// difference prints a request whose answers differ.
func (l *report) difference(names []string, d *replay.Difference) {
	r := d.Record
	if len(names) == 1 {
		names = []string{"trace", names[0]}
	}
	l.printf("request %d at %.6f s, lun %s: %s %s: %s", d.Number, r.Time.Seconds(), r.Unit(), r.Op(), r.Detail(),
		strings.Join(d.What, ", "))
	l.printf("  cdb % x", r.CDB)
	for i, a := range []*replay.Answer{&d.A, &d.B} {
		l.printf("  %-8s %s", names[i], a.Text(r))
	}
	if len(d.Data) > 0 {
		l.printf("  bytes    %s", replay.Spans(d.Data))
		first := d.Data[0] &^ 15
		for i, a := range []*replay.Answer{&d.A, &d.B} {
			l.printf("  %-8s %4d: % x", names[i], first, a.Data[first:min(first+16, len(a.Data))])
		}
	}
}

// differenceJSON prints a difference with the rows of docs/backends.md that explain parts of it,
// and the parts that no row explains.
func (l *report) differenceJSON(names []string, d *replay.Difference, rows, left []string) error {
	type answer struct {
		From     string `json:"from"`
		Outcome  string `json:"outcome"`
		Response uint8  `json:"response"`
		Status   uint8  `json:"status"`
		Sense    string `json:"sense"`
		Residual uint32 `json:"residual"`
	}
	if len(names) == 1 {
		names = []string{"trace", names[0]}
	}
	of := func(i int, a *replay.Answer) answer {
		return answer{names[i], a.Text(d.Record), a.Response, uint8(a.Status), fmt.Sprintf("%x", a.Sense), a.Residual}
	}
	b, err := json.Marshal(struct {
		Number  int           `json:"number"`
		Request *trace.Record `json:"request"`
		What    []string      `json:"what"`
		Known   []string      `json:"known,omitempty"`
		Unknown []string      `json:"unknown,omitempty"`
		Data    string        `json:"data_bytes,omitempty"`
		A       answer        `json:"a"`
		B       answer        `json:"b"`
	}{d.Number, d.Record, d.What, rows, left, replay.Spans(d.Data), of(0, &d.A), of(1, &d.B)})
	if err != nil {
		return err
	}
	l.printf("%s", b)
	return l.err
}
