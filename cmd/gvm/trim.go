package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// settled is the time after which the start of a machine counts as over.
const settled = time.Second

// trimmer has the files that trim reads, open: in the sandbox they cannot be opened.
type trimmer struct {
	status, maps *os.File
	exe          string
	err          error

	mu     sync.Mutex
	closed bool
}

func newTrimmer() *trimmer {
	t := &trimmer{}
	var errs [3]error
	t.status, errs[0] = os.Open("/proc/self/status")
	t.maps, errs[1] = os.Open("/proc/self/maps")
	t.exe, errs[2] = os.Readlink("/proc/self/exe")
	t.err = errors.Join(errs[:]...)
	return t
}

func (t *trimmer) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	_ = t.status.Close() // read only
	_ = t.maps.Close()
}

// trim releases the program's pages that the start has read, some 10 MiB. Pages that a running
// machine needs come back from the page cache, a few at a time. Under a debugger trim does nothing,
// since breakpoints are changes to such pages; nor does it after close, as a machine that ends
// needs none.
func (t *trimmer) trim() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	if t.err != nil {
		return t.err
	}
	status, err := io.ReadAll(t.status)
	if err != nil {
		return err
	}
	if !strings.Contains(string(status), "\nTracerPid:\t0\n") {
		return nil
	}
	maps, err := t.programMaps()
	if err != nil {
		return err
	}
	for _, m := range maps {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.from, m.to-m.from, unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("madvise of the program at %#x: %w", m.from, errno)
		}
	}
	return nil
}

type addressRange struct{ from, to uintptr }

// programMaps returns the read-only mappings of the program's file (proc_pid_maps(5)).
func (t *trimmer) programMaps() ([]addressRange, error) {
	text, err := io.ReadAll(t.maps)
	if err != nil {
		return nil, err
	}
	var found []addressRange
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		var r addressRange
		var perm string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &r.from, &r.to, &perm); err == nil && len(perm) == 4 &&
			perm[1] == '-' && strings.HasSuffix(line, " "+t.exe) {
			found = append(found, r)
		}
	}
	return found, nil
}
