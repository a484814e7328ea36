package main

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/term"

	"gvm/vmm"
)

// terminal is this process's terminal, raw, as a guest's console. Ctrl-a x stops the guest.
type terminal struct {
	in       *os.File // not standard input, as it can be closed while it is read
	settings *term.State
	stop     func(error)
	reads    sync.WaitGroup

	mu sync.Mutex
	to vmm.Input // nil: none
}

func openTerminal(stop func(error)) (*terminal, error) {
	in, err := os.Open("/dev/tty")
	if err != nil {
		return nil, err
	}
	settings, err := term.MakeRaw(int(os.Stdin.Fd()))
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	t := &terminal{in: in, settings: settings, stop: stop}
	t.reads.Go(t.read)
	return t, nil
}

// close ends the input and restores the terminal's settings. The machine has ended, so that no
// input waits for the guest.
func (t *terminal) close() error {
	err := t.in.Close()
	t.reads.Wait()
	return errors.Join(err, term.Restore(int(os.Stdin.Fd()), t.settings))
}

func (t *terminal) Write(p []byte) (int, error) { return os.Stdout.Write(p) }

func (t *terminal) Connect(to vmm.Input) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.to = to
}

// read passes input on until close.
func (t *terminal) read() {
	const ctrlA = 1
	escaped := false
	for key := make([]byte, 1); ; {
		if _, err := t.in.Read(key); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				t.stop(err)
			}
			return
		}
		switch {
		case escaped && key[0] == 'x':
			t.stop(errors.New("stopped by Ctrl-a x"))
			return
		case !escaped && key[0] == ctrlA:
			escaped = true
			continue
		}
		escaped = false
		t.mu.Lock()
		to := t.to
		t.mu.Unlock()
		if to != nil {
			_, _ = to.Write(key) // it fails if the guest ends meanwhile
		}
	}
}
