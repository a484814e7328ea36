// Package scsi is a SCSI target: command descriptor blocks in; status, sense
// and data out (SAM-5, SPC-5, SBC-4). It knows no transport, no ring and no
// guest memory.
//
// # Parts
//
// A Target has logical units, each a Unit at a LUN. A Unit is a disk over a
// Backend, which is any storage that can be read, written and flushed; package
// backend has files, block devices and memory. A transport, such as virtio-scsi,
// makes a Command of what its initiator sends, with the buffers as they lie, and
// hands it to Target.Submit:
//
//	t := scsi.NewTarget()
//	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: b, Serial: "disk-1"})
//	…
//	err = t.Attach(0, u)
//	…
//	t.Submit(&scsi.Command{CDB: cdb, In: buffers, Done: func(r scsi.Result) {
//		// r.Status, r.Sense and r.Residual go back to the initiator
//	}})
//
// # How a command ends
//
// Done is called exactly once. CHECK CONDITION always comes with sense data,
// in fixed format unless the initiator has set D_SENSE. A failure of the
// Backend is never GOOD: see Sense for what becomes of it. The initiator's
// ALLOCATION LENGTH and the size of its buffer are two limits; Residual counts
// against the buffer, and Overrun tells that the buffer was the smaller one.
//
// The first command of an I_T nexus that is not INQUIRY, REPORT LUNS or REQUEST
// SENSE ends with the unit attention POWER ON OCCURRED, as with any disk;
// initiators repeat it.
//
// A command with IMMED is answered first and done then; when that fails, the
// initiator's next command ends with the sense data, as a deferred error.
//
// # What is durable when
//
// CacheMode is the promise. With WriteBack, data is on stable storage when
// SYNCHRONIZE CACHE or a write with FUA is answered GOOD; a read with FUA comes
// from the medium, so that pending writes are flushed before it. When the
// initiator turns WCE off by MODE SELECT, what was written is flushed and every
// later write is durable when it is answered. WriteThrough is always so. Unsafe
// promises nothing.
//
// # At the same time
//
// Submit may be called from many goroutines and waits for nothing: a command goes on in a
// goroutine of its own unless all of it can be done at once, such as a read of what a
// Prompt backend has in memory. Commands of the attribute SIMPLE run beside each other in any order, as QUEUE ALGORITHM
// MODIFIER of the control mode page says; ORDERED and HEAD OF QUEUE are obeyed.
// COMPARE AND WRITE and ORWRITE are atomic against everything else. The task management
// functions (AbortTask and the rest) return when whatever they aborted has been
// answered.
//
// # Reservations
//
// Persistent reservations, and RESERVE and RELEASE, are kept for each I_T nexus
// (Command.Nexus), and a command that one of them keeps out ends with RESERVATION
// CONFLICT. A reservation takes effect at one point in the order of commands: what
// was let in before it goes on, unless PREEMPT AND ABORT ends it. With a
// ReservationKeeper, registrations with APTPL are there after a loss of power.
//
// # Protection information
//
// A unit with a Protection has type 1 (SBC-4 4.21). The tuples of a command are in buffers of their
// own (Command.ProtectionOut and ProtectionIn); without them the unit does what a host bus adapter
// would. What is checked is what is stored.
//
// # Failures and limits
//
// UnitConfig.OnError hears of every failure of the Backend, and Retry may have the unit do it again
// once somebody has seen to it. A unit with a Limit makes commands wait, in goroutines
// of their own, so that no other unit waits with them.
//
// # Adding a command
//
// A command is a row in the table of opcode.go and a handler, a func(*task)
// error that returns a Sense, or any other error, to fail. The row says where
// address and lengths stand in the CDB, what data the command has, and what may
// refuse it. Dispatch, handlers, limits, reservations, traces and REPORT
// SUPPORTED OPERATION CODES all read the row (see AddCommand in the tests).
package scsi
