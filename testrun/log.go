package testrun

import (
	"io"
	"sync"

	"gvm/panics"
	"gvm/verdict"
	"gvm/vmm"
)

// maxTail bounds the end of the kernel's log that a Result has.
const maxTail = 16 << 10

// kernelLog is the console of the machine.
type kernelLog struct {
	to    io.Writer
	touch func()

	mu      sync.Mutex
	input   vmm.Input // nil: no machine runs
	reader  *verdict.Reader
	tail    []byte
	writing bool  // a write to to has not returned
	err     error // of to
}

func newKernelLog(to io.Writer, p verdict.Policy, touch func()) *kernelLog {
	return &kernelLog{to: to, touch: touch, reader: verdict.NewReader(p, nil)}
}

// Connect takes the way to the kernel's SysRq.
func (l *kernelLog) Connect(in vmm.Input) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.input = in
}

// sysRq presses keys of SysRq on the console (Documentation/admin-guide/sysrq.rst). It waits until
// the kernel has taken them, or the machine ends.
func (l *kernelLog) sysRq(keys string) {
	l.mu.Lock()
	in := l.input
	l.mu.Unlock()
	if in == nil {
		return
	}
	for i := range keys {
		if err := in.Break(); err != nil {
			return
		}
		if _, err := in.Write([]byte{keys[i]}); err != nil {
			return
		}
	}
}

// Write keeps the log. A file that cannot take it does not stop the guest.
func (l *kernelLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.reader.Progress()
	_, _ = l.reader.Write(p)
	if l.reader.Progress() != before {
		l.touch()
	}
	l.tail = append(l.tail, p...)
	if n := len(l.tail) - maxTail; n > maxTail {
		l.tail = append(l.tail[:0], l.tail[n:]...)
	}
	if l.to != nil && l.err == nil {
		l.writing = true
		var err error
		panics.Unlocked(&l.mu, func() { _, err = l.to.Write(p) }) // a pipe's reader may take any time
		l.writing, l.err = false, err
	}
	return len(p), nil
}

// isWriting reports whether a write of the log waits for its reader.
func (l *kernelLog) isWriting() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.writing
}
