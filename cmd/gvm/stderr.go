package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/term"

	"gvm/panics"
)

// errorOutput writes to standard error. No caller waits for its reader: a pipe that no program
// reads would otherwise hold up the guest's disks, the control socket and the end of the run.
type errorOutput struct {
	mu      sync.Mutex
	queue   []string
	dropped int           // since the queue was full
	idle    chan struct{} // closed when the queue is written; nil: it is empty
	midLine atomic.Bool   // the guest's last output to the terminal ended no line
}

// maxErrorQueue bounds the notes that wait for a reader.
const maxErrorQueue = 256

var stderr errorOutput

// say queues text to be written, in order. It begins a line of its own on the terminal of the
// guest.
func (e *errorOutput) say(text string) {
	if e.midLine.Swap(false) && term.IsTerminal(int(os.Stderr.Fd())) {
		text = "\r\n" + text // the terminal may be raw
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.queue) == maxErrorQueue {
		e.dropped++
		return
	}
	e.queue = append(e.queue, text)
	if e.idle == nil {
		e.idle = make(chan struct{})
		panics.Go(e.write) // ends when the queue is empty, or with the process
	}
}

func (e *errorOutput) write() {
	for {
		e.mu.Lock()
		queue, dropped := e.queue, e.dropped
		e.queue, e.dropped = nil, 0
		if len(queue) == 0 && dropped == 0 {
			close(e.idle)
			e.idle = nil
			e.mu.Unlock()
			return
		}
		e.mu.Unlock()
		for _, text := range queue {
			_, _ = io.WriteString(os.Stderr, text)
		}
		if dropped > 0 {
			fmt.Fprintf(os.Stderr, "gvm: and %d more notes, which nothing read in time\n", dropped)
		}
	}
}

// flush returns when the queue is written, or after patience if that is not negative.
func (e *errorOutput) flush(patience time.Duration) {
	e.mu.Lock()
	idle := e.idle
	e.mu.Unlock()
	if idle == nil {
		return
	}
	var late <-chan time.Time
	if patience >= 0 {
		late = time.After(patience)
	}
	select {
	case <-idle:
	case <-late:
	}
}
