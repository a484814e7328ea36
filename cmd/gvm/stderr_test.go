package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestErrorOutput: say waits for no reader, keeps the order, and has a bounded queue.
func TestErrorOutput(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	was := os.Stderr
	os.Stderr = w
	defer func() { os.Stderr = was }()
	var e errorOutput
	const lines = 10 * maxErrorQueue
	for i := range lines {
		e.say(fmt.Sprintf("line %d %s\n", i, strings.Repeat("x", 100)))
	}
	e.flush(0) // does not wait either
	read := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		read <- string(b)
	}()
	e.flush(-1)
	w.Close()
	got := <-read
	if !strings.HasPrefix(got, "line 0 ") || !strings.Contains(got, " more notes, which nothing read in time\n") {
		t.Errorf("%d bytes begin %.20q", len(got), got)
	}
	if n := strings.Count(got, "\n"); n < maxErrorQueue || n > 3*maxErrorQueue {
		t.Errorf("%d lines of %d, want about %d", n, lines, maxErrorQueue)
	}
}
