package tracefs

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// Format is the layout of an event in the ring buffer, from its file format.
type Format struct {
	ID     uint16
	Name   string
	fields map[string]field
}

type field struct {
	offset, size int
	dynamic      bool // __data_loc: the field has the value's offset and length
}

// parseFormat reads an event's file format.
func parseFormat(text string) (*Format, error) {
	f := &Format{fields: make(map[string]field)}
	id := -1
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "name: "); ok {
			f.Name = name
		}
		if n, ok := strings.CutPrefix(line, "ID: "); ok {
			v, err := strconv.ParseUint(n, 10, 16)
			if err != nil {
				return nil, fmt.Errorf("ID %q", n)
			}
			id = int(v)
		}
		decl, ok := strings.CutPrefix(line, "field:")
		if !ok {
			continue
		}
		parts := strings.Split(decl, ";")
		var fl field
		var err error
		for _, p := range parts[1:] {
			key, value, _ := strings.Cut(strings.TrimSpace(p), ":")
			switch key {
			case "offset":
				fl.offset, err = strconv.Atoi(value)
			case "size":
				fl.size, err = strconv.Atoi(value)
			}
			if err != nil || fl.offset < 0 || fl.size < 0 || fl.offset > 4096 || fl.size > 4096 {
				return nil, fmt.Errorf("field %q", decl)
			}
		}
		fl.dynamic = strings.HasPrefix(decl, "__data_loc ")
		words := strings.Fields(parts[0])
		if len(words) < 2 {
			return nil, fmt.Errorf("field %q", decl)
		}
		name, _, _ := strings.Cut(words[len(words)-1], "[")
		f.fields[strings.TrimLeft(name, "*")] = fl
	}
	if id < 0 || f.Name == "" {
		return nil, fmt.Errorf("no name or ID")
	}
	f.ID = uint16(id)
	return f, nil
}

// Bytes returns a field of an event's data, nil if there is none of that name.
func (e Event) Bytes(name string) []byte {
	fl, ok := e.Format.fields[name]
	if !ok || fl.offset+fl.size > len(e.Data) {
		return nil
	}
	b := e.Data[fl.offset:][:fl.size]
	if !fl.dynamic || fl.size != 4 {
		return b
	}
	at, n := int(binary.LittleEndian.Uint16(b)), int(binary.LittleEndian.Uint16(b[2:]))
	if at+n > len(e.Data) {
		return nil
	}
	return e.Data[at:][:n]
}

// Uint returns a field of up to eight bytes as a number, 0 if there is none.
func (e Event) Uint(name string) uint64 {
	var b [8]byte
	copy(b[:], e.Bytes(name))
	return binary.LittleEndian.Uint64(b[:])
}

// The ring buffer's pages (include/linux/ring_buffer.h, kernel/trace/ring_buffer.c): a time stamp,
// the length of the data, then events. Each has a header of 32 bits, with a type or length in five
// and a time difference in 27.
const (
	pageHeader   = 16
	missedEvents = 1 << 31 // in the commit field: events before this page are lost
	missedStored = 1 << 30 // and their number follows the data
	commitMask   = 1<<27 - 1

	typePadding   = 29
	typeExtend    = 30
	typeTimeStamp = 31
)

// parsePage returns the events of a page with known formats, with copies of their data, and how
// many were lost before the page (1 for an unknown number).
func parsePage(p []byte, formats map[uint16]*Format) (out []Event, missed uint64, err error) {
	le := binary.LittleEndian
	if len(p) < pageHeader {
		return nil, 0, fmt.Errorf("page of %d bytes", len(p))
	}
	time, commit := le.Uint64(p), le.Uint64(p[8:])
	end := pageHeader + int(commit&commitMask)
	if end > len(p) {
		return nil, 0, fmt.Errorf("page of %d bytes says that it has %d", len(p), end)
	}
	if commit&missedEvents != 0 {
		missed = 1
		if commit&missedStored != 0 && end+8 <= len(p) {
			missed = le.Uint64(p[end:])
		}
	}
	for b := p[pageHeader:end]; len(b) >= 4; {
		head := le.Uint32(b)
		kind, delta := head&31, uint64(head>>5)
		var word uint64
		if len(b) >= 8 {
			word = uint64(le.Uint32(b[4:]))
		}
		n, data := 8, 4 // of the whole event; offset of its data
		switch {
		case kind == typePadding && delta == 0:
			return out, missed, nil
		case kind == typeExtend:
			delta |= word << 27
		case kind == typeTimeStamp:
			// 59 bits of the time; the page's own has the rest.
			time = time&^(1<<59-1) | word<<27 | delta
			delta = 0
		case kind == 0, kind == typePadding:
			n, data = 4+int(word), 8
		default:
			n = 4 + 4*int(kind)
		}
		if n < data || n > len(b) {
			return nil, 0, fmt.Errorf("event of type %d and %d bytes, of %d", kind, n, len(b))
		}
		time += delta
		if kind < typePadding && n-data >= 2 {
			if f := formats[le.Uint16(b[data:])]; f != nil {
				out = append(out, Event{f, time, append([]byte(nil), b[data:n]...)})
			}
		}
		b = b[n:]
	}
	return out, missed, nil
}
