package inspect

import (
	"fmt"
	"testing"
	"time"
)

// TestEvents: the newest event comes first, with its values and its age, and no more than sixteen
// are kept.
func TestEvents(t *testing.T) {
	var e Events
	if n := e.Node("event"); len(n.Nodes) > 0 || n.Kind != Passing || n.Name != "event" {
		t.Errorf("no events: %+v", n)
	}
	e.Add("reset")
	before := Clock()
	e.Add("DRIVER_OK", Int("queues", 3))
	n := e.Node("event")
	if age, ok := n.Get("0/age").(Age); !ok || time.Duration(age) > Clock()-before || age < 0 {
		t.Errorf("age %v", n.Get("0/age"))
	}
	if n.Get("0/event") != "DRIVER_OK" || n.Get("0/queues") != 3 || n.Get("1/event") != "reset" ||
		n.Get("2/event") != nil {
		t.Errorf("two events: %+v", n)
	}
	for i := range 100 {
		e.Add(fmt.Sprint(i))
	}
	n = e.Node("event")
	if len(n.Nodes) != 16 || n.Get("0/event") != "99" || n.Get("15/event") != "84" {
		t.Errorf("102 events: %+v", n)
	}
}
