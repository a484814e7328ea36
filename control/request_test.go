package control

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"testing"
)

// leftMachine's Pause lasts until its client has gone.
type leftMachine struct {
	*fake
	paused chan struct{}
	left   chan error
}

func (m leftMachine) Pause(ctx context.Context) error {
	close(m.paused)
	<-ctx.Done()
	m.left <- ctx.Err()
	return ctx.Err()
}

// TestClientLeaves: a request ends with the connection of its client.
func TestClientLeaves(t *testing.T) {
	m := leftMachine{newFake(), make(chan struct{}), make(chan error, 1)}
	d, _ := serve(t, m)
	ctx, cancel := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	go func() { answered <- NewClient(d, "vm").Pause(ctx) }()
	<-m.paused
	cancel()
	if err := <-answered; err == nil {
		t.Error("a client that left has an answer")
	}
	if err := <-m.left; err != context.Canceled {
		t.Errorf("the request of a client that left: %v", err)
	}
}

// TestExpect: a client that waits for leave to send its body gets it.
func TestExpect(t *testing.T) {
	f := newFake()
	d, _ := serve(t, f)
	conn, err := d.dial(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "POST /v1/disks HTTP/1.1\r\nHost: gvm\r\nContent-Length: 13\r\n"+
		"Expect: 100-continue\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	for _, want := range []int{http.StatusContinue, http.StatusOK} {
		r, err := http.ReadResponse(in, nil)
		if err != nil || r.StatusCode != want {
			t.Fatalf("%+v, %v, want %d", r, err, want)
		}
		_, _ = io.WriteString(conn, `{"disk": "a"}`)
	}
	if list := f.Disks(); len(list) != 1 {
		t.Errorf("disks: %+v", list)
	}
}
