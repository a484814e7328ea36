package vmm

import (
	"io"
	"regexp"
	"strings"
	"sync"
	"time"

	"gvm/verdict/klog"
)

// kernelLines match the lines that Linux prints about the machine's end. The expressions match the
// text of a printk record without its prefix. Like all expressions here they are compiled at the
// console's first line, because compiling takes as long as making a vCPU and would delay the start.
var kernelLines = sync.OnceValue(func() []kernelLine {
	return []kernelLine{
		{regexp.MustCompile(`^Kernel panic - not syncing`), func(w *consoleWatch, text string) {
			w.text, w.last, w.own = text, text, true
		}},
		// After an exception before it can panic the kernel only halts. With quiet this is its last line
		// (early_fixup_exception in arch/x86/mm/extable.c).
		{regexp.MustCompile(`^PANIC: early exception `), func(w *consoleWatch, text string) {
			w.text, w.last, w.own = text, text, true
			w.early, w.halts = true, true
		}},
		// Lines that follow a panic (kernel/panic.c; the notifier in arch/x86/kernel/setup.c), and
		// the first line of a crash kernel.
		{regexp.MustCompile(`^(CPU: \d+ (UID: \d+ )?PID: \d+ |Kernel Offset: |Rebooting in \d+ seconds|` +
			`---\[ end Kernel panic|Linux version )`),
			func(w *consoleWatch, _ string) { w.proved = w.text != "" }},
		// After these lines the kernel only waits.
		{regexp.MustCompile(`^(Rebooting in \d+ seconds|---\[ end Kernel panic)`), func(w *consoleWatch, _ string) {
			w.waits = w.proved
		}},
		// The last line of kernel_halt (kernel/reboot.c). A kernel that prints it had no early exception:
		// a program printed the text.
		{regexp.MustCompile(`^(reboot: )?System halted\.?$`),
			func(w *consoleWatch, _ string) { w.halts, w.early = true, false }},
		// A kernel that restarts normally did not panic: a program printed the text.
		{regexp.MustCompile(`^((reboot: )?Restarting system|sysrq: (SysRq : )?Resetting|kexec_core: Starting new kernel)`),
			func(w *consoleWatch, _ string) {
				if !w.proved {
					w.text, w.own, w.early = "", false, false
				}
			}},
	}
})

type kernelLine struct {
	text *regexp.Regexp
	read func(w *consoleWatch, text string)
}

// consoleWatch passes console output on and reads the kernel's lines in it.
type consoleWatch struct {
	out io.Writer
	on  bool
	// final is called, perhaps several times and with no lock held, once the kernel has printed
	// that it panicked and only waits.
	final func()
	halt  func() // likewise, once it has printed that it halts

	mu      sync.Mutex
	writing bool      // a write to out has not returned
	wrote   time.Time // when the last write to out returned
	line    klog.Line
	// text is a panic's message, or "". It counts if the kernel printed it (own), or if a line that
	// follows only a panic came after it (proved).
	text        string
	own, proved bool
	early       bool   // it is an early exception's, and no line of an orderly end followed
	waits       bool   // final must be called
	halts       bool   // halt must be called
	last        string // the last message seen, whether it counts or not
}

// Write passes p on, then reads the lines that p completes.
func (w *consoleWatch) Write(p []byte) (int, error) {
	w.mu.Lock()
	w.writing = true
	w.mu.Unlock()
	n, err := w.out.Write(p)
	w.mu.Lock()
	w.writing, w.wrote = false, time.Now()
	if w.on {
		for _, c := range p {
			if w.line.Add(c) {
				w.read()
			}
		}
	}
	waits, halts := w.waits, w.halts
	w.waits, w.halts = false, false
	w.mu.Unlock()
	if waits {
		w.final()
	}
	if halts {
		w.halt()
	}
	return n, err
}

// read parses the line and empties it. The caller holds mu.
func (w *consoleWatch) read() {
	line := w.line.Take()
	if len(line) == 0 {
		return
	}
	known := false
	klog.Records(line, func(r klog.Record) {
		if r.FromUser() {
			return
		}
		text := strings.TrimSpace(r.Text)
		for _, k := range kernelLines() {
			if k.text.MatchString(text) {
				known = true
				k.read(w, text)
			}
		}
	})
	if !known && !w.own && !w.proved {
		if text := klog.PanicMessage().Find(line); text != nil {
			w.text, w.last = string(text), string(text)
		}
	}
}

// panicText returns the message of the panic that the console showed, or "". If the panic is known
// from elsewhere, the message need not count.
func (w *consoleWatch) panicText(known bool) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.read() // a last line without an end
	switch {
	case w.own, w.proved:
		return w.text
	case known:
		return w.last
	}
	return ""
}

// panicProved reports whether lines that follow only a panic came after its message.
func (w *consoleWatch) panicProved() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.proved
}

// haltsEarly reports whether the kernel's last word was an early exception.
func (w *consoleWatch) haltsEarly() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.early
}

// forgetPanic forgets the panic that the console showed.
func (w *consoleWatch) forgetPanic() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text, w.own, w.proved, w.early = "", false, false, false
}

// silent returns how long the guest has printed nothing, 0 while output waits to be written.
func (w *consoleWatch) silent() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.writing {
		return 0
	}
	return time.Since(w.wrote)
}
