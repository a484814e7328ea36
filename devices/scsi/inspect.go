package scsi

import (
	"fmt"
	"time"

	"gvm/inspect"
)

// request is the part of a command that Inspect shows. A task has one only if it may wait: the
// others are gone within microseconds.
type request struct {
	cdb    [16]byte // its beginning
	cdbLen uint8
	taken  time.Duration
}

func (r *request) of(c *Command) {
	r.taken = c.Taken
	if len(c.CDB) >= len(r.cdb) { // as virtio's: one instruction
		r.cdb, r.cdbLen = [16]byte(c.CDB), uint8(len(r.cdb))
		return
	}
	r.cdbLen = uint8(copy(r.cdb[:], c.CDB))
}

// arrival is a command that came to a task set.
type arrival struct {
	request
	left   bool // it is answered, as follows
	status Status
	sense  senseCode // of CHECK CONDITION
}

// senseCode is the part of sense data that Inspect shows.
type senseCode struct {
	key       SenseKey
	asc, ascq uint8
}

// account counts the commands that come to a task set, whose mu guards it. It is on the way of
// every command: it reads no clock, and copies a CDB once.
type account struct {
	commands, checkConditions uint64
	inBytes, outBytes         uint64
	last                      [8]arrival // by commands modulo their number
}

// arrived counts tk.
func (a *account) arrived(tk *task) {
	tk.number = a.commands
	a.commands++
	l := a.arrival(tk.number)
	l.of(tk.Command)
	l.left = false
}

// answered counts the answer to tk.
func (a *account) answered(tk *task, status Status) {
	a.inBytes += uint64(tk.inDone)
	a.outBytes += uint64(tk.outDone)
	if status == CheckCondition {
		a.checkConditions++
	}
	if a.commands-tk.number <= uint64(len(a.last)) {
		l := a.arrival(tk.number)
		l.left, l.status, l.sense = true, status, tk.sense
	}
}

func (a *account) arrival(number uint64) *arrival { return &a.last[number%uint64(len(a.last))] }

// Inspect returns the state of the unit: its mode, its commands, those in the task set, the oldest
// first, and the last ones that came, the newest first.
func (u *Unit) Inspect() []inspect.Node {
	s, now := &u.set, inspect.Clock()
	s.mu.Lock() // never held for long
	defer s.mu.Unlock()
	flushed := u.flushed.Load()
	nodes := []inspect.Node{
		inspect.Int("blocks", u.blocks.Load()),
		inspect.Bool("wce", u.wce.Load()), inspect.Bool("swp", u.swp.Load()), inspect.Bool("stopped", u.stopped.Load()),
		inspect.Bool("sanitize", u.sanitizing.Load() != nil),
		inspect.Int("writes_not_flushed", u.written.Load()-flushed),
		inspect.Count("commands", s.commands), inspect.Count("check_conditions", s.checkConditions),
		inspect.Count("data_in_bytes", s.inBytes), inspect.Count("data_out_bytes", s.outBytes),
	}
	if s.pr.kind != 0 {
		nodes = append(nodes, inspect.Text("reservation", s.pr.kind.name()))
	}
	tasks, last := inspect.Group("task").As(inspect.Passing), inspect.Group("last").As(inspect.Passing)
	n := 0
	for tk := range s.tasks.all() {
		const most = 64 // a guest can have thousands
		if n < most && tk.cdbLen > 0 {
			task := inspect.Group(fmt.Sprint(len(tasks.Nodes)), tk.inspect(now)...)
			task.Nodes = append(task.Nodes, inspect.Bits("tag", tk.Tag), inspect.Bool("dormant", tk.inDormant.of != nil))
			tasks.Nodes = append(tasks.Nodes, task)
		}
		n++
	}
	for i := range min(s.commands, uint64(len(s.last))) {
		l := s.arrival(s.commands - 1 - i)
		command := inspect.Group(fmt.Sprint(i), l.inspect(now)...)
		if l.left {
			command.Nodes = append(command.Nodes, inspect.Text("status", l.status.Name()))
		}
		if l.left && l.status == CheckCondition {
			sense := l.sense.key.Name() + ", " + additional(l.sense.asc, l.sense.ascq)
			command.Nodes = append(command.Nodes, inspect.Text("sense", sense))
		}
		last.Nodes = append(last.Nodes, command)
	}
	return append(nodes, inspect.Int("tasks", n), tasks, last)
}

func (r *request) inspect(now time.Duration) []inspect.Node {
	cdb := r.cdb[:r.cdbLen]
	nodes := []inspect.Node{inspect.Text("command", OpcodeName(cdb))}
	if lba, n, ok := Extent(cdb); ok {
		nodes = append(nodes, inspect.Int("lba", lba), inspect.Int("blocks", n))
	}
	if r.taken != 0 {
		nodes = append(nodes, inspect.Node{Name: "age", Value: inspect.Age(now - r.taken)})
	}
	return nodes
}
