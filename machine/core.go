package machine

import (
	"context"
	"errors"
	"io"

	"gvm/control"
	"gvm/guestmem"
	"gvm/panics"
	"gvm/vmm"
	"gvm/vmm/vmcore"
)

// ErrDumping refuses a second core at a time, and a resume during one.
var ErrDumping = errors.New("a dump of its memory is under way")

// Core pauses the machine, unless it is paused, and returns an ELF core of it in the form of
// control.PutCore: see package vmcore. The machine runs on when the core is complete, or is closed
// before that, or when the machine ends. Errors are ErrDumping and those of Pause.
func (m *Machine) Core(ctx context.Context) (io.ReadCloser, error) {
	m.dump.Lock()
	busy := m.dumping
	m.dumping = true
	m.dump.Unlock()
	if busy {
		return nil, ErrDumping
	}
	err := m.pauser.Pause(ctx)
	over := func() {
		m.dump.Lock()
		defer m.dump.Unlock()
		if m.dumping = false; err == nil {
			_ = m.pauser.Resume() // fails if the machine has ended
		}
	}
	if err != nil && !errors.Is(err, vmm.ErrPaused) {
		defer over()
		return nil, err
	}
	nothing := func(context.Context, *guestmem.Memory, []vmcore.CPU) error { return nil }
	if e := m.inspector.Core(func() {}, nothing); e != nil {
		defer over()
		return nil, e // of a CPU that does not stop
	}
	r, w := io.Pipe()
	panics.Go(func() { // ends with the reader or the machine
		running := true
		resume := func() {
			if running {
				running = false
				over()
			}
		}
		defer resume()
		w.CloseWithError(m.inspector.Core(func() { w.CloseWithError(vmm.ErrNotRunning) },
			func(life context.Context, mem *guestmem.Memory, cpus []vmcore.CPU) error {
				size, release, err := vmcore.Write(life, mem, cpus, func(off int64, p []byte) error {
					return control.PutCore(w, off, p)
				})
				if err != nil {
					return err
				}
				resume()
				return control.EndCore(w, size, release)
			}))
	})
	return r, nil
}
