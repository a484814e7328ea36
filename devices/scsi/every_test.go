package scsi_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"gvm/devices/block"
	"gvm/devices/internal/every"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// gated is storage whose reads and writes of block i wait for gate i.
type gated struct {
	block.Backend
	tasks []*queuedTask
}

func (g *gated) pass(off int64) {
	tk := g.tasks[off/blockSize]
	tk.entered.Add(1)
	<-tk.gate
}

func (g *gated) ReadAt(p []byte, off int64) (int, error) {
	g.pass(off)
	return g.Backend.ReadAt(p, off)
}

func (g *gated) WriteAt(p []byte, off int64) (int, error) {
	g.pass(off)
	return g.Backend.WriteAt(p, off)
}

// queuedTask is a command of TestEveryInterleaving: a write of queue 0 or a read of queue 1, of a
// block of its own.
type queuedTask struct {
	queue int
	nexus scsi.NexusID
	attr  scsi.TaskAttr
	gate  chan struct{} // closed when the storage lets it pass
	buf   []byte        // its data

	// As it is.
	entered atomic.Int32 // calls of the storage
	answers chan string

	// As SAM-5 has it.
	state   taskState
	open    bool // the gate
	ran     bool
	aborted scsi.Abort
	answer  string
	seen    string // the answer that came, "" before
}

type taskState int

const (
	absent taskState = iota
	dormant
	enabled
	ended
)

// function is a task management function of nexus 1.
type function struct {
	name string
	do   func(*scsi.Target) scsi.TaskResponse
	// Of the standard: the commands that it ends, how, and the unit attention condition that it
	// establishes for a nexus, which had commands that it ended or not; "": none.
	selects   func(i int, tk *queuedTask) bool
	cause     scsi.Abort
	attention func(nexus scsi.NexusID, lost bool) string
}

func noAttention(scsi.NexusID, bool) string { return "" }

// functions are those that end commands (SAM-5 7).
var functions = []function{
	{"ABORT TASK of 0", func(t *scsi.Target) scsi.TaskResponse { return t.AbortTask(1, 0, 0) },
		func(i int, _ *queuedTask) bool { return i == 0 }, scsi.AbortedByTask, noAttention},
	{"ABORT TASK of 1", func(t *scsi.Target) scsi.TaskResponse { return t.AbortTask(1, 0, 1) },
		func(i int, tk *queuedTask) bool { return i == 1 && tk.nexus == 1 }, scsi.AbortedByTask, noAttention},
	{"ABORT TASK SET", func(t *scsi.Target) scsi.TaskResponse { return t.AbortTaskSet(1, 0) },
		func(_ int, tk *queuedTask) bool { return tk.nexus == 1 }, scsi.AbortedByTask, noAttention},
	{"CLEAR TASK SET", func(t *scsi.Target) scsi.TaskResponse { return t.ClearTaskSet(1, 0) },
		func(int, *queuedTask) bool { return true }, scsi.AbortedByTask,
		func(nexus scsi.NexusID, lost bool) string {
			if lost && nexus != 1 {
				return "CHECK 6/2f/00"
			}
			return ""
		}},
	{"LOGICAL UNIT RESET", func(t *scsi.Target) scsi.TaskResponse { return t.LogicalUnitReset(0) },
		func(int, *queuedTask) bool { return true }, scsi.AbortedByReset,
		func(scsi.NexusID, bool) string { return "CHECK 6/29/03" }},
	{"I_T NEXUS RESET", func(t *scsi.Target) scsi.TaskResponse { return t.NexusReset(1) },
		func(_ int, tk *queuedTask) bool { return tk.nexus == 1 }, scsi.AbortedByReset,
		func(nexus scsi.NexusID, _ bool) string {
			if nexus == 1 {
				return "CHECK 6/29/07"
			}
			return ""
		}},
}

// issued is a function that was called.
type issued struct {
	function
	returned atomic.Bool
	found    [][]byte // data of selected when it returned

	waits, selected []int // commands: those that have not been answered, and all
	lost            map[scsi.NexusID]bool
	over            bool
}

// schedule is one interleaving.
type schedule struct {
	t       *testing.T
	target  *scsi.Target
	disk    *gated
	tasks   []*queuedTask
	set     []int // the task set, in order of arrival
	issued  []*issued
	pending map[scsi.NexusID][]conditions // those that are possible
	trace   []string
}

func (s *schedule) fail(format string, args ...any) {
	s.t.Helper()
	var tasks []string
	for i, tk := range s.tasks {
		attr := [...]string{"SIMPLE", "ORDERED", "HEAD OF QUEUE"}[tk.attr]
		tasks = append(tasks, fmt.Sprintf("%d %s of nexus %d", i, attr, tk.nexus))
	}
	s.t.Fatalf("commands %s; %s: %s", strings.Join(tasks, ", "), strings.Join(s.trace, ", "), fmt.Sprintf(format, args...))
}

// blocked reports whether SAM-5 8.6 keeps task i dormant.
func (s *schedule) blocked(i int) bool {
	older := true
	for _, j := range s.set {
		if j == i {
			older = false
			continue
		}
		other, mine := s.tasks[j].attr, s.tasks[i].attr
		switch {
		case mine == scsi.HeadOfQueue:
		case other == scsi.HeadOfQueue, older && other == scsi.Ordered, older && mine == scsi.Ordered:
			return true
		}
	}
	return false
}

// end answers task i and takes it out of the set.
func (s *schedule) end(i int, answer string) {
	tk := s.tasks[i]
	tk.state, tk.answer = ended, answer
	s.set = slices.DeleteFunc(s.set, func(j int) bool { return j == i })
	for _, f := range s.issued {
		f.waits = slices.DeleteFunc(f.waits, func(j int) bool { return j == i })
	}
	s.endFunctions()
}

// endFunctions ends the functions that have nothing more to wait for.
func (s *schedule) endFunctions() {
	for _, f := range s.issued {
		if f.over || len(f.waits) > 0 {
			continue
		}
		f.over = true
		for _, all := range s.pending {
			for i := range all {
				all[i].due = append(slices.Clone(all[i].due), f)
			}
		}
	}
}

// conditions are the unit attention conditions of a nexus, and the functions that have ended in
// this step and have yet to establish theirs: they do so at any time in the step.
type conditions struct {
	queue []string
	due   []*issued
}

// reachable returns c, and the conditions after any of the functions that are due, in any order.
func (c conditions) reachable(nexus scsi.NexusID) []conditions {
	all := []conditions{c}
	for i, f := range c.due {
		next := conditions{c.queue, slices.Delete(slices.Clone(c.due), i, i+1)}
		switch a := f.attention(nexus, f.lost[nexus]); {
		case a == "":
		case strings.HasPrefix(a, "CHECK 6/29"): // a reset's replaces the others (SAM-5 5.14)
			next.queue = []string{a}
		case !slices.Contains(c.queue, a):
			next.queue = append(slices.Clone(c.queue), a)
		}
		all = append(all, next.reachable(nexus)...)
	}
	return all
}

// narrow replaces the possible conditions of nexus by those that which accepts, and reports whether
// there is any.
func (s *schedule) narrow(nexus scsi.NexusID, which func(c *conditions) bool) bool {
	var left []conditions
	for _, c := range s.pending[nexus] {
		for _, c := range c.reachable(nexus) {
			if which(&c) && !slices.ContainsFunc(left, func(have conditions) bool {
				return slices.Equal(have.queue, c.queue) && slices.Equal(have.due, c.due)
			}) {
				left = append(left, c)
			}
		}
	}
	if left != nil {
		s.pending[nexus] = left
	}
	return left != nil
}

// finish ends an enabled task whose storage lets it pass.
func (s *schedule) finish(i int) {
	tk := s.tasks[i]
	switch {
	case tk.state != enabled || !tk.open:
	case tk.aborted != scsi.NotAborted:
		s.end(i, abortedBy(tk.aborted))
	default:
		s.end(i, "GOOD")
	}
}

func abortedBy(a scsi.Abort) string { return fmt.Sprint("aborted ", a) }

// settle lets every task begin that nothing blocks. A task that begins in the step in which a
// function ends may find the function's unit attention condition, or come before it, and of several
// that begin in one step any may be the first, and report the condition: all of that is right.
func (s *schedule) settle() {
	for s.begin(true) || s.begin(false) {
	}
}

// begin lets a task begin, one that has reported a unit attention condition or one that has not,
// and returns false if there is none.
func (s *schedule) begin(reported bool) bool {
	for _, i := range s.set {
		tk := s.tasks[i]
		if tk.state != dormant || s.blocked(i) || strings.HasPrefix(tk.seen, "CHECK") != reported {
			continue
		}
		if !s.narrow(tk.nexus, func(c *conditions) bool {
			if !reported {
				return len(c.queue) == 0
			}
			found := len(c.queue) > 0 && c.queue[0] == tk.seen
			if found {
				c.queue = c.queue[1:]
			}
			return found
		}) {
			continue // until the condition is there, or is not
		}
		if reported {
			s.end(i, tk.seen)
		} else {
			tk.state, tk.ran = enabled, true
			s.finish(i)
		}
		return true
	}
	return false
}

// submit sends command i.
func (s *schedule) submit(i int) {
	tk := s.tasks[i]
	c := &scsi.Command{CDB: cdb10(0x2a, 0, uint32(i), 1), Attr: tk.attr, Nexus: tk.nexus, Tag: uint64(i),
		Out: [][]byte{tk.buf}}
	if tk.queue == 1 {
		c.CDB[0], c.Out, c.In = 0x28, nil, [][]byte{tk.buf}
	}
	c.Done = func(r scsi.Result) {
		if r.Abort != scsi.NotAborted {
			tk.answers <- abortedBy(r.Abort)
		} else {
			tk.answers <- scsitest.Answer{Result: r}.String()
		}
	}
	s.target.Submit(c)
	tk.state = dormant
	s.set = append(s.set, i)
}

// call begins a function.
func (s *schedule) call(f function) {
	called := &issued{function: f, lost: map[scsi.NexusID]bool{}}
	for _, i := range s.set {
		tk := s.tasks[i]
		if !f.selects(i, tk) {
			continue
		}
		called.waits = append(called.waits, i)
		if tk.aborted == scsi.NotAborted {
			tk.aborted = f.cause
			called.lost[tk.nexus] = true
		}
	}
	called.selected = slices.Clone(called.waits)
	s.issued = append(s.issued, called)
	go func() {
		if r := f.do(s.target); r != scsi.FunctionComplete {
			s.t.Errorf("%s: response %v", f.name, r)
		}
		called.found = s.data(called.selected)
		called.returned.Store(true)
	}()
	for _, i := range called.selected {
		if s.tasks[i].state == dormant {
			s.end(i, abortedBy(s.tasks[i].aborted))
		}
	}
	s.endFunctions()
}

// data returns the bytes that some of the commands change: on the medium for writes, in buf for
// reads.
func (s *schedule) data(of []int) (all [][]byte) {
	for _, i := range of {
		b := slices.Clone(s.tasks[i].buf)
		if s.tasks[i].queue == 0 {
			if _, err := s.disk.Backend.ReadAt(b, int64(i)*blockSize); err != nil {
				s.t.Error(err)
			}
		}
		all = append(all, b)
	}
	return all
}

// compare waits until nothing moves, and holds the target against SAM-5.
func (s *schedule) compare() {
	synctest.Wait()
	for i, tk := range s.tasks {
		for len(tk.answers) > 0 {
			if tk.seen != "" {
				s.fail("%d is answered %q and again %q", i, tk.seen, <-tk.answers)
			}
			tk.seen = <-tk.answers
		}
	}
	s.settle()
	for i, tk := range s.tasks {
		if tk.seen != tk.answer {
			s.fail("%d is answered %q, want %q", i, tk.seen, tk.answer)
		}
		if n := tk.entered.Load(); n > 1 || n == 1 != tk.ran {
			s.fail("%d came to its storage %d times, want it there: %t", i, n, tk.ran)
		}
	}
	for _, f := range s.issued {
		if f.returned.Load() != f.over {
			s.fail("%s has returned: %t, with %v to wait for", f.name, f.returned.Load(), f.waits)
		}
	}
	for nexus := range s.pending {
		s.narrow(nexus, func(c *conditions) bool { return len(c.due) == 0 })
	}
}

// run makes one interleaving of the events: each command is sent, in the order of its queue, its
// storage lets it pass, before or after it comes there, and functions are called.
func (s *schedule) run(pick func(int) int, calls int) {
	defer func() { // for the goroutines of a test that failed
		for _, tk := range s.tasks {
			if !tk.open {
				close(tk.gate)
			}
		}
	}()
	for {
		var names []string
		var events []func()
		event := func(name string, f func()) { names, events = append(names, name), append(events, f) }
		sends := map[int]bool{}
		for i, tk := range s.tasks {
			switch {
			case tk.state == absent && !sends[tk.queue]:
				sends[tk.queue] = true
				event(fmt.Sprint("send ", i), func() { s.submit(i) })
			case tk.state != absent && !tk.open:
				event(fmt.Sprint("let ", i, " pass"), func() {
					tk.open = true
					close(tk.gate)
					s.finish(i)
				})
			}
		}
		if len(s.issued) < calls {
			event("call", func() {
				f := functions[pick(len(functions))]
				s.trace = append(s.trace, f.name)
				s.call(f)
			})
		}
		if len(events) == 0 {
			return
		}
		i := pick(len(events))
		s.trace = append(s.trace, names[i])
		events[i]()
		s.compare()
	}
}

// checkEnd checks the data of all commands, and that the unit attention conditions are there that
// no command has reported.
func (s *schedule) checkEnd() {
	for i, tk := range s.tasks {
		data := s.data([]int{i})[0]
		switch {
		case tk.answer == "GOOD" && !bytes.Equal(data, filled(byte(i+1), 1)):
			s.fail("%d has the wrong data", i)
		case !tk.ran && !bytes.Equal(data, make([]byte, blockSize)):
			s.fail("%d, which did not run, has data", i)
		}
	}
	for _, f := range s.issued {
		for n, data := range s.data(f.selected) {
			if !bytes.Equal(data, f.found[n]) {
				s.fail("%d changed its data after %s", f.selected[n], f.name)
			}
		}
	}
	for nexus, want := range s.pending {
		var found []string
		for a := ""; a != "GOOD"; {
			a = asNexus(s.target, nexus, testUnitReady, nil, 0).String()
			found = append(found, a)
		}
		found = found[:len(found)-1]
		if !slices.ContainsFunc(want, func(c conditions) bool { return slices.Equal(c.queue, found) }) {
			s.fail("nexus %d finds %q, want one of %v", nexus, found, want)
		}
	}
}

// TestEveryInterleaving sends commands by two queues, with every task attribute, and calls every
// task management function that ends commands, in every order of these events and of the moments at
// which the storage lets a command pass. After each event the target is waited for until all its
// goroutines wait. The commands that have been answered then, those that are at their storage, and
// the functions that have returned are those of SAM-5 8.6 and 7. Each command is answered once, and
// none that a function ended changes data after the function has returned.
func TestEveryInterleaving(t *testing.T) {
	total := 0
	for _, shape := range []struct {
		name    string
		queues  [2]int // commands of each
		calls   int
		nexuses [2]scsi.NexusID
	}{
		{"2+2", [2]int{2, 2}, 0, [2]scsi.NexusID{1, 2}},
		{"2+1 and a function", [2]int{2, 1}, 1, [2]scsi.NexusID{1, 2}},
		{"2+1 and a function, one nexus", [2]int{2, 1}, 1, [2]scsi.NexusID{1, 1}},
		{"1+1 and two functions", [2]int{1, 1}, 2, [2]scsi.NexusID{1, 2}},
		{"1+1 and two functions, one nexus", [2]int{1, 1}, 2, [2]scsi.NexusID{1, 1}},
	} {
		t.Run(shape.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := interleave(t, shape.queues, shape.calls, shape.nexuses)
				t.Logf("%d interleavings", n)
				total += n
			})
		})
	}
	t.Logf("%d interleavings", total)
}

// interleave makes every interleaving of some commands of two queues and calls of functions.
func interleave(t *testing.T, queues [2]int, calls int, nexuses [2]scsi.NexusID) int {
	disk := &gated{Backend: block.NewMem(blocks * blockSize)}
	target := attach(t, scsi.UnitConfig{Backend: disk})
	for nexus := range scsi.NexusID(3) {
		asNexus(target, nexus, testUnitReady, nil, 0) // unit attention
	}
	return every.Run(func(pick func(int) int) {
		s := &schedule{t: t, target: target, disk: disk,
			pending: map[scsi.NexusID][]conditions{1: {{}}, nexuses[1]: {{}}}}
		for queue, n := range queues {
			for range n {
				i := len(s.tasks)
				tk := &queuedTask{queue: queue, nexus: nexuses[queue], attr: scsi.TaskAttr(pick(3)),
					gate: make(chan struct{}), buf: filled(byte(i+1), 1), answers: make(chan string, 2)}
				stored := make([]byte, blockSize)
				if queue == 1 {
					tk.buf, stored = stored, tk.buf
				}
				if _, err := disk.Backend.WriteAt(stored, int64(i)*blockSize); err != nil {
					t.Fatal(err)
				}
				s.tasks = append(s.tasks, tk)
			}
		}
		disk.tasks = s.tasks
		s.run(pick, calls)
		s.checkEnd()
	})
}
