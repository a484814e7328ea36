package klog

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// The prefixes of a printk record: none or several of a log level (console_msg_format=syslog), a
// time stamp (printk.time), and the task or CPU that printed it (CONFIG_PRINTK_CALLER). Patched
// kernels put other things between brackets. A record starts a line, or follows the output of a
// program or another record. The expressions are compiled at the first line, because that takes as
// long as making a vCPU and would delay a start.
var (
	recordAtStart = pattern(`^ *(?:<(\d{1,3})>)?(?:[ I]?\[[^][]{1,64}\])* ?`)
	recordInside  = pattern(`(?:<(\d{1,3})>|\[ *(?:\d+\.\d+|[TC]\d+)[^][]{0,48}\])(?:[ I]?\[[^][]{1,64}\])* ?`)
	// PanicMessage matches the message of a panic anywhere in a line.
	PanicMessage = pattern(`Kernel panic - not syncing: .*\S`)
	stamp        = pattern(`\[ *(\d+\.\d+)`)
	caller       = pattern(`\[ *([TC]\d+)\]`)
)

// pattern compiles a regular expression on first use.
func pattern(s string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(s) })
}

// Record is a text in a line of a console that can be a record of the kernel.
type Record struct {
	Prefix string // log level, time stamp and caller as they stand; "": none
	Text   string // the rest, with its leading spaces
	Level  int    // facility and level of the syslog prefix; -1: none
}

// FromUser reports whether a program wrote the record to /dev/kmsg: its facility is not 0, the
// kernel's.
func (r Record) FromUser() bool { return r.Level >= 8 }

// Time returns the time stamp in seconds, or "".
func (r Record) Time() string { return group(stamp(), r.Prefix) }

// Caller returns the task or CPU that printed the record, such as T12 or C0, or "".
func (r Record) Caller() string { return group(caller(), r.Prefix) }

func group(re *regexp.Regexp, s string) string {
	if m := re.FindStringSubmatch(s); m != nil {
		return m[1]
	}
	return ""
}

// Records calls read with each text in a line that can be a kernel record.
func Records(line []byte, read func(Record)) {
	at := append([][]int{recordAtStart().FindSubmatchIndex(line)}, recordInside().FindAllSubmatchIndex(line, -1)...)
	for i, m := range at {
		if i > 0 && m[1] == at[0][1] {
			continue // found above by recordAtStart
		}
		r := Record{Prefix: string(line[m[0]:m[1]]), Text: string(line[m[1]:]), Level: -1}
		if m[2] >= 0 {
			r.Level, _ = strconv.Atoi(string(line[m[2]:m[3]]))
		}
		if n := strings.Index(r.Prefix, "[ BUG: "); n >= 0 { // a title of lockdep, not a prefix
			r.Prefix, r.Text = r.Prefix[:n], r.Prefix[n:]+r.Text
		}
		if strings.TrimSpace(r.Prefix) == "" {
			r.Prefix, r.Text = "", r.Prefix+r.Text
		}
		read(r)
	}
}

// Line collects the text of a line, without line ends, other control characters, escape
// sequences and control strings (ECMA-48). CR, LF and CR LF each end a line.
type Line struct {
	text   []byte
	escape byte // 0: none; escapeByte; '[' in a control sequence (ECMA-48, 5.4)
	// A control string (5.6), such as a window's title, occupies text from start on until its
	// terminator removes it. A string that the end of the line cuts stays as text.
	inString bool
	start    int
	more     int  // bytes missing from the UTF-8 character
	full     bool // the text holds a panic's message and drops bytes beyond MaxLine
}

const (
	escapeByte = 0x1b
	// MaxLine bounds a line; a kernel record has 1 KiB (PRINTKRB_RECORD_MAX). A longer line keeps
	// its end, where a record can begin.
	MaxLine = 4 << 10
	keptEnd = 256
)

// Add adds a byte and reports whether it ended the line.
func (l *Line) Add(c byte) bool {
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
	case len(l.text) < MaxLine:
		l.text = append(l.text, c)
	case !l.full:
		from := MaxLine - keptEnd
		if m := PanicMessage().FindIndex(l.text); m != nil {
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
func (l *Line) control(c byte) {
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
func (l *Line) endString() {
	if l.inString {
		l.text, l.inString, l.full = l.text[:min(l.start, len(l.text))], false, false
	}
}

// Take returns the line's text and empties the line. The text is valid until the next Add.
func (l *Line) Take() []byte {
	text := l.text
	l.text, l.inString, l.full = text[:0], false, false
	return text
}
