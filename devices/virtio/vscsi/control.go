package vscsi

import (
	"encoding/binary"
	"io"

	"gvm/devices/iovec"
	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
)

// Types of control requests, and of task management functions (5.6.6.2).
const (
	tTMF         = 0
	tANQuery     = 1
	tANSubscribe = 2

	tmfAbortTask        = 0
	tmfAbortTaskSet     = 1
	tmfClearACA         = 2
	tmfClearTaskSet     = 3
	tmfITNexusReset     = 4
	tmfLogicalUnitReset = 5
	tmfQueryTask        = 6
	tmfQueryTaskSet     = 7
)

// control serves the control queue.
func (d *Device) control(w *virtio.Worker, c *virtq.Chain) error {
	var req [24]byte // type, subtype, lun, id; or type, lun, event_requested
	n, _ := io.ReadFull(&c.Out, req[:])
	if n < 4 {
		return guestErr("5.6.6.2", "control request of %d bytes", n)
	}
	out, in := 24, 1
	typ := binary.LittleEndian.Uint32(req[:])
	switch typ {
	case tTMF:
	case tANQuery, tANSubscribe:
		out, in = 16, 5
	default:
		return guestErr("5.6.6.2", "control request of type %d", typ)
	}
	if n < out || c.In.Len() < in {
		return guestErr("5.6.6.2", "control request of type %d with %d device-readable and %d device-writable bytes",
			typ, n, c.In.Len())
	}
	var resp []byte
	if typ == tTMF {
		resp = []byte{d.observed(req[8:16], trace.Record{Function: binary.LittleEndian.Uint32(req[4:]),
			Tag: binary.LittleEndian.Uint64(req[16:])})}
	} else {
		// event_actual is 0: a disk has none of the multimedia events.
		resp = make([]byte, 5)
		if _, ok := address(req[4:12]); !ok {
			resp[4] = sBadTarget
		}
	}
	iovec.Scatter(c.In.Take(in), resp)
	w.Complete(c, uint32(in))
	return nil
}

// observed calls manage, keeps the function for Inspect and tells the observer.
func (d *Device) observed(lun []byte, r trace.Record) byte {
	r.Kind, r.Missing, r.LUN = trace.TaskManagement, trace.NoQueue|trace.NoResidual, [8]byte(lun)
	answered, o := d.functions.add(r), d.cfg.Observer
	if o != nil {
		r.Time = o.Now()
	}
	r.Response = d.manage(r.Function, lun, r.Tag)
	answered(r.Response)
	if o != nil {
		r.Latency = o.Now() - r.Time
		o.Observe(&r)
	}
	return r.Response
}

// manage does a task management function and returns its response. The task that
// the function concerns may still be in a request queue, where the driver put it
// before; so it is handed to the target first. Otherwise it could run after the
// driver was told that it is gone.
func (d *Device) manage(function uint32, lunBytes []byte, id uint64) byte {
	lun, ok := address(lunBytes)
	if !ok {
		return sBadTarget
	}
	for _, w := range d.workers[requestQueue:] {
		if w == nil {
			continue
		}
		if err := w.Barrier(); err != nil {
			return sFailure
		}
	}
	t, nexus := d.cfg.Target, d.cfg.Nexus
	response := scsi.FunctionRejected // CLEAR ACA too: no unit has NORMACA
	switch function {
	case tmfAbortTask:
		response = t.AbortTask(nexus, lun, id)
	case tmfAbortTaskSet:
		response = t.AbortTaskSet(nexus, lun)
	case tmfClearTaskSet:
		response = t.ClearTaskSet(nexus, lun)
	case tmfITNexusReset:
		response = t.NexusReset(nexus)
	case tmfLogicalUnitReset:
		response = t.LogicalUnitReset(lun)
	case tmfQueryTask:
		response = t.QueryTask(nexus, lun, id)
	case tmfQueryTaskSet:
		response = t.QueryTaskSet(nexus, lun)
	}
	switch response {
	case scsi.FunctionComplete:
		return sFunctionComplete
	case scsi.FunctionSucceeded:
		return sFunctionSucceeded
	case scsi.FunctionRejected:
		return sFunctionRejected
	case scsi.IncorrectLUN:
		return sIncorrectLUN
	}
	return sFailure
}
