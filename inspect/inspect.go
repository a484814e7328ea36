// Package inspect is the form in which the parts of a machine show their state: a tree of named
// values, such as pci/00:01.0/virtio/queue/2/avail_idx. Names are the specifications' terms. A part
// returns Nodes, and knows no reader: a command, a report of a crash and metrics read one tree.
//
// A value is read under its owner's lock, which may be held for long while a device stops. Locked
// gives up then, and its nodes are Busy: no reader waits for a device.
package inspect

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"gvm/text"
)

// Node is a named value or a named group of nodes.
type Node struct {
	Name  string
	Value any    // a bool, string, Hex, Age, integer or json.Number, or Busy; nil in a group
	Nodes []Node // of a group, in order
	Kind  Kind

	open func(context.Context) (nodes []Node, ok bool) // reads Nodes; nil: they are read
}

// Kind says more of a node to readers that keep numbers, such as metrics.
type Kind uint8

const (
	State        Kind = iota // a value as it is now, or a group
	Counter                  // a number that only grows while its owner exists
	Passing                  // of a thing that comes and goes, such as a request or the time: nothing to keep
	Distribution             // a group that Histogram.Node made
)

// Hex is a value that people read in hexadecimal: a register, an address or a set of bits. In JSON
// it is a string such as "0x1f", because readers of JSON round large numbers.
type Hex uint64

// String implements fmt.Stringer.
func (h Hex) String() string { return fmt.Sprintf("%#x", uint64(h)) }

// MarshalJSON implements json.Marshaler.
func (h Hex) MarshalJSON() ([]byte, error) { return json.Marshal(h.String()) }

// Age is the time since an event, in JSON a number of seconds.
type Age time.Duration

// String implements fmt.Stringer.
func (a Age) String() string {
	d := time.Duration(a)
	if d >= time.Millisecond {
		d = d.Round(time.Microsecond)
	}
	return d.String()
}

// MarshalJSON implements json.Marshaler.
func (a Age) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(a).Seconds()) }

var start = time.Now()

// Clock returns the time since the start of the process. The difference of two is an Age.
func Clock() time.Duration { return time.Since(start) }

type busy struct{}

func (busy) String() string               { return "busy" }
func (busy) MarshalJSON() ([]byte, error) { return []byte(`"busy"`), nil }

// Busy is the value of a node that could not be read in time: its owner is stopping, waits for
// storage, or runs.
var Busy any = busy{}

// Int returns a node for a number.
func Int[T ~int | ~int32 | ~int64 | ~uint8 | ~uint16 | ~uint32 | ~uint64](name string, v T) Node {
	return Node{Name: name, Value: v}
}

// Count returns a node for a number that only grows while its owner exists.
func Count[T ~int | ~int64 | ~uint32 | ~uint64](name string, v T) Node {
	return Node{Name: name, Value: v, Kind: Counter}
}

// Bits returns a node for a register, an address or a set of bits.
func Bits[T ~uint8 | ~uint16 | ~uint32 | ~uint64](name string, v T) Node {
	return Node{Name: name, Value: Hex(v)}
}

// Bool returns a node for a truth value.
func Bool(name string, v bool) Node { return Node{Name: name, Value: v} }

// Text returns a node for text. Text from a guest or a user needs no escapes: readers escape it.
func Text(name, v string) Node { return Node{Name: name, Value: v} }

// Group returns a group of nodes.
func Group(name string, nodes ...Node) Node { return Node{Name: name, Nodes: nodes} }

// As returns n as a node of another kind.
func (n Node) As(k Kind) Node {
	n.Kind = k
	return n
}

// Lazy returns a group that read reads when a reader needs it. It returns false if it cannot before
// the context ends: the group is Busy.
func Lazy(name string, read func(context.Context) ([]Node, bool)) Node {
	return Node{Name: name, open: read}
}

// patience bounds the wait for one lock. The locks of devices that do not stop are held for
// microseconds.
const patience = 50 * time.Millisecond

// Locked returns a group whose nodes are read with mu held, with all that is below them.
func Locked(name string, mu *sync.Mutex, read func() []Node) Node {
	return Lazy(name, func(ctx context.Context) ([]Node, bool) {
		for end := time.Now().Add(patience); !mu.TryLock(); time.Sleep(100 * time.Microsecond) {
			if ctx.Err() != nil || time.Now().After(end) {
				return nil, false
			}
		}
		defer mu.Unlock()
		nodes := read()
		for i := range nodes {
			nodes[i].readAll(ctx)
		}
		return nodes, true
	})
}

// read reads the nodes of a group that is Lazy.
func (n *Node) read(ctx context.Context) {
	if n.open == nil {
		return
	}
	var ok bool
	if n.Nodes, ok = n.open(ctx); !ok {
		n.Nodes, n.Value = nil, Busy
	}
	n.open = nil
}

func (n *Node) readAll(ctx context.Context) {
	n.read(ctx)
	for i := range n.Nodes {
		n.Nodes[i].readAll(ctx)
	}
}

// PathError is the error of Read for a path that does not exist.
type PathError struct {
	Path, At string // At is the part that exists; "" is the root
	Name     string // the name that At does not have
	Names    []string
}

func (e *PathError) Error() string {
	at, mend := e.At, text.Suggest(e.Name, e.Names)
	if at == "" {
		at = "the machine"
	}
	switch {
	case len(e.Names) == 0:
		return fmt.Sprintf("no %s: there is nothing below %s", e.Path, at)
	case mend == "":
		const most = 16
		mend = ", which has " + strings.Join(e.Names[:min(len(e.Names), most)], ", ")
		if len(e.Names) > most {
			mend += " and more"
		}
	}
	return fmt.Sprintf("no %q in %s%s", e.Name, at, mend)
}

// Read returns the node at a path below n, with all that is below it. The path's names are
// separated by slashes; "" is n. Nothing else is read. Groups that cannot be read before ctx ends
// are Busy, and so is the result if one of them is above it. The error is a *PathError.
func (n Node) Read(ctx context.Context, path string) (Node, error) {
	at := ""
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		n.read(ctx)
		if n.Value == Busy {
			return Node{Name: path[strings.LastIndex(path, "/")+1:], Value: Busy}, nil
		}
		i := slices.IndexFunc(n.Nodes, func(c Node) bool { return c.Name == name })
		if i < 0 {
			e := &PathError{Path: path, At: at, Name: name}
			for _, c := range n.Nodes {
				e.Names = append(e.Names, c.Name)
			}
			return Node{}, e
		}
		n, at = n.Nodes[i], join(at, name)
	}
	n.readAll(ctx)
	return n, nil
}

func join(at, name string) string {
	if at == "" || name == "" {
		return at + name
	}
	return at + "/" + name
}

// Values returns the paths below path, which is n's, and their values, in order.
func (n Node) Values(path string) iter.Seq2[string, any] {
	return func(yield func(string, any) bool) { n.values(path, yield) }
}

func (n Node) values(path string, yield func(string, any) bool) bool {
	if n.Value != nil {
		return yield(path, n.Value)
	}
	for _, c := range n.Nodes {
		if !c.values(join(path, c.Name), yield) {
			return false
		}
	}
	return true
}

// Get returns the value at a path below n, which has been read; nil: there is none.
func (n Node) Get(path string) any {
	for p, v := range n.Values("") {
		if p == path {
			return v
		}
	}
	return nil
}

// MarshalJSON implements json.Marshaler: a value is itself, and a group an object in its order.
func (n Node) MarshalJSON() ([]byte, error) {
	if v, ok := n.Value.(string); ok {
		return text.Name(v).MarshalJSON()
	}
	if n.Value != nil {
		return json.Marshal(n.Value)
	}
	b := []byte{'{'}
	for i, c := range n.Nodes {
		if i > 0 {
			b = append(b, ',')
		}
		name, err := json.Marshal(c.Name)
		if err != nil {
			return nil, err
		}
		value, err := c.MarshalJSON()
		if err != nil {
			return nil, err
		}
		b = append(append(append(b, name...), ':'), value...)
	}
	return append(b, '}'), nil
}

// UnmarshalJSON implements json.Unmarshaler. Numbers become json.Number, and every value that is a
// string in JSON becomes one. An array is an error. The time and the memory that it takes go with
// the length of b, also if each group is in another one: b may be the answer of a hostile machine.
func (n *Node) UnmarshalJSON(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	return n.decode(b, d)
}

// decode reads a value by d, which reads b from its beginning on.
func (n *Node) decode(b []byte, d *json.Decoder) error {
	*n = Node{Name: n.Name}
	switch next := bytes.TrimLeft(b[d.InputOffset():], " \t\r\n:,"); {
	case len(next) == 0:
		return fmt.Errorf("inspect: no value")
	case next[0] == '"':
		var v text.Name
		err := d.Decode(&v)
		n.Value = string(v)
		return err
	case next[0] == '[':
		return fmt.Errorf("inspect: an array is no value")
	case next[0] != '{':
		return d.Decode(&n.Value)
	}
	if _, err := d.Token(); err != nil {
		return err
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return err
		}
		c := Node{Name: name.(string)}
		if err := c.decode(b, d); err != nil {
			return err
		}
		n.Nodes = append(n.Nodes, c)
	}
	_, err := d.Token()
	return err
}
