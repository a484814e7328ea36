package lio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/kvmapi/tracefs"
	"gvm/panics"
)

// Observer gets every request that LIO has answered.
type Observer interface {
	// Now returns the time since an origin of the observer's.
	Now() time.Duration
	// Observe keeps nothing of the record, which is used again.
	Observe(*trace.Record)
}

// Tracepoints of the kernel's target (include/trace/events/target.h): a command
// begins, and is answered.
const (
	eventStart    = "target/target_sequencer_start"
	eventComplete = "target/target_cmd_complete"

	traceBuffer = 2048                  // KiB for each CPU
	tracePeriod = 50 * time.Millisecond // how often it is read
)

// Tracer makes records from LIO's tracepoints for a target. They have neither queue, tag nor virtio
// response; a task management function has no tracepoint. Tracer pairs commands with answers by LUN
// and CDB, in the order of their time.
type Tracer struct {
	in     *tracefs.Instance
	to     Observer
	origin time.Duration // of the observer's time, on CLOCK_MONOTONIC
	stop   chan struct{}
	done   chan struct{}
	err    error

	complete *tracefs.Format
	open     map[string][]tracefs.Event // commands under way
	opened   int                        // their number
	lost     uint64
}

// maxOpen bounds the commands under way. LIO reports no aborted command, and a guest can abort any
// number.
const maxOpen = 1 << 16

// traceName is the name of the owner's trace instance.
func (o owner) traceName() string { return fmt.Sprintf("gvm-%d-%d-%d", o.pid, o.start, o.seq) }

// Trace begins to report the requests to the target to o. It first removes the trace instances of
// dead gvms.
func (t *Target) Trace(o Observer) (_ *Tracer, err error) {
	self := t.owner
	if !t.own {
		if self, err = t.h.self(); err != nil {
			return nil, err
		}
		self.seq = maxSeq + t.TPGT // no other target of this process has it
	}
	if _, err := t.h.collectTraces(); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	in, err := tracefs.Create("", self.traceName(), traceBuffer)
	if err != nil {
		return nil, fmt.Errorf("trace of a disk that the kernel serves: %w", err)
	}
	tr := &Tracer{in: in, to: o, stop: make(chan struct{}), done: make(chan struct{}),
		open: make(map[string][]tracefs.Event)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("trace of a disk that the kernel serves: %w", err), in.Close())
		}
	}()
	filter, err := t.traceFilter()
	if err != nil {
		return nil, err
	}
	if _, err = in.Enable(eventStart, filter); err != nil {
		return nil, err
	}
	if tr.complete, err = in.Enable(eventComplete, filter); err != nil {
		return nil, err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return nil, err
	}
	tr.origin = time.Duration(now.Nano()) - o.Now()
	if err := in.Start(); err != nil {
		return nil, err
	}
	panics.Go(tr.run)
	return tr, nil
}

// traceFilter picks the commands of the target's initiators, by their names.
func (t *Target) traceFilter() (string, error) {
	tags, err := t.h.tpgs(t.WWN)
	if err != nil {
		return "", err
	}
	var terms []string
	for _, tag := range tags {
		if name, err := t.h.read(tpgDir(t.WWN, tag) + "/nexus"); err == nil && name != "" &&
			!strings.Contains(name, `"`) {
			terms = append(terms, fmt.Sprintf("initiator == %q", name))
		}
	}
	if len(terms) == 0 {
		return "", fail(ErrNoNexus, nil, "%s: no nexus", t.WWN)
	}
	return strings.Join(terms, " || "), nil
}

// collectTraces removes the trace instances of gvms that are dead.
func (h *host) collectTraces() (removed []string, err error) {
	names, err := tracefs.List("")
	for _, n := range names {
		var o owner
		if k, e := fmt.Sscanf(n, "gvm-%d-%d-%d", &o.pid, &o.start, &o.seq); e != nil || k != 3 || o.traceName() != n {
			continue
		}
		if start, ok := h.running(o.pid); !ok || start != o.start {
			if e := tracefs.Remove("", n); e != nil {
				err = errors.Join(err, fmt.Errorf("trace instance %s: %w", n, e))
				continue
			}
			removed = append(removed, "tracing/instances/"+n)
		}
	}
	return removed, err
}

// Traces returns the names of this process's trace instances.
func Traces() []string {
	names, _ := tracefs.List("") // without tracefs there are none
	return slices.DeleteFunc(names, func(n string) bool {
		return !strings.HasPrefix(n, fmt.Sprintf("gvm-%d-", os.Getpid()))
	})
}

func (t *Tracer) run() {
	defer close(t.done)
	tick := time.NewTicker(tracePeriod)
	defer tick.Stop()
	for t.err == nil {
		select {
		case <-t.stop:
			return
		case <-tick.C:
			t.read()
		}
	}
}

func (t *Tracer) read() {
	events, err := t.in.Read()
	t.err = errors.Join(t.err, err)
	for _, e := range events {
		t.event(e)
	}
	if n := t.in.Missed(); n > t.lost {
		t.forget(n - t.lost)
		t.lost = n
	}
}

// forget reports that n records are missing. The answer of any command under way may be among them,
// and the next one with the same CDB must not get its time.
func (t *Tracer) forget(n uint64) {
	t.to.Observe(&trace.Record{Kind: trace.Lost, Time: t.to.Now(), Count: n})
	clear(t.open)
	t.opened = 0
}

// event takes one event, and makes a record of a command that is answered.
func (t *Tracer) event(e tracefs.Event) {
	key := string(binary.LittleEndian.AppendUint32(nil, uint32(e.Uint("unpacked_lun")))) + string(e.Bytes("cdb"))
	if e.Format != t.complete {
		if t.opened >= maxOpen {
			t.forget(maxOpen)
		}
		t.opened++
		t.open[key] = append(t.open[key], e)
		return
	}
	waiting := t.open[key]
	if len(waiting) == 0 {
		return // it began before the trace, or its start is lost
	}
	t.opened--
	start := waiting[0]
	if len(waiting) == 1 {
		delete(t.open, key)
	} else {
		t.open[key] = waiting[1:]
	}
	r := t.record(start, e)
	t.to.Observe(&r)
}

// Task attributes of the kernel's target (TCM_SIMPLE_TAG and so on).
var taskAttrs = map[uint64]scsi.TaskAttr{0x20: scsi.Simple, 0x21: scsi.HeadOfQueue, 0x22: scsi.Ordered, 0x24: scsi.ACA}

func (t *Tracer) record(start, end tracefs.Event) trace.Record {
	r := trace.Record{
		Kind:    trace.Command,
		Missing: trace.NoQueue | trace.NoResponse | trace.NoTag,
		Time:    max(time.Duration(start.Time)-t.origin, 0),
		Latency: time.Duration(end.Time - start.Time),
		LUN:     [8]byte{0: 1},
		Attr:    taskAttrs[start.Uint("task_attribute")],
		CDB:     start.Bytes("cdb"),
		Status:  scsi.Status(end.Uint("scsi_status")),
		Sense:   end.Bytes("sense_data"),
	}
	// As Linux writes a LUN: flat space addressing (SAM-5 4.7.7.3).
	binary.BigEndian.PutUint16(r.LUN[2:], 0x4000|uint16(start.Uint("unpacked_lun")))
	r.Sense = r.Sense[:min(int(end.Uint("sense_length")), len(r.Sense))]
	if r.Status != scsi.CheckCondition {
		r.Sense = nil
	}
	// The offered length, and LIO's: it cuts the length to the data of the command.
	offered, moved := uint32(start.Uint("data_length")), uint32(end.Uint("data_length"))
	if _, dir, _ := scsi.CommandInfo(r.CDB); dir == scsi.DataOut {
		r.Out = offered
	} else {
		r.In = offered
	}
	if moved < offered {
		r.Residual = offered - moved
	}
	return r
}

// Close ends the trace. The requests of a guest that is gone are all recorded.
func (t *Tracer) Close() error {
	close(t.stop)
	<-t.done
	t.err = errors.Join(t.err, t.in.Stop())
	t.read()
	return errors.Join(t.err, t.in.Close())
}
