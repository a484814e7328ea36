package vmm

import (
	"fmt"
	"sync"
)

// maxTroubles bounds how many texts are told of the devices of one machine, and kept.
const maxTroubles = 20

// troubles are what devices of a machine had to say of their guest. Each text is told once, the
// first maxTroubles of them: a guest can make any number, each of its own.
type troubles struct {
	mu   sync.Mutex
	told map[string]bool
	more uint64 // other texts, and what was said again of them
}

// new notes the text of err and says whether it is to be told.
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

// deviceTrouble is what a transport tells of a device that broke. The guest
// sees it in the device's status, and goes on.
func (m *machine) deviceTrouble(err error) {
	if m.troubles.new(err) {
		m.cfg.Note(err.Error())
	}
}

// tellMore tells how many troubles were left out.
func (m *machine) tellMore() {
	m.troubles.mu.Lock()
	n := m.troubles.more
	m.troubles.mu.Unlock()
	if n > 0 {
		m.cfg.Note(fmt.Sprintf("and %d more notes about devices that the guest broke", n))
	}
}
