package vmm

import (
	"bytes"
	"io"
	"regexp"
	"sync"
)

// A Linux panic as the console shows it, at the start of a line but for
// printk's time stamp and caller. The second is the last line of a kernel that
// stays where it is (kernel/panic.c).
var (
	panicLine = regexp.MustCompile(`^(?:\[[ 0-9.TC]+\] ?)*(Kernel panic - not syncing: ?.*)$`)
	panicEnd  = regexp.MustCompile(`^(?:\[[ 0-9.TC]+\] ?)*---\[ end Kernel panic`)
)

// maxLine bounds what is kept of a line; no kernel line of interest is longer.
const maxLine = 512

// panicWatch passes console output on and looks for a panic in it.
type panicWatch struct {
	out      io.Writer
	on       bool
	panicked func(text string, final bool)

	mu   sync.Mutex
	line []byte
	last string
}

// Write passes p on, then looks at the lines that it completes.
func (w *panicWatch) Write(p []byte) (int, error) {
	n, err := w.out.Write(p)
	if !w.on {
		return n, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for rest := p; len(rest) > 0; {
		i := bytes.IndexByte(rest, '\n')
		part := rest
		if i >= 0 {
			part = rest[:i]
		}
		w.line = append(w.line, part[:min(len(part), maxLine-len(w.line))]...)
		if i < 0 {
			break
		}
		w.see(bytes.TrimRight(w.line, "\r"))
		w.line = w.line[:0]
		rest = rest[i+1:]
	}
	return n, err
}

func (w *panicWatch) see(line []byte) {
	if m := panicLine.FindSubmatch(line); m != nil {
		w.last = string(m[1])
		w.panicked(w.last, false)
	} else if w.last != "" && panicEnd.Match(line) {
		w.panicked(w.last, true)
	}
}

// lastPanic returns the panic message seen last, or "".
func (w *panicWatch) lastPanic() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}
