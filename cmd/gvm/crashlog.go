package main

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"gvm/devices/virtio"
	"gvm/inspect"
	"gvm/text"
)

// crashLog has the parts of the file log of a record: the console's last output with its times, and
// gvm's last messages. Times are those of inspect.Clock. Its memory is bounded, however much the
// guest prints.
type crashLog struct {
	text   []byte       // the console's last output
	seen   uint64       // bytes of the console's output
	times  []outputTime // ascending
	events []event
}

// outputTime is the time of the console's output from the byte at on.
type outputTime struct {
	at   uint64
	time time.Duration
}

// event is a line of the log.
type event struct {
	time       time.Duration
	from, line string
}

// Bounds of a log. The text has twice recordConsole at most.
const (
	logMarks  = 16 << 10 // when there are more, every second one goes
	logEvents = 1000
	markEvery = time.Millisecond
)

// output keeps the end of the console's output.
func (l *crashLog) output(now time.Duration, p []byte) {
	if n := len(l.times); n == 0 || now-l.times[n-1].time >= markEvery {
		l.times = append(l.times, outputTime{l.seen, now})
	}
	l.seen += uint64(len(p))
	l.text = append(l.text, p[max(0, len(p)-recordConsole):]...)
	if n := len(l.text) - recordConsole; n > recordConsole {
		l.text = append(l.text[:0], l.text[n:]...)
	}
	if len(l.times) <= logMarks {
		return
	}
	kept, n, old := l.times[:0], 0, l.seen-uint64(len(l.text))
	for i, m := range l.times {
		last := i+1 == len(l.times)
		if !last && l.times[i+1].at <= old {
			continue
		}
		if n%2 == 0 || last {
			kept = append(kept, m)
		}
		n++
	}
	l.times = kept
}

// add keeps a line of gvm's.
func (l *crashLog) add(now time.Duration, line string) {
	if len(l.events) == logEvents {
		l.events = append(l.events[:0], l.events[logEvents/2:]...)
	}
	l.events = append(l.events, event{now, "gvm", line})
}

// console returns the last output.
func (l *crashLog) console() []byte { return l.text[max(0, len(l.text)-recordConsole):] }

// lines returns the lines of the console, each with the time of its beginning.
func (l *crashLog) lines() (lines []event) {
	b := l.console()
	at, times := l.seen-uint64(len(b)), l.times
	for line := range bytes.Lines(b) {
		for len(times) > 1 && times[1].at <= at {
			times = times[1:]
		}
		lines = append(lines, event{times[0].time, "console", string(bytes.TrimRight(line, "\r\n"))})
		at += uint64(len(line))
	}
	return lines
}

// merged returns the file log: a line for each line of the console, each message of gvm's, and each
// command and change of a disk, task management function and event of a virtio device that the
// state has, by time. state was read at the time read.
func (l *crashLog) merged(state *inspect.Node, read time.Duration) []byte {
	all := slices.Concat(l.lines(), l.events, deviceEvents(state, read))
	slices.SortStableFunc(all, func(a, b event) int { return cmp.Compare(a.time, b.time) })
	var b bytes.Buffer
	begin := time.Now().Add(-inspect.Clock())
	for _, e := range all {
		at := begin.Add(e.time).UTC().Format("2006-01-02T15:04:05.000000Z")
		fmt.Fprintf(&b, "%s %-7s %s\n", at, e.from, text.Printable(e.line))
	}
	return b.Bytes()
}

// deviceEvents returns the events with times in a machine's state, which was read at a time: the
// last commands of disks that were answered, and those that were not, task management functions
// alike, changes of disks, and events of virtio devices. Of a disk that the kernel serves there is
// a line without commands.
func deviceEvents(state *inspect.Node, read time.Duration) (events []event) {
	if state == nil {
		return nil
	}
	add := func(from, line string, n inspect.Node) {
		if age, ok := n.Get("age").(inspect.Age); ok && line != "" {
			events = append(events, event{read - time.Duration(age), from, line})
		}
	}
	for _, group := range state.Nodes {
		for _, n := range group.Nodes {
			switch group.Name {
			case "disk_change":
				add("disk", eventLine(n), n)
			case "disk":
				for _, part := range n.Nodes {
					for _, c := range part.Nodes {
						add("disk/"+n.Name, commandLine(part.Name, c), c)
					}
				}
			case "lio":
				for _, d := range n.Nodes {
					events = append(events, event{read, "lio/" + n.Name + "/" + d.Name,
						"the kernel serves this disk: gvm does not see its commands"})
				}
			case "pci":
				for _, f := range below(n, "virtio", "device", "function") {
					from, line := functionLine(f)
					add(from, line, f)
				}
				id, _ := n.Get("virtio/device_type").(virtio.ID)
				for _, e := range below(n, "virtio", "event") {
					add("pci/"+n.Name, id.Name()+": "+eventLine(e), e)
				}
			}
		}
	}
	return events
}

// eventLine describes an event of package inspect with its values.
func eventLine(n inspect.Node) string {
	line := fmt.Sprint(n.Get("event"))
	for _, v := range n.Nodes {
		if v.Name != "event" && v.Name != "age" {
			line += fmt.Sprintf(", %s %v", v.Name, v.Value)
		}
	}
	return line
}

// commandLine describes a command of a disk, of the group task or last; "": it is in the other
// group.
func commandLine(group string, c inspect.Node) string {
	words := []string{fmt.Sprint(c.Get("command"))}
	for _, name := range []string{"lba", "blocks"} {
		if v := c.Get(name); v != nil {
			words = append(words, name, fmt.Sprint(v))
		}
	}
	line, status := strings.Join(words, " "), c.Get("status")
	switch sense := c.Get("sense"); {
	case group == "task":
		return line + ": not answered"
	case group != "last" || status == nil:
		return ""
	case sense != nil:
		return fmt.Sprintf("%s: %v, %v", line, status, sense)
	}
	return fmt.Sprintf("%s: %v", line, status)
}

// below returns the nodes of the group with a path below n.
func below(n inspect.Node, path ...string) []inspect.Node {
	for _, name := range path {
		i := slices.IndexFunc(n.Nodes, func(c inspect.Node) bool { return c.Name == name })
		if i < 0 {
			return nil
		}
		n = n.Nodes[i]
	}
	return n.Nodes
}

// functionLine returns the disk of a task management function, and its description.
func functionLine(f inspect.Node) (from, line string) {
	from, line = "disk", fmt.Sprint(f.Get("function"))
	if lun := f.Get("lun"); lun != nil {
		from = fmt.Sprintf("disk/%v", lun)
	}
	if detail := f.Get("detail"); detail != nil {
		line += fmt.Sprintf(" %v", detail)
	}
	if response := f.Get("response"); response != nil {
		return from, fmt.Sprintf("%s: %v", line, response)
	}
	return from, line + ": not answered"
}
