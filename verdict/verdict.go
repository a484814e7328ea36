// Package verdict reads a guest's console for results of tests and for faults that the kernel
// reports, and writes them as JSON and JUnit.
package verdict

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	"gvm/text"
	"gvm/verdict/klog"
	"gvm/verdict/ktap"
)

// Policy says which of the kernel's reports fail a run. A panic is none of them: it is an end of
// the guest, which is known more surely than from the console alone.
type Policy struct {
	Fail   bool // all but WARN
	Strict bool // WARN too
	Allow  Allow
}

// Report is a report of the kernel. A fault that is reported again is counted.
type Report struct {
	klog.Report
	Count int  `json:"count"`
	Fails bool `json:"fails"` // by the Policy
}

// Results have the findings of a console.
type Results struct {
	Exit int    `json:"exit"`          // the exit status, set by the caller
	End  string `json:"end,omitempty"` // the end of the guest and the faults, set by the caller; "": none
	// Status and Counts are those of all tests; Tests is nil if there were none.
	Status  ktap.Status  `json:"status"`
	Counts  ktap.Counts  `json:"counts"`
	Tests   []*ktap.Test `json:"tests"`
	Errors  []string     `json:"errors,omitempty"` // in the form of the outermost results
	Reports []Report     `json:"reports"`
	// Dropped is the number of reports beyond those kept, Failing that of all that fail the run.
	Dropped int `json:"dropped_reports"`
	Failing int `json:"failing_reports"`
	// Lost is the number of messages that the kernel dropped: see LostText.
	Lost int `json:"lost_messages"`
}

// maxReports bounds the reports that are kept.
const maxReports = 64

// Reader reads a console. It is not safe for concurrent use.
type Reader struct {
	policy  Policy
	line    klog.Line
	lines   uint64 // see Progress
	kernel  klog.Reader
	tests   ktap.Parser
	results Results
	at      map[string]int // fingerprint to index in results.Reports
}

// NewReader returns a Reader. If ended is not nil, it takes each test that ends, as in ktap.Parser.
func NewReader(p Policy, ended func(t *ktap.Test, depth int)) *Reader {
	r := &Reader{policy: p, at: map[string]int{}}
	r.kernel.Report, r.tests.Ended = r.report, ended
	r.results.Reports = []Report{} // not null in JSON
	return r
}

// Allow sets the reports that do not fail the run. It is for before the first Write.
func (r *Reader) Allow(list Allow) { r.policy.Allow = list }

// Write reads console output; it does not fail.
func (r *Reader) Write(p []byte) (int, error) {
	for _, c := range p {
		if r.line.Add(c) {
			r.read()
		}
	}
	return len(p), nil
}

func (r *Reader) read() {
	line := r.line.Take()
	r.kernel.Read(line)
	r.tests.Read(line)
	if len(line) > 0 && !r.kernel.Stalled {
		r.lines++
	}
}

// Progress returns the number of lines so far by which the guest makes progress: all but those of
// the kernel's reports that a CPU or a task makes none, which come again and again.
func (r *Reader) Progress() uint64 { return r.lines }

func (r *Reader) report(k klog.Report) {
	report := Report{Report: k, Count: 1, Fails: r.policy.fails(k)}
	if report.Fails {
		r.results.Failing++
	}
	if i, ok := r.at[k.Fingerprint]; ok {
		r.results.Reports[i].Count++
		return
	}
	if len(r.results.Reports) == maxReports {
		r.results.Dropped++
		if !report.Fails || r.results.First() != nil {
			return
		}
		// A report that fails the run is kept, even after maxReports others.
		last := r.results.Reports[maxReports-1]
		delete(r.at, last.Fingerprint)
		r.results.Reports = r.results.Reports[:maxReports-1]
	}
	r.at[k.Fingerprint] = len(r.results.Reports)
	r.results.Reports = append(r.results.Reports, report)
}

func (p *Policy) fails(k klog.Report) bool {
	return k.Kind != klog.Panic && (p.Strict || p.Fail && k.Kind != klog.Warn) && !p.Allow.matches(k)
}

// Close reads a last line without an end and returns the results.
func (r *Reader) Close() *Results {
	r.read()
	r.kernel.Close()
	r.results.Lost = r.kernel.Lost
	root := r.tests.Close()
	r.results.Status, r.results.Counts = root.Status, root.Counts()
	r.results.Tests, r.results.Errors = root.Tests, root.Errors
	if r.results.Tests == nil {
		r.results.Tests = []*ktap.Test{}
	}
	return &r.results
}

// LostText explains that the kernel dropped n messages; "" for 0.
func LostText(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("the guest's kernel dropped %s of its log, where faults and results of tests may have been: "+
		"give it a larger log buffer (--cmdline log_buf_len=16M)", text.Count(n, "message"))
}

// First returns the first report that fails the run, or nil.
func (r *Results) First() *Report {
	for i := range r.Reports {
		if r.Reports[i].Fails {
			return &r.Reports[i]
		}
	}
	return nil
}

// JSON writes the results as a JSON object.
func (r *Results) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

// Allow names reports that do not fail a run.
type Allow []allowed

type allowed struct {
	fingerprint string
	title       *regexp.Regexp
}

// ReadAllow reads a list of reports to allow. A line is a fingerprint, or a regular expression that
// matches a report's title; a line that is empty or begins with "#" is skipped.
func ReadAllow(r io.Reader) (list Allow, err error) {
	fingerprint := regexp.MustCompile(`^[0-9a-f]{16}$`)
	lines := bufio.NewScanner(r)
	n := 1
	for ; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		switch {
		case text == "" || text[0] == '#':
		case fingerprint.MatchString(text):
			list = append(list, allowed{fingerprint: text})
		default:
			re, err := regexp.Compile(text)
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", n, err)
			}
			list = append(list, allowed{title: re})
		}
	}
	err = lines.Err()
	if errors.Is(err, bufio.ErrTooLong) {
		err = fmt.Errorf("has more than %d bytes; want a fingerprint or a regular expression", bufio.MaxScanTokenSize-1)
	}
	if err != nil {
		return nil, fmt.Errorf("line %d: %w", n, err)
	}
	return list, nil
}

func (a Allow) matches(k klog.Report) bool {
	for _, row := range a {
		if row.title != nil && row.title.MatchString(k.Title) || row.fingerprint == k.Fingerprint {
			return true
		}
	}
	return false
}
