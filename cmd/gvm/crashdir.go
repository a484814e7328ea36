package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest/kernel"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/vmm"
	"gvm/vmm/vmcore"
)

// crashRecord is --crash-dir: a directory that gets a directory of its own for a guest that panics,
// crashes or hangs, and for a bug of gvm. A nil crashRecord does nothing.
type crashRecord struct {
	dir     string
	machine string        // its name
	state   *inspect.Node // at the machine's end; nil: unknown
	vmlinux *os.File      // of the kernel, with symbols; nil: none
	stacks  []byte        // of the CPUs at the machine's end; nil: unknown

	core bool            // --crash-core
	ctx  context.Context // of the run: its end gives up the core

	mu  sync.Mutex
	log crashLog
	end time.Duration // the machine's end, by inspect.Clock; 0: unknown

	made    string // the directory of the record; "": not made
	coreErr error  // why it has no core
}

// Bounds of a record.
const (
	recordConsole  = 1 << 20
	recordPatience = 800 * time.Millisecond // storage that hangs delays the end by that at most
	recordNames    = 100                    // records of one second
)

// recordedEnds are the exit statuses of ends that get a record.
var recordedEnds = []int{exitCrash, exitPanic, exitFault, exitWatchdog, exitBug, exitTimeout}

// newCrashRecord checks the directory of --crash-dir; "" is none. core is --crash-core.
func newCrashRecord(dir string, core bool) (*crashRecord, error) {
	if dir == "" && core {
		return nil, usageError{errors.New("--crash-core needs --crash-dir DIR, which gets the core")}
	}
	if dir == "" {
		return nil, nil
	}
	fi, err := os.Stat(dir)
	if err == nil && !fi.IsDir() {
		err = &fs.PathError{Op: "open", Path: dir, Err: unix.ENOTDIR}
	}
	if err == nil {
		if err = unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
			err = &fs.PathError{Op: "write to", Path: dir, Err: err}
		}
	}
	if err != nil {
		return nil, configError{fmt.Errorf("--crash-dir: %w; name a directory that exists and may be written", err)}
	}
	return &crashRecord{dir: dir, core: core, coreErr: errors.New("the machine did not end in order")}, nil
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

// phase takes the end of a phase of the start: see vmm.Config.
func (r *crashRecord) phase(name string) {
	if r != nil && name == vmm.Entered {
		r.add("the guest's " + name)
	}
}

// open opens the vmlinux with the symbols of a kernel, if there is one: a machine may open no files.
func (r *crashRecord) open(k *kernel.Kernel) {
	if path, _ := k.Debug(); path != "" {
		r.vmlinux, _ = nowait.Open(path, os.O_RDONLY, 0, nowait.Regular) // an unreadable one gives no stacks
	}
}

// final keeps the stacks of the CPUs at an end that gets a record, and writes the core.
func (r *crashRecord) final(out vmm.Outcome, mem *guestmem.Memory, cpus []vmcore.CPU, alive func()) {
	r.mu.Lock()
	r.end = inspect.Clock()
	r.mu.Unlock()
	status := exitStatus(ended(out))
	if r.vmlinux != nil && slices.Contains(recordedEnds, status) {
		r.keepStacks(mem, cpus)
	}
	if r.core && slices.Contains(coreEnds, status) {
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

// finish takes the error of a run, and writes a record if that is an end which gets one.
func (r *crashRecord) finish(err error) error {
	if r == nil || !slices.Contains(recordedEnds, exitStatus(err)) {
		return err
	}
	done := make(chan error, 1)
	end, wanted := "gvm: "+errorText(err)+"\n", r.core && slices.Contains(coreEnds, exitStatus(err))
	r.mu.Lock()
	if wanted && r.coreErr != nil {
		err, wanted = errors.Join(err, fmt.Errorf("--crash-core: %w", r.coreErr)), false
	}
	r.mu.Unlock()
	panics.Go(func() { done <- r.write(end, wanted) })
	select {
	case werr := <-done:
		if werr != nil {
			return errors.Join(err, fmt.Errorf("--crash-dir: %w", werr))
		}
		return err
	case <-time.After(recordPatience):
		return errors.Join(err, fmt.Errorf("--crash-dir %s: the storage does not answer; gvm ends without a whole record",
			r.dir))
	}
}

// write makes a record: the message of the end, the console, the state, and all of it by time.
func (r *crashRecord) write(end string, core bool) error {
	dir, err := r.directory()
	if err != nil {
		return err
	}
	r.mu.Lock()
	if r.end == 0 {
		r.end = inspect.Clock()
	}
	first, _, _ := strings.Cut(strings.TrimPrefix(end, "gvm: "), "\n")
	r.log.add(r.end, first)
	console, log, stacks := bytes.Clone(r.log.console()), r.log.merged(r.state, r.end), r.stacks
	r.mu.Unlock()
	var state bytes.Buffer
	err = errors.Join(writeJSON(&state, r.state),
		os.WriteFile(filepath.Join(dir, "end"), []byte(end), 0o666),
		os.WriteFile(filepath.Join(dir, "console"), console, 0o666),
		os.WriteFile(filepath.Join(dir, "log"), log, 0o666),
		os.WriteFile(filepath.Join(dir, "state.json"), state.Bytes(), 0o666))
	if stacks != nil {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, "stacks"), stacks, 0o666))
	}
	switch {
	case err != nil:
	case core:
		note(fmt.Sprintf("the end, the console, the machine's state and the guest's memory are in %s", dir))
	default:
		note(fmt.Sprintf("the end, the console and the machine's state are in %s", dir))
	}
	return err
}

// directory makes the directory of the record, once, and returns its path.
func (r *crashRecord) directory() (dir string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.made != "" {
		return r.made, nil
	}
	base := filepath.Join(r.dir, time.Now().UTC().Format("20060102T150405Z-")+r.machine)
	dir = base
	for i := range recordNames {
		if i > 0 {
			dir = fmt.Sprintf("%s-%d", base, i+1)
		}
		if err = os.Mkdir(dir, 0o777); !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	if err == nil {
		r.made = dir
	}
	return dir, err
}
