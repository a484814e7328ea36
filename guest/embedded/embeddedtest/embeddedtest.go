// Package embeddedtest reads the results of the embedded guest: its report on the console, and the
// pattern on a disk that it was allowed to write to. It serves the tests of every machine that
// boots that guest.
package embeddedtest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
)

// Report is the outcome that a run of the embedded guest printed.
type Report struct {
	Passed     bool     // the last line is PASS
	Checks     int      // lines of checks, good or bad
	Failures   []string // the text of each failed check, and of the last line if it is a FAIL
	CPUs       int      // CPUs that came up
	CPUsListed int      // CPUs in the MADT
	Disks      []string // "host:channel:target:lun vendor product revision"
	Requests   int      // virtio-scsi requests made, of all devices
	Indirect   int      // those through an indirect descriptor table
	Interrupts int      // MSI-X interrupts taken for them
}

var (
	cpusLine  = regexp.MustCompile(`^cpus: (\d+) of (\d+) up`)
	totalLine = regexp.MustCompile(`^  (\d+) requests, (\d+) of them indirect, \d+ notifications, (\d+) interrupts$`)
)

// ParseReport reads the guest's console output. A report without a verdict is an error: the guest
// did not finish.
func ParseReport(console string) (Report, error) {
	var r Report
	ended := false
	for line := range strings.Lines(console) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "  ok   "):
			r.Checks++
		case strings.HasPrefix(line, "  FAIL "):
			r.Checks++
			r.Failures = append(r.Failures, line[len("  FAIL "):])
		case line == "PASS":
			ended, r.Passed = true, true
		case strings.HasPrefix(line, "FAIL: "):
			ended, r.Passed = true, false
			r.Failures = append(r.Failures, line[len("FAIL: "):])
		case strings.HasPrefix(line, "disk "):
			r.Disks = append(r.Disks, line[len("disk "):])
		}
		if m := cpusLine.FindStringSubmatch(line); m != nil {
			r.CPUs, r.CPUsListed = number(m[1]), number(m[2])
		}
		if m := totalLine.FindStringSubmatch(line); m != nil {
			r.Requests += number(m[1])
			r.Indirect += number(m[2])
			r.Interrupts += number(m[3])
		}
	}
	if !ended {
		return r, fmt.Errorf("embedded guest's report has no verdict: %q", tail(console, 300))
	}
	return r, nil
}

func number(digits string) int {
	n, _ := strconv.Atoi(digits) // the expression allows only digits
	return n
}

func tail(s string, n int) string {
	return s[max(0, len(s)-n):]
}

// A Range is a run of bytes of a disk.
type Range struct{ Offset, Length int64 }

// Written returns the parts of a disk that the guest writes to if the word "write" allows it: the
// first, the middle and the last block, and a run of 8 KiB. Size and block size are in bytes.
func Written(size, blockSize int64) []Range {
	const run = 8192
	blocks := size / blockSize
	ranges := []Range{{0, blockSize}, {blocks / 2 * blockSize, blockSize}, {(blocks - 1) * blockSize, blockSize}}
	if blocks > 4*(run/blockSize) {
		ranges = append(ranges, Range{(blocks/4 + 1) * blockSize, run})
	}
	return ranges
}

// Pattern returns the guest's data for a range of the disk at a target and LUN: at byte position p
// the little-endian 64-bit word of p, the target and the LUN.
func Pattern(target byte, lun uint16, r Range) []byte {
	b := make([]byte, r.Length)
	disk := uint64(target)<<16 | uint64(lun)
	for i := int64(0); i < r.Length; i += 8 {
		word := (uint64(r.Offset+i)/8+1)*0x9e3779b97f4a7c15 ^ (disk+1)<<40
		binary.LittleEndian.PutUint64(b[i:], word)
	}
	return b
}

// CheckDisk returns an error unless the disk, of the given size and block size, holds the guest's
// pattern in all of Written.
func CheckDisk(disk io.ReaderAt, size, blockSize int64, target byte, lun uint16) error {
	for _, r := range Written(size, blockSize) {
		got := make([]byte, r.Length)
		if _, err := disk.ReadAt(got, r.Offset); err != nil {
			return fmt.Errorf("read disk at %d: %w", r.Offset, err)
		}
		if !bytes.Equal(got, Pattern(target, lun, r)) {
			return fmt.Errorf("disk of target %d, LUN %d does not hold the pattern at %d: begins % x",
				target, lun, r.Offset, got[:8])
		}
	}
	return nil
}
