package machine

import (
	"errors"
	"io"
	"net"
	"testing"
)

// takes is the input of a guest that takes limit bytes and then ends.
type takes struct {
	got   []byte
	limit int
	full  chan struct{} // closed once it has limit bytes
}

func (k *takes) Write(p []byte) (int, error) {
	n := min(len(p), k.limit-len(k.got))
	if k.got = append(k.got, p[:n]...); n > 0 && len(k.got) == k.limit {
		close(k.full)
	}
	if n < len(p) {
		return n, errors.New("the machine ended")
	}
	return n, nil
}

func (*takes) Break() error { return nil }

// TestStreamPort: no byte for the guest is lost when one machine ends and the next one begins, and
// close ends the reader.
func TestStreamPort(t *testing.T) {
	near, far := net.Pipe()
	p := newStreamPort(near)
	first, second := &takes{limit: 3, full: make(chan struct{})}, &takes{limit: 5, full: make(chan struct{})}
	p.Connect(first)
	if _, err := far.Write([]byte("abcdef")); err != nil {
		t.Fatal(err)
	}
	<-first.full
	p.Connect(nil)
	p.Connect(second)
	if _, err := far.Write([]byte("gh")); err != nil {
		t.Fatal(err)
	}
	<-second.full
	go func() { _, _ = p.Write([]byte("out")) }()
	b := make([]byte, 3)
	if _, err := io.ReadFull(far, b); err != nil || string(b) != "out" {
		t.Errorf("%q, %v", b, err)
	}
	if err := p.close(); err != nil {
		t.Error(err)
	}
	if got := string(first.got) + "," + string(second.got); got != "abc,defgh" {
		t.Errorf("the guests got %q", got)
	}
	if n, err := p.Write([]byte("late")); n != 4 || err != nil {
		t.Errorf("after the end: %d, %v", n, err)
	}
}
