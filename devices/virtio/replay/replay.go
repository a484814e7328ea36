package replay

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
)

// Side is one of the devices that get the requests.
type Side struct {
	Name string
	// Hosts are the devices, in the order of the trace's header.
	Hosts []*Host
}

// Difference is a request that was answered differently.
type Difference struct {
	Number int // of the request in the trace, from 0, by its time
	Record *trace.Record
	// The part that differs: "response", "status", "sense", "residual", "data".
	What []string
	// A is the answer of the first side, or the trace's where there is one side. B
	// is the other's.
	A, B Answer
	// Data are the offsets of the bytes of data-in that differ.
	Data []int
}

// Text says in words how a request was answered.
func (a *Answer) Text(r *trace.Record) string {
	x := *r
	x.Response, x.Status, x.Sense, x.Residual = a.Response, a.Status, a.Sense, a.Residual
	return x.Outcome()
}

// Summary counts the requests of a Run.
type Summary struct {
	Requests  int // that were sent
	Different int // of them
	// Skipped are requests whose parameter list the trace does not have: the
	// tracepoints of a kernel do not show it.
	Skipped int
	Lost    uint64 // records that the trace itself lacks
}

// Load reads a trace into memory, in the order of the requests.
func Load(t *trace.Reader) ([]trace.Record, error) {
	var list []trace.Record
	for {
		var r trace.Record
		switch err := t.Next(&r); err {
		case nil:
		case io.EOF:
			slices.SortStableFunc(list, func(x, y trace.Record) int { return cmp.Compare(x.Time, y.Time) })
			return list, nil
		default:
			return nil, err
		}
		r.CDB, r.Sense, r.Payload = bytes.Clone(r.CDB), bytes.Clone(r.Sense), bytes.Clone(r.Payload)
		list = append(list, r)
	}
}

// Run sends the records' requests to each side, one after the other, and tells
// report of those that were answered differently: by two sides, or by one side
// and in the trace. A command's data-out is the recorded one, or for one
// that writes blocks, made up from its place in the trace, alike for every side.
func Run(ctx context.Context, records []trace.Record, sides []Side, report func(*Difference) error) (Summary, error) {
	var sum Summary
	for i := range records {
		r := &records[i]
		if ctx.Err() != nil {
			return sum, context.Cause(ctx)
		}
		switch r.Kind {
		case trace.Lost:
			sum.Lost += r.Count
		case trace.Reset, trace.PowerOn:
			for _, s := range sides {
				if err := s.reset(int(r.Device), r.Kind == trace.PowerOn && i > 0); err != nil {
					return sum, fmt.Errorf("%s: reset of device %d: %w", s.Name, r.Device, err)
				}
			}
		case trace.Command, trace.TaskManagement:
			out, ok := dataOut(i, r)
			if !ok {
				sum.Skipped++
				continue
			}
			sum.Requests++
			var answers []Answer
			for _, s := range sides {
				a, err := s.send(r, out)
				if err != nil {
					return sum, fmt.Errorf("%s: request %d, %s: %w", s.Name, i, r.Op(), err)
				}
				answers = append(answers, a)
			}
			d := &Difference{Number: i, Record: r}
			if len(sides) == 1 {
				d.againstTrace(answers[0])
			} else {
				d.between(answers[0], answers[1])
			}
			if len(d.What) == 0 {
				continue
			}
			sum.Different++
			if err := report(d); err != nil {
				return sum, err
			}
		}
	}
	return sum, nil
}

func (s *Side) reset(device int, power bool) error {
	if device >= len(s.Hosts) {
		return nil
	}
	return s.Hosts[device].Reset(power)
}

func (s *Side) send(r *trace.Record, out []byte) (Answer, error) {
	switch {
	case int(r.Device) >= len(s.Hosts):
		return Answer{}, fmt.Errorf("there is no device %d in the trace's header", r.Device)
	case r.Out > MaxData || r.In > MaxData:
		return Answer{}, fmt.Errorf("%d bytes of data-out and %d of data-in: a request has up to %d here",
			r.Out, r.In, MaxData)
	case r.Kind == trace.TaskManagement:
		return s.Hosts[r.Device].Manage(r)
	}
	return s.Hosts[r.Device].Command(r, out)
}

// dataOut returns the data that a request sends, and false when that is not known and
// decides how the command works.
func dataOut(i int, r *trace.Record) ([]byte, bool) {
	switch {
	case r.Payload != nil:
		return r.Payload, true
	case r.Out == 0 || r.Kind != trace.Command:
		return nil, true
	case r.Out > MaxData:
		return nil, true // send has an error for that
	case scsi.ParameterList(r.CDB):
		return nil, false
	}
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(i))
	b := make([]byte, r.Out)
	_, _ = rand.NewChaCha8(seed).Read(b)
	return b, true
}

func (d *Difference) differs(what string, yes bool) {
	if yes {
		d.What = append(d.What, what)
	}
}

// againstTrace compares an answer with the recorded one, as far as it is known.
func (d *Difference) againstTrace(a Answer) {
	r := d.Record
	d.A, d.B = Answer{Response: r.Response, Status: r.Status, Sense: r.Sense, Residual: r.Residual}, a
	if r.Missing&trace.NoResponse != 0 {
		d.A.Response = a.Response
	}
	if r.Missing&trace.NoResidual != 0 {
		d.A.Residual = a.Residual
	}
	d.common()
}

// between compares the answers of two sides.
func (d *Difference) between(a, b Answer) {
	d.A, d.B = a, b
	d.common()
	// Bytes past the residual say nothing; their number is compared already.
	got := func(x *Answer) []byte { return x.Data[:max(len(x.Data)-int(x.Residual), 0)] }
	x, y := got(&a), got(&b)
	for i := range min(len(x), len(y)) {
		if x[i] != y[i] {
			d.Data = append(d.Data, i)
		}
	}
	d.differs("data", len(d.Data) > 0)
}

func (d *Difference) common() {
	a, b := &d.A, &d.B
	zeros := func(s []byte) []byte { return bytes.TrimRight(s, "\x00") }
	d.differs("response", a.Response != b.Response)
	d.differs("status", a.Status != b.Status)
	d.differs("sense", !bytes.Equal(zeros(a.Sense), zeros(b.Sense)))
	d.differs("residual", a.Residual != b.Residual)
}

// Spans writes ascending numbers as spans, such as "3 8-11".
func Spans(n []int) string {
	var b []byte
	for i := 0; i < len(n); {
		j := i
		for j+1 < len(n) && n[j+1] == n[j]+1 {
			j++
		}
		if i > 0 {
			b = append(b, ' ')
		}
		b = fmt.Append(b, n[i])
		if j > i {
			b = fmt.Appendf(b, "-%d", n[j])
		}
		i = j + 1
	}
	return string(b)
}
