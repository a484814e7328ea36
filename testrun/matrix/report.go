package matrix

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"gvm/testrun"
	"gvm/text"
	"gvm/verdict"
	"gvm/verdict/ktap"
)

// severity has the kinds of verdicts that are no success, the gravest first.
var severity = []testrun.Kind{testrun.Stopped, testrun.Panic, testrun.Fault, testrun.Crash, testrun.Ended, testrun.Hang,
	testrun.Timeout, testrun.Signaled, testrun.Exited, testrun.NotStarted, testrun.NotTested}

// Status returns the exit status of all cells: 0 if each passed, else that of the gravest verdict,
// and of the first cell that has it. A cell that was not run is not tested.
func Status(all []Done) (status int) {
	least := len(severity)
	for i := range all {
		kind, of := testrun.NotTested, testrun.ExitNotTested
		if r := all[i].Result(); r != nil {
			kind, of = r.Kind, r.Status
		}
		if at := slices.Index(severity, kind); !all[i].Passed() && at < least {
			least, status = at, of
		}
	}
	return status
}

// Counts are numbers of cells.
type Counts struct {
	Passed    int `json:"passed"`
	Failed    int `json:"failed"`
	NotTested int `json:"not_tested"`
	NotRun    int `json:"not_run"` // the matrix was stopped before them, or during them
	Retries   int `json:"retries"`
}

// Count counts the cells.
func Count(all []Done) (n Counts) {
	for i := range all {
		d := &all[i]
		n.Retries += d.Retries()
		switch r := d.Result(); {
		case r == nil, r.Kind == testrun.Stopped:
			n.NotRun++
		case d.Passed():
			n.Passed++
		case r.Kind == testrun.NotTested:
			n.NotTested++
		default:
			n.Failed++
		}
	}
	return n
}

// String describes the numbers that are not 0, and the passed cells.
func (n Counts) String() string {
	s := fmt.Sprintf("%d passed", n.Passed)
	for _, c := range []struct {
		n    int
		noun string
	}{{n.Failed, "failed"}, {n.NotTested, "not tested"}, {n.NotRun, "not run"}} {
		if c.n > 0 {
			s += fmt.Sprintf(", %d %s", c.n, c.noun)
		}
	}
	if n.Retries > 0 {
		s += fmt.Sprintf("; lost guests retried: %d", n.Retries)
	}
	return s
}

// Verdict describes how a cell ended, in some words.
func (d *Done) Verdict() string {
	switch r := d.Result(); {
	case r == nil:
		return "not run"
	case d.Passed():
		return "passed"
	default:
		return fmt.Sprintf("%s %d", r.Kind, r.Status)
	}
}

// Reason describes in a line why a cell did not pass, and why it was retried.
func (d *Done) Reason() (s string) {
	if r := d.Result(); r != nil {
		s = text.Printable(r.Text)
	}
	for i := range d.Retries() {
		if s != "" {
			s += "; "
		}
		s += fmt.Sprintf("retry %d after: %s", i+1, text.Printable(d.Attempts[i].Result.Text))
	}
	return s
}

// Table writes a line for each cell, and one for all.
func Table(w io.Writer, all []Done) error {
	var b bytes.Buffer
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "cell\tverdict\tseconds\tretries\t\n")
	for i := range all {
		d := &all[i]
		fmt.Fprintf(t, "%s\t%s\t%.1f\t%d\t%s\n", text.Printable(d.Name), text.Printable(d.Verdict()), d.Took.Seconds(),
			d.Retries(), d.Reason())
	}
	_ = t.Flush() // into memory
	for line := range bytes.Lines(b.Bytes()) {
		if _, err := fmt.Fprintf(w, "%s\n", bytes.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "%s: %s\n", text.Count(len(all), "cell"), Count(all))
	return err
}

// Format is the form of JSON.
const Format = "gvm-test-matrix-1"

// JSON writes the cells with all of their verdicts as a JSON object.
func JSON(w io.Writer, all []Done, status int) error {
	type cell struct {
		Cell
		Seconds float64           `json:"seconds"`
		Verdict json.RawMessage   `json:"verdict"` // as in a verdict file; null: not run
		Lost    []json.RawMessage `json:"lost"`    // those of attempts that were retried
	}
	file := struct {
		Format string `json:"format"`
		Status int    `json:"status"`
		Counts Counts `json:"counts"`
		Cells  []cell `json:"cells"`
	}{Format, status, Count(all), []cell{}}
	for i := range all {
		d := &all[i]
		c := cell{Cell: d.Cell, Seconds: d.Took.Round(time.Millisecond).Seconds(), Lost: []json.RawMessage{}}
		for n, a := range d.Attempts {
			var b bytes.Buffer
			if err := a.Result.JSON(&b); err != nil {
				return err
			}
			if n < d.Retries() {
				c.Lost = append(c.Lost, b.Bytes())
			} else {
				c.Verdict = b.Bytes()
			}
		}
		file.Cells = append(file.Cells, c)
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(file)
}

// JUnit writes the cells as JUnit XML: a test for each cell, and a skipped one for each attempt
// that was retried.
func JUnit(w io.Writer, all []Done) error {
	suite := &ktap.Test{Name: "gvm test"}
	for i := range all {
		d := &all[i]
		for n := range d.Retries() {
			suite.Tests = append(suite.Tests, &ktap.Test{Name: fmt.Sprintf("%s lost %d", d.Name, n+1), Status: ktap.Skip,
				Reason: d.Attempts[n].Result.Text})
		}
		t := &ktap.Test{Name: d.Name, Status: ktap.Skip, Reason: d.Verdict()}
		if r := d.Result(); r != nil {
			t.Log = slices.Concat(d.Attempts[d.Retries()].Output, r.Log)
			if r.Text != "" {
				t.Reason += ": " + r.Text
			}
			switch r.Kind {
			case testrun.Stopped:
			case testrun.Crash, testrun.Ended, testrun.Hang, testrun.Timeout, testrun.NotTested:
				t.Status = ktap.Crash
			default:
				t.Status = ktap.Fail
			}
		}
		if d.Passed() {
			t = &ktap.Test{Name: d.Name, Status: ktap.Pass}
		}
		suite.Tests = append(suite.Tests, t)
	}
	return (&verdict.Results{Tests: []*ktap.Test{suite}}).JUnit(w)
}
