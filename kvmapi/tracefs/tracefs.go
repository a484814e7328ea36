// Package tracefs reads the kernel's tracepoints (Documentation/trace/events.rst) from the ring
// buffer, in binary, through its own trace instance. The caller interprets the fields of an event.
package tracefs

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// DefaultRoot is the usual mount point of tracefs.
const DefaultRoot = "/sys/kernel/tracing"

// Instance is a set of ring buffers, one for each CPU, with its own enabled events. It records by
// CLOCK_MONOTONIC.
type Instance struct {
	dir     string
	formats map[uint16]*Format
	cpus    []*cpu
	missed  uint64
	held    []Event // events too late for the last Read
	stopped bool
}

type cpu struct {
	f    *os.File
	page []byte
}

// Event is one record of a tracepoint.
type Event struct {
	Format *Format
	Time   uint64 // ns of CLOCK_MONOTONIC
	Data   []byte
}

// Create makes an instance with buffers of kib KiB for each CPU, which records nothing yet. The
// error for a kernel without tracefs says how to get it.
func Create(root, name string, kib int) (_ *Instance, err error) {
	root = cmp.Or(root, DefaultRoot)
	i := &Instance{dir: filepath.Join(root, "instances", name), formats: make(map[uint16]*Format)}
	switch err := os.Mkdir(i.dir, 0o700); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s is not there: mount -t tracefs tracefs %[1]s (CONFIG_TRACING)", root)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: %w; tracepoints need root", root, unix.EACCES)
	case err != nil:
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Close())
		}
	}()
	for _, set := range []struct{ file, value string }{
		{"tracing_on", "0"}, {"trace_clock", "mono"}, {"buffer_size_kb", strconv.Itoa(kib)},
	} {
		if err := i.write(set.file, set.value); err != nil {
			return nil, err
		}
	}
	names, err := filepath.Glob(filepath.Join(i.dir, "per_cpu", "cpu[0-9]*", "trace_pipe_raw"))
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		f, err := os.OpenFile(n, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		i.cpus = append(i.cpus, &cpu{f, make([]byte, os.Getpagesize())})
	}
	return i, nil
}

func (i *Instance) write(file, value string) error {
	f, err := os.OpenFile(filepath.Join(i.dir, file), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// Enable enables the named event, such as target/target_cmd_complete, where filter holds ("":
// always), and returns its format. If the kernel lacks the event the error is fs.ErrNotExist.
func (i *Instance) Enable(event, filter string) (*Format, error) {
	dir := filepath.Join("events", event)
	text, err := os.ReadFile(filepath.Join(i.dir, dir, "format"))
	if err != nil {
		return nil, err
	}
	f, err := parseFormat(string(text))
	if err != nil {
		return nil, fmt.Errorf("tracepoint %s: %w", event, err)
	}
	i.formats[f.ID] = f
	if filter != "" {
		if err := i.write(filepath.Join(dir, "filter"), filter); err != nil {
			return nil, fmt.Errorf("filter %q: %w", filter, err)
		}
	}
	return f, i.write(filepath.Join(dir, "enable"), "1")
}

// Start starts recording.
func (i *Instance) Start() error { return i.write("tracing_on", "1") }

// Stop stops recording. The recorded events stay for one more Read.
func (i *Instance) Stop() error {
	i.stopped = true
	return i.write("tracing_on", "0")
}

// Read returns the events recorded before the call, in the order of time. It does not wait.
func (i *Instance) Read() ([]Event, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return nil, fmt.Errorf("clock_gettime: %w", err)
	}
	events, err := i.drain()
	if err != nil {
		return nil, err
	}
	// A CPU that was read first may have recorded more by now: events later than the start of this
	// call are kept for the next one.
	events = append(i.held, events...)
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.Time, b.Time) })
	until := len(events)
	if !i.stopped {
		until, _ = slices.BinarySearchFunc(events, uint64(now.Nano()),
			func(e Event, t uint64) int { return cmp.Compare(e.Time, t) })
	}
	i.held = slices.Clone(events[until:])
	return events[:until], nil
}

// drain reads the buffers of all CPUs until they are empty.
func (i *Instance) drain() ([]Event, error) {
	var out []Event
	for _, c := range i.cpus {
		for {
			n, err := unix.Read(int(c.f.Fd()), c.page)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if errors.Is(err, unix.EAGAIN) || err == nil && n == 0 {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.f.Name(), err)
			}
			events, missed, err := parsePage(c.page[:n], i.formats)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.f.Name(), err)
			}
			out = append(out, events...)
			i.missed += missed
		}
	}
	return out, nil
}

// Missed returns how many events were overwritten before they were read.
func (i *Instance) Missed() uint64 { return i.missed }

// Close removes the instance.
func (i *Instance) Close() error {
	var errs []error
	for _, c := range i.cpus {
		errs = append(errs, c.f.Close())
	}
	i.cpus = nil
	if err := unix.Rmdir(i.dir); err != nil {
		errs = append(errs, fmt.Errorf("%s: %w", i.dir, err))
	}
	return errors.Join(errs...)
}

// List returns the names of the existing instances; none without tracefs.
func List(root string) ([]string, error) {
	des, err := os.ReadDir(filepath.Join(cmp.Or(root, DefaultRoot), "instances"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, nil
	}
	var names []string
	for _, d := range des {
		names = append(names, d.Name())
	}
	return names, err
}

// Remove removes an instance that a process left behind.
func Remove(root, name string) error {
	return unix.Rmdir(filepath.Join(cmp.Or(root, DefaultRoot), "instances", name))
}
