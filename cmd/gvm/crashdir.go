package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"gvm/broker"
	"gvm/guest/kernel"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi/nowait"
	"gvm/machine"
	"gvm/panics"
	"gvm/testrun"
	"gvm/vmm"
	"gvm/vmm/vmcore"
)

// crashRecord is --crash-dir: a directory that gets a directory of its own for a guest that panics,
// crashes or hangs, and for a bug of gvm. A nil crashRecord does nothing.
type crashRecord struct {
	dir     string
	files   *broker.Record
	state   *inspect.Node // at the machine's end; nil: unknown
	vmlinux *os.File      // of the kernel, with symbols; nil: none
	stacks  []byte        // of the CPUs at the machine's end; nil: unknown

	core bool            // --crash-core
	ctx  context.Context // of the run: its end gives up the core

	mu      sync.Mutex
	log     crashLog
	end     time.Duration // the machine's end, by inspect.Clock; 0: unknown
	coreErr error         // why it has no core
	begun   bool          // open was called, so that the end gets a record
	spent   time.Duration // of recordPatience
	late    bool          // a part of it was

	open  func() error        // makes the directory and opens the files of text in it, once
	path  string              // of the directory; this and texts are set when open has returned nil
	texts map[string]*os.File // by their names
}

// Bounds of a record.
const (
	recordConsole  = 1 << 20
	recordPatience = 800 * time.Millisecond // storage that hangs delays the end by that at most
)

// recordedEnds are the exit statuses of ends that get a record.
var recordedEnds = []int{exitCrash, exitPanic, exitFault, exitWatchdog, exitBug, exitTimeout}

func crashFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "crash-dir", TakesFile: true,
			Usage: "when the guest panics, crashes, hangs or meets --timeout, keep the console, the state of all CPUs and " +
				"devices, a log of both by time, and with a vmlinux the kernel's stacks, in a new directory in `DIR`"},
		&cli.BoolFlag{Name: "crash-core",
			Usage: "with --crash-dir also keep the guest's memory and CPUs, as gvm dump does, unless it powered off: " +
				"up to the size of --memory"},
	}
}

// parseCrashRecord reads crashFlags; nil: they are not given.
func parseCrashRecord(c *cli.Context) (*crashRecord, error) {
	return newCrashRecord(c.String("crash-dir"), c.Bool("crash-core"))
}

// newCrashRecord checks the directory of --crash-dir; "" is none. core is --crash-core.
func newCrashRecord(dir string, core bool) (*crashRecord, error) {
	if dir == "" && core {
		return nil, usageError{errors.New("--crash-core needs --crash-dir DIR, which gets the core")}
	}
	if dir == "" {
		return nil, nil
	}
	if err := checkDir(dir, unix.W_OK|unix.X_OK); err != nil {
		return nil, fmt.Errorf("--crash-dir: %w", err)
	}
	files, err := broker.NewRecord(dir)
	if err != nil {
		return nil, fmt.Errorf("--crash-dir: %w", namedError(nowait.OpenError(dir, err)))
	}
	files.Machine = "gvm"
	r := &crashRecord{dir: dir, core: core, files: files, coreErr: errors.New("the machine did not end in order")}
	r.open = sync.OnceValue(r.openTexts)
	return r, nil
}

// console returns a console whose last output r keeps.
func (r *crashRecord) console(to vmm.Console) vmm.Console {
	if r == nil {
		return to
	}
	return recorded{to, r}
}

type recorded struct {
	vmm.Console
	record *crashRecord
}

func (c recorded) Write(p []byte) (int, error) {
	c.record.keep(p)
	return c.Console.Write(p)
}

// keep keeps the end of the output.
func (r *crashRecord) keep(p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log.output(inspect.Clock(), p)
}

// notes returns a function that takes a note for the user, which r keeps too.
func (r *crashRecord) notes(say func(string)) func(string) {
	if r == nil {
		return say
	}
	return func(s string) {
		r.add(s)
		say(s)
	}
}

func (r *crashRecord) add(line string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log.add(inspect.Clock(), line)
}

// begin makes r the record of a machine, before it starts. found is its kernel; nil: none of the
// user's.
func (r *crashRecord) begin(ctx context.Context, spec *machine.Spec, found *kernel.Kernel) {
	if r == nil {
		return
	}
	r.ctx, r.files.Machine = ctx, cmp.Or(spec.Name, "gvm")
	spec.KeepState, spec.Final = true, r.final
	phase := spec.Phase
	spec.Phase = func(name string) {
		phase(name)
		if name == vmm.Entered {
			r.add("the guest's " + name)
		}
	}
	if found == nil {
		return
	}
	if path, _ := found.Debug(); path != "" { // now, as a machine may open no files
		r.vmlinux, _ = nowait.Open(path, os.O_RDONLY, 0, nowait.Regular) // an unreadable one gives no stacks
	}
}

// beginTest is begin for a machine of gvm test.
func (r *crashRecord) beginTest(ctx context.Context, cfg *testrun.Config, found *kernel.Kernel) {
	if r == nil {
		return
	}
	r.begin(ctx, &cfg.Spec, found)
	cfg.Spec.Note = r.notes(cfg.Spec.Note)
	to := cfg.Log
	if to == nil {
		to = io.Discard
	}
	cfg.Log = r.console(machine.Output(to))
}

// final keeps the stacks of the CPUs at an end that gets a record, and writes the core.
func (r *crashRecord) final(out vmm.Outcome, mem *guestmem.Memory, cpus []vmcore.CPU, alive func()) {
	r.mu.Lock()
	r.end, r.state = inspect.Clock(), out.State
	r.mu.Unlock()
	status, late := exitStatus(ended(out)), errors.Is(out.Err, context.DeadlineExceeded) // of gvm test, with its hangs
	if r.vmlinux != nil && (late || slices.Contains(recordedEnds, status)) {
		r.keepStacks(mem, cpus)
	}
	if r.core && (late || slices.Contains(coreEnds, status)) {
		err := r.writeCore(mem, cpus, alive)
		r.mu.Lock()
		r.coreErr = err
		r.mu.Unlock()
	}
}

func (r *crashRecord) keepStacks(mem *guestmem.Memory, cpus []vmcore.CPU) {
	var b bytes.Buffer
	symbols, err := vmcore.ReadSymbols(r.vmlinux)
	if err == nil {
		err = vmcore.Stacks(&b, mem, cpus, symbols)
	}
	if err != nil {
		fmt.Fprintf(&b, "no stacks: %s: %v\n", r.vmlinux.Name(), err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stacks = b.Bytes()
}

// prepare opens the files of the record of a run with this error, if that is an end which gets one:
// the broker, which may have to make them, ends before the verdict.
func (r *crashRecord) prepare(err error, w *watch) {
	if r == nil || !slices.Contains(recordedEnds, exitStatus(err)) && (err != nil || !w.fails()) {
		return
	}
	r.mu.Lock()
	r.begun = true
	r.mu.Unlock()
	done := make(chan error, 1)
	panics.Go(func() { done <- r.open() })
	_ = r.await(done) // save has the error
}

// errRecordLate is the error of storage that does not answer.
var errRecordLate = errors.New("the storage does not answer; gvm ends without a whole record")

// await waits for a part of the record. All of them together have recordPatience, or the rest of
// the end's time: storage that does each of them slowly delays the end no longer than storage that
// hangs.
func (r *crashRecord) await(done <-chan error) error {
	r.mu.Lock()
	patience, late, begin := recordPatience-r.spent, r.late, inspect.Clock()
	r.mu.Unlock()
	if late {
		return errRecordLate
	}
	select {
	case err := <-done:
		r.mu.Lock()
		defer r.mu.Unlock()
		r.spent += inspect.Clock() - begin
		return err
	case <-time.After(left(patience)):
		r.mu.Lock()
		defer r.mu.Unlock()
		r.late = true
		return errRecordLate
	}
}

// finish takes the error of a run, and writes a record if that is an end which gets one.
func (r *crashRecord) finish(err error) error {
	if r == nil {
		return err
	}
	status := exitStatus(err)
	r.mu.Lock()
	begun := r.begun
	r.mu.Unlock()
	if !begun && !slices.Contains(recordedEnds, status) {
		return err
	}
	if saveErr := r.save(errorText(err), slices.Contains(coreEnds, status)); saveErr != nil {
		return errors.Join(err, saveErr)
	}
	return err
}

// finishTest is finish for the result of gvm test. note takes an error.
func (r *crashRecord) finishTest(res *testrun.Result, note func(string)) {
	ends := []testrun.Kind{testrun.Fault, testrun.Panic, testrun.Crash, testrun.Hang, testrun.Timeout}
	if r == nil || !slices.Contains(ends, res.Kind) {
		return
	}
	end := strings.Join(append([]string{res.Text}, res.Detail...), "\n")
	if err := r.save(end, res.Kind != testrun.Fault); err != nil {
		note(err.Error())
	}
}

// save writes the record, with the message of the end. core: the end is one that gets a core.
func (r *crashRecord) save(end string, core bool) (err error) {
	r.mu.Lock()
	if core = core && r.core; core && r.coreErr != nil {
		err, core = fmt.Errorf("--crash-core: %w", r.coreErr), false
	}
	r.mu.Unlock()
	done := make(chan error, 1)
	panics.Go(func() { done <- r.write("gvm: "+end+"\n", core) })
	writeErr := r.await(done)
	switch {
	case writeErr == errRecordLate:
		writeErr = fmt.Errorf("--crash-dir %s: %w", r.dir, writeErr)
	case writeErr != nil:
		writeErr = fmt.Errorf("--crash-dir: %w", writeErr)
	}
	return errors.Join(err, writeErr)
}

// openTexts makes the directory of the record and opens the files of text in it.
func (r *crashRecord) openTexts() error {
	names := []string{"end", "console", "log", "state.json"}
	r.mu.Lock()
	if r.stacks != nil {
		names = append(names, "stacks")
	}
	r.mu.Unlock()
	path, err := r.files.Directory()
	if err != nil {
		return err
	}
	files, err := r.files.Create(names...)
	if err != nil {
		return err
	}
	r.path, r.texts = path, map[string]*os.File{}
	for i, name := range names {
		r.texts[name] = files[i]
	}
	return nil
}

// write makes a record: the message of the end, the console, the state, and all of it by time.
func (r *crashRecord) write(end string, core bool) error {
	if err := r.open(); err != nil {
		return err
	}
	r.mu.Lock()
	if r.end == 0 {
		r.end = inspect.Clock()
	}
	first, _, _ := strings.Cut(strings.TrimPrefix(end, "gvm: "), "\n")
	r.log.add(r.end, first)
	console, log, state, stacks := bytes.Clone(r.log.console()), r.log.merged(r.state, r.end), r.state, r.stacks
	r.mu.Unlock()
	var tree bytes.Buffer
	err := writeJSON(&tree, state)
	for _, file := range []struct {
		name string
		data []byte
	}{{"end", []byte(end)}, {"console", console}, {"log", log}, {"state.json", tree.Bytes()}, {"stacks", stacks}} {
		f := r.texts[file.name]
		if f == nil {
			continue
		}
		_, writeErr := f.Write(file.data)
		if e := cmp.Or(writeErr, f.Close()); e != nil && err == nil { // the others have the same, as a rule
			err = nowait.CreateError(f.Name(), e)
		}
	}
	switch {
	case err != nil:
	case core:
		note(fmt.Sprintf("the end, the console, the machine's state and the guest's memory are in %s", r.path))
	default:
		note(fmt.Sprintf("the end, the console and the machine's state are in %s", r.path))
	}
	return err
}
