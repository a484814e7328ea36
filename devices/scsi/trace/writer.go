package trace

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/text"
)

// Version is the version of the format that this package writes and reads. It
// changes when a reader of the one before would be misled.
const Version = 1

const magic = "gvm-trace "

// Header describes the run of a trace.
type Header struct {
	GVM     string    `json:"gvm"`    // gvm's version
	Kernel  string    `json:"kernel"` // the host kernel's release
	Start   time.Time `json:"start"`  // the wall clock when Record.Time is 0
	Devices []Device  `json:"devices"`
}

// Device is a virtio-scsi device.
type Device struct {
	Backend string `json:"backend"` // "process" or "vhost"
	Queues  int    `json:"queues"`  // request queues
	Disks   []Disk `json:"disks"`
}

// Disk is a logical unit at the start of the run.
type Disk struct {
	LUN       int       `json:"lun"`
	Serial    text.Name `json:"serial"`
	Size      uint64    `json:"size"`       // bytes
	BlockSize int       `json:"block_size"` // bytes
	ReadOnly  bool      `json:"read_only,omitempty"`
	Cache     string    `json:"cache,omitempty"` // value of cache= of --disk; "" is writeback
}

// HostKernel returns the release of the kernel that this process runs on.
func HostKernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

const (
	flushAt    = 64 << 10    // bytes that are worth a write
	flushAfter = time.Second // and how long fewer may wait
)

// Writer writes a trace. Its methods may be called from any goroutine. Observe never waits for the
// file: a goroutine of the Writer writes the collected records, and if it cannot keep up, records
// are dropped and counted.
type Writer struct {
	now  func() time.Duration
	file io.Writer
	wake chan struct{}
	done chan struct{}

	mu      sync.Mutex
	buf     []byte // records not yet written; it never grows beyond its capacity
	lost    uint64 // records that are missing behind buf
	allLost uint64
	woken   bool // wake has been sent for buf
	closed  bool
	err     error // of the file; nothing is recorded after it
}

// NewWriter writes the header and returns a Writer on w. Header.Start is the moment of the call
// unless it is set; now returns the time since then; nil is the system's monotonic clock.
func NewWriter(w io.Writer, h Header, now func() time.Duration) (*Writer, error) {
	start := time.Now()
	if h.Start.IsZero() {
		h.Start = start
	}
	if now == nil {
		now = func() time.Duration { return time.Since(start) }
	}
	b, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	if _, err := fmt.Fprintf(w, "%s%d\n%s\n", magic, Version, b); err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	t := &Writer{now: now, file: w, wake: make(chan struct{}, 1), done: make(chan struct{}),
		buf: make([]byte, 0, MaxRecord)}
	panics.Go(t.run)
	return t, nil
}

// Observe records r and keeps nothing of it.
func (t *Writer) Observe(r *Record) {
	t.mu.Lock()
	if t.err == nil && !t.closed {
		if len(t.buf)+r.size() > cap(t.buf)-lostLen {
			t.lost++
		} else {
			t.buf = r.append(t.buf)
		}
		if len(t.buf) >= flushAt && !t.woken {
			t.woken = true
			select {
			case t.wake <- struct{}{}:
			default: // it is awake
			}
		}
	}
	t.mu.Unlock()
}

// run writes the records that Observe collects.
func (t *Writer) run() {
	defer close(t.done)
	tick := time.NewTicker(flushAfter)
	defer tick.Stop()
	spare := make([]byte, 0, MaxRecord)
	for open := true; open; {
		select {
		case _, open = <-t.wake:
		case <-tick.C:
		}
		spare = t.flush(spare)
	}
}

// flush writes the records, and puts empty in place of their buffer meanwhile. It returns their
// buffer, emptied.
func (t *Writer) flush(empty []byte) []byte {
	t.mu.Lock()
	if t.lost > 0 {
		t.buf = (&Record{Kind: Lost, Time: t.now(), Count: t.lost}).append(t.buf)
		t.allLost += t.lost
	}
	full := t.buf
	t.buf, t.lost, t.woken = empty, 0, false
	bad := t.err != nil
	t.mu.Unlock()
	if len(full) > 0 && !bad {
		if _, err := t.file.Write(full); err != nil {
			t.mu.Lock()
			t.err = err
			t.mu.Unlock()
		}
	}
	return full[:0]
}

// Close writes the remaining records. The error reports the first failure of the file, or dropped
// records: the trace is then incomplete, but can be read.
func (t *Writer) Close() error {
	t.mu.Lock()
	was := t.closed
	t.closed = true
	t.mu.Unlock()
	if was {
		return nil
	}
	close(t.wake)
	<-t.done
	switch {
	case t.err != nil:
		return fmt.Errorf("the trace ends before the run did: %w", t.err)
	case t.allLost > 0:
		return fmt.Errorf("the trace lacks %d requests, which came faster than its disk took them", t.allLost)
	}
	return nil
}

// File is a Writer with its own file.
type File struct {
	*Writer
	f *os.File
}

// ErrRefused is Create's error for a path that is not for a trace.
var ErrRefused = errors.New("name another file")

// Device returns the Observer of the requests of Header.Devices[i].
func (t *Writer) Device(i uint8) *Observer { return &Observer{t, i} }

// Observer records the requests of one device.
type Observer struct {
	t      *Writer
	device uint8
}

// Now returns the time since the start of the run.
func (o *Observer) Now() time.Duration { return o.t.now() }

// Observe records r as a request of the device. Nothing of r is kept.
func (o *Observer) Observe(r *Record) {
	r.Device = o.device
	o.t.Observe(r)
}

// setLock is a variable for tests.
var setLock = unix.FcntlFlock

// Create makes the file at path. It overwrites an existing trace and nothing else: a mistyped path
// must not cost a disk image. Two gvms cannot write to the same file.
func Create(path string, h Header) (_ *File, err error) {
	flags := os.O_RDWR
	if there, err := os.Stat(path); err == nil && nowait.KindOf(there.Mode()) == nowait.Pipe {
		flags = os.O_WRONLY // fails without a reader; writes fail once the reader has gone
	}
	f, made, err := nowait.Make(path, flags, 0o666, nowait.Regular|nowait.Pipe|nowait.CharDevice)
	kind := (*nowait.KindError)(nil)
	switch {
	case errors.Is(err, unix.ENXIO) && flags == os.O_WRONLY:
		return nil, fmt.Errorf("trace %s: it is a pipe that no program reads; start that first, or %w",
			path, ErrRefused)
	case errors.As(err, &kind):
		return nil, fmt.Errorf("trace %s: it is %v; %w", path, kind.Is, ErrRefused)
	case err != nil:
		return nil, fmt.Errorf("trace: %w", nowait.CreateError(path, err))
	}
	defer func() {
		if err != nil {
			if made {
				err = errors.Join(err, nowait.Remove(f, path))
			}
			f.Close()
			err = fmt.Errorf("trace %s: %w", path, err)
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Mode().IsRegular() {
		var b [len(magic)]byte
		if _, err := f.ReadAt(b[:], 0); fi.Size() > 0 && (err != nil || string(b[:]) != magic) {
			return nil, fmt.Errorf("it holds something other than a trace and was left alone; %w", ErrRefused)
		}
		// The same kind of lock as disks have, so that no disk's file becomes a trace. A file
		// system without locks may still hold traces.
		l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
		if err := setLock(f.Fd(), unix.F_OFD_SETLK, &l); err == unix.EAGAIN || err == unix.EACCES {
			made = false // the other may have it from now on
			return nil, fmt.Errorf("another gvm writes to it, or has it as a disk; %w", ErrRefused)
		}
		if err := f.Truncate(0); err != nil {
			return nil, err
		}
	}
	_ = f.SetWriteDeadline(time.Now().Add(endsWithin)) // of a file that is not regular
	w, err := NewWriter(f, h, nil)
	if err != nil {
		return nil, err
	}
	_ = f.SetWriteDeadline(time.Time{})
	return &File{w, f}, nil
}

// endsWithin bounds the wait at the end of a run for the program that reads its trace.
const endsWithin = time.Second

// Close closes the Writer and the file.
func (f *File) Close() error {
	_ = f.f.SetWriteDeadline(time.Now().Add(endsWithin))
	err := errors.Join(f.Writer.Close(), f.f.Close())
	if err != nil {
		return fmt.Errorf("trace %s: %w", f.f.Name(), err)
	}
	return nil
}

// IsTrace reports whether b, the start of a file, begins like a trace.
func IsTrace(b []byte) bool { return bytes.HasPrefix(b, []byte(magic)) }
