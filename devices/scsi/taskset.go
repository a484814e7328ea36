package scsi

import (
	"iter"
	"slices"
	"sync"
	"sync/atomic"

	"gvm/devices/block"
	"gvm/panics"
)

// States of a task. The step out of running decides whether the initiator gets the command's status
// or an abort. The command or a task management function takes it, once.
const (
	running int32 = iota
	answering
	aborted
)

// task is a command inside the target.
type task struct {
	*Command
	// Copies from the command, for use after Done, when the caller owns it again.
	Attr  TaskAttr
	Nexus NexusID
	Tag   uint64
	request

	t   *Target
	u   *Unit
	op  *opcode
	err error // of the lookup of op
	now bool  // it must not wait

	place   block.Place // in the limiter of u
	charged bool        // the limit counts the command, as it has begun

	status        Status    // of a command that ends without error
	sense         senseCode // of CHECK CONDITION
	inLen, outLen int       // sizes of the buffers
	inDone        int       // bytes transferred
	outDone       int
	piDone        int // bytes of ProtectionIn written
	overrun       bool
	iov           [][]byte // reused by clip
	flushAfter    bool     // IMMED: flush once the command has been answered

	state atomic.Int32

	// Guarded by set.mu.
	inSet, inOrdered, inDormant, inTag node[task] // in tasks, ordered, dormant and byTag of the set
	number                             uint64     // among the commands that came
	cause                              Abort
	waiters                            []*abortWait
	wake                               chan struct{} // closed to end a wait; nil: it does not wait
}

// abortWait is a task management function that waits for the tasks it aborted, or the removal of
// the unit.
type abortWait struct {
	left int           // tasks; guarded by set.mu
	done chan struct{} // closed when none is left
}

// taskKey identifies a task for ABORT TASK and QUERY TASK. Initiators that break the rules have
// several tasks of one key.
type taskKey struct {
	nexus NexusID
	tag   uint64
}

// taskSet holds the commands of one unit that were submitted and not yet answered, in order of
// arrival (SAM-5 8), and the unit's state for each I_T nexus.
//
// No operation takes longer with more tasks: a waiting task has its own channel, and a leaving task
// visits only those that it lets run (TestStepsPerCommand).
type taskSet struct {
	mu      sync.Mutex
	tasks   list[task]
	ordered list[task]              // those with the attribute ORDERED
	dormant list[task]              // those that their attribute keeps from running (SAM-5 8.6)
	head    int                     // tasks with the attribute HEAD OF QUEUE
	byTag   map[taskKey]*list[task] // all of tasks; nil until tagged is called, and again when there are none
	steps   int                     // tasks looked at and woken, for tests
	closed  bool
	nexuses map[NexusID]*nexus
	known   *nexus // the one of nexuses that the last command came through; nil: none

	// The reservation: a persistent one, or the I_T nexus of RESERVE(6) or RESERVE(10). It changes
	// with both prOut and mu held. A command is checked against it under mu, when its attribute
	// lets it run: each change is either visible to it or not, and does not stop a command admitted
	// before, unless it is aborted (SPC-5 5.14.1).
	pr       persistent
	reserver *NexusID

	// prOut is held from the reading of the reservation to its change, and while it is saved. It is
	// taken before mu.
	prOut  sync.Mutex
	unsure bool // the last save failed: the kept state is unknown; guarded by prOut

	account
}

// nexus is the state of one initiator in a unit: unit attention conditions not yet reported, oldest
// first, and results of its EXTENDED COPY commands. Deferred errors are among the conditions: they
// too end the next command.
type nexus struct {
	id        NexusID
	attention []Sense
	copies    []copyResult
}

func (s *taskSet) init() {
	s.nexuses = map[NexusID]*nexus{}
}

// nexus returns the state for id. An initiator that the unit has not seen finds
// POWER ON OCCURRED. The caller holds mu.
func (s *taskSet) nexus(id NexusID) *nexus {
	if s.known != nil && s.known.id == id { // sooner than the map tells
		return s.known
	}
	n := s.nexuses[id]
	if n == nil {
		n = &nexus{id: id, attention: []Sense{PowerOnOccurred}}
		s.nexuses[id] = n
	}
	s.known = n
	return n
}

// join puts tk at the end of the set, and returns false if the unit has been detached. It does
// nothing for a task that is in the set.
func (s *taskSet) join(tk *task) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	tk.of(tk.Command)
	return s.add(tk)
}

// add is join. The caller holds mu.
func (s *taskSet) add(tk *task) bool {
	if s.closed || tk.inSet.of != nil {
		return tk.inSet.of != nil
	}
	if s.blocks(tk) {
		s.dormant.push(&tk.inDormant, tk)
	}
	s.tasks.push(&tk.inSet, tk)
	s.arrived(tk)
	switch tk.Attr {
	case Ordered:
		s.ordered.push(&tk.inOrdered, tk)
	case HeadOfQueue:
		s.head++
	}
	if s.byTag != nil {
		s.index(tk)
	}
	return true
}

// blocks reports whether the tasks of the set block an arriving one: HEAD OF QUEUE tasks block all
// others, ORDERED tasks block SIMPLE ones, and any task blocks an ORDERED one. The caller holds mu.
func (s *taskSet) blocks(tk *task) bool {
	switch {
	case tk.Attr == HeadOfQueue:
		return false
	case tk.Attr == Ordered:
		return s.tasks.first != nil
	}
	return s.head > 0 || s.ordered.first != nil
}

// release lets dormant tasks run that are no longer blocked. It visits them in order of arrival: a
// task that blocks one blocks all later ones. The caller holds mu.
func (s *taskSet) release() {
	for s.dormant.first != nil && s.head == 0 {
		s.steps++
		tk := s.dormant.first.of
		if tk.Attr == Ordered {
			if s.tasks.first.of != tk {
				return
			}
		} else if o := s.ordered.first; o != nil && o.of.inDormant.of == nil {
			return // an older ORDERED task: it runs, as those that are dormant are not older
		}
		s.dormant.remove(&tk.inDormant)
		s.wake(tk)
	}
}

// wake ends the wait of tk, if it waits. The caller holds mu.
func (s *taskSet) wake(tk *task) {
	if tk.wake != nil {
		s.steps++
		close(tk.wake)
		tk.wake = nil
	}
}

// enter is join that returns when the attribute of tk lets it run (SAM-5 8.6). It returns the
// oldest unit attention condition unless the command is exempt, or a conflict with a reservation,
// and false if the unit has been detached. A conflict comes before every unit attention condition
// but that of a reset (SAM-5 5.3.3).
func (s *taskSet) enter(tk *task, exempt bool) (err error, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.add(tk) {
		return nil, false
	}
	if tk.inDormant.of != nil && tk.state.Load() == running {
		wake := make(chan struct{})
		tk.wake = wake
		panics.Unlocked(&s.mu, func() { <-wake })
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

// enterNow is enter for a task that must not wait. It returns false if the task would wait or has
// something to report, with the task in the set if the unit is attached.
func (s *taskSet) enterNow(tk *task, exempt bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.add(tk) || tk.inDormant.of != nil {
		return false
	}
	n := s.nexus(tk.Nexus) // any command makes the nexus known
	return (exempt || len(n.attention) == 0) && !s.conflicts(tk)
}

// occupy takes one of slots and reports whether it did; it gives up when tk is aborted.
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

// interruptibly calls wait with a channel that is closed when tk is aborted. It does not call wait
// if tk is aborted already.
func (s *taskSet) interruptibly(tk *task, wait func(cut <-chan struct{})) {
	cut := make(chan struct{})
	s.mu.Lock()
	if tk.state.Load() != running {
		s.mu.Unlock()
		return
	}
	tk.wake = cut
	s.mu.Unlock()
	wait(cut)
	s.mu.Lock()
	tk.wake = nil
	s.mu.Unlock()
}

// abortCause returns the kind of function that aborted tk.
func (s *taskSet) abortCause(tk *task) Abort {
	s.mu.Lock()
	defer s.mu.Unlock()
	return tk.cause
}

// leave takes tk out of the set, after Done has returned.
func (s *taskSet) leave(tk *task, status Status) {
	s.mu.Lock()
	s.answered(tk, status)
	s.tasks.remove(&tk.inSet)
	s.ordered.remove(&tk.inOrdered)
	s.dormant.remove(&tk.inDormant)
	if tk.Attr == HeadOfQueue {
		s.head--
	}
	switch {
	case s.byTag == nil:
	case s.tasks.first == nil:
		s.byTag = nil
	default:
		key := taskKey{tk.Nexus, tk.Tag}
		twins := s.byTag[key]
		if twins.remove(&tk.inTag); twins.first == nil {
			delete(s.byTag, key)
		}
	}
	for _, w := range tk.waiters {
		if w.left--; w.left == 0 {
			close(w.done)
		}
	}
	s.release()
	s.mu.Unlock() // sooner than by defer
}

// index puts tk in byTag. The caller holds mu.
func (s *taskSet) index(tk *task) {
	s.steps++
	key := taskKey{tk.Nexus, tk.Tag}
	twins := s.byTag[key]
	if twins == nil {
		twins = &list[task]{}
		s.byTag[key] = twins
	}
	twins.push(&tk.inTag, tk)
}

// A selection is some of the tasks of a set, in order of arrival. The caller of one holds mu.
type selection func(*taskSet) iter.Seq[*task]

// tagged selects the tasks of a nexus with a tag; there should be one.
func tagged(nexus NexusID, tag uint64) selection {
	return func(s *taskSet) iter.Seq[*task] {
		if s.byTag == nil {
			s.byTag = map[taskKey]*list[task]{}
			for tk := range s.tasks.all() {
				s.index(tk)
			}
		}
		if twins := s.byTag[taskKey{nexus, tag}]; twins != nil {
			return twins.all()
		}
		return func(func(*task) bool) {}
	}
}

// every selects all tasks that match is true for.
func every(match func(*task) bool) selection {
	return func(s *taskSet) iter.Seq[*task] {
		return func(yield func(*task) bool) {
			for tk := range s.tasks.all() {
				s.steps++
				if match(tk) && !yield(tk) {
					return
				}
			}
		}
	}
}

// tasksOf selects the tasks of a nexus, and allTasks those of all.
func tasksOf(nexus NexusID) selection { return every(func(tk *task) bool { return tk.Nexus == nexus }) }

var allTasks = every(func(*task) bool { return true })

// abort ends every selected task and returns when the last of them has been answered. It also waits
// for selected tasks that were being answered, so that no answer comes after it returns. It returns
// the nexuses of the tasks that it ended.
func (s *taskSet) abort(cause Abort, which selection) map[NexusID]bool {
	s.mu.Lock()
	w, ended := s.end(cause, which)
	s.mu.Unlock()
	<-w.done
	return ended
}

// end is the first half of abort: it ends the tasks, which are gone when done of the returned
// abortWait is closed. The caller holds mu.
func (s *taskSet) end(cause Abort, which selection) (w *abortWait, ended map[NexusID]bool) {
	w, ended = &abortWait{done: make(chan struct{})}, map[NexusID]bool{}
	for tk := range which(s) {
		s.steps++
		if tk.state.CompareAndSwap(running, aborted) {
			tk.cause = cause
			ended[tk.Nexus] = true
			s.wake(tk)
		}
		w.add(tk)
	}
	if w.left == 0 {
		close(w.done)
	}
	return w, ended
}

// add makes w wait for tk too. The caller holds set.mu.
func (w *abortWait) add(tk *task) {
	w.left++
	tk.waiters = append(tk.waiters, w)
}

// drain lets no more tasks in, until open. The channel is closed when those in the set have ended
// by themselves.
func (s *taskSet) drain() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	w := &abortWait{done: make(chan struct{})}
	for tk := range s.tasks.all() {
		w.add(tk)
	}
	if w.left == 0 {
		close(w.done)
	}
	return w.done
}

// attention establishes a unit attention condition for the known initiators that selected reports
// true for. A pending condition is not repeated, and the condition of a reset replaces all others
// (SAM-5 5.14).
func (s *taskSet) attention(sense Sense, selected func(NexusID) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, n := range s.nexuses {
		if selected(id) {
			n.add(sense)
		}
	}
}

// tell establishes a unit attention condition for one initiator. An initiator that the unit has not
// seen finds POWER ON OCCURRED. The caller holds mu.
func (s *taskSet) tell(id NexusID, sense Sense) {
	if n := s.nexuses[id]; n != nil {
		n.add(sense)
	}
}

// everyone selects all initiators for attention.
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

// clearAttention removes a condition of id.
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

// has reports whether a selected task is in the set and has not been answered.
func (s *taskSet) has(which selection) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for tk := range which(s) {
		s.steps++
		if tk.state.Load() != answering {
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
	s.known = nil
	s.pr, s.reserver = s.pr.powerLoss(), nil
}

// close ends every task and lets no more in, until open.
func (s *taskSet) close() { <-s.shut().done }

// shut is close without the wait.
func (s *taskSet) shut() *abortWait {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	w, _ := s.end(AbortedByReset, allTasks)
	return w
}

// isClosed reports whether the unit has been detached.
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
