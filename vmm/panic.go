package vmm

import (
	"errors"

	"gvm/devices/pvpanic"
)

// pvpanic is the guest's panic notifier. A guest that goes on to its crash
// kernel, or that just shuts down, is left to do so.
func (m *machine) pvpanic(e pvpanic.Event) {
	if e&pvpanic.Panicked != 0 {
		m.end(Outcome{Ending: GuestPanic})
	}
}

// panicFinal is the console's word that the guest panicked and stays where it is.
func (m *machine) panicFinal() { m.end(Outcome{Ending: GuestPanic}) }

// verdict makes the outcome of a machine that has been closed, whose console has shown all, what it
// is if the guest's kernel panicked: a kernel resets after that, for some values of reboot= by a
// triple fault. One that was only seen to panic, and powers off, did not: a program printed that.
func (m *machine) verdict(out Outcome) Outcome {
	text := m.console.panicText()
	switch {
	case out.Ending == GuestPanic && text == "":
		text = "the guest's kernel panicked"
	case out.Ending == GuestPanic, text != "" && (out.Ending == GuestReset || out.tripleFault):
	default:
		return out
	}
	return Outcome{Ending: GuestPanic, Err: errors.New(text), Report: out.Report}
}
