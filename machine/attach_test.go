package machine

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"gvm/vmm"
)

// screen is a Spec's console.
type screen struct {
	bytes.Buffer
	input vmm.Input
}

func (s *screen) Connect(in vmm.Input) { s.input = in }

// TestAttach: each end of the console sees the output, with what came before it, and types; the end
// of the machine ends it after the last output.
func TestAttach(t *testing.T) {
	var screen screen
	c := newSharedConsole(&screen)
	m := &Machine{console: c}
	guest := make(guestInput)
	c.Connect(guest)
	fmt.Fprint(c, "before\n")
	first, second := m.Attach(), m.Attach()
	fmt.Fprint(c, "after\n")
	for _, a := range []*Attachment{first, second} {
		fmt.Fprint(a, "typed")
		if got := <-guest; got != "typed" {
			t.Errorf("the guest got %q", got)
		}
	}
	m.Break()
	if got := <-guest; got != "break" {
		t.Errorf("the guest got %q", got)
	}
	first.Close()
	if n, err := first.Read(make([]byte, 8)); n != 0 || err != io.EOF {
		t.Errorf("closed: %d, %v", n, err)
	}
	c.Connect(nil)
	fmt.Fprint(c, "last\n")
	if err := c.close(); err != nil {
		t.Error(err)
	}
	for a, want := range map[*Attachment]string{second: "before\nafter\nlast\n", m.Attach(): "before\nafter\nlast\n"} {
		if b, err := io.ReadAll(a); err != nil || string(b) != want {
			t.Errorf("read %q, %v, want %q", b, err, want)
		}
	}
	m.Break()
	if screen.String() != "before\nafter\nlast\n" || screen.input != nil {
		t.Errorf("the Spec's console has %q", screen.String())
	}
}

// TestAttachBehind: a reader that is behind loses output, and reads how much, and no reader delays
// the guest.
func TestAttachBehind(t *testing.T) {
	c := newSharedConsole(nil)
	line := strings.Repeat("x", 1023) + "\n"
	for range 64 {
		fmt.Fprint(c, line)
	}
	fmt.Fprint(c, "recent\n")
	a := (&Machine{console: c}).Attach()
	const fits = (maxUnread - recentOutput) / 1024
	for range fits + 10 {
		fmt.Fprint(c, line)
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
	b, err := io.ReadAll(a)
	head, tail, _ := strings.Cut(string(b), "recent\n")
	if err != nil || len(head) > recentOutput || strings.Trim(head, "x\n") != "" || !strings.HasPrefix(head, "x") {
		t.Errorf("%d bytes before the attachment, %v", len(head), err)
	}
	lost := strings.TrimLeft(tail, "x\n")
	if n := strings.Count(tail, line); n < fits || lost != fmt.Sprintf("\r\n[gvm: %d bytes of output are lost here: "+
		"they were not read in time]\r\n", (fits+10-n)*1024) {
		t.Errorf("%d lines, then %q", n, lost)
	}
}

// TestAttachFull: an end whose input the guest does not take waits, until it is closed.
func TestAttachFull(t *testing.T) {
	c := newSharedConsole(nil)
	a := (&Machine{console: c}).Attach()
	if _, err := a.Write(make([]byte, maxQueued)); err != nil {
		t.Fatal(err)
	}
	written := make(chan struct{})
	go func() { defer close(written); _, _ = a.Write([]byte("more")) }()
	a.Close()
	<-written
	if err := c.close(); err != nil {
		t.Error(err)
	}
}
