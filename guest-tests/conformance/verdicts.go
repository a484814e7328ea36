// Package conformance reads the output of iscsi-test-cu, libiscsi's suite of SCSI tests. Its test
// runs the suite at the in-process target without a machine in between; `make conformance` runs it
// in Linux guests (package linux).
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

// Size is the size of a disk for the suite, in bytes. The disk has less than 65536 blocks: with
// more, one command moves that many, which Linux takes from /dev/sg0 only if memory happens to be
// in large pieces.
const Size = 24 << 20

// Flags make iscsi-test-cu print all that Parse needs: without -V some tests do not report that
// they were skipped. DestroyFlag allows it to destroy data, and SanitizeFlag to SANITIZE.
const (
	Flags        = "-v -V"
	DestroyFlag  = "-d"
	SanitizeFlag = "-S"
)

// Sanitize are the tests of SANITIZE that work. Another one crashes the suite under SanitizeFlag,
// so each of these is a separate run.
var Sanitize = []string{"SCSI.Sanitize.BlockErase", "SCSI.Sanitize.ExitFailureMode",
	"SCSI.Sanitize.InvalidServiceAction", "SCSI.Sanitize.Overwrite"}

// Lines is a regular expression, for grep -E too, of the lines that Parse needs.
const Lines = `^Suite:|^ *Test:|SKIPPED|FAILED|^ *[0-9]+\. [^ ]*\.c:`

var (
	suiteLine = regexp.MustCompile(`^Suite: (\S+)`)
	testLine  = regexp.MustCompile(`^\s*Test: (\S+) \.\.\.(.*)`)
	// A failed assertion makes a test fail. A line [FAILED] may be an expected result; it is the
	// reason if the test failed.
	assertLine = regexp.MustCompile(`^\s*\d+\. \S+\.c:\d+ `)
)

// Parse reads the output of iscsi-test-cu, or of several runs of it with a line "Suite:" before
// each. The later verdict of a test counts.
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
