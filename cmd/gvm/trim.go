package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settled is the time after which the start of a machine counts as over.
const settled = time.Second

// trim releases the program's pages that the start has read, some 10 MiB. Pages that a running
// machine needs come back from the page cache, a few at a time. Under a debugger trim does nothing,
// since breakpoints are changes to such pages.
func trim() error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	if !strings.Contains(string(status), "\nTracerPid:\t0\n") {
		return nil
	}
	maps, err := programMaps()
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
func programMaps() ([]addressRange, error) {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	var found []addressRange
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		var r addressRange
		var perm string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &r.from, &r.to, &perm); err == nil && len(perm) == 4 &&
			perm[1] == '-' && strings.HasSuffix(line, " "+exe) {
			found = append(found, r)
		}
	}
	return found, nil
}
