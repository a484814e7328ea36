// Package scsi is a SCSI target: command descriptor blocks in; status, sense
// and data out (SAM-5, SPC-5, SBC-4). It knows no transport, no ring and no
// guest memory.
//
// # Parts
//
// A Target has logical units, each a Unit at a LUN. A Unit is a disk over a block.Backend, which is
// any storage that can be read, written and flushed; package block has files, block devices and
// memory. A transport, such as virtio-scsi, makes a Command of its initiator's request, with the
// buffers as they are, and hands it to Target.Submit:
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
// Done is called exactly once. CHECK CONDITION always comes with sense data, in fixed format unless
// the initiator has set D_SENSE. A failure of the Backend is never GOOD; it becomes Sense. The
// initiator's ALLOCATION LENGTH and the size of its buffer are two limits; Residual counts against
// the buffer, and Overrun reports that the buffer was the smaller one.
//
// The first command of an I_T nexus that is not INQUIRY, REPORT LUNS or REQUEST
// SENSE ends with the unit attention POWER ON OCCURRED, as with any disk;
// initiators repeat it.
//
// A command with IMMED is answered before it is done. If it then fails, the initiator's next
// command ends with the sense data, as a deferred error.
//
// # Durability
//
// CacheMode is the promise. With WriteBack, data is on stable storage when SYNCHRONIZE CACHE or a
// write with FUA is answered GOOD; a read with FUA comes from the medium, so that pending writes
// are flushed before it. When the initiator turns WCE off by MODE SELECT, all written data is
// flushed and every later write is durable when it is answered. WriteThrough always behaves so.
// Unsafe promises nothing.
//
// # Concurrency
//
// Submit may be called from many goroutines and does not block: it serves a command at once if it
// can, such as a read that a block.Prompt has in memory, and else in a new goroutine. Commands
// with the attribute SIMPLE run concurrently in any order, as QUEUE ALGORITHM MODIFIER of the
// control mode page says; ORDERED and HEAD OF QUEUE are obeyed. COMPARE AND WRITE and ORWRITE are
// atomic against everything else. The task management functions (AbortTask and the rest) return
// when all commands that they aborted have been answered.
//
// # Reservations
//
// Persistent reservations, and RESERVE and RELEASE, are kept for each I_T nexus (Command.Nexus). A
// command that a reservation excludes ends with RESERVATION CONFLICT. A reservation takes effect at
// one point in the order of commands: earlier commands go on, unless PREEMPT AND ABORT ends them.
// With a ReservationKeeper, registrations with APTPL survive a loss of power.
//
// # Protection information
//
// A unit with a Protection has type 1 (SBC-4 4.21). The tuples of a command are in buffers of their
// own (Command.ProtectionOut and ProtectionIn); without them the unit generates or checks and drops
// them, as a host bus adapter does. The unit stores the data that it checked.
//
// # Failures and limits
//
// UnitConfig.OnError gets every failure of the Backend, and Retry may have the unit repeat the
// operation once the cause is removed. A unit with a Limit makes commands wait in goroutines of
// their own, so that other units do not wait.
//
// # Adding a command
//
// A command is a row in the table of opcode.go and a handler, a func(*task) error that returns a
// Sense, or any other error, to fail. The row gives the places of address and lengths in the CDB,
// the kind of data, and the conditions that refuse the command. Dispatch, handlers, limits,
// reservations, traces and REPORT SUPPORTED OPERATION CODES all read the row (see AddCommand in the
// tests).
package scsi
