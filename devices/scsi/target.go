package scsi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"gvm/devices/iovec"
	"gvm/panics"
)

// Target is a SCSI target device with its logical units. Its methods may be
// called from any goroutine.
type Target struct {
	mu    sync.Mutex // held while units is replaced
	units atomic.Pointer[map[LUN]*Unit]
	wlun  *Unit
	tasks sync.Pool
}

// NewTarget returns a target without units, but with the REPORT LUNS well-known
// logical unit.
func NewTarget() *Target {
	t := &Target{wlun: &Unit{wellKnown: true, serial: "REPORT LUNS", blockSize: 1}}
	t.wlun.cfg.Vendor, t.wlun.cfg.Product, t.wlun.cfg.Revision = "GVM", "REPORT LUNS", "1"
	t.wlun.init()
	t.units.Store(&map[LUN]*Unit{})
	t.tasks.New = func() any { return &task{} }
	return t
}

// SerialError is the error of an Attach at LUN of a unit that has the serial number of the unit at
// Other.
type SerialError struct {
	LUN, Other int
	Serial     string
}

func (e *SerialError) Error() string {
	return fmt.Sprintf("scsi attach: LUN %d: LUN %d has the serial %q too", e.LUN, e.Other, e.Serial)
}

// number is a single level LUN as a number.
func (l LUN) number() int {
	n, _ := DecodeLUN(l)
	return n
}

// Attach makes u a logical unit of the target, as after a power on. Initiators that know the target
// find the unit attention REPORTED LUNS DATA HAS CHANGED on its other units. Attach fails if lun is
// taken or is not a single level LUN, and if another unit has the same serial number: initiators
// would take the two for two paths to the same storage.
func (t *Target) Attach(lun LUN, u *Unit) error {
	if _, ok := DecodeLUN(lun); !ok {
		return fmt.Errorf("scsi attach: LUN %#016x is not a single level logical unit number", uint64(lun))
	}
	lun = lun.canonical()
	t.mu.Lock()
	defer t.mu.Unlock()
	units := maps.Clone(*t.units.Load())
	if units[lun] != nil {
		return fmt.Errorf("scsi attach: LUN %d is in use", lun.number())
	}
	for at, other := range units {
		if other.serial == u.serial {
			return &SerialError{LUN: lun.number(), Other: at.number(), Serial: u.serial}
		}
	}
	u.powerOn()
	u.set.open()
	units[lun] = u
	t.swap(units, u)
	return nil
}

// Detach removes the unit at lun. Before it returns, commands in flight are aborted and answered,
// and flushes of answered commands have ended, so that the backend may be closed then.
func (t *Target) Detach(lun LUN) error { return t.detach(lun, func(*Unit) {}) }

// Remove is Detach that lets commands in flight finish until ctx ends, and aborts only the others.
// Those that come meanwhile find no unit.
func (t *Target) Remove(ctx context.Context, lun LUN) error {
	return t.detach(lun, func(u *Unit) { endsBy(ctx, u.set.drain()) })
}

// detach is Detach that calls settle between the removal and the abort.
func (t *Target) detach(lun LUN, settle func(*Unit)) error {
	lun = lun.canonical()
	u := t.take(lun)
	if u == nil {
		return fmt.Errorf("scsi detach: no unit at LUN %d", lun.number())
	}
	settle(u)
	u.set.close() // without t.mu: commands may end late, and other units come and go meanwhile
	<-u.stopSanitize()
	<-u.later.ended()
	// Copies between other units end before the backend may be closed.
	u.medium.lock(true, nil)
	defer u.medium.unlock(true)
	return nil
}

// End ends every command and every sanitize operation for good, and waits for them and for the
// flushes of answered commands until ctx ends. It returns the units that still use their backends
// then, which must not be closed.
func (t *Target) End(ctx context.Context) (busy []*Unit) {
	t.mu.Lock()
	defer t.mu.Unlock()
	waits := map[*Unit]*abortWait{}
	for _, u := range *t.units.Load() {
		waits[u] = u.set.shut()
		u.stopSanitize()
	}
	for u, w := range waits {
		if !endsBy(ctx, w.done) || !endsBy(ctx, u.stopSanitize()) || !endsBy(ctx, u.later.ended()) {
			busy = append(busy, u)
		}
	}
	return busy
}

// endsBy reports whether done is closed before ctx ends.
func endsBy(ctx context.Context, done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	case <-ctx.Done():
	}
	select { // both may be ready
	case <-done:
		return true
	default:
		return false
	}
}

// take removes the unit at lun from the target, and returns nil if there is none.
func (t *Target) take(lun LUN) *Unit {
	t.mu.Lock()
	defer t.mu.Unlock()
	units := maps.Clone(*t.units.Load())
	u := units[lun]
	if u != nil {
		delete(units, lun)
		t.swap(units, nil)
	}
	return u
}

// swap publishes units and establishes LUNsChanged on all of them but the new one.
func (t *Target) swap(units map[LUN]*Unit, added *Unit) {
	t.units.Store(&units)
	for _, u := range units {
		if u != added {
			u.set.attention(LUNsChanged, everyone)
		}
	}
}

// LUNs returns the LUNs that have a unit, in ascending order of their number.
func (t *Target) LUNs() []LUN {
	return slices.SortedFunc(maps.Keys(*t.units.Load()), func(a, b LUN) int {
		x, _ := DecodeLUN(a)
		y, _ := DecodeLUN(b)
		return x - y
	})
}

// Unit returns the unit at lun, nil if there is none.
func (t *Target) Unit(lun LUN) *Unit { return (*t.units.Load())[lun.canonical()] }

// lookup is Unit with the well-known logical unit.
func (t *Target) lookup(lun LUN) *Unit {
	if lun == ReportLUNsWLUN {
		return t.wlun
	}
	return t.Unit(lun)
}

// Submit processes c and does not wait for it. A command that needs no storage, or whose data a
// Prompt backend has in memory, is done inline, any other in a new goroutine. Submit may be called
// from several goroutines at the same time; c belongs to the target until Done is called.
func (t *Target) Submit(c *Command) {
	tk := t.tasks.Get().(*task)
	tk.Command, tk.t = c, t
	tk.Attr, tk.Nexus, tk.Tag = c.Attr, c.Nexus, c.Tag
	tk.inLen, tk.outLen = iovec.Len(c.In), iovec.Len(c.Out)
	tk.op, tk.err = lookupOpcode(tk.CDB)
	tk.u = t.lookup(tk.LUN)
	switch {
	case tk.u == nil:
		t.serve(tk)
	case t.now(tk):
	default:
		tk.u.set.join(tk) // commands join in order of arrival
		panics.Go(func() { t.serve(tk) })
	}
}

// errWait reports that the command would block; rerun it where blocking is allowed.
var errWait = errors.New("scsi: would wait")

// now serves the command if no part of it has to wait, and reports whether it did. A command that
// counts under a limit takes its place there.
func (t *Target) now(tk *task) bool {
	able := tk.op != nil && (tk.op.flags&nonBlocking != 0 || tk.u.limit != nil && tk.op.limited())
	if !able || !tk.u.set.enterNow(tk, tk.op.flags&ignoresAttention != 0) {
		return false
	}
	tk.now = true
	err := tk.run()
	tk.now = false
	if err == errWait {
		return false
	}
	t.finish(tk, tk.answer(err), true)
	return true
}

// serve runs the command and answers it.
func (t *Target) serve(tk *task) {
	r, entered := t.process(tk)
	t.finish(tk, r, entered)
}

// finish answers the command and does its remaining work.
func (t *Target) finish(tk *task, r Result, entered bool) {
	done := tk.Done
	tk.Command = nil // the caller owns it again, CDB and buffers too: a later use of it would panic
	done(r)
	if tk.flushAfter && r.Status == Good {
		tk.u.flushLater(tk.Nexus)
	}
	if entered {
		tk.u.set.leave(tk, r.Status)
	}
	clear(tk.iov)
	*tk = task{iov: tk.iov[:0]}
	t.tasks.Put(tk)
}

// process runs the command. It returns the result, and whether the command is in the task set of a
// unit.
func (t *Target) process(tk *task) (Result, bool) {
	u := tk.u
	if u == nil {
		return t.noUnit(tk), false
	}
	attention, ok := u.set.enter(tk, tk.op != nil && tk.op.flags&ignoresAttention != 0)
	if !ok {
		tk.u = nil
		return t.noUnit(tk), false
	}
	err := tk.err
	if attention != nil {
		err = attention
	}
	if err == nil {
		err = tk.run()
	}
	return tk.answer(err), true
}

// answer is result, or the result of an earlier abort.
func (tk *task) answer(err error) Result {
	if tk.u.limit != nil && !tk.charged {
		tk.u.limit.GiveBack(&tk.place)
	}
	r := tk.result(err)
	if !tk.state.CompareAndSwap(running, answering) {
		r = Result{Status: TaskAborted, Abort: tk.u.set.abortCause(tk), Residual: clampInt(tk.inLen + tk.outLen)}
	}
	return r
}

// run does the command, and repeats it from its beginning after a wait for its place under the
// limit.
func (tk *task) run() error {
	for {
		if tk.place.Turn() != nil {
			tk.await(&tk.place)
		}
		err := tk.once()
		if err != errWait {
			return err
		}
		tk.inDone, tk.outDone, tk.piDone, tk.overrun, tk.charged = 0, 0, 0, false, false
		if tk.now {
			return err
		}
	}
}

// once does the checks that all commands share, then calls the handler.
func (tk *task) once() error {
	op, u := tk.op, tk.u
	if tk.state.Load() != running {
		return TargetFailure // aborted while it waited: not done, not answered
	}
	if err := tk.acceptable(); err != nil {
		return err
	}
	if !op.exists(u) {
		return InvalidOpcode
	}
	if op.flags&medium != 0 && !tk.now {
		if !u.set.occupy(tk, u.slots) {
			return TargetFailure // likewise
		}
		defer func() { <-u.slots }()
	}
	if op.flags&medium != 0 {
		if err := u.notReady(); err != nil {
			return err
		}
	}
	if op.flags&writes != 0 {
		if err := u.writeProtected(); err != nil {
			return err
		}
	}
	switch {
	case op.flags&(medium|exclusive) == 0:
	case tk.now:
		if !u.medium.try(op.flags&exclusive != 0) {
			return errWait
		}
		defer u.medium.unlock(op.flags&exclusive != 0)
	default:
		if !tk.lockMedium(u, op.flags&exclusive != 0) {
			return TargetFailure // likewise
		}
		defer u.medium.unlock(op.flags&exclusive != 0)
		if op.flags&medium != 0 { // again: it may have been stopped or sanitized meanwhile
			if err := u.notReady(); err != nil {
				return err
			}
		}
	}
	return op.run(tk)
}

// lockMedium takes the medium of u, and returns false without it when tk is aborted.
func (tk *task) lockMedium(u *Unit, alone bool) (ok bool) {
	if u.medium.try(alone) {
		return true
	}
	tk.u.set.interruptibly(tk, func(cut <-chan struct{}) { ok = u.medium.lock(alone, cut) })
	return ok
}

// stopped implements worker: an aborted command ends between two pieces of its work.
func (tk *task) stopped() bool { return tk.state.Load() == aborted }

// acceptable checks the fields that all CDBs share.
func (tk *task) acceptable() error {
	if len(tk.CDB) < tk.op.length() {
		return InvalidFieldInIU
	}
	// NACA is bit 2 of CONTROL, the last byte (SAM-5 5.2); NORMACA is 0.
	if last := tk.op.length() - 1; tk.CDB[last]&0x04 != 0 {
		return invalidCDB(last, 2)
	}
	if tk.Attr >= ACA {
		return InvalidFieldInIU // there never is an ACA condition (SAM-5 8.6.5)
	}
	return nil
}

// result makes the answer of a command that ended with err. An error without sense data is a
// failure too.
func (tk *task) result(err error) Result {
	r := Result{Status: tk.status, Overrun: tk.overrun, ProtectionIn: clampInt(tk.piDone)}
	switch {
	case err == errReservationConflict:
		r.Status = ReservationConflict
	case err != nil:
		r.Status = CheckCondition
		s := senseOf(err)
		tk.sense = senseCode{s.Key, s.ASC, s.ASCQ}
		r.Sense = s.encode(tk.u != nil && tk.u.dSense.Load())
	}
	r.Residual = clampInt(tk.inLen - tk.inDone + tk.outLen - tk.outDone)
	return r
}

// noUnit answers a command to a LUN without a unit (SPC-5 5.9.4, SAM-5 4.7.2):
// INQUIRY with peripheral qualifier 011b, REQUEST SENSE with the sense data as
// its parameter data, REPORT LUNS at LUN 0 with the inventory, everything else
// with LOGICAL UNIT NOT SUPPORTED.
func (t *Target) noUnit(tk *task) Result {
	var err error = LUNNotSupported
	zero := tk.LUN.canonical() == 0 && len(*t.units.Load()) > 0
	answered := false
	if tk.op != nil && tk.op.flags&ignoresAttention != 0 && tk.acceptable() == nil {
		switch tk.CDB[0] {
		case opInquiry, opRequestSense:
			answered = true
		case opReportLUNs:
			answered = zero
		}
	}
	if answered {
		err = tk.op.run(tk)
	}
	r := tk.result(err)
	r.NoLUN = !(zero && answered)
	return r
}

// clampInt is n as a residual.
func clampInt(n int) uint32 { return uint32(min(n, math.MaxUint32)) }

// listLength returns the ALLOCATION LENGTH or PARAMETER LIST LENGTH of the CDB.
func (tk *task) listLength() int { return int(tk.op.list.of(tk.CDB)) }

// reply transfers data to the initiator: at most ALLOCATION LENGTH, if the CDB has one, and at most
// the size of the data-in buffer, which is another limit (SPC-5 4.2.5.6).
func (tk *task) reply(data []byte) error {
	if tk.op.list != (field{}) {
		data = data[:min(len(data), tk.listLength())]
	}
	tk.inDone = iovec.Scatter(tk.In, data)
	tk.overrun = tk.inDone < len(data)
	return nil
}

// parameters returns a copy of the n bytes of parameter list in the data-out
// buffer.
func (tk *task) parameters(n int) ([]byte, error) {
	if n > tk.outLen {
		tk.overrun = true
		return nil, InvalidFieldInIU
	}
	b := make([]byte, n)
	tk.outDone = iovec.Gather(b, tk.Out)
	return b, nil
}

// dataOut returns the n bytes of data-out in place, or an error if the initiator sent less.
func (tk *task) dataOut(n int) ([][]byte, error) {
	if n > tk.outLen {
		tk.overrun = true
		return nil, InvalidFieldInIU
	}
	tk.outDone = n
	return tk.clip(tk.Out, tk.outLen, 0, n), nil
}

// clip returns n bytes of iov, which has total, from off on. It is valid until
// the next call.
func (tk *task) clip(iov [][]byte, total, off, n int) [][]byte {
	if off == 0 && n == total {
		return iov
	}
	tk.iov = iovec.Cut(tk.iov[:0], iov, off, n)
	return tk.iov
}

// TaskResponse is the service response of a task management function (SAM-5
// 7.1).
type TaskResponse uint8

// Service responses.
const (
	FunctionComplete TaskResponse = iota
	FunctionSucceeded
	FunctionRejected
	IncorrectLUN
)

// AbortTask is ABORT TASK: it ends the command of the nexus with the tag, if it is in the task set.
// Like every function that aborts, it returns when all selected commands have been answered: those
// that it ended with Abort set in the Result, and those that were ending by themselves. No Done of
// theirs comes later. It therefore waits for I/O in flight, and must not be called from Done.
func (t *Target) AbortTask(nexus NexusID, lun LUN, tag uint64) TaskResponse {
	return t.abort(lun, AbortedByTask, tagged(nexus, tag))
}

// AbortTaskSet is ABORT TASK SET: it ends every command of the nexus.
func (t *Target) AbortTaskSet(nexus NexusID, lun LUN) TaskResponse {
	return t.abort(lun, AbortedByTask, tasksOf(nexus))
}

// ClearTaskSet is CLEAR TASK SET: it ends every command of every nexus. Other initiators that lost
// a command find COMMANDS CLEARED BY ANOTHER INITIATOR (SAM-5 5.14).
func (t *Target) ClearTaskSet(nexus NexusID, lun LUN) TaskResponse {
	u := t.lookup(lun)
	if u == nil {
		return IncorrectLUN
	}
	ended := u.set.abort(AbortedByTask, allTasks)
	u.set.attention(CommandsCleared, func(id NexusID) bool { return id != nexus && ended[id] })
	return FunctionComplete
}

func (t *Target) abort(lun LUN, cause Abort, which selection) TaskResponse {
	u := t.lookup(lun)
	if u == nil {
		return IncorrectLUN
	}
	u.set.abort(cause, which)
	return FunctionComplete
}

// LogicalUnitReset is LOGICAL UNIT RESET (SAM-5 6.3.3): it ends every command,
// brings back the default mode parameters, starts a stopped unit and leaves the
// unit attention BUS DEVICE RESET FUNCTION OCCURRED for every nexus. It releases
// RESERVE(6) and RESERVE(10), and leaves persistent reservations.
//
// A write cache that the initiator has turned off stays off: its driver may not check again, and
// would lose data that it believes to be durable.
func (t *Target) LogicalUnitReset(lun LUN) TaskResponse {
	u := t.lookup(lun)
	if u == nil {
		return IncorrectLUN
	}
	u.set.abort(AbortedByReset, allTasks)
	u.defaults()
	u.set.dropReserver(everyone)
	u.set.attention(DeviceReset, everyone)
	return FunctionComplete
}

// NexusReset is I_T NEXUS RESET (SAM-5 6.3.4): it ends every command of the
// nexus on every unit, releases its RESERVE(6) and RESERVE(10), and leaves it the
// unit attention I_T NEXUS LOSS OCCURRED.
func (t *Target) NexusReset(nexus NexusID) TaskResponse {
	for _, u := range t.all() {
		u.set.abort(AbortedByReset, tasksOf(nexus))
		u.set.dropReserver(func(id NexusID) bool { return id == nexus })
		u.set.attention(NexusLoss, func(id NexusID) bool { return id == nexus })
	}
	return FunctionComplete
}

// PowerOn is a power cycle, for a transport whose machine was reset: every command ends, every unit
// is in the state of its Attach, the write cache too, and every nexus finds POWER ON OCCURRED. Only
// reservations with APTPL stay.
func (t *Target) PowerOn() {
	for _, u := range t.all() {
		u.set.abort(AbortedByReset, allTasks)
		u.powerOn()
	}
}

// all returns every unit, the well-known one too.
func (t *Target) all() []*Unit {
	return append(slices.Collect(maps.Values(*t.units.Load())), t.wlun)
}

// QueryTask is QUERY TASK: FunctionSucceeded when the command is in the task
// set, FunctionComplete when it is not.
func (t *Target) QueryTask(nexus NexusID, lun LUN, tag uint64) TaskResponse {
	return t.query(lun, tagged(nexus, tag))
}

// QueryTaskSet is QUERY TASK SET: FunctionSucceeded when the nexus has any
// command in the task set, FunctionComplete when it has none.
func (t *Target) QueryTaskSet(nexus NexusID, lun LUN) TaskResponse {
	return t.query(lun, tasksOf(nexus))
}

func (t *Target) query(lun LUN, which selection) TaskResponse {
	u := t.lookup(lun)
	if u == nil {
		return IncorrectLUN
	}
	if u.set.has(which) {
		return FunctionSucceeded
	}
	return FunctionComplete
}
