// Gotest runs go test with its arguments, and then prints a line for each of the tests that took
// longest.
//
//	go run ./guest-tests/cmd/gotest [ARGUMENT]...
//
// Before, it prints the lines of go test on packages: all output of those that fail, and with
// -v that of all. Besides, it prints the lab's own lines, which tell of lost guests. If
// GVM_TEST_TIMES is set, it names a file that gets the lines as well.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// These name files that get lines of several runs.
const (
	timesEnv    = "GVM_TEST_TIMES"
	failuresEnv = "GVM_TEST_FAILURES"
)

// A run says at most longest tests, and none that took less than short seconds.
const longest, short = 20, 5

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	times, failures, err := report(os.Stdout, out, slices.Contains(args, "-v"))
	err = errors.Join(err, cmd.Wait(), times.print(os.Stdout, os.Getenv(timesEnv)),
		appendTo(os.Getenv(failuresEnv), failures))
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, err)
	}
	if err != nil {
		return 1
	}
	return 0
}

// event is a line of go test -json: see go doc test2json.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

type testTime struct {
	seconds float64
	name    string
}

type testTimes []testTime

// report reads events, and writes the text that go test would print, and why tests are skipped.
// failures has the lines of it that tell most.
func report(w io.Writer, events io.Reader, verbose bool) (times testTimes, failures []string, err error) {
	kept := map[string]map[string][]string{} // lines of tests that have not passed, by package and test
	labs := map[string][]string{}            // the lab's lines, by package
	subs := map[string]float64{}             // times of all subtests of a test
	places := map[string]string{}            // the last line with a place in a file, by package and test
	lines := bufio.NewReader(events)
	for {
		line, readErr := lines.ReadBytes('\n')
		if readErr != nil {
			if !errors.Is(readErr, io.EOF) {
				err = errors.Join(err, readErr)
			}
			return times, failures, err
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			_, writeErr := w.Write(line) // not an event, such as a message of the go command
			err = errors.Join(err, writeErr)
			continue
		}
		text := ""
		tests := kept[e.Package]
		if tests == nil {
			tests = map[string][]string{}
			kept[e.Package] = tests
		}
		top, below, sub := strings.Cut(e.Test, "/")
		switch e.Action {
		case "build-output":
			text = e.Output
		case "output":
			if verbose || e.Test == "" && isSummary(e.Output) || strings.HasPrefix(e.Output, "lab: ") {
				text = e.Output
			}
			if place.MatchString(e.Output) {
				places[e.Package+" "+e.Test] = strings.TrimSpace(e.Output)
			}
			if strings.HasPrefix(e.Output, "lab: ") {
				labs[e.Package] = append(labs[e.Package], e.Output)
			} else if text == "" && !strings.HasPrefix(e.Output, "=== ") || verbose {
				tests[top] = append(tests[top], e.Output)
			}
			if e.Test == "" && strings.HasPrefix(e.Output, "FAIL\t") {
				lines := failed(tests)
				if !verbose {
					text = strings.Join(lines, "") + text
				}
				failures = append(append(failures, brief(append(labs[e.Package], lines...))...), e.Output)
			}
		case "pass", "skip", "fail":
			if reason := places[e.Package+" "+e.Test]; e.Action == "skip" && reason != "" && !verbose {
				text = fmt.Sprintf("skip\t%s %s: %s\n", e.Package, e.Test, reason)
			}
			switch {
			case e.Test == "":
			case sub && !strings.Contains(below, "/"):
				subs[e.Package+" "+top] += e.Elapsed
			case !sub:
				name := e.Package + " " + e.Test
				// The time of a test has none of its subtests if they are parallel.
				times = append(times, testTime{max(e.Elapsed, subs[name]), name})
			}
			if e.Action != "fail" && !sub {
				delete(tests, e.Test)
			}
		}
		_, writeErr := io.WriteString(w, text)
		err = errors.Join(err, writeErr)
	}
}

// isSummary reports whether a line is the one that go test prints of a package.
func isSummary(line string) bool {
	return strings.HasPrefix(line, "ok  \t") || strings.HasPrefix(line, "FAIL\t") || strings.HasPrefix(line, "?   \t")
}

// failed returns the output kept of a package: its own lines come first.
func failed(tests map[string][]string) (lines []string) {
	for _, name := range slices.Sorted(maps.Keys(tests)) {
		lines = append(lines, tests[name]...)
		delete(tests, name)
	}
	return lines
}

// mostBrief bounds the lines on a package, and lastBrief those on one whose tests have not failed.
const mostBrief, lastBrief = 30, 5

// telling matches lines that say which test failed, and why, also by a panic or a timeout, which
// lists the tests that ran.
var telling = regexp.MustCompile(`^\s*--- FAIL: |^\s+\w+_test\.go:\d+: |^(panic|fatal error): |^WARNING: DATA RACE` +
	`|^\trunning tests:|^\t\tTest`)

// place matches a line that a test prints, such as the reason of a skip.
var place = regexp.MustCompile(`^\s+\w+_test\.go:\d+: `)

// brief returns the first of the telling lines. Without one it returns the last lines: a package
// may have no lab, or a test may have left a process behind.
func brief(lines []string) []string {
	told := slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return !telling.MatchString(line) })
	if len(told) == 0 {
		return lines[max(0, len(lines)-lastBrief):]
	}
	return told[:min(len(told), mostBrief)]
}

// print writes the longest of the times to w, and all that are not short to the end of file, if it
// is named.
func (t testTimes) print(w io.Writer, file string) error {
	slices.SortStableFunc(t, func(a, b testTime) int {
		switch {
		case a.seconds > b.seconds:
			return -1
		case a.seconds < b.seconds:
			return 1
		}
		return 0
	})
	var lines []string
	for _, test := range t {
		if test.seconds >= short {
			lines = append(lines, fmt.Sprintf("%8.1f s  %s\n", test.seconds, test.name))
		}
	}
	_, err := io.WriteString(w, strings.Join(lines[:min(len(lines), longest)], ""))
	return errors.Join(err, appendTo(file, lines))
}

// appendTo writes lines to the end of a file, if it is named.
func appendTo(file string, lines []string) error {
	if file == "" || len(lines) == 0 {
		return nil
	}
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, strings.Join(lines, ""))
	return errors.Join(err, f.Close())
}
