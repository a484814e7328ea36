package vmm

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"gvm/devices/pvpanic"
	"gvm/panics"
)

// A guest that panicked runs on until it ends by itself: the kernel signals the pvpanic device
// first, and then prints the output of panic_print=. A guest that does not end is ended after its
// console has been silent for panicSilence, or for haltSilence after the last line of a kernel that
// waits for ever, and at the latest panicLimit after the panic. After a pause these times begin
// anew.
const (
	panicSilence = 5 * time.Second
	haltSilence  = time.Second
	panicLimit   = time.Minute

	// tooLate is how late a timer comes only if this process was stopped meanwhile, and the guest with
	// it.
	tooLate = time.Second
)

// panicState is the known state of the guest's panic.
type panicState struct {
	told atomic.Bool // by pvpanic

	mu      sync.Mutex
	timer   *time.Timer   // nil: no wait for silence
	silence time.Duration // how long the console must be silent
	began   time.Time     // start of the wait
	due     time.Time     // when the timer is to look at the console
	resumed time.Time     // end of the last pause
	final   bool          // pvpanic told of a panic without a crash kernel
}

// pvpanic handles the guest's panic notification. A guest that starts its crash kernel ends when
// the crash kernel does. A wait for silence that began before the first notification was for a
// program's text: the kernel prints its last line later.
func (m *machine) pvpanic(e pvpanic.Event) {
	if e&(pvpanic.Panicked|pvpanic.CrashLoaded) == 0 {
		return
	}
	p := &m.panicked
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.told.Swap(true)
	if e&pvpanic.CrashLoaded == 0 {
		known, p.final = p.final, true
	}
	if !known && p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
	if e&pvpanic.CrashLoaded == 0 {
		m.awaitSilence(panicSilence)
	}
}

// panicFinal is called when the console shows that the guest panicked and waits for ever.
func (m *machine) panicFinal() {
	m.panicked.mu.Lock()
	defer m.panicked.mu.Unlock()
	m.awaitSilence(haltSilence)
}

// awaitSilence ends the machine when its console has been silent for d. The caller holds
// panicked.mu.
func (m *machine) awaitSilence(d time.Duration) {
	p := &m.panicked
	switch {
	case m.stop.Load():
	case p.timer == nil:
		p.silence, p.began = d, time.Now()
		p.due = p.began.Add(d)
		p.timer = time.AfterFunc(d, panics.Func(m.checkSilence))
	case d < p.silence:
		p.silence = d
		p.wait(d)
	}
}

// wait sets the timer. The caller holds mu.
func (p *panicState) wait(d time.Duration) {
	p.due = time.Now().Add(d)
	p.timer.Reset(d)
}

func (m *machine) checkSilence() {
	p := &m.panicked
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.due) > tooLate {
		p.goOn()
	}
	silent := min(m.console.silent(), time.Since(p.resumed))
	switch {
	case m.stop.Load():
	case p.timer == nil: // stopped too late
	case m.stopped():
		p.wait(p.silence)
	case silent >= p.silence:
		m.end(Outcome{Ending: GuestPanic, Err: fmt.Errorf("its console was then silent for %v", p.silence)})
	case time.Since(p.began) < panicLimit:
		p.wait(p.silence - silent)
	case p.told.Load():
		m.end(Outcome{Ending: GuestPanic, Err: fmt.Errorf("its console was still busy %v later", panicLimit)})
	default: // a program printed the text, and runs on
		m.console.forgetPanic()
		p.timer = nil
	}
}

// resume is called when the guest's CPUs go on after a pause.
func (p *panicState) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.goOn()
}

// goOn begins the times anew. The caller holds mu.
func (p *panicState) goOn() {
	p.resumed = time.Now()
	p.began = p.resumed
}

// stopSilence stops the timer, once the machine has ended.
func (p *panicState) stopSilence() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
	}
}

// verdict turns the outcome of a closed machine whose console is complete into GuestPanic if the
// guest's kernel panicked: the panic comes first, and the end says how it ended. If only the
// console showed the panic, the kernel must have reset afterwards, for some values of reboot= by a
// triple fault. If it powered off it did not panic: a program printed the text. A triple fault
// belongs to a panic only if the kernel printed the lines that follow one, and so does a halt,
// unless the kernel had an early exception, which with quiet has no further lines.
func (m *machine) verdict(out Outcome) Outcome {
	told := m.panicked.told.Load()
	text := m.console.panicText(told || out.Ending == GuestPanic)
	var then string
	switch out.Ending {
	case GuestPanic:
		then = out.Err.Error()
	case GuestReset:
		then = "the guest then reset"
	case GuestCrashed:
		then = fmt.Sprintf("the guest then crashed: %v", out.Err)
		told = told || out.tripleFault && m.console.panicProved()
	case PoweredOff:
		then = "the guest then powered off"
	case Expired:
		then = out.Err.Error()
		told = told || m.console.panicProved()
	case Halted:
		then = "the guest then halted"
		told = told || m.console.panicProved() || m.console.haltsEarly()
	case Stopped:
		then = fmt.Sprintf("the guest was then stopped: %v", out.Err)
	default:
		return out
	}
	switch {
	case told, out.Ending == GuestPanic, out.Ending == GuestReset && text != "":
	default:
		return out
	}
	if text == "" {
		text = "the guest's kernel panicked"
	}
	return Outcome{Ending: GuestPanic, Err: errors.New(text + "; " + then), Report: out.Report}
}
