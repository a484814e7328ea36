// Package conformance reads what iscsi-test-cu, libiscsi's suite of SCSI tests, says
// of a disk. Its test runs the suite at the in-process target without a machine in
// between; `make conformance` has Linux guests run it (package linux).
package conformance

import (
	"bufio"
	"cmp"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// Verdicts are the outcomes of tests by their names, "Suite.Test": "PASS", or "FAIL" or "SKIP"
// with a reason.
type Verdicts map[string]string

// Count returns how many tests have each outcome.
func (v Verdicts) Count() map[string]int {
	n := map[string]int{}
	for _, verdict := range v {
		word, _, _ := strings.Cut(verdict, " ")
		n[word]++
	}
	return n
}

// With returns the names of the tests with an outcome, sorted.
func (v Verdicts) With(outcome string) []string {
	names := slices.Sorted(maps.Keys(v))
	return slices.DeleteFunc(names, func(name string) bool { return !strings.HasPrefix(v[name], outcome) })
}

// Size is that of a disk for the suite, in bytes. It has less than 65536 blocks: with more,
// that many move in one command, which Linux takes from /dev/sg0 only if memory
// happens to be in large pieces.
const Size = 24 << 20

// Flags of iscsi-test-cu have it say all that Parse needs: without -V some tests keep to
// themselves that they were skipped. DestroyFlag lets it destroy data, and
// SanitizeFlag do SANITIZE.
const (
	Flags        = "-v -V"
	DestroyFlag  = "-d"
	SanitizeFlag = "-S"
)

// Sanitize are the tests of SANITIZE that can be run: with SanitizeFlag, another one
// crashes the suite, so that each is a run of its own.
var Sanitize = []string{"SCSI.Sanitize.BlockErase", "SCSI.Sanitize.ExitFailureMode", "SCSI.Sanitize.InvalidServiceAction", "SCSI.Sanitize.Overwrite"}

// Lines is a regular expression, for grep -E too, of the lines that Parse needs.
const Lines = `^Suite:|^ *Test:|SKIPPED|FAILED|^ *[0-9]+\. [^ ]*\.c:`

var (
	suiteLine = regexp.MustCompile(`^Suite: (\S+)`)
	testLine  = regexp.MustCompile(`^\s*Test: (\S+) \.\.\.(.*)`)
	// A failed assertion makes a test fail; a line [FAILED] may be what a test found
	// out, and is the reason if it failed.
	assertLine = regexp.MustCompile(`^\s*\d+\. \S+\.c:\d+ `)
)

// Parse reads the output of iscsi-test-cu, or of several runs of it with a line
// "Suite:" before each. Of a test that ran twice the later verdict counts.
func Parse(output string) Verdicts {
	v := Verdicts{}
	suite, test, why := "", "", ""
	for s := bufio.NewScanner(strings.NewReader(output)); s.Scan(); {
		line := s.Text()
		if strings.HasPrefix(line, "Suite:") {
			test = ""
			if m := suiteLine.FindStringSubmatch(line); m != nil {
				suite = m[1]
			}
			continue
		}
		if m := testLine.FindStringSubmatch(line); m != nil {
			test, line, why = suite+"."+m[1], m[2], ""
			v[test] = "PASS"
		}
		_, reason, skipped := strings.Cut(line, "[SKIPPED] ")
		if _, text, ok := strings.Cut(line, "[FAILED] "); ok && why == "" {
			why = text
		}
		switch {
		case test == "" || strings.HasPrefix(v[test], "FAIL"):
		case assertLine.MatchString(line):
			v[test] = "FAIL " + cmp.Or(why, strings.TrimSpace(line))
		case skipped && v[test] == "PASS":
			v[test] = "SKIP " + reason
		}
	}
	return v
}
