package scsi

import (
	"slices"
	"sync"
	"sync/atomic"
)

// States of a task. The step out of running decides whether the initiator gets
// the command's status or an abort: it is taken once, by the command or by a
// task management function.
const (
	running int32 = iota
	answering
	aborted
)

// task is a command inside the target.
type task struct {
	*Command
	// Of the command, for after Done, when it is the caller's again.
	Attr  TaskAttr
	Nexus NexusID
	Tag   uint64

	t   *Target
	u   *Unit
	op  *opcode
	err error // of the lookup of op
	now bool  // it must not wait

	place   ticket // under the limit of u
	charged bool   // the limit counts the command, as it has begun

	status        Status // what a command without error ends with
	inLen, outLen int    // sizes of the buffers
	inDone        int    // bytes transferred
	outDone       int
	overrun       bool
	iov           [][]byte     // reused by clip
	after         func() error // what is left to do once the command has been answered, nil: nothing

	state atomic.Int32

	// Guarded by set.mu.
	joined     bool // it is in the set
	prev, next *task
	cause      Abort
	waiters    []*abortWait
	cut        chan struct{} // closed to end a wait; nil: it does not wait
}

// abortWait is a task management function that waits for the tasks it aborted.
type abortWait struct{ left int }

// taskSet holds the commands of one unit that were submitted and not yet
// answered, in order of arrival (SAM-5 8), and what it keeps for each I_T nexus.
type taskSet struct {
	mu      sync.Mutex
	changed *sync.Cond // a task left, or was aborted
	first   *task
	last    *task
	ordered int // tasks with the attribute ORDERED
	head    int // tasks with the attribute HEAD OF QUEUE
	waiting int // callers inside changed.Wait
	closed  bool
	nexuses map[NexusID]*nexus

	// What is reserved: a persistent reservation, or else the I_T nexus of
	// RESERVE(6) or RESERVE(10). It changes with both prOut and mu held. A
	// command is checked against it under mu, when its attribute lets it run:
	// each change has either happened for it or not, and what was let in before
	// one is not stopped by it, unless it is aborted (SPC-5 5.14.1).
	pr       persistent
	reserver *NexusID

	// prOut is held from the reading of what is reserved to its change, while
	// it is saved too. It is taken before mu.
	prOut  sync.Mutex
	unsure bool // the last save failed: what is kept is not known; guarded by prOut
}

// nexus is what a unit remembers of one initiator: unit attention conditions
// not yet reported, oldest first, and results of its EXTENDED COPY commands.
// Deferred errors are among the former: they too end the next command.
type nexus struct {
	attention []Sense
	copies    []copyResult
}

func (s *taskSet) init() {
	s.changed = sync.NewCond(&s.mu)
	s.nexuses = map[NexusID]*nexus{}
}

// nexus returns the state for id. An initiator that the unit has not seen finds
// POWER ON OCCURRED. The caller holds mu.
func (s *taskSet) nexus(id NexusID) *nexus {
	n := s.nexuses[id]
	if n == nil {
		n = &nexus{attention: []Sense{PowerOnOccurred}}
		s.nexuses[id] = n
	}
	return n
}

// join puts tk at the end of the set, and returns false when the unit has been
// detached. For a task that is there already nothing changes.
func (s *taskSet) join(tk *task) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.add(tk)
}

// add is join. The caller holds mu.
func (s *taskSet) add(tk *task) bool {
	if s.closed || tk.joined {
		return tk.joined
	}
	tk.joined = true
	tk.prev, tk.next = s.last, nil
	if s.last == nil {
		s.first = tk
	} else {
		s.last.next = tk
	}
	s.last = tk
	switch tk.Attr {
	case Ordered:
		s.ordered++
	case HeadOfQueue:
		s.head++
	}
	return true
}

// enter is join that returns when the attribute of tk lets it run (SAM-5 8.6). It
// reports the oldest unit attention condition unless the command is exempt, a
// conflict with a reservation, and false when the unit has been detached. A conflict
// comes before every unit attention condition but that of a reset (SAM-5 5.3.3).
func (s *taskSet) enter(tk *task, exempt bool) (err error, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.add(tk) {
		return nil, false
	}
	for tk.state.Load() == running && s.blocked(tk) {
		s.wait()
	}
	n := s.nexus(tk.Nexus)
	if tk.state.Load() != running {
		return nil, true
	}
	first := 0
	if s.conflicts(tk) {
		if first = slices.IndexFunc(n.attention, Sense.ofReset); first < 0 {
			return errReservationConflict, true
		}
	}
	if len(n.attention) > 0 && !exempt {
		err = n.attention[first]
		n.attention = slices.Delete(n.attention, first, first+1)
	}
	return err, true
}

// enterNow is enter for a task that must not wait, and has nothing to report: else it
// returns false, with the task in the set if the unit is attached.
func (s *taskSet) enterNow(tk *task, exempt bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.add(tk) || s.blocked(tk) {
		return false
	}
	n := s.nexus(tk.Nexus) // known from now on, whatever the command
	return (exempt || len(n.attention) == 0) && !s.conflicts(tk)
}

// blocked says whether tk must wait: SIMPLE for HEAD OF QUEUE and for older
// ORDERED tasks, ORDERED for HEAD OF QUEUE and for every older task, HEAD OF
// QUEUE for none. The caller holds mu.
func (s *taskSet) blocked(tk *task) bool {
	switch {
	case tk.Attr == HeadOfQueue:
		return false
	case s.head > 0:
		return true
	case tk.Attr == Ordered:
		return tk.prev != nil
	case s.ordered == 0:
		return false
	}
	for p := tk.prev; p != nil; p = p.prev {
		if p.Attr == Ordered {
			return true
		}
	}
	return false
}

// occupy takes one of slots, and says whether it has: it gives up when tk is aborted.
func (s *taskSet) occupy(tk *task, slots chan<- struct{}) (ok bool) {
	select {
	case slots <- struct{}{}:
		return true
	default:
	}
	s.interruptibly(tk, func(cut <-chan struct{}) {
		select {
		case slots <- struct{}{}:
			ok = true
		case <-cut:
		}
	})
	return ok
}

// interruptibly calls wait with a channel that is closed when tk is aborted, unless
// that has happened.
func (s *taskSet) interruptibly(tk *task, wait func(cut <-chan struct{})) {
	cut := make(chan struct{})
	s.mu.Lock()
	if tk.state.Load() != running {
		s.mu.Unlock()
		return
	}
	tk.cut = cut
	s.mu.Unlock()
	wait(cut)
	s.mu.Lock()
	tk.cut = nil
	s.mu.Unlock()
}

// wait is changed.Wait. The caller holds mu.
func (s *taskSet) wait() {
	s.waiting++
	s.changed.Wait()
	s.waiting--
}

// abortCause returns what ended tk, whose state is aborted.
func (s *taskSet) abortCause(tk *task) Abort {
	s.mu.Lock()
	defer s.mu.Unlock()
	return tk.cause
}

// leave takes tk out of the set, after Done has returned.
func (s *taskSet) leave(tk *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if tk.prev == nil {
		s.first = tk.next
	} else {
		tk.prev.next = tk.next
	}
	if tk.next == nil {
		s.last = tk.prev
	} else {
		tk.next.prev = tk.prev
	}
	switch tk.Attr {
	case Ordered:
		s.ordered--
	case HeadOfQueue:
		s.head--
	}
	for _, w := range tk.waiters {
		w.left--
	}
	if s.waiting > 0 {
		s.changed.Broadcast()
	}
}

// abort ends every task that match selects and returns when the last of them
// has been answered: what was being answered already is waited for too, so that
// no answer comes after abort has returned. It returns whose tasks it ended.
func (s *taskSet) abort(cause Abort, match func(*task) bool) []NexusID {
	s.mu.Lock()
	defer s.mu.Unlock()
	w, ended := s.end(cause, match)
	s.await(w)
	return ended
}

// end is the first half of abort: it ends the tasks, which await waits for. The
// caller holds mu.
func (s *taskSet) end(cause Abort, match func(*task) bool) (w *abortWait, ended []NexusID) {
	w = &abortWait{}
	for tk := s.first; tk != nil; tk = tk.next {
		if !match(tk) {
			continue
		}
		if tk.state.CompareAndSwap(running, aborted) {
			tk.cause = cause
			ended = append(ended, tk.Nexus)
			if tk.cut != nil {
				close(tk.cut)
			}
		}
		w.left++
		tk.waiters = append(tk.waiters, w)
	}
	if w.left > 0 {
		s.changed.Broadcast()
	}
	return w, ended
}

// await returns when the tasks of w have been answered. The caller holds mu.
func (s *taskSet) await(w *abortWait) {
	for w.left > 0 {
		s.wait()
	}
}

// attention establishes a unit attention condition for the known initiators
// that whom selects. One that is pending already is not repeated, and one that
// tells of a reset replaces all others (SAM-5 5.14).
func (s *taskSet) attention(sense Sense, whom func(NexusID) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, n := range s.nexuses {
		if whom(id) {
			n.add(sense)
		}
	}
}

// tell establishes a unit attention condition for one initiator. One that the
// unit has not seen finds POWER ON OCCURRED. The caller holds mu.
func (s *taskSet) tell(id NexusID, sense Sense) {
	if n := s.nexuses[id]; n != nil {
		n.add(sense)
	}
}

// everyone is attention's choice of all initiators.
func everyone(NexusID) bool { return true }

func (n *nexus) add(sense Sense) {
	if sense.ofReset() {
		n.copies = nil
		n.attention = append(slices.DeleteFunc(n.attention, func(s Sense) bool { return !s.Deferred }), sense)
		return
	}
	for _, have := range n.attention {
		if have == sense {
			return
		}
	}
	n.attention = append(n.attention, sense)
}

// takeAttention returns and clears the oldest unit attention of id.
func (s *taskSet) takeAttention(id NexusID) (Sense, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nexus(id)
	if len(n.attention) == 0 {
		return Sense{}, false
	}
	first := n.attention[0]
	n.attention = n.attention[1:]
	return first, true
}

// clearAttention takes a condition back from id.
func (s *taskSet) clearAttention(id NexusID, sense Sense) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nexuses[id]
	if n == nil {
		return
	}
	kept := n.attention[:0]
	for _, have := range n.attention {
		if have != sense {
			kept = append(kept, have)
		}
	}
	n.attention = kept
}

// has says whether match selects a task of the set that has not been answered.
func (s *taskSet) has(match func(*task) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for tk := s.first; tk != nil; tk = tk.next {
		if match(tk) && tk.state.Load() != answering {
			return true
		}
	}
	return false
}

// forget makes every initiator a new one, which finds POWER ON OCCURRED, and
// drops the reservations that do not survive a loss of power.
func (s *taskSet) forget() {
	s.prOut.Lock()
	defer s.prOut.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.nexuses)
	s.pr, s.reserver = s.pr.powerLoss(), nil
}

// close ends every task and lets no more in, until open.
func (s *taskSet) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.abort(AbortedByReset, func(*task) bool { return true })
}

// isClosed says whether the unit has been detached.
func (s *taskSet) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// open lets tasks in.
func (s *taskSet) open() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = false
}
