package vmm

import (
	"bytes"
	"io"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// kernelLines match the lines that Linux prints about the machine's end. The expressions match the
// text of a printk record without its prefix. Like all expressions here they are compiled at the
// console's first line, because compiling takes as long as making a vCPU and would delay the start.
var kernelLines = sync.OnceValue(func() []kernelLine {
	return []kernelLine{
		{regexp.MustCompile(`^Kernel panic - not syncing`), func(w *consoleWatch, text string) {
			w.text, w.last, w.own = text, text, true
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
		// The last line of kernel_halt (kernel/reboot.c).
		{regexp.MustCompile(`^(reboot: )?System halted\.?$`), func(w *consoleWatch, _ string) { w.halts = true }},
		// A kernel that restarts normally did not panic: a program printed the text.
		{regexp.MustCompile(`^((reboot: )?Restarting system|sysrq: (SysRq : )?Resetting|kexec_core: Starting new kernel)`),
			func(w *consoleWatch, _ string) {
				if !w.proved {
					w.text, w.own = "", false
				}
			}},
	}
})

type kernelLine struct {
	text *regexp.Regexp
	read func(w *consoleWatch, text string)
}

// The prefixes of a printk record: none or several of a log level (console_msg_format=syslog), a
// time stamp (printk.time), and the task or CPU that printed it (CONFIG_PRINTK_CALLER). Patched
// kernels put other things between brackets. A record starts a line, or follows the output of a
// program or another record.
var (
	recordAtStart = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^ *(?:<(\d{1,3})>)?(?:[ I]?\[[^][]{1,64}\])* ?`)
	})
	recordInside = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`(?:<(\d{1,3})>|\[ *(?:\d+\.\d+|[TC]\d+)[^][]{0,48}\])(?:[ I]?\[[^][]{1,64}\])* ?`)
	})
	panicInside = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`Kernel panic - not syncing: .*\S`) })
)

// records calls read with each text in a line that can be a kernel record.
func records(line []byte, read func(text string)) {
	at := append([][]int{recordAtStart().FindSubmatchIndex(line)}, recordInside().FindAllSubmatchIndex(line, -1)...)
	for i, m := range at {
		if i > 0 && m[1] == at[0][1] {
			continue // found above by recordAtStart
		}
		if m[2] >= 0 {
			// Records that programs write to /dev/kmsg have a facility other than 0 (the kernel).
			if level, _ := strconv.Atoi(string(line[m[2]:m[3]])); level >= 8 {
				continue
			}
		}
		read(strings.TrimSpace(string(line[m[1]:])))
	}
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
	line    consoleLine
	// text is a panic's message, or "". It counts if the kernel printed it (own), or if a line that
	// follows only a panic came after it (proved).
	text        string
	own, proved bool
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
			if w.line.add(c) {
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
	line := w.line.text
	w.line.text, w.line.inString, w.line.full = line[:0], false, false
	if len(line) == 0 {
		return
	}
	known := false
	records(line, func(text string) {
		for _, k := range kernelLines() {
			if k.text.MatchString(text) {
				known = true
				k.read(w, text)
			}
		}
	})
	if !known && !w.own && !w.proved {
		if text := panicInside().Find(line); text != nil {
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

// forgetPanic forgets the panic that the console showed.
func (w *consoleWatch) forgetPanic() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text, w.own, w.proved = "", false, false
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

// consoleLine collects the text of a line, without line ends, other control characters, escape
// sequences and control strings (ECMA-48). CR, LF and CR LF each end a line.
type consoleLine struct {
	text   []byte
	escape byte // 0: none; escapeByte; '[' in a control sequence (ECMA-48, 5.4)
	// A control string (5.6), such as a window's title, occupies text from start on until its
	// terminator removes it. A string that the end of the line cuts stays as text.
	inString bool
	start    int
	more     int  // bytes missing from the UTF-8 character
	full     bool // the text holds a panic's message and drops bytes beyond maxLine
}

const (
	escapeByte = 0x1b
	// maxLine bounds a line; a kernel record has 1 KiB (PRINTKRB_RECORD_MAX). A longer line keeps
	// its end, where a record can begin.
	maxLine = 4 << 10
	keptEnd = 256
)

// add adds a byte and reports whether it ended the line.
func (l *consoleLine) add(c byte) bool {
	escape, continued := l.escape, l.more > 0 && c&0xc0 == 0x80
	l.escape = 0
	if l.more--; !continued {
		l.more = 0
		switch {
		case c >= 0xf0:
			l.more = 3
		case c >= 0xe0:
			l.more = 2
		case c >= 0xc2:
			l.more = 1
		}
	}
	switch {
	case c == '\r' || c == '\n':
		return true
	case c == escapeByte:
		l.escape = escapeByte
	case c == 0x18 || c == 0x1a: // CAN and SUB cancel a sequence
		l.endString()
	case c == '\a' && l.inString: // as in xterm
		l.endString()
	case c < ' ' && c != '\t' || c == 0x7f:
		l.escape = escape
	case c&^0x1f == 0x80 && !continued: // an 8-bit control is ESC and a 7-bit one (5.3)
		l.control(c - 0x40)
	case c&^0x1f == 0x80 && bytes.HasSuffix(l.text, []byte{0xc2}): // the same in UTF-8
		l.text = l.text[:len(l.text)-1]
		l.control(c - 0x40)
	case escape == escapeByte && c >= '@' && c <= '_':
		l.control(c)
	case escape == escapeByte && c <= '/', escape == '[' && c <= '?':
		l.escape = escape // an intermediate byte, or a parameter
	case escape != 0: // the final byte
	case len(l.text) < maxLine:
		l.text = append(l.text, c)
	case !l.full:
		from := maxLine - keptEnd
		if m := panicInside().FindIndex(l.text); m != nil {
			from, l.full = max(m[0]-keptEnd, 0), true
		}
		l.start = max(l.start-from, 0)
		if l.text = append(l.text[:0], l.text[from:]...); from > 0 {
			l.text = append(l.text, c)
		}
	}
	return false
}

// control applies a control function of the C1 set, ESC and c, to the line.
func (l *consoleLine) control(c byte) {
	switch c {
	case '[':
		l.escape = '['
	case 'P', 'X', ']', '^', '_': // DCS, SOS, OSC, PM, APC
		if !l.inString { // else nested, as tmux passes them on
			l.inString, l.start = true, len(l.text)
		}
	case '\\': // ST
		l.endString()
	}
}

// endString removes the control string.
func (l *consoleLine) endString() {
	if l.inString {
		l.text, l.inString, l.full = l.text[:min(l.start, len(l.text))], false, false
	}
}
