package trace

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
)

const (
	maxHeader   = 1 << 20   // bytes of a header
	maxDevices  = 32        // of a machine: a PCI bus has as many
	maxDiskSize = 1<<63 - 1 // bytes, of a file
)

// FormatError is the error of a file that is not a trace, that this gvm cannot read, or that is
// damaged.
type FormatError struct {
	Offset int64 // where in the file
	What   string
}

func (e *FormatError) Error() string {
	if e.Offset == 0 {
		return e.What
	}
	return fmt.Sprintf("damaged at byte %d: %s", e.Offset, e.What)
}

// Reader reads a trace from its start.
type Reader struct {
	Header Header

	r   *bufio.Reader
	at  int64 // of the next record
	buf []byte
	cut int
}

// NewReader reads the header. The error is a *FormatError unless r failed.
func NewReader(r io.Reader) (*Reader, error) {
	t := &Reader{r: bufio.NewReaderSize(r, 256<<10)}
	start, err := t.r.Peek(len(magic))
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("trace: %w", err)
	}
	if !IsTrace(start) {
		return nil, &FormatError{What: "not a trace of gvm; gvm run --trace makes one"}
	}
	first, err := t.line()
	if err != nil {
		return nil, err
	}
	word := first[len(magic):]
	version, err := strconv.ParseUint(string(word), 10, 32)
	if err != nil {
		return nil, &FormatError{What: fmt.Sprintf("%.20q is not a version of the trace format", word)}
	}
	if version != Version {
		return nil, &FormatError{What: fmt.Sprintf(
			"version %d of the trace format, and this gvm reads version %d; use the gvm that wrote it",
			version, Version)}
	}
	at := t.at
	b, err := t.line()
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &t.Header); err != nil {
		return nil, &FormatError{Offset: at, What: fmt.Sprintf("the header: %v", err)}
	}
	if n := len(t.Header.Devices); n > maxDevices {
		return nil, &FormatError{Offset: at,
			What: fmt.Sprintf("the header: %d devices, and a machine has %d at most", n, maxDevices)}
	}
	for _, d := range t.Header.Devices {
		for _, k := range d.Disks {
			if k.Size > maxDiskSize {
				return nil, &FormatError{Offset: at, What: fmt.Sprintf("the header: a disk of %d bytes", k.Size)}
			}
		}
	}
	return t, nil
}

// line reads one line of the header and returns it without its end.
func (t *Reader) line() ([]byte, error) {
	var line []byte
	for {
		part, err := t.r.ReadSlice('\n')
		line = append(line, part...)
		t.at += int64(len(part))
		switch {
		case len(line) > maxHeader:
			return nil, &FormatError{Offset: t.at, What: "the header has no end"}
		case err == nil:
			return line[:len(line)-1], nil
		case err == io.EOF:
			return nil, &FormatError{Offset: t.at, What: "the file ends inside the header"}
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("trace: %w", err)
		}
	}
}

// Next reads the next record into r. At the end of the file, and at a last record that is not whole
// (see Cut), it returns io.EOF. Any other error is a *FormatError, unless the underlying reader
// failed.
func (t *Reader) Next(r *Record) error {
	for {
		f, err := t.record()
		if err != nil {
			return err
		}
		if what := r.parse(f); what != "" {
			return &FormatError{t.at, what}
		}
		t.at += int64(len(f))
		if r.Kind >= Command && r.Kind <= Lost {
			return nil
		}
	}
}

// record reads the bytes of one record.
func (t *Reader) record() ([]byte, error) {
	head, err := t.r.Peek(4)
	if err != nil {
		return nil, t.end(err, len(head))
	}
	n := binary.LittleEndian.Uint32(head)
	if n < fixedLen || n > MaxRecord {
		return nil, &FormatError{t.at, fmt.Sprintf("a record of %d bytes; they have %d to %d", n, fixedLen, MaxRecord)}
	}
	if cap(t.buf) < int(n) {
		t.buf = make([]byte, n)
	}
	t.buf = t.buf[:n]
	got, err := io.ReadFull(t.r, t.buf)
	if err != nil {
		return nil, t.end(err, got)
	}
	return t.buf, nil
}

// end turns the end of the file inside a record into io.EOF.
func (t *Reader) end(err error, some int) error {
	if err != io.EOF && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("trace: %w", err)
	}
	t.cut += some
	return io.EOF
}

// Cut returns, once Next has returned io.EOF, the number of bytes of an incomplete record at the
// end of the file. Such a trace is of a gvm that was killed, had no room on its disk, or is still
// running.
func (t *Reader) Cut() int { return t.cut }
