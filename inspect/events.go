package inspect

import (
	"fmt"
	"sync"
	"time"
)

// Events keeps the last sixteen events of its owner. The zero value has none. Several goroutines
// may use it.
type Events struct {
	mu    sync.Mutex
	count uint64
	last  [16]occurrence // by count modulo their number
}

type occurrence struct {
	at    time.Duration // by Clock
	nodes []Node
}

// Add keeps an event that occurs now: its name, and values of it.
func (e *Events) Add(name string, values ...Node) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last[e.count%uint64(len(e.last))] = occurrence{Clock(), append([]Node{Text("event", name)}, values...)}
	e.count++
}

// Node returns a group of the events, the newest first, each with its age.
func (e *Events) Node(name string) Node {
	e.mu.Lock()
	defer e.mu.Unlock()
	now, list := Clock(), Group(name).As(Passing)
	for i := range min(e.count, uint64(len(e.last))) {
		o := &e.last[(e.count-1-i)%uint64(len(e.last))]
		age := Node{Name: "age", Value: Age(now - o.at)}
		list.Nodes = append(list.Nodes, Group(fmt.Sprint(i), append(o.nodes[:len(o.nodes):len(o.nodes)], age)...))
	}
	return list
}
