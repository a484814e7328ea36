//go:build built

package linux

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestBuiltKUnit: gvm kunit has the kernel's own counts of each suite of its tests. Its
// exit status is that of the tests, and a GLOB selects suites.
func TestBuiltKUnit(t *testing.T) {
	k, err := theLab(t).KUnit()
	must(t, err)
	results := filepath.Join(t.TempDir(), "results.json")
	r := gvm(t, "kunit", "-k", k.BZImage, "--raw", "--results", results, "--cmdline", withTime)
	r.wantStatus(t, 0)
	want := map[string]string{}
	var totals string
	suite := regexp.MustCompile(`^(?:not )?ok \d+ (?:- )?([^ ]+)`)
	for line := range strings.Lines(r.console) {
		_, line, _ = strings.Cut(strings.TrimRight(line, "\r\n"), "] ")
		if counts, ok := strings.CutPrefix(line, "# Totals: "); ok {
			totals = counts
		} else if m := suite.FindStringSubmatch(line); m != nil {
			want[m[1]], totals = totals, ""
		}
	}
	if len(want) < 10 {
		t.Fatalf("the kernel has run %d suites, want 10 or more", len(want))
	}
	file, err := os.ReadFile(results)
	must(t, err)
	var got struct {
		Tests []countedTest
	}
	must(t, json.Unmarshal(file, &got))
	for _, s := range got.Tests {
		counted, ok := want[s.Name]
		if ok && counted == "" { // of one test
			counted = kunitCounts{pass: 1}.String()
		}
		if n := s.counts(); n.String() != counted {
			t.Errorf("%s: gvm counts %s, the kernel %s", s.Name, n, counted)
		}
		delete(want, s.Name)
	}
	for name := range want {
		t.Errorf("gvm has no suite %s", name)
	}
	r = gvm(t, "kunit", "-k", k.BZImage, "list*")
	r.wantStatus(t, 0)
	if !strings.Contains(r.stderr, "list-kunit-test") || strings.Contains(r.stderr, "overflow") {
		r.fatalf(t, "the suites of list* and no others are wanted")
	}
}

// countedTest is a test in the file of --results.
type countedTest struct {
	Name, Status string
	Tests        []countedTest
}

// kunitCounts are KUnit's counts.
type kunitCounts struct{ pass, fail, skip int }

func (n kunitCounts) String() string {
	return fmt.Sprintf("pass:%d fail:%d skip:%d total:%d", n.pass, n.fail, n.skip, n.pass+n.fail+n.skip)
}

// counts counts the tests that have no tests of their own.
func (c countedTest) counts() (n kunitCounts) {
	for _, sub := range c.Tests {
		m := sub.counts()
		n.pass, n.fail, n.skip = n.pass+m.pass, n.fail+m.fail, n.skip+m.skip
	}
	switch {
	case len(c.Tests) > 0:
	case c.Status == "pass":
		n.pass++
	case c.Status == "skip":
		n.skip++
	default:
		n.fail++
	}
	return n
}
