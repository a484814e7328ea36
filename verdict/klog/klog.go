// Package klog finds the reports of faults that a Linux kernel prints on its console: panics,
// oopses, BUG and WARN, the reports of sanitizers and of lockdep, stalls and lockups.
//
// It reads a console as it comes: with or without printk's prefixes, with colours, and with records
// behind a program's unfinished line. The guest is not trusted: memory is bounded, and a program
// that prints the text of a report at the start of a line makes one where the kernel's records have
// no time stamps.
package klog

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// Kind is the kind of a report.
type Kind string

// The kinds of reports.
const (
	Panic      Kind = "panic"
	Oops       Kind = "oops"
	Bug        Kind = "bug"
	Warn       Kind = "warn"
	KASAN      Kind = "kasan"
	KCSAN      Kind = "kcsan"
	KMSAN      Kind = "kmsan"
	KFENCE     Kind = "kfence"
	UBSAN      Kind = "ubsan"
	Lockdep    Kind = "lockdep"
	RCUStall   Kind = "rcu-stall"
	HungTask   Kind = "hung-task"
	SoftLockup Kind = "soft-lockup"
	HardLockup Kind = "hard-lockup"
)

// titles match the first line of a report; the first row that matches counts.
var titles = sync.OnceValue(func() (rows []title) {
	for _, row := range []struct {
		kind Kind
		text string
	}{
		{Panic, `^(Kernel panic - not syncing|PANIC: early exception )`},
		{KASAN, `^BUG: KASAN: `},
		{KCSAN, `^BUG: KCSAN: `},
		{KMSAN, `^BUG: KMSAN: `},
		{KFENCE, `^BUG: KFENCE: `},
		{UBSAN, `^UBSAN: .* in `},
		{SoftLockup, `^(NMI )?(watchdog: )?BUG: soft lockup - `},
		{HardLockup, `^(NMI )?watchdog: .*\bhard LOCKUP\b`},
		{RCUStall, `^(rcu: )?INFO: rcu\w* (self-detected stall|detected (expedited )?stalls) on `},
		{HungTask, `^INFO: task .* blocked .*for more than \d+ seconds`},
		// kernel/locking/lockdep.c, and kernel/rcu/update.c by way of it
		{Lockdep, `^(WARNING|INFO): (possible |inconsistent lock state|suspicious RCU usage|` +
			`bad unlock balance|bad contention|held lock freed|lock held when returning|[Nn]ested lock was not|` +
			`\S+-safe -> \S+-unsafe lock order|trying to register non-static key)`},
		{Lockdep, `^\[ BUG: .* \]`},
		{Lockdep, `^BUG: (MAX_LOCK|MAX_STACK_TRACE|held lock freed|.* lock held when returning)`},
		{Oops, `^BUG: (kernel NULL pointer dereference|unable to handle|TASK stack guard|IRQ stack guard|stack guard)`},
		{Oops, `^\S.*: [0-9a-f]{4} \[#\d+\]`}, // __die_header in arch/x86/kernel/dumpstack.c
		{Oops, `^(traps: )?PANIC: double fault`},
		{Bug, `^kernel BUG at `},
		{Bug, `^BUG: `},
		{Warn, `^WARNING: (CPU: \d+ PID: \d+ )?at `},
		{Warn, `^WARNING: \S+:\d+ at `}, // since Linux 6.18
	} {
		rows = append(rows, title{row.kind, regexp.MustCompile(row.text)})
	}
	return rows
})

type title struct {
	kind Kind
	text *regexp.Regexp
}

// Frame is a line of a call trace.
type Frame struct {
	Symbol string `json:"symbol"`
	Offset uint64 `json:"offset"`
	Size   uint64 `json:"size"`
	Module string `json:"module,omitempty"`
	// Sure is false for an address that only lay on the stack ("? ").
	Sure   bool   `json:"sure"`
	Source string `json:"source,omitempty"` // file and line, if decoded
}

// Report is a fault that the kernel reported.
type Report struct {
	Kind  Kind   `json:"kind"`
	Title string `json:"title"`          // the first line, without printk's prefix
	Time  string `json:"time,omitempty"` // time stamp of the title
	CPU   string `json:"cpu,omitempty"`
	// Fingerprint is the same for reports of the same fault: it depends on the kind, the title
	// without numbers, and the first functions of the call trace.
	Fingerprint string   `json:"fingerprint"`
	Frames      []Frame  `json:"frames,omitempty"` // of the first call trace
	Text        []string `json:"text"`             // the lines, without printk's prefixes
}

// Bounds of a report.
const (
	maxText   = 200      // lines
	maxBytes  = 32 << 10 // of these lines
	maxFrames = 64
	// quiet is the time in seconds between two records that ends a report without an end marker.
	quiet = 1.0
)

// Reader finds the reports in the output of a console. It is not safe for concurrent use.
type Reader struct {
	// Report takes a report when it is complete.
	Report func(Report)
	// Lost is the number of messages that the kernel dropped, as the console was too slow for them: a
	// report may have been among them.
	Lost int
	// Stalled reports whether the last line tells that a CPU or a task makes no progress: it is of
	// such a report, or of the time of one, as other CPUs add lines of theirs.
	Stalled bool

	line    Line
	stamped bool // the kernel's records have time stamps, or the like
	open    *report
	before  string  // the line after "cut here", which can be the message of a WARN
	cut     bool    // "cut here" was the last line, or the last but one
	stall   float64 // time stamp of the last line of a stall; 0: none
}

// report is one that is not complete.
type report struct {
	Report
	caller string
	last   float64 // time stamp of the last line
	bytes  int     // of Text
	rip    []Frame // 0 or 1
	traces int     // headings of call traces
	closed bool    // frames are complete
}

// Write reads console output; it does not fail.
func (r *Reader) Write(p []byte) (int, error) {
	for _, c := range p {
		if r.line.Add(c) {
			r.Read(r.line.Take())
		}
	}
	return len(p), nil
}

// Close reads a last line without an end, and completes the last report.
func (r *Reader) Close() {
	r.Read(r.line.Take())
	r.finish()
}

// printed matches a prefix that only printk prints: a log level, a time stamp with six decimals,
// or a caller of six characters (print_time and print_caller in kernel/printk/printk.c). Programs
// begin lines with other things in brackets, such as addresses of hosts.
var printed = pattern(`<\d{1,3}>|\[ *\d+\.\d{6}|\[(?: {4}[TC]\d| {3}[TC]\d{2}| {2}[TC]\d{3}| [TC]\d{4}|[TC]\d{5,})\]`)

// Read reads one line, as Line collects it.
func (r *Reader) Read(line []byte) {
	r.Stalled = false
	if m := dropped().FindSubmatch(line); m != nil {
		n, _ := strconv.Atoi(string(m[1]))
		r.Lost = min(r.Lost+n, maxLost)
	}
	Records(line, func(rec Record) {
		if rec.FromUser() {
			return
		}
		if printed().MatchString(rec.Prefix) {
			r.stamped = true
		} else if r.stamped {
			return // a program's
		}
		r.record(rec)
	})
}

// dropped matches the line before the next record (console_prepend_dropped in
// kernel/printk/printk.c), which has no prefix.
var dropped = pattern(`\*\* (\d{1,9}) printk messages dropped \*\*`)

// maxLost bounds Lost: a program can print such lines too.
const maxLost = 1 << 30

const cutHere = "------------[ cut here ]------------"

var (
	banner  = pattern(`^={20,}$`)
	endMark = pattern(`^---\[ end (trace|Kernel panic)`)
	dieLine = pattern(`: [0-9a-f]{4} \[#\d+\]`)
	cpuWord = pattern(`\b(?:CPU: ?|CPU#|(?:on|for) cpu )(\d+)`)
	heading = pattern(`^\s*(?:Call Trace:|stack backtrace:|Stack:)`)
	// Sections after the first trace of a KASAN or KCSAN report.
	section   = pattern(`^(Allocated|Freed) by |^Last potentially related|^(\S+ )*(read|write) to 0x|^Showing all locks`)
	ripLine   = pattern(`^RIP: 0010:(.*)`)
	frameLine = pattern(`^\s*(\? )?([A-Za-z_][\w.]*)\+0x([0-9a-f]{1,16})/0x([0-9a-f]{1,16})(?: \[([\w-]+)(?: [^]]*)?\])?$`)
)

func (r *Reader) record(rec Record) {
	text := strings.TrimRight(rec.Text, " \t")
	bare := strings.TrimSpace(text)
	if r.stall > 0 {
		if at := seconds(rec.Time()); at >= r.stall && at <= r.stall+quiet {
			r.Stalled = true
		}
	}
	if bare == cutHere {
		r.finish()
		r.cut, r.before = true, ""
		return
	}
	for _, row := range titles() {
		if row.text.MatchString(bare) {
			if r.continues(row.kind, bare) {
				break
			}
			r.begin(row.kind, bare, rec)
			return
		}
	}
	if r.cut { // the message of WARN(cond, message)
		r.cut, r.before = r.before == "", bare
	}
	o := r.open
	if o == nil {
		return
	}
	if o.caller != "" && rec.Caller() != "" && o.caller != rec.Caller() {
		return // another CPU's
	}
	if at := seconds(rec.Time()); at > 0 && o.last > 0 {
		if at > o.last+quiet {
			r.finish()
			return
		}
		o.last = at
	}
	if banner().MatchString(bare) {
		r.finish()
		return
	}
	o.add(text)
	r.note(o)
	if endMark().MatchString(bare) || len(o.Text) == maxText || o.bytes > maxBytes {
		r.finish()
	}
}

// continues reports whether a title is the second of the open report: the line of die() follows
// one that says why.
func (r *Reader) continues(kind Kind, text string) bool {
	o := r.open
	return o != nil && kind == Oops && (o.Kind == Oops || o.Kind == Bug) && dieLine().MatchString(text) &&
		!dieLine().MatchString(o.Title) && len(o.Text) < 5
}

func (r *Reader) begin(kind Kind, text string, rec Record) {
	r.finish()
	r.open = &report{
		Report: Report{Kind: kind, Title: text, Time: rec.Time()},
		caller: rec.Caller(), last: seconds(rec.Time()),
	}
	if r.cut && r.before != "" {
		r.open.Text = append(r.open.Text, r.before)
	}
	r.cut = false
	r.open.add(text)
	r.note(r.open)
}

// note takes the last line for one of a stall, if the report is of one.
func (r *Reader) note(o *report) {
	switch o.Kind {
	case RCUStall, HungTask, SoftLockup, HardLockup:
		r.Stalled, r.stall = true, o.last
	}
}

func seconds(stamp string) float64 {
	s, _ := strconv.ParseFloat(stamp, 64)
	return s
}

// add adds a line to the report.
func (o *report) add(text string) {
	o.Text = append(o.Text, text)
	o.bytes += len(text)
	if m := cpuWord().FindStringSubmatch(text); m != nil && o.CPU == "" {
		o.CPU = m[1]
	}
	if m := ripLine().FindStringSubmatch(text); m != nil && len(o.rip) == 0 {
		if f, ok := parseFrame(m[1]); ok {
			o.rip = []Frame{f}
		}
	}
	switch f, ok := parseFrame(text); {
	case o.closed:
	case heading().MatchString(text):
		if o.traces++; o.traces == 1 {
			o.Frames = nil // such lines before it are no call trace
		} else if len(o.Frames) > 0 {
			o.closed = true
		}
	case section().MatchString(text):
		o.closed = len(o.Frames) > 0
	case ok && len(o.Frames) < maxFrames:
		o.Frames = append(o.Frames, f)
	}
}

// parseFrame parses a line such as " ? do_idle+0x1c/0x30 [module]".
func parseFrame(text string) (f Frame, ok bool) {
	m := frameLine().FindStringSubmatch(text)
	if m == nil {
		return f, false
	}
	f = Frame{Symbol: m[2], Module: m[5], Sure: m[1] == ""}
	f.Offset, _ = strconv.ParseUint(m[3], 16, 64)
	f.Size, _ = strconv.ParseUint(m[4], 16, 64)
	return f, true
}

// finish completes the open report.
func (r *Reader) finish() {
	o := r.open
	if r.open = nil; o == nil {
		return
	}
	o.Frames = append(o.rip, o.Frames...)
	o.Fingerprint = fingerprint(o.Kind, o.Title, o.Frames)
	r.Report(o.Report)
}

var (
	// These differ between two reports of a fault: tasks, addresses and other numbers.
	taskWord   = pattern(`\[[^][]*:\d+\]|\btask \S+:\d+\b`)
	offsetWord = pattern(`\+0x[0-9a-f]+(/0x[0-9a-f]+)?`)
	numberWord = pattern(`\b(0x[0-9a-f]+|[0-9a-f]{8,}|\d+s?)\b`)
	// Functions that report a fault, and are the same for every one of their kind.
	reporters = pattern(`^_*(dump_stack|show_stack|print_|kasan_|asan_|tsan_|kcsan_|kmsan_|msan_|kfence_report|` +
		`ubsan_|warn(_|$)|report_bug|handle_bug|exc_|asm_exc_|v?panic$|die(_|$)|oops_|page_fault_oops|no_context|` +
		`bad_area|check_(region|noncircular|prev|usage|deadlock)|mark_lock|lock_acquire|lockdep_|validate_chain)`)
)

// fingerprintFrames is the number of functions in a fingerprint.
const fingerprintFrames = 5

func fingerprint(kind Kind, title string, frames []Frame) string {
	s := taskWord().ReplaceAllString(title, "N")
	s = offsetWord().ReplaceAllString(s, "")
	s = string(kind) + "\n" + numberWord().ReplaceAllString(s, "N")
	n := 0
	for _, f := range frames {
		if !f.Sure || reporters().MatchString(f.Symbol) {
			continue
		}
		symbol, _, _ := strings.Cut(f.Symbol, ".") // .isra.0, .constprop.0, .cold
		s += "\n" + symbol
		if n++; n == fingerprintFrames {
			break
		}
	}
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
