package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const events = `{"Action":"start","Package":"a"}
{"Action":"output","Package":"a","Test":"TestQuick","Output":"=== RUN   TestQuick\n"}
{"Action":"output","Package":"a","Test":"TestQuick","Output":"noise\n"}
{"Action":"pass","Package":"a","Test":"TestQuick","Elapsed":0.5}
{"Action":"output","Package":"a","Test":"TestBad","Output":"=== RUN   TestBad\n"}
{"Action":"output","Package":"a","Test":"TestBad/sub","Output":"    bad_test.go:1: wrong\n"}
{"Action":"fail","Package":"a","Test":"TestBad/sub","Elapsed":7}
{"Action":"output","Package":"a","Test":"TestBad","Output":"--- FAIL: TestBad (7.00s)\n"}
{"Action":"fail","Package":"a","Test":"TestBad","Elapsed":7}
{"Action":"output","Package":"a","Output":"FAIL\n"}
{"Action":"output","Package":"a","Output":"FAIL\ta\t7.5s\n"}
{"Action":"fail","Package":"a","Elapsed":7.5}
{"Action":"output","Package":"b","Output":"lab: L1 is up\n"}
{"Action":"output","Package":"b","Test":"TestSlow","Output":"noise\n"}
{"Action":"pass","Package":"b","Test":"TestSlow","Elapsed":61.25}
{"Action":"pass","Package":"b","Test":"TestParallel/one","Elapsed":20}
{"Action":"pass","Package":"b","Test":"TestParallel/two/deep","Elapsed":30}
{"Action":"pass","Package":"b","Test":"TestParallel/two","Elapsed":30}
{"Action":"pass","Package":"b","Test":"TestParallel","Elapsed":0.5}
{"Action":"output","Package":"b","Test":"TestRoot/sub","Output":"    b_test.go:2: needs root\n"}
{"Action":"skip","Package":"b","Test":"TestRoot/sub","Elapsed":0}
{"Action":"pass","Package":"b","Test":"TestRoot","Elapsed":0}
{"Action":"output","Package":"b","Output":"PASS\n"}
{"Action":"output","Package":"b","Output":"ok  \tb\t61.3s\n"}
{"Action":"pass","Package":"b","Elapsed":61.3}
not an event
`

func TestReport(t *testing.T) {
	var out strings.Builder
	times, failures, err := report(&out, strings.NewReader(events), false)
	if err != nil {
		t.Fatal(err)
	}
	want := "FAIL\n    bad_test.go:1: wrong\n--- FAIL: TestBad (7.00s)\n" +
		"FAIL\ta\t7.5s\nlab: L1 is up\nskip\tb TestRoot/sub: b_test.go:2: needs root\nok  \tb\t61.3s\nnot an event\n"
	if out.String() != want {
		t.Errorf("prints %q, want %q", out.String(), want)
	}
	want = "    bad_test.go:1: wrong\n--- FAIL: TestBad (7.00s)\nFAIL\ta\t7.5s\n"
	if got := strings.Join(failures, ""); got != want {
		t.Errorf("the failures are %q, want %q", got, want)
	}
	out.Reset()
	file := filepath.Join(t.TempDir(), "times")
	if err := times.print(&out, file); err != nil {
		t.Fatal(err)
	}
	want = "    61.2 s  b TestSlow\n    50.0 s  b TestParallel\n     7.0 s  a TestBad\n"
	if out.String() != want {
		t.Errorf("the longest are %q, want %q", out.String(), want)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != want {
		t.Errorf("the file has %q, %v, want %q", b, err, want)
	}
}

func TestReportVerbose(t *testing.T) {
	var out strings.Builder
	if _, _, err := report(&out, strings.NewReader(events), true); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "noise\n"); n != 2 {
		t.Errorf("noise is printed %d times, want 2", n)
	}
}

// TestBrief: of a package whose tests took too long, the tests that ran are told, and of one that
// failed without a test the last lines.
func TestBrief(t *testing.T) {
	lines := []string{"panic: test timed out after 1s\n", "\trunning tests:\n", "\t\tTestSlow (1s)\n", "\n",
		"goroutine 1 [running]:\n", "main.main()\n", "\t/a/main_test.go:1 +0x1\n"}
	if got := brief(lines); !slices.Equal(got, lines[:3]) {
		t.Errorf("%q", got)
	}
	if got := brief(lines[3:]); !slices.Equal(got, lines[3:]) {
		t.Errorf("%q", got)
	}
	if got := brief(slices.Repeat(lines, 100)); len(got) != mostBrief {
		t.Errorf("%d lines", len(got))
	}
}
