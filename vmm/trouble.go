package vmm

import (
	"fmt"
	"sync"
)

// maxTroubles bounds how many texts about the devices of one machine are reported, and kept.
const maxTroubles = 20

// troubles are the errors that a machine's devices found in their guest. Each text is reported
// once, up to maxTroubles: a guest can cause any number of different ones.
type troubles struct {
	mu   sync.Mutex
	told map[string]bool
	more uint64 // other texts, and repeated ones
}

// new records the text of err and reports whether to print it.
func (t *troubles) new(err error) bool {
	text := err.Error()
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.told[text]:
		return false
	case len(t.told) >= maxTroubles:
		t.more++
		return false
	case t.told == nil:
		t.told = map[string]bool{}
	}
	t.told[text] = true
	return true
}

// deviceTrouble is a transport's report of a device that broke. The guest sees the failure in the
// device's status, and runs on.
func (m *machine) deviceTrouble(err error) {
	if m.troubles.new(err) {
		m.cfg.Note(err.Error())
	}
}

// tellMore reports how many troubles were left out.
func (m *machine) tellMore() {
	m.troubles.mu.Lock()
	n := m.troubles.more
	m.troubles.mu.Unlock()
	if n > 0 {
		m.cfg.Note(fmt.Sprintf("and %d more notes about devices that the guest broke", n))
	}
}
