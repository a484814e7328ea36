package scsi

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"gvm/devices/block"
)

// Flushed returns a channel that is closed when the flushes of commands with IMMED have ended.
func (u *Unit) Flushed() <-chan struct{} { return u.later.ended() }

// idle is storage that nothing is done with.
type idle struct{ block.Backend }

func (idle) Size() int64 { return 1 << 20 }

// idleTarget has an idle unit at LUN 0.
func idleTarget(t *testing.T) (*Target, *Unit) {
	t.Helper()
	u, err := NewUnit(UnitConfig{Backend: idle{}, Serial: "S"})
	if err != nil {
		t.Fatal(err)
	}
	target := NewTarget()
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	return target, u
}

// TestStepsPerCommand holds up n commands behind one whose answer is being taken, and counts the
// steps that the task set does for them afterwards: tasks looked at and woken. It is a few for each
// command, however many there are.
func TestStepsPerCommand(t *testing.T) {
	const most = 8
	mixed := func(i int) TaskAttr { return []TaskAttr{Simple, Ordered, Simple, Simple}[i%4] }
	for name, v := range map[string]struct {
		first TaskAttr
		attr  func(i int) TaskAttr
		after func(target *Target, n int)
	}{
		"ORDERED and SIMPLE": {Ordered, mixed, nil},
		"ORDERED":            {Simple, func(int) TaskAttr { return Ordered }, nil},
		"SIMPLE":             {Ordered, func(int) TaskAttr { return Simple }, nil},
		"HEAD OF QUEUE among them": {HeadOfQueue, mixed, func(target *Target, n int) {
			for i := range n {
				target.Submit(&Command{CDB: make([]byte, 6), Attr: HeadOfQueue, Tag: uint64(i), Done: func(Result) {}})
			}
		}},
		"each aborted": {Ordered, mixed, func(target *Target, n int) {
			for i := range n {
				target.AbortTask(0, 0, uint64(i))
			}
		}},
		"the last queried": {Ordered, mixed, func(target *Target, n int) {
			for range n {
				if r := target.QueryTask(0, 0, uint64(n-1)); r != FunctionSucceeded {
					t.Errorf("QUERY TASK: %v", r)
				}
			}
		}},
		"all with one tag": {Ordered, mixed, func(target *Target, n int) {
			target.Submit(&Command{CDB: make([]byte, 6), Tag: 1 << 40, Done: func(Result) {}})
			target.QueryTask(0, 0, 1<<40)
			target.AbortTaskSet(1, 0)
		}},
	} {
		for _, n := range []int{256, 1024} {
			target, u := idleTarget(t)
			u.set.takeAttention(0)
			answering, release := make(chan struct{}), make(chan struct{})
			go target.Submit(&Command{CDB: make([]byte, 6), Attr: v.first, Tag: 1 << 50, Done: func(Result) {
				close(answering)
				<-release
			}})
			<-answering
			var done sync.WaitGroup
			done.Add(n)
			for i := range n {
				tag := uint64(i)
				if name == "all with one tag" {
					tag = 0
				}
				target.Submit(&Command{CDB: make([]byte, 6), Attr: v.attr(i), Tag: tag,
					Done: func(Result) { done.Done() }})
			}
			for range 100 { // for goroutines to begin to wait: the count is the same if they do not
				time.Sleep(100 * time.Microsecond)
			}
			if v.after != nil {
				v.after(target, n)
			}
			close(release)
			done.Wait()
			target.ClearTaskSet(0, 0) // the last one leaves
			u.set.mu.Lock()
			if u.set.steps > most*n {
				t.Errorf("%s: %d steps for %d commands, want at most %d each", name, u.set.steps, n, most)
			}
			u.set.mu.Unlock()
		}
	}
}

// TestDormant has tasks of all attributes come and go at random, and holds which of them may run
// against the text of SAM-5 8.6: a dormant task may run once nothing blocks it.
func TestDormant(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 5))
	var s taskSet
	s.init()
	attrs := []TaskAttr{Simple, Simple, Simple, Simple, Ordered, HeadOfQueue}
	var tasks []*task // in order of arrival
	runs := map[*task]bool{}
	blocked := func(i int) bool {
		for j, other := range tasks {
			switch attr, older := other.Attr, j < i; {
			case j == i || tasks[i].Attr == HeadOfQueue:
			case attr == HeadOfQueue, attr == Ordered && older, tasks[i].Attr == Ordered && older:
				return true
			}
		}
		return false
	}
	for range 20000 {
		if len(tasks) < 1+r.IntN(40) {
			tk := &task{Command: &Command{}, Attr: attrs[r.IntN(len(attrs))], Tag: uint64(r.IntN(8))}
			tasks = append(tasks, tk)
			s.join(tk)
		} else {
			i := r.IntN(len(tasks)) // one that runs, or is aborted
			s.leave(tasks[i], Good)
			delete(runs, tasks[i])
			tasks = slices.Delete(tasks, i, i+1)
		}
		for i, tk := range tasks {
			runs[tk] = runs[tk] || !blocked(i)
			if dormant := tk.inDormant.of != nil; dormant == runs[tk] {
				t.Fatalf("task %d of %d, attribute %d: dormant is %t", i, len(tasks), tk.Attr, dormant)
			}
		}
		tag, n, want := uint64(r.IntN(8)), 0, 0
		for range tagged(0, tag)(&s) {
			n++
		}
		for _, tk := range tasks {
			if tk.Tag == tag {
				want++
			}
		}
		if n != want {
			t.Fatalf("%d tasks with a tag, want %d", n, want)
		}
	}
}
