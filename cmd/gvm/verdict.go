package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/guest/kernel"
	"gvm/text"
	"gvm/verdict"
	"gvm/verdict/klog"
	"gvm/verdict/ktap"
	"gvm/vmm"
)

// policyFlags are the flags for faults that the guest's kernel reports: by default action is done.
func policyFlags(action string, status int) []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "oops", Value: action,
			Usage: fmt.Sprintf("when the guest's kernel reports a fault other than WARN, `ACTION` fail (status %d) or ignore",
				status)},
		&cli.BoolFlag{Name: "strict", Usage: "--oops=fail, and WARN is a fault too"},
		&cli.StringFlag{Name: "allow", TakesFile: true,
			Usage: "`FILE` of faults that --oops=fail and --strict ignore: " +
				"a fingerprint or a regular expression of the title a line"},
	}
}

// verdictFlags are the flags for a console's verdict.
func verdictFlags() []cli.Flag {
	return append(policyFlags("ignore", exitFault),
		&cli.StringFlag{Name: "junit", TakesFile: true,
			Usage: "write the results of the guest's tests (KTAP, TAP, LAVA) as JUnit into `FILE`; status 1 if one failed"},
		&cli.StringFlag{Name: "results", TakesFile: true,
			Usage: "the same as JSON, with the exit status and the kernel's reports, into `FILE`"},
	)
}

// watch reads the console of a run for a verdict. A nil watch does nothing.
type watch struct {
	reader  *verdict.Reader
	tests   bool // the tests' results count
	allow   allowFile
	kernel  string // path, to decode call traces
	outputs []*resultFile
	began   atomic.Bool      // the console has output
	decoder *verdict.Decoder // nil: not started
	results *verdict.Results // nil: the reader is not closed
}

// resultFile is a file for the results.
type resultFile struct {
	outputFile
	write func(*verdict.Results, io.Writer) error
}

// parsePolicy reads policyFlags.
func parsePolicy(c *cli.Context) (p verdict.Policy, err error) {
	p.Strict = c.Bool("strict")
	switch v := c.String("oops"); v {
	case "fail", "ignore":
		p.Fail = v == "fail" || p.Strict
	default:
		return p, text.OneOfNames("--oops ", v, []string{"fail", "ignore"})
	}
	if c.String("allow") != "" && !p.Fail {
		return p, errors.New("--allow needs --oops=fail or --strict")
	}
	return p, nil
}

// allowFile is the file of --allow. A run reads it, once, as signals and --timeout end the wait for
// it.
type allowFile struct {
	path string // "": none
	text []byte // read already, unless nil
}

// read reads the file and parses it.
func (a *allowFile) read(ctx context.Context) (list verdict.Allow, err error) {
	if a.path == "" {
		return nil, nil
	}
	if a.text == nil {
		if a.text, err = readInput(ctx, a.path, 1<<20); err != nil {
			return nil, fmt.Errorf("--allow: %w", err)
		}
	}
	if list, err = verdict.ReadAllow(bytes.NewReader(a.text)); err != nil {
		return nil, configError{fmt.Errorf("--allow %s: %w", a.path, err)}
	}
	return list, nil
}

// parseWatch reads verdictFlags; nil if none is given.
func parseWatch(c *cli.Context, ended func(t *ktap.Test, depth int)) (*watch, error) {
	p, err := parsePolicy(c)
	if err != nil {
		return nil, err
	}
	w := &watch{allow: allowFile{path: c.String("allow")}}
	for _, o := range []*resultFile{
		{outputFile{flag: "--junit", path: c.String("junit")}, (*verdict.Results).JUnit},
		{outputFile{flag: "--results", path: c.String("results")}, (*verdict.Results).JSON},
	} {
		if o.path != "" {
			w.outputs = append(w.outputs, o)
		}
	}
	if w.tests = len(w.outputs) > 0; !w.tests && !p.Fail {
		return nil, nil
	}
	w.reader = verdict.NewReader(p, ended)
	return w, nil
}

// open opens the files for the results.
func (w *watch) open() error {
	if w == nil {
		return nil
	}
	return openOutputs(w.files()...)
}

func (w *watch) files() (files []*outputFile) {
	for _, o := range w.outputs {
		files = append(files, &o.outputFile)
	}
	return files
}

func (w *watch) close() (err error) {
	for _, o := range w.outputs {
		err = errors.Join(err, o.close())
	}
	return err
}

// readAllow reads the file of --allow.
func (w *watch) readAllow(ctx context.Context) error {
	if w == nil {
		return nil
	}
	list, err := w.allow.read(ctx)
	w.reader.Allow(list)
	return err
}

// console returns a console whose output w reads too.
func (w *watch) console(to vmm.Console) vmm.Console {
	if w == nil {
		return to
	}
	return watched{to, w}
}

type watched struct {
	vmm.Console
	by *watch
}

func (c watched) Write(p []byte) (int, error) {
	c.by.began.Store(true)
	_, _ = c.by.reader.Write(p)
	return c.Console.Write(p)
}

// fails reports whether the console shows a fault of the kernel's that fails a run. No more output
// comes.
func (w *watch) fails() bool { return w != nil && w.read().First() != nil }

// read returns the text of the console, at the end.
func (w *watch) read() *verdict.Results {
	if w.results == nil {
		w.results = w.reader.Close()
	}
	return w.results
}

// finish takes the error of a run, writes the results, and returns the error with the verdict: the
// guest's end comes first, then the kernel's reports, then the tests.
func (w *watch) finish(err error) (*verdict.Results, error) {
	if w == nil {
		return nil, err
	}
	r := w.read()
	if exitStatus(err) < exitTimeout { // else the end was asked for, and is not to wait
		w.decode(r)
	}
	if w.decoder != nil {
		w.decoder.Close()
	}
	if s := verdict.LostText(r.Lost); s != "" {
		note(s)
	}
	switch first := r.First(); {
	case err == nil && first != nil:
		err = endError{exitFault, fmt.Errorf("the guest's kernel reported %s", faultText(r, first))}
	case first != nil:
		note(fmt.Sprintf("the guest's kernel reported %s: %s", first.Kind, first.Title))
	case err != nil || !w.tests:
	case r.Status == ktap.Fail || r.Status == ktap.Crash:
		err = endError{exitTests, fmt.Errorf("tests failed: %s", countsText(r.Counts))}
	case r.Status == ktap.None:
		err = endError{exitTests, errors.New("no results of tests on the console (KTAP, TAP 13 or 14, LAVA)")}
	}
	if r.Exit = exitStatus(err); err != nil {
		r.End = errorText(err)
	}
	saveErr := saveOutputs(r.Exit >= exitTimeout, w.files(), func() (err error) {
		for _, o := range w.outputs {
			err = errors.Join(err, o.fill(func(to io.Writer) error { return o.write(r, to) }))
		}
		return errors.Join(err, w.close())
	})
	return r, errors.Join(err, saveErr)
}

// faultText describes the first report that fails the run, and its call trace.
func faultText(r *verdict.Results, first *verdict.Report) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s (fingerprint %s)", first.Kind, first.Title, first.Fingerprint)
	if r.Failing > 1 {
		fmt.Fprintf(&b, ", and %d more", r.Failing-1)
	}
	for _, f := range first.Frames {
		if f.Sure {
			fmt.Fprintf(&b, "\n  %s+%#x", f.Symbol, f.Offset)
			if f.Source != "" {
				fmt.Fprintf(&b, " %s", f.Source)
			}
		}
	}
	return b.String()
}

func countsText(c ktap.Counts) string {
	return fmt.Sprintf("%d passed, %d failed, %d crashed, %d skipped", c.Passed, c.Failed, c.Crashed, c.Skipped)
}

// Bounds of decoding call traces: nm reads all of vmlinux for every function.
const (
	decodeTime    = 20 * time.Second
	decodeReports = 3
	decodeFrames  = 16
)

// prepare starts the decoder of call traces: in the sandbox gvm starts no program.
func (w *watch) prepare() {
	tree, script := decodeScript(w.kernel)
	if script == "" || w.decoder != nil {
		return
	}
	var err error
	if w.decoder, err = verdict.StartDecoder(script, filepath.Join(tree, "vmlinux"), tree); err != nil {
		note(fmt.Sprintf("call traces are not decoded: %v", err))
	}
}

// decode finds the source lines of call traces, if the kernel lies in the tree where it was built.
func (w *watch) decode(r *verdict.Results) {
	var frames []*klog.Frame
	for i := range min(len(r.Reports), decodeReports) {
		of := r.Reports[i].Frames
		for j := range min(len(of), decodeFrames) {
			frames = append(frames, &of[j])
		}
	}
	if len(frames) == 0 || r.Failing == 0 && len(w.outputs) == 0 {
		return
	}
	if w.prepare(); w.decoder == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), decodeTime)
	defer cancel()
	if err := w.decoder.Decode(ctx, frames); err != nil {
		note(fmt.Sprintf("the call trace is not decoded: %v", err))
	}
	w.decoder = nil
}

// decodeScript returns the build directory of a kernel and decode_stacktrace.sh of its source tree,
// or "".
func decodeScript(path string) (tree, script string) {
	for _, image := range kernel.BuiltImages {
		abs, err := filepath.Abs(path)
		tree, ok := strings.CutSuffix(abs, "/"+image)
		if _, vmlinux := os.Stat(filepath.Join(tree, "vmlinux")); err != nil || !ok || vmlinux != nil {
			continue
		}
		for _, source := range []string{tree, filepath.Join(tree, "source")} {
			script := filepath.Join(source, "scripts/decode_stacktrace.sh")
			if _, err := os.Stat(script); err == nil {
				return tree, script
			}
		}
	}
	return "", ""
}
