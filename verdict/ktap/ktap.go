// Package ktap reads the results of tests on a guest's console: KTAP version 1 of KUnit and
// kselftest (Documentation/dev-tools/ktap.rst of Linux), TAP 13 and 14, and LAVA's signals.
//
// Lines can have printk's prefixes. Results nest by indentation, and by the "# " that kselftest
// puts before the output of a test. A test that began and has no result has crashed. Memory is
// bounded for any output of the guest.
package ktap

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"gvm/verdict/klog"
)

// Status is the result of a test.
type Status string

// The results of tests.
const (
	Pass  Status = "pass"
	Fail  Status = "fail"
	Skip  Status = "skip"
	Crash Status = "crash" // it began, and no result came
	None  Status = "none"  // a suite without a test
)

// Test is a test, or a suite of tests.
type Test struct {
	Name        string   `json:"name"`
	Status      Status   `json:"status"`
	Reason      string   `json:"reason,omitempty"`      // the directive's text
	Measurement string   `json:"measurement,omitempty"` // of LAVA, with its unit
	Errors      []string `json:"errors,omitempty"`      // faults in the form of the output
	Log         []string `json:"log,omitempty"`         // the lines before the result of a test that did not pass
	Tests       []*Test  `json:"tests,omitempty"`
}

// Counts are numbers of tests without subtests, by result, and of errors in the output's form.
type Counts struct {
	Passed  int `json:"passed"`
	Failed  int `json:"failed"`
	Crashed int `json:"crashed"`
	Skipped int `json:"skipped"`
	Errors  int `json:"errors"`
}

// Total returns the number of tests.
func (c Counts) Total() int { return c.Passed + c.Failed + c.Crashed + c.Skipped }

// Status returns the result of all tests together.
func (c Counts) Status() Status {
	switch {
	case c.Crashed > 0:
		return Crash
	case c.Failed > 0:
		return Fail
	case c.Passed > 0:
		return Pass
	case c.Skipped > 0:
		return Skip
	}
	return None
}

// Counts counts the tests of t. A suite counts itself if it has no test with a result, or if it
// failed although none of its tests did.
func (t *Test) Counts() (c Counts) {
	for _, sub := range t.Tests {
		n := sub.Counts()
		c.Passed += n.Passed
		c.Failed += n.Failed
		c.Crashed += n.Crashed
		c.Skipped += n.Skipped
		c.Errors += n.Errors
	}
	c.Errors += len(t.Errors)
	if t.own(c) {
		switch t.Status {
		case Pass:
			c.Passed++
		case Fail:
			c.Failed++
		case Crash:
			c.Crashed++
		case Skip:
			c.Skipped++
		}
	}
	return c
}

// Own reports whether t counts itself: it is a test, or a suite as Counts says.
func (t *Test) Own() bool { return t.own((&Test{Status: None, Tests: t.Tests}).Counts()) }

func (t *Test) own(of Counts) bool {
	bad := t.Status == Fail || t.Status == Crash
	return of.Total() == 0 || bad && of.Failed+of.Crashed == 0
}

// Bounds of the data that a guest can make gvm keep.
const (
	maxTests = 1 << 16
	maxDepth = 32
	maxName  = 256
	maxLog   = 100     // lines of one test
	maxLogs  = 4 << 20 // bytes of all tests
	maxError = 8       // errors of one test
)

// Parser reads results. It is not safe for concurrent use.
type Parser struct {
	// Ended takes each test that ended, subtests first; depth is 0 for the outermost. nil: no call.
	Ended func(t *Test, depth int)

	line  klog.Line
	root  Test
	tests int // in root
	logs  int // bytes of logs in root

	started bool
	open    []*suite // open[0] is the document; empty: none
	tap     bool     // the document is TAP, whose results need no number
	yaml    int      // column of the YAML block of TAP 13; 0: none
	log     []string // lines since the last result
	lava    lava
}

// suite is an open suite.
type suite struct {
	*Test
	indent int
	plan   int // -1: none yet
	header string
}

var (
	versionLine = pattern(`^(K?TAP) version (\d+)$`)
	planLine    = pattern(`^1\.\.(\d+)(?:\s+#\s*(.*))?$`)
	resultLine  = pattern(`^(not ok|ok)(?:\s+(\d+))?(?:\s+-\s+|\s+|$)(.*)$`)
	directive   = pattern(`^(.*?)(?:^|\s)#\s(.*)$`)
	skipWord    = pattern(`^(?i:skip)\S*\s*(.*)$`)
	todoWord    = pattern(`^(TODO|XFAIL)\b`)
)

// pattern compiles a regular expression on first use, not at every start of gvm.
func pattern(s string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(s) })
}

const header = "# Subtest: "

// Write reads console output; it does not fail.
func (p *Parser) Write(b []byte) (int, error) {
	for _, c := range b {
		if p.line.Add(c) {
			p.Read(p.line.Take())
		}
	}
	return len(b), nil
}

// Read reads one line, as klog.Line collects it.
func (p *Parser) Read(line []byte) {
	if p.signal(string(line)) || len(line) == 0 {
		return
	}
	known, first := false, ""
	klog.Records(line, func(r klog.Record) {
		text := strings.TrimRight(r.Text, " \t")
		if first == "" {
			first = text
		}
		known = known || p.read(text, r.Prefix == "")
	})
	if !known && p.started {
		p.note(first)
	}
}

// Close reads a last line without an end, closes everything, and returns all tests as a suite.
func (p *Parser) Close() *Test {
	p.Read(p.line.Take())
	p.endDocument()
	p.lava.end(p)
	p.root.Status = p.root.Counts().Status()
	return &p.root
}

// Started reports whether results have begun: there was a version line or a signal.
func (p *Parser) Started() bool { return p.started }

// read reads a line without its prefix, and reports whether it is one of the format.
func (p *Parser) read(text string, bare bool) bool {
	indent, rest := 0, text
	for {
		trimmed := strings.TrimLeft(rest, " \t")
		for _, c := range rest[:len(rest)-len(trimmed)] {
			if indent++; c == '\t' {
				indent = (indent + 7) &^ 7
			}
		}
		rest = trimmed
		if p.yaml > 0 && indent >= p.yaml {
			if rest == "..." {
				p.yaml = 0
			}
			return false
		}
		p.yaml = 0
		if m := versionLine().FindStringSubmatch(rest); m != nil {
			p.version(indent, m[1] == "TAP", m[2])
			return true
		}
		if len(p.open) == 0 {
			return false
		}
		if name, ok := strings.CutPrefix(rest, header); ok {
			p.header(indent, name)
			return true
		}
		if m := planLine().FindStringSubmatch(rest); m != nil {
			p.plan(indent, m[1], m[2])
			return true
		}
		if m := resultLine().FindStringSubmatch(rest); m != nil && (m[2] != "" || p.tap && bare) {
			p.result(indent, m[1] == "ok", m[2], m[3])
			return true
		}
		if reason, ok := strings.CutPrefix(rest, "Bail out!"); ok {
			p.bail(strings.TrimSpace(reason))
			return true
		}
		if rest == "---" && p.tap {
			p.yaml = indent
		}
		more, ok := strings.CutPrefix(rest, "# ")
		if !ok {
			return false
		}
		indent, rest = indent+2, more // kselftest's "# ", which nests
	}
}

// version begins a document, or a suite within one.
func (p *Parser) version(indent int, tap bool, number string) {
	if len(p.open) == 0 || indent <= p.open[0].indent {
		p.endDocument()
		p.started, p.tap = true, tap
		p.open = []*suite{{Test: new(Test), indent: indent, plan: -1}}
	} else {
		p.closeTo(indent - 1)
		p.push(indent, "")
	}
	if want := map[bool]string{false: "1", true: "13 or 14"}[tap]; !strings.Contains(want, number) {
		p.top().fault("version %s, want %s", number, want)
	}
}

// header names a suite: the one that a version line began, or a new one. In TAP 14 the header
// stands in the column of the parent.
func (p *Parser) header(indent int, name string) {
	name = cut(name)
	if top := p.top(); len(p.open) > 1 && top.indent == indent && top.Name == "" && len(top.Tests) == 0 {
		top.Name = name
		return
	}
	if indent <= p.open[0].indent {
		p.closeTo(p.open[0].indent)
		p.top().header = name
		return
	}
	p.closeTo(indent - 1)
	p.push(indent, name)
}

// plan sets the number of tests of a suite.
func (p *Parser) plan(indent int, number, comment string) {
	s := p.at(indent)
	if s.plan >= 0 {
		s.fault("a second plan 1..%s", number)
		return
	}
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil {
		s.fault("plan 1..%s", cut(number))
		return
	}
	s.plan = int(n)
	if m := skipWord().FindStringSubmatch(comment); m != nil && n == 0 {
		s.plan = -1
		p.add(s.Test, &Test{Name: "all tests", Status: Skip, Reason: cut(m[1])})
	}
}

// result ends the suite that the line is about, or is a test of its own.
func (p *Parser) result(indent int, ok bool, number, text string) {
	name, reason := text, ""
	if m := directive().FindStringSubmatch(text); m != nil {
		name, reason = m[1], m[2]
	}
	t := &Test{Name: cut(strings.TrimSpace(name)), Status: Pass, Reason: cut(reason)}
	if !ok {
		t.Status = Fail
	}
	if m := skipWord().FindStringSubmatch(reason); m != nil {
		t.Status, t.Reason = Skip, cut(m[1])
	} else if !ok && todoWord().MatchString(reason) {
		t.Status = Skip
	}
	// The outermost suite within the line's column is the one that ends.
	for i, s := range p.open {
		if i == 0 || s.indent <= indent {
			continue
		}
		p.closeTo(s.indent)
		if s.Name == "" || s.Name == t.Name {
			s.Name, s.Reason = t.Name, t.Reason
			p.number(p.open[i-1], number, len(p.open[i-1].Tests))
			p.finish(t.Status)
			return
		}
		p.closeTo(s.indent - 1)
		break
	}
	s := p.at(indent)
	p.number(s, number, len(s.Tests)+1)
	p.add(s.Test, t)
	p.ended(t, len(p.open)-1)
}

// number checks the number of a result.
func (p *Parser) number(s *suite, number string, want int) {
	if number != "" && number != strconv.Itoa(want) {
		s.fault("test number %s, want %d", cut(number), want)
	}
}

// bail ends the document: nothing more will run.
func (p *Parser) bail(reason string) {
	t := &Test{Name: "Bail out!", Status: Crash, Reason: cut(reason)}
	p.add(p.top().Test, t)
	p.ended(t, len(p.open)-1)
	for _, s := range p.open {
		s.plan = -1
	}
	p.endDocument()
}

// at returns the suite for lines in a column. It closes those further right, and begins one without
// a header if there is none.
func (p *Parser) at(indent int) *suite {
	p.closeTo(indent)
	if top := p.top(); top.indent < indent {
		name := top.header
		top.header = ""
		p.push(indent, name)
	}
	return p.top()
}

func (p *Parser) top() *suite { return p.open[len(p.open)-1] }

// push opens a suite within the innermost one.
func (p *Parser) push(indent int, name string) {
	if len(p.open) == maxDepth {
		p.top().fault("suites are nested more than %d deep", maxDepth)
		p.finish(Crash)
	}
	t := &Test{Name: name}
	p.add(p.top().Test, t)
	p.open = append(p.open, &suite{Test: t, indent: indent, plan: -1})
}

// closeTo closes the suites right of a column, which have no result line.
func (p *Parser) closeTo(indent int) {
	for len(p.open) > 1 && p.top().indent > indent {
		p.top().fault("no result line")
		p.finish(Crash)
	}
}

// finish closes the innermost suite.
func (p *Parser) finish(status Status) {
	s := p.top()
	p.missing(s)
	switch {
	case len(s.Tests) == 0 && status == Pass:
		s.Status = None
		s.fault("no tests ran")
	case s.Counts().Crashed > 0:
		s.Status = Crash
	default:
		s.Status = status
	}
	p.open = p.open[:len(p.open)-1]
	p.ended(s.Test, len(p.open)-1)
}

// missing adds crashed tests for the planned tests without a result.
func (p *Parser) missing(s *suite) {
	n := len(s.Tests)
	switch {
	case s.plan > n:
		s.fault("%d of %d tests have no result", s.plan-n, s.plan)
	case s.plan >= 0 && s.plan < n:
		s.fault("%d tests, planned were %d", n, s.plan)
	}
	for i := n + 1; i <= s.plan && p.tests < maxTests; i++ {
		t := &Test{Name: fmt.Sprintf("test %d of %d", i, s.plan), Status: Crash, Reason: "no result"}
		p.add(s.Test, t)
		p.ended(t, len(p.open)-1)
	}
}

// endDocument closes the document, and moves its tests to the root.
func (p *Parser) endDocument() {
	if len(p.open) == 0 {
		return
	}
	s := p.open[0]
	p.closeTo(s.indent)
	p.missing(s)
	if len(s.Tests) == 0 {
		s.fault("no tests ran")
	}
	p.root.Tests = append(p.root.Tests, s.Tests...)
	if len(p.root.Errors) < maxError {
		p.root.Errors = append(p.root.Errors, s.Errors...)
	}
	p.open, p.log, p.yaml = nil, nil, 0
}

// add adds a test to a suite.
func (p *Parser) add(to, t *Test) {
	switch p.tests++; {
	case p.tests < maxTests:
		to.Tests = append(to.Tests, t)
	case p.tests == maxTests:
		p.root.Tests = append(p.root.Tests, &Test{Name: "too many tests", Status: Crash,
			Reason: fmt.Sprintf("results beyond %d were dropped", maxTests)})
	}
}

// ended gives a test that did not pass the lines since the last result.
func (p *Parser) ended(t *Test, depth int) {
	if t.Status != Pass && t.Status != Skip {
		for _, line := range p.log {
			if p.logs += len(line); p.logs > maxLogs {
				break
			}
			t.Log = append(t.Log, line)
		}
	}
	p.log = p.log[:0]
	if p.Ended != nil {
		p.Ended(t, depth)
	}
}

// note keeps a line that is no result.
func (p *Parser) note(text string) {
	if len(p.log) == maxLog {
		p.log = append(p.log[:0], p.log[1:]...)
	}
	p.log = append(p.log, text)
}

// fault notes an error in the output's form.
func (s *suite) fault(format string, args ...any) {
	if len(s.Errors) < maxError {
		s.Errors = append(s.Errors, fmt.Sprintf(format, args...))
	}
}

// cut bounds a text of the guest.
func cut(s string) string {
	if len(s) > maxName {
		s = strings.ToValidUTF8(s[:maxName], "")
	}
	return s
}
