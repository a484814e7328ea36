package vscsi

import (
	"encoding/binary"
	"io"
	"slices"

	"gvm/devices/iovec"
	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
)

// struct virtio_scsi_req_cmd and virtio_scsi_req_cmd_pi (5.6.6.1): what surrounds
// the CDB and the sense data.
const (
	idOff       = 8
	taskAttrOff = 16
	cdbOff      = 19
	piOff       = 19 // with VIRTIO_SCSI_F_T10_PI: pi_bytesout and pi_bytesin, before the CDB
	piLen       = 8
	respLen     = 12 // sense_len, residual, status_qualifier, status, response
)

// maxPayload bounds the parameter lists that the observer gets: a length in a
// CDB of 10 bytes has no more bits.
const maxPayload = 64 << 10

// maxProtection bounds the output of fillProtection: the tuples of the largest transfer.
const maxProtection = 65536 * scsi.TupleSize

// promptRead bounds the read of cached data, in bytes, that may delay the interrupt for
// requests completed before: some microseconds.
const promptRead = 64 << 10

// Response codes (5.6.6.1, 5.6.6.2).
const (
	sOK                = 0
	sOverrun           = 1
	sAborted           = 2
	sBadTarget         = 3
	sReset             = 4
	sFailure           = 9
	sFunctionComplete  = 0
	sFunctionSucceeded = 10
	sFunctionRejected  = 11
	sIncorrectLUN      = 12
)

// request is the state of one request. It lives in a chain's User and is used
// again with the chain.
type request struct {
	w    *virtio.Worker
	c    *virtq.Chain
	cmd  scsi.Command
	hdr  [piOff + piLen + maxCDBSize]byte
	resp [respLen + maxSenseSize]byte
	// The response part of the chain: header and sense_size bytes.
	to      [][]byte
	toLen   int
	piIn    int // bytes of protection information before data-in
	dataLen int // bytes of data-in or data-out, without protection information

	observer Observer
	rec      trace.Record // for the observer, if there is one
}

// request serves request queue q. It parses the request into a command, all of
// it copied but for the data, and submits that.
func (d *Device) request(q uint16, w *virtio.Worker, c *virtq.Chain) error {
	r, _ := c.User.(*request)
	if r == nil {
		r = &request{observer: d.cfg.Observer}
		r.cmd.Done = r.done
		c.User = r
	}
	cdbSize, senseSize := int(d.cdbSize.Load()), int(d.senseSize.Load())
	cdbAt := cdbOff
	if d.protection {
		cdbAt = piOff + piLen
	}
	hdr := r.hdr[:cdbAt+cdbSize]
	if _, err := io.ReadFull(&c.Out, hdr); err != nil {
		return guestErr("5.6.6.1", "request with less than %d device-readable bytes", len(hdr))
	}
	r.toLen = respLen + senseSize
	if c.In.Len() < r.toLen {
		return guestErr("5.6.6.1", "request with %d device-writable bytes, not %d", c.In.Len(), r.toLen)
	}
	r.w, r.c = w, c
	r.to = c.In.Take(r.toLen)
	r.cmd.CDB, r.piIn = hdr[cdbAt:], 0
	if d.protection {
		out, in := binary.LittleEndian.Uint32(hdr[piOff:]), binary.LittleEndian.Uint32(hdr[piOff+4:])
		if uint64(out) > uint64(c.Out.Len()) || uint64(in) > uint64(c.In.Len()) {
			return guestErr("5.6.6.1", "request with %d and %d bytes of protection information in buffers of %d and %d",
				out, in, c.Out.Len(), c.In.Len())
		}
		r.cmd.ProtectionOut, r.cmd.ProtectionIn = c.Out.Take(int(out)), c.In.Take(int(in))
		r.piIn = int(in)
	}
	outLen, inLen := c.Out.Len(), c.In.Len()
	r.dataLen = outLen + inLen
	if r.observer != nil {
		r.begin(q, hdr, outLen, inLen)
	}

	lun, ok := address(hdr[:8])
	if !ok {
		r.answer(sBadTarget, scsi.Result{Residual: uint32(r.dataLen)})
		return nil
	}
	if outLen > 0 && inLen > 0 { // VIRTIO_SCSI_F_INOUT is not offered
		r.answer(sFailure, scsi.Result{Residual: uint32(r.dataLen)})
		return nil
	}
	attr := scsi.TaskAttr(hdr[taskAttrOff])
	if attr > scsi.ACA {
		attr = scsi.Simple
	}
	r.cmd.LUN = lun
	r.cmd.Attr = attr
	r.cmd.Tag = binary.LittleEndian.Uint64(hdr[idOff:])
	r.cmd.Nexus = d.cfg.Nexus
	r.cmd.Taken = w.Clock()
	r.cmd.Out = c.Out.Take(outLen)
	r.cmd.In = c.In.Take(inLen)
	if r.observer != nil && outLen > 0 && outLen <= maxPayload && scsi.ParameterList(r.cmd.CDB) {
		r.rec.Payload = slices.Concat(r.cmd.Out...)
	}
	if outLen > 0 || inLen > promptRead {
		w.Interrupt() // a write may wait after all
	}
	d.cfg.Target.Submit(&r.cmd)
	return nil
}

// done is the command's Done: the one way from a result to a response code.
func (r *request) done(res scsi.Result) {
	code := byte(sFailure)
	switch {
	case res.Abort == scsi.AbortedByTask:
		code = sAborted
	case res.Abort == scsi.AbortedByReset:
		code = sReset
	case res.Overrun:
		code = sOverrun
	case res.Abort == scsi.NotAborted:
		// Also for a LUN without a unit: initiators that scan look for its
		// status and sense data.
		code = sOK
	}
	r.answer(code, res)
}

// answer writes the response and gives the chain back. The used length is the bytes written from
// the beginning of the device-writable part, without a gap (virtio 1.3, 2.7.8.2; TestUsedLength).
// The sense area and that of protection information are written to their ends, so that it
// covers the data behind them.
func (r *request) answer(code byte, res scsi.Result) {
	resp := r.resp[:r.toLen]
	senseLen := copy(resp[respLen:], res.Sense)
	clear(resp[respLen+senseLen:])
	binary.LittleEndian.PutUint32(resp, uint32(senseLen))
	binary.LittleEndian.PutUint32(resp[4:], res.Residual)
	binary.LittleEndian.PutUint16(resp[8:], 0) // status_qualifier
	resp[10] = byte(res.Status)
	resp[11] = code
	iovec.Scatter(r.to, resp)

	written := r.toLen
	if len(r.cmd.In) > 0 {
		if moved := r.dataLen - int(res.Residual); moved > 0 {
			written += int(res.ProtectionIn)
			if r.fillProtection(int(res.ProtectionIn)) {
				written += r.piIn - int(res.ProtectionIn) + moved
			}
		}
	}
	if r.observer != nil {
		r.end(code, &res)
	}
	// Nothing in guest memory is kept past the request.
	r.to, r.cmd.Out, r.cmd.In, r.cmd.ProtectionOut, r.cmd.ProtectionIn = nil, nil, nil, nil, nil
	r.w.Complete(r.c, uint32(written))
}

// fillProtection writes the rest of pi_in, after done bytes, with the tuples that
// are not checked (SBC-4 4.21.3). It returns false where that is more than any command can have.
func (r *request) fillProtection(done int) bool {
	if r.piIn-done > maxProtection {
		return false
	}
	for _, p := range r.cmd.ProtectionIn {
		skip := min(done, len(p))
		done -= skip
		for i := range p[skip:] {
			p[skip+i] = 0xff
		}
	}
	return true
}

// begin records the request.
func (r *request) begin(q uint16, hdr []byte, outLen, inLen int) {
	r.rec = trace.Record{
		Kind:  trace.Command,
		Queue: q,
		LUN:   [8]byte(hdr),
		Tag:   binary.LittleEndian.Uint64(hdr[idOff:]),
		Attr:  scsi.TaskAttr(hdr[taskAttrOff]),
		CDB:   r.cmd.CDB,
		Out:   uint32(outLen),
		In:    uint32(inLen),
		Time:  r.observer.Now(),
	}
}

// end records the answer, and hands the record to the observer.
func (r *request) end(code byte, res *scsi.Result) {
	r.rec.Latency = r.observer.Now() - r.rec.Time
	r.rec.Response, r.rec.Status, r.rec.Residual = code, res.Status, res.Residual
	r.rec.Sense = r.resp[respLen : respLen+min(len(res.Sense), r.toLen-respLen)] // as much as the driver gets
	r.observer.Observe(&r.rec)
	r.rec.Payload = nil // up to maxPayload of each chain of the queue
}
