package vscsi

import (
	"fmt"
	"sync"
	"time"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/inspect"
)

// functions are the last task management functions, for Inspect.
type functions struct {
	mu    sync.Mutex
	count uint64
	last  [8]function // by count modulo their number
}

// function is a task management function.
type function struct {
	trace.Record
	taken    time.Duration // by inspect.Clock
	answered bool
}

// add keeps a function that begins, and returns a function that keeps its answer. The control queue
// has one thread, so no other function begins before that.
func (f *functions) add(r trace.Record) (answered func(response byte)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := &f.last[f.count%uint64(len(f.last))]
	*l = function{Record: r, taken: inspect.Clock()}
	f.count++
	return func(response byte) {
		f.mu.Lock()
		defer f.mu.Unlock()
		l.Response, l.answered = response, true
	}
}

// inspect returns the functions, the newest first.
func (f *functions) inspect() inspect.Node {
	f.mu.Lock()
	defer f.mu.Unlock()
	now, list := inspect.Clock(), inspect.Group("function").As(inspect.Passing)
	for i := range min(f.count, uint64(len(f.last))) {
		l := &f.last[(f.count-1-i)%uint64(len(f.last))]
		n := inspect.Group(fmt.Sprint(i), inspect.Text("function", l.Op()))
		if detail := l.Detail(); detail != "" {
			n.Nodes = append(n.Nodes, inspect.Text("detail", detail))
		}
		if lun, ok := address(l.LUN[:]); ok {
			if number, ok := scsi.DecodeLUN(lun); ok {
				n.Nodes = append(n.Nodes, inspect.Int("lun", number))
			}
		}
		n.Nodes = append(n.Nodes, inspect.Node{Name: "age", Value: inspect.Age(now - l.taken)})
		if l.answered {
			n.Nodes = append(n.Nodes, inspect.Text("response", l.Outcome()))
		}
		list.Nodes = append(list.Nodes, n)
	}
	return list
}
