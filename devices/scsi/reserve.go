package scsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// errReservationConflict ends a command with the status RESERVATION CONFLICT.
var errReservationConflict = errors.New("reservation conflict")

// access is the kind of access of a command that a reservation of another nexus may refuse (SPC-5
// 5.14.1, SBC-4 4.17).
type access uint8

const (
	freeAccess  access = iota // allowed under every reservation
	readAccess                // refused by Exclusive Access
	writeAccess               // refused by every type
)

// access returns the access of the command in cdb, which is complete. Without a flag, every type
// refuses the command.
func (o *opcode) access(cdb []byte) access {
	switch {
	case o.flags&ignoresReservation != 0, o.exempt != nil && o.exempt(cdb):
		return freeAccess
	case o.flags&(writes|alwaysConflicts) != 0:
		return writeAccess
	case o.flags&medium != 0, o.data.direction() == DataIn:
		return readAccess
	}
	return writeAccess
}

// starts is START STOP UNIT with START, and no POWER CONDITION.
func starts(cdb []byte) bool { return cdb[4]&0xf1 == 0x01 }

// allows is PREVENT ALLOW MEDIUM REMOVAL with neither bit of PREVENT.
func allows(cdb []byte) bool { return cdb[4]&0x03 == 0 }

// reservationType is the TYPE of a persistent reservation (SPC-5 6.16.3.4), 0
// for none.
type reservationType byte

const (
	writeExclusive                reservationType = 0x1
	exclusiveAccess               reservationType = 0x3
	writeExclusiveRegistrantsOnly reservationType = 0x5
	exclusiveRegistrantsOnly      reservationType = 0x6
	writeExclusiveAllRegistrants  reservationType = 0x7
	exclusiveAllRegistrants       reservationType = 0x8
)

var reservationNames = [...]string{
	writeExclusive: "Write Exclusive", exclusiveAccess: "Exclusive Access",
	writeExclusiveRegistrantsOnly: "Write Exclusive, registrants only",
	exclusiveRegistrantsOnly:      "Exclusive Access, registrants only",
	writeExclusiveAllRegistrants:  "Write Exclusive, all registrants",
	exclusiveAllRegistrants:       "Exclusive Access, all registrants",
}

func (t reservationType) name() string {
	if int(t) < len(reservationNames) && reservationNames[t] != "" {
		return reservationNames[t]
	}
	return fmt.Sprintf("type %xh", byte(t))
}

// reservationTypes is the PERSISTENT RESERVATION TYPE MASK: a bit for each type.
const reservationTypes = 1<<writeExclusive | 1<<exclusiveAccess |
	1<<writeExclusiveRegistrantsOnly | 1<<exclusiveRegistrantsOnly |
	1<<writeExclusiveAllRegistrants | 1<<exclusiveAllRegistrants

func (t reservationType) valid() bool { return reservationTypes>>t&1 != 0 }

// forRegistrants reports whether every registered I_T nexus has access.
func (t reservationType) forRegistrants() bool { return t >= writeExclusiveRegistrantsOnly }

// allRegistrants reports whether every registered I_T nexus is a holder.
func (t reservationType) allRegistrants() bool { return t >= writeExclusiveAllRegistrants }

// exclusive reports whether the type keeps others from reading.
func (t reservationType) exclusive() bool {
	return t == exclusiveAccess || t == exclusiveRegistrantsOnly || t == exclusiveAllRegistrants
}

// maxRegistrations is the largest number of I_T nexuses registered with a unit.
const maxRegistrations = 1024

// registration is an I_T nexus with its reservation key, which is not 0.
type registration struct {
	nexus NexusID
	key   uint64
}

// persistent is the registrations and the persistent reservation of a unit (SPC-5 5.14). The scope
// is always the logical unit. A holder is registered, and without a registration there is no
// reservation. The array of registered never changes; a change makes a new one.
type persistent struct {
	registered []registration  // in order of registration
	kind       reservationType // of the reservation
	holder     NexusID         // of a type other than all registrants, else 0
	aptpl      bool            // kept over a loss of power
	generation uint32          // PRGENERATION
}

// key returns the reservation key of id, 0 if it is not registered.
func (p *persistent) key(id NexusID) uint64 {
	for _, r := range p.registered {
		if r.nexus == id {
			return r.key
		}
	}
	return 0
}

// holds reports whether id is a holder of the reservation.
func (p *persistent) holds(id NexusID) bool {
	if p.kind.allRegistrants() {
		return p.key(id) != 0
	}
	return p.kind != 0 && p.holder == id
}

// admits reports whether the reservation does not restrict id.
func (p *persistent) admits(id NexusID) bool {
	return p.holds(id) || p.kind.forRegistrants() && p.key(id) != 0
}

// powerLoss returns the part of p that survives a loss of power (SPC-5 5.14.5).
func (p persistent) powerLoss() persistent {
	if !p.aptpl {
		return persistent{}
	}
	p.generation = 0
	return p
}

// reserves sets the reservation.
func (p *persistent) reserves(kind reservationType, id NexusID) {
	p.kind, p.holder = kind, id
	if kind.allRegistrants() {
		p.holder = 0
	}
}

// Service actions of PERSISTENT RESERVE OUT (SPC-5 6.17.2).
const (
	prRegister        = 0x00
	prReserve         = 0x01
	prRelease         = 0x02
	prClear           = 0x03
	prPreempt         = 0x04
	prPreemptAndAbort = 0x05
	prRegisterIgnore  = 0x06
	prRegisterAndMove = 0x07
)

// reserveOut is a PERSISTENT RESERVE OUT command.
type reserveOut struct {
	action      byte
	scopeType   byte // SCOPE and TYPE
	nexus       NexusID
	key, newKey uint64 // RESERVATION KEY and SERVICE ACTION RESERVATION KEY
	aptpl       bool
	// Of REGISTER AND MOVE.
	to         NexusID
	unregister bool
	invalid    error // the error in the rest of the parameter list
}

// scope checks SCOPE and TYPE of a command that makes a reservation, and returns
// the type.
func (r reserveOut) scope() (reservationType, error) {
	if r.scopeType>>4 != 0 {
		return 0, invalidCDB(2, 7) // LU_SCOPE is the only one
	}
	if t := reservationType(r.scopeType); t.valid() {
		return t, nil
	}
	return 0, invalidCDB(2, 3)
}

// reserved is the result of a PERSISTENT RESERVE OUT command.
type reserved struct {
	persistent
	told      []notice
	preempted []NexusID // PREEMPT took their registrations
}

// notice is a unit attention condition for one I_T nexus.
type notice struct {
	nexus NexusID
	sense Sense
}

// remove takes away the registrations that gone selects, and the reservation with its holder. It
// notifies each nexus that lost one, except by.
func (o *reserved) remove(by NexusID, sense Sense, gone func(registration) bool) {
	var left []registration
	for _, r := range o.registered {
		switch {
		case !gone(r):
			left = append(left, r)
			continue
		case r.nexus != by:
			o.told = append(o.told, notice{r.nexus, sense})
		}
		o.preempted = append(o.preempted, r.nexus)
	}
	o.registered = left
	if len(left) == 0 || !o.kind.allRegistrants() && o.key(o.holder) == 0 {
		o.reserves(0, 0)
	}
}

// released notifies all registered nexuses, except by, that the restrictions of a reservation are
// gone.
func (o *reserved) released(by NexusID) {
	for _, r := range o.registered {
		if r.nexus != by {
			o.told = append(o.told, notice{r.nexus, ReservationsReleased})
		}
	}
}

// apply returns the effect of r on p, which it does not change.
func (p persistent) apply(r reserveOut) (reserved, error) {
	o := reserved{persistent: p}
	own := p.key(r.nexus)
	register := r.action == prRegister || r.action == prRegisterIgnore
	// The key is checked before the rest of the command (SPC-5 6.17.3).
	if r.action != prRegisterIgnore && r.key != own || !register && own == 0 {
		return o, errReservationConflict
	}
	if r.action != prReserve && r.action != prRelease {
		o.generation++
	}
	var err error
	switch r.action {
	case prReserve:
		err = o.reserve(r)
	case prRelease:
		err = o.release(r)
	case prClear: // SPC-5 5.14.11.2.8
		o.remove(r.nexus, ReservationsPreempted, func(registration) bool { return true })
	case prPreempt, prPreemptAndAbort:
		err = o.preempt(r)
	case prRegisterAndMove:
		err = o.move(r)
	default:
		o.aptpl = r.aptpl
		err = o.register(r.nexus, r.newKey)
	}
	return o, err
}

// register is REGISTER and REGISTER AND IGNORE EXISTING KEY (SPC-5 5.14.7,
// 5.14.11.3) of an I_T nexus.
func (o *reserved) register(id NexusID, key uint64) error {
	own := o.key(id)
	switch {
	case key == 0 && own == 0:
	case key == 0:
		kind := o.kind
		o.remove(id, Sense{}, func(g registration) bool { return g.nexus == id })
		if kind.forRegistrants() && o.kind == 0 {
			o.released(id)
		}
	case own == 0 && len(o.registered) == maxRegistrations:
		return InsufficientRegistrations
	case own == 0:
		o.registered = append(slices.Clip(o.registered), registration{id, key})
	default:
		o.registered = slices.Clone(o.registered)
		i := slices.IndexFunc(o.registered, func(g registration) bool { return g.nexus == id })
		o.registered[i].key = key
	}
	return nil
}

// move is REGISTER AND MOVE (SPC-5 5.14.8): the holder registers another I_T nexus and
// makes that the holder.
func (o *reserved) move(r reserveOut) error {
	switch {
	case !o.holds(r.nexus) || o.kind.allRegistrants():
		return errReservationConflict
	case r.newKey == 0:
		return invalidParam(8)
	case r.invalid != nil:
		return r.invalid
	case r.to == r.nexus:
		return invalidParam(24)
	}
	if err := o.register(r.to, r.newKey); err != nil {
		return err
	}
	o.reserves(o.kind, r.to)
	o.aptpl = r.aptpl
	if r.unregister {
		return o.register(r.nexus, 0)
	}
	return nil
}

// reserve is RESERVE (SPC-5 5.14.9).
func (o *reserved) reserve(r reserveOut) error {
	kind, err := r.scope()
	switch {
	case err != nil:
		return err
	case o.kind == 0:
		o.reserves(kind, r.nexus)
	case !o.holds(r.nexus) || kind != o.kind:
		return errReservationConflict
	}
	return nil
}

// release is RELEASE (SPC-5 5.14.11.2.2). It is no error if another I_T nexus holds the reservation
// or there is none.
func (o *reserved) release(r reserveOut) error {
	if !o.holds(r.nexus) {
		return nil
	}
	if r.scopeType != byte(o.kind) {
		return InvalidRelease
	}
	if o.kind.forRegistrants() {
		o.released(r.nexus)
	}
	o.reserves(0, 0)
	return nil
}

// preempt is PREEMPT and PREEMPT AND ABORT (SPC-5 5.14.11.2.4 to 5.14.11.2.7).
func (o *reserved) preempt(r reserveOut) error {
	all := o.kind.allRegistrants()
	named := func(g registration) bool { return g.key == r.newKey }
	switch {
	case r.newKey == 0 && !all:
		return invalidParam(8)
	case all && r.newKey != 0, !all && (o.kind == 0 || o.key(o.holder) != r.newKey):
		// The reservation stays: SCOPE and TYPE are ignored, and the I_T nexus
		// may take away its own registration.
		if !slices.ContainsFunc(o.registered, named) {
			return errReservationConflict
		}
		o.remove(r.nexus, RegistrationsPreempted, named)
		return nil
	}
	kind, err := r.scope()
	if err != nil {
		return err
	}
	was := o.kind
	o.remove(r.nexus, RegistrationsPreempted, func(g registration) bool {
		return g.nexus != r.nexus && (all || named(g))
	})
	o.reserves(kind, r.nexus)
	if kind != was {
		o.released(r.nexus)
	}
	return nil
}

// registerAndMove is PERSISTENT RESERVE OUT with REGISTER AND MOVE (SPC-5 6.17.4).
func registerAndMove(tk *task) error {
	const header, at = 24, 24 // of the parameter list, and where the TransportID is
	be, idLen := binary.BigEndian, len(transportID(0))
	n := tk.listLength()
	if n < header || n > header+256 {
		return ParameterListLength
	}
	b, err := tk.parameters(n)
	if err != nil {
		return err
	}
	r := reserveOut{
		action: prRegisterAndMove, nexus: tk.Nexus, key: be.Uint64(b), newKey: be.Uint64(b[8:]),
		aptpl: b[17]&0x01 != 0, unregister: b[17]&0x02 != 0,
	}
	switch {
	case int(be.Uint32(b[20:])) != n-header:
		return ParameterListLength
	case r.aptpl && tk.u.cfg.Reservations == nil:
		r.invalid = invalidParam(17)
	case be.Uint16(b[18:]) != relativePort:
		r.invalid = invalidParam(18)
	case n != header+idLen:
		r.invalid = invalidParam(at)
	default:
		if r.to = NexusID(be.Uint64(b[at+4:])); !bytes.Equal(b[at:], transportID(r.to)) {
			r.invalid = invalidParam(at)
		}
	}
	return tk.u.set.reserveOut(tk, r)
}

// persistentReserveOut is PERSISTENT RESERVE OUT (SPC-5 6.17).
func persistentReserveOut(tk *task) error {
	const listLen = 24
	be := binary.BigEndian
	n := tk.listLength()
	if n < listLen {
		return ParameterListLength
	}
	b, err := tk.parameters(listLen)
	if err != nil {
		return err
	}
	r := reserveOut{
		action: tk.op.action(), scopeType: tk.CDB[2],
		nexus: tk.Nexus, key: be.Uint64(b), newKey: be.Uint64(b[8:]),
	}
	r.aptpl = b[20]&0x01 != 0 && (r.action == prRegister || r.action == prRegisterIgnore)
	switch {
	case b[20]&0x08 != 0: // SPEC_I_PT
		return invalidParam(20)
	case n != listLen:
		return ParameterListLength
	case r.aptpl && tk.u.cfg.Reservations == nil:
		return invalidParam(20)
	}
	// ALL_TG_PT has no effect: there is one target port.
	return tk.u.set.reserveOut(tk, r)
}

// reserveOut does r for tk. It first saves the new state to survive a loss of power. The state then
// takes effect at one point in the order of all commands, together with the unit attention
// conditions and the aborts of PREEMPT AND ABORT. When PREEMPT AND ABORT returns, no command of a
// preempted I_T nexus is under way on the unit, nor a copy by another unit's command.
func (s *taskSet) reserveOut(tk *task, r reserveOut) error {
	s.prOut.Lock()
	s.mu.Lock()
	now, legacy := s.pr, s.reserver != nil
	s.mu.Unlock()
	o, err := now.apply(r)
	switch {
	case tk.state.Load() != running:
		// Aborted, perhaps by another PREEMPT AND ABORT: it must not change anything after that.
		err = TargetFailure
	case legacy:
		err = errReservationConflict
	case err == nil:
		err = s.keep(tk.u, now, o.persistent)
	}
	if err != nil {
		s.prOut.Unlock()
		return err
	}
	s.mu.Lock()
	s.pr = o.persistent
	for _, n := range o.told {
		s.tell(n.nexus, n.sense)
	}
	var w *abortWait
	if r.action == prPreemptAndAbort && len(o.preempted) > 0 {
		var ended map[NexusID]bool
		w, ended = s.end(AbortedByTask, every(func(other *task) bool {
			return other != tk && slices.Contains(o.preempted, other.Nexus)
		}))
		for id := range ended {
			if id != r.nexus {
				s.tell(id, CommandsCleared)
			}
		}
	}
	// The wait below cannot deadlock: this command holds no lock that the awaited commands need,
	// and is not among them. They were in the set before this change, and an aborted command makes
	// no change of its own.
	s.prOut.Unlock()
	s.mu.Unlock()
	if w != nil {
		s.interruptibly(tk, func(cut <-chan struct{}) {
			select {
			case <-w.done:
			case <-cut:
			}
		})
		if tk.lockMedium(tk.u, true) {
			tk.u.medium.unlock(true)
		}
	}
	return nil
}

// keep saves the part of next that survives a loss of power, if it differs from the kept state. The
// caller holds prOut.
func (s *taskSet) keep(u *Unit, now, next persistent) error {
	k := u.cfg.Reservations
	was, will := now.kept(), next.kept()
	if k == nil || !s.unsure && string(was) == string(will) {
		return nil
	}
	err := k.Save(will)
	s.unsure = err != nil
	if err != nil {
		err = fmt.Errorf("save persistent reservations: %w", err)
		if u.cfg.OnError != nil {
			u.cfg.OnError(err)
		}
	}
	return err
}

// refuses reports whether a reservation of another nexus refuses a to id. The caller holds mu.
func (s *taskSet) refuses(id NexusID, a access) bool {
	if s.reserver != nil {
		return *s.reserver != id && a != freeAccess
	}
	return s.pr.kind != 0 && a != freeAccess && !s.pr.admits(id) && (a == writeAccess || s.pr.kind.exclusive())
}

// conflicts reports whether tk ends with RESERVATION CONFLICT. A command with an error in the
// fields that all commands share does not. The caller holds mu.
func (s *taskSet) conflicts(tk *task) bool {
	if s.reserver == nil && s.pr.kind == 0 || tk.op == nil || tk.acceptable() != nil || !tk.op.exists(tk.u) {
		return false
	}
	a := tk.op.access(tk.CDB)
	if s.reserver != nil && tk.op.flags&conflictsWithReserve != 0 {
		a = readAccess
	}
	return s.refuses(tk.Nexus, a)
}

// refusesCopy is refuses for a unit that a command of another unit accesses.
func (s *taskSet) refusesCopy(id NexusID, a access) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refuses(id, a)
}

// reserveUnit is RESERVE(6), RESERVE(10), RELEASE(6) and RELEASE(10) (SPC-2 7.18 to 7.22), with the
// exceptions of compatible reservation handling (SPC-5 5.14.3): they succeed, and do nothing, for a
// nexus that a persistent reservation does not restrict.
func reserveUnit(tk *task) error {
	switch cdb := tk.CDB; {
	case cdb[1]&0x10 != 0:
		return invalidCDB(1, 4) // 3RDPTY: there is no initiator to name
	case cdb[1]&0x01 != 0:
		return invalidCDB(1, 0) // EXTENT
	}
	s, id := &tk.u.set, tk.Nexus
	s.prOut.Lock()
	defer s.prOut.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	ours := s.reserver == nil || *s.reserver == id
	switch {
	case s.pr.admits(id):
	case len(s.pr.registered) > 0: // SPC-2 5.5.1
		return errReservationConflict
	case tk.CDB[0] == opRelease6 || tk.CDB[0] == opRelease10:
		if ours {
			s.reserver = nil
		}
	case !ours:
		return errReservationConflict
	default:
		s.reserver = &id
	}
	return nil
}

// dropReserver ends the reservation of RESERVE(6) or RESERVE(10) if selected reports true for the
// I_T nexus that has it.
func (s *taskSet) dropReserver(selected func(NexusID) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserver != nil && selected(*s.reserver) {
		s.reserver = nil
	}
}

// reserveIn returns the state for PERSISTENT RESERVE IN, which RESERVE(6) and
// RESERVE(10) exclude (SPC-2 5.5.1).
func (s *taskSet) reserveIn() (persistent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserver != nil {
		return persistent{}, errReservationConflict
	}
	return s.pr, nil
}

// replyReservations answers PERSISTENT RESERVE IN with PRGENERATION, ADDITIONAL
// LENGTH and the data.
func (tk *task) replyReservations(p persistent, data []byte) error {
	b := binary.BigEndian.AppendUint32(nil, p.generation)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return tk.reply(append(b, data...))
}

// readKeys is PERSISTENT RESERVE IN with READ KEYS (SPC-5 6.16.2).
func readKeys(tk *task) error {
	p, err := tk.u.set.reserveIn()
	if err != nil {
		return err
	}
	var b []byte
	for _, r := range p.registered {
		b = binary.BigEndian.AppendUint64(b, r.key)
	}
	return tk.replyReservations(p, b)
}

// readReservation is PERSISTENT RESERVE IN with READ RESERVATION (SPC-5 6.16.3).
func readReservation(tk *task) error {
	p, err := tk.u.set.reserveIn()
	if err != nil {
		return err
	}
	var b []byte
	if p.kind != 0 {
		b = make([]byte, 16)
		if !p.kind.allRegistrants() {
			binary.BigEndian.PutUint64(b, p.key(p.holder))
		}
		b[13] = byte(p.kind)
	}
	return tk.replyReservations(p, b)
}

// reportCapabilities is PERSISTENT RESERVE IN with REPORT CAPABILITIES (SPC-5
// 6.16.4).
func reportCapabilities(tk *task) error {
	p, err := tk.u.set.reserveIn()
	if err != nil {
		return err
	}
	// CRH, ATP_C; TMV, ALLOW COMMANDS 011b: TEST UNIT READY goes through every
	// type, MODE SENSE and others that only read through Write Exclusive.
	b := []byte{0, 8, 0x10 | 0x04, 0x80 | 0x30, reservationTypes & 0xff, reservationTypes >> 8, 0, 0}
	if tk.u.cfg.Reservations != nil {
		b[2] |= 0x01 // PTPL_C
	}
	if p.aptpl {
		b[3] |= 0x01 // PTPL_A
	}
	return tk.reply(b)
}

// readFullStatus is PERSISTENT RESERVE IN with READ FULL STATUS (SPC-5 6.16.5).
func readFullStatus(tk *task) error {
	p, err := tk.u.set.reserveIn()
	if err != nil {
		return err
	}
	var b []byte
	for _, r := range p.registered {
		d := make([]byte, 24)
		binary.BigEndian.PutUint64(d, r.key)
		if p.holds(r.nexus) {
			d[12] = 0x01 // R_HOLDER
			d[13] = byte(p.kind)
		}
		id := transportID(r.nexus)
		d[19] = relativePort
		binary.BigEndian.PutUint32(d[20:], uint32(len(id)))
		b = append(append(b, d...), id...)
	}
	return tk.replyReservations(p, b)
}

// relativePort is the RELATIVE TARGET PORT IDENTIFIER of the only port.
const relativePort = 1

// transportID is a TransportID for an I_T nexus: that of a SAS initiator port (SPC-5 7.6.4.8) with
// a locally assigned address (NAA 3h) that is the number of the nexus. virtio-scsi has no format of
// its own.
func transportID(id NexusID) []byte {
	b := make([]byte, 24)
	b[0] = 0x06
	binary.BigEndian.PutUint64(b[4:], 3<<60|uint64(id))
	return b
}
