package machine

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"gvm/panics"
	"gvm/vmm"
)

const (
	// recentOutput is how much of the console's earlier output an Attachment begins with, at most.
	recentOutput = 16 << 10
	// maxUnread bounds the output that an Attachment holds for its reader.
	maxUnread = 256 << 10
)

// sharedConsole is COM1 with all that are attached to it. None of them delays the guest.
type sharedConsole struct {
	vmm.Console // of the Spec

	input  *InputQueue
	feeder sync.WaitGroup

	mu       sync.Mutex
	recent   []byte // the end of the output
	attached map[*Attachment]bool
	feeding  bool // feeder runs, or has run
	ended    bool
}

func newSharedConsole(c vmm.Console) *sharedConsole {
	if c == nil {
		c = Output(io.Discard)
	}
	return &sharedConsole{Console: c, input: NewInputQueue(), attached: map[*Attachment]bool{}}
}

// Write implements vmm.Console. Attachments get output first, as the console may take its time.
func (s *sharedConsole) Write(p []byte) (int, error) {
	s.mu.Lock()
	s.recent = append(s.recent, p[max(0, len(p)-recentOutput):]...)
	if n := len(s.recent) - recentOutput; n > recentOutput {
		s.recent = append(s.recent[:0], s.recent[n:]...)
	}
	for a := range s.attached {
		a.add(p)
	}
	s.mu.Unlock()
	return s.Console.Write(p)
}

// Connect implements vmm.Console.
func (s *sharedConsole) Connect(in vmm.Input) {
	s.input.Connect(in)
	s.Console.Connect(in)
}

// close ends the attachments, once they have read everything. The guest's input has ended.
func (s *sharedConsole) close() error {
	s.mu.Lock()
	s.ended = true
	for a := range s.attached {
		a.more.Broadcast()
	}
	s.mu.Unlock()
	s.input.Close()
	s.feeder.Wait()
	return nil
}

// feed starts the goroutine that gives input to the guest, once. The caller holds mu.
func (s *sharedConsole) feed() {
	if !s.ended && !s.feeding {
		s.feeding = true
		s.feeder.Go(panics.Func(s.input.Feed))
	}
}

// attach returns an Attachment, which begins with the last output.
func (s *sharedConsole) attach() *Attachment {
	a := &Attachment{console: s}
	a.more.L = &s.mu
	s.mu.Lock()
	defer s.mu.Unlock()
	recent := s.recent
	if n := len(recent) - recentOutput; n > 0 {
		recent = recent[n:]
		recent = recent[bytes.IndexByte(recent, '\n')+1:]
	}
	a.unread = bytes.Clone(recent)
	s.attached[a] = true
	s.feed()
	return a
}

// Attachment is an end of the console of a running machine. Its methods may be called from several
// goroutines.
type Attachment struct {
	console *sharedConsole
	more    sync.Cond // Read waits; the lock is console.mu, which guards the rest
	unread  []byte
	lost    int // bytes of output that had no room
	closed  bool
}

// add adds output, or counts it as lost if the reader is behind. The caller holds console.mu.
func (a *Attachment) add(p []byte) {
	if a.lost > 0 || len(a.unread)+len(p) > maxUnread {
		a.lost += len(p)
	} else {
		a.unread = append(a.unread, p...)
	}
	a.more.Broadcast()
}

// Read reads the guest's output. After output that was lost, because Read was not called in time,
// it returns a line about that. It returns io.EOF when the machine has ended, or the Attachment is
// closed.
func (a *Attachment) Read(p []byte) (int, error) {
	a.console.mu.Lock()
	defer a.console.mu.Unlock()
	for len(a.unread) == 0 && a.lost == 0 && !a.closed && !a.console.ended {
		a.more.Wait()
	}
	if a.closed {
		return 0, io.EOF
	}
	if len(a.unread) == 0 && a.lost > 0 {
		a.unread = fmt.Appendf(nil, "\r\n[gvm: %d bytes of output are lost here: they were not read in time]\r\n", a.lost)
		a.lost = 0
	}
	if len(a.unread) == 0 {
		return 0, io.EOF
	}
	n := copy(p, a.unread)
	if a.unread = a.unread[n:]; len(a.unread) == 0 {
		a.unread = nil
	}
	return n, nil
}

// Write adds input for the guest, beside that of the Spec's Console and of other Attachments: each
// Write stays together, and they mix in the order of their calls. It waits while 1 MiB of input
// waits for the guest.
func (a *Attachment) Write(p []byte) (int, error) {
	a.console.input.Put(p, func() bool {
		a.console.mu.Lock()
		defer a.console.mu.Unlock()
		return a.closed
	})
	return len(p), nil
}

// Close ends a Read and a Write.
func (a *Attachment) Close() error {
	s := a.console
	s.mu.Lock()
	a.closed = true
	delete(s.attached, a)
	s.mu.Unlock()
	a.more.Broadcast()
	s.input.Changed()
	return nil
}

// Attach returns a new end of the console, which begins with the last 16 KiB of output. It ends
// with the machine.
func (m *Machine) Attach() *Attachment { return m.console.attach() }

// Break sends a break on the console, when the guest has taken the input before it.
func (m *Machine) Break() {
	m.console.mu.Lock()
	m.console.feed()
	m.console.mu.Unlock()
	m.console.input.Put(nil, func() bool { return true })
}
