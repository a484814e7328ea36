package verdict

import (
	"encoding/xml"
	"fmt"
	"io"
	"strings"

	"gvm/verdict/ktap"
)

// The elements of JUnit's reports, as Jenkins and GitLab read them. Package xml replaces what XML
// 1.0 has no characters for.
type (
	junit struct {
		XMLName xml.Name `xml:"testsuites"`
		junitCounts
		Suites []*junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		Name string `xml:"name,attr"`
		junitCounts
		Cases []junitCase `xml:"testcase"`
	}
	junitCounts struct {
		Tests    int `xml:"tests,attr"`
		Failures int `xml:"failures,attr"`
		Errors   int `xml:"errors,attr"`
		Skipped  int `xml:"skipped,attr"`
	}
	junitCase struct {
		Class   string     `xml:"classname,attr"`
		Name    string     `xml:"name,attr"`
		Failure *junitText `xml:"failure"`
		Error   *junitText `xml:"error"`
		Skipped *junitText `xml:"skipped"`
	}
	junitText struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
)

// JUnit writes the results as JUnit XML: a suite for each suite of tests, with the tests that are
// directly in it; one for the kernel's reports that fail the run; and one for the guest's end, if
// that is an error.
func (r *Results) JUnit(w io.Writer) error {
	var j junit
	j.suite("", r.Tests)
	kernel := &junitSuite{Name: "kernel"}
	for _, report := range r.Reports {
		if report.Fails {
			log := report.Text
			for _, f := range report.Frames {
				if f.Source != "" {
					log = append(log, fmt.Sprintf("%s+%#x %s", f.Symbol, f.Offset, f.Source))
				}
			}
			kernel.add(string(report.Kind)+" "+report.Fingerprint, ktap.Fail, report.Title, log)
		}
	}
	j.add(kernel)
	if r.End != "" {
		gvm := &junitSuite{Name: "gvm"}
		gvm.add("guest", ktap.Crash, fmt.Sprintf("exit status %d", r.Exit), []string{r.End})
		j.add(gvm)
	}
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return err
	}
	e := xml.NewEncoder(w)
	e.Indent("", " ")
	if err := e.Encode(j); err != nil {
		return err
	}
	_, err := io.WriteString(w, "\n")
	return err
}

// suite adds the tests of a suite, and the suites in it.
func (j *junit) suite(path string, tests []*ktap.Test) {
	s := &junitSuite{Name: path}
	if path == "" {
		s.Name = "tests"
	}
	for _, t := range tests {
		if t.Own() {
			s.add(t.Name, t.Status, strings.Join(append([]string{t.Reason}, t.Errors...), " "), t.Log)
		}
	}
	j.add(s)
	for _, t := range tests {
		if len(t.Tests) > 0 {
			j.suite(strings.TrimPrefix(path+"."+t.Name, "."), t.Tests)
		}
	}
}

func (j *junit) add(s *junitSuite) {
	if s.Tests == 0 {
		return
	}
	j.Suites = append(j.Suites, s)
	j.Tests += s.Tests
	j.Failures += s.Failures
	j.Errors += s.Errors
	j.Skipped += s.Skipped
}

func (s *junitSuite) add(name string, status ktap.Status, message string, log []string) {
	c := junitCase{Class: s.Name, Name: name}
	text := &junitText{Message: strings.TrimSpace(message), Text: strings.Join(log, "\n")}
	s.Tests++
	switch status {
	case ktap.Pass:
	case ktap.Skip:
		c.Skipped = text
		s.Skipped++
	case ktap.Fail:
		c.Failure = text
		s.Failures++
	default:
		c.Error = text
		s.Errors++
	}
	s.Cases = append(s.Cases, c)
}
