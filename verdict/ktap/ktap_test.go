package ktap

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// parse reads a console in writes of size bytes.
func parse(out string, size int) *Test {
	var p Parser
	for rest := []byte(out); len(rest) > 0; {
		n := min(size, len(rest))
		p.Write(rest[:n])
		rest = rest[n:]
	}
	return p.Close()
}

func names(tests []*Test) string {
	var all []string
	for _, t := range tests {
		all = append(all, t.Name)
	}
	return strings.Join(all, " ")
}

// TestKernelData reads the kernel's own test data, with the results of its kunit_parser.py. Errors
// in the form of a log that was cut are counted otherwise there (3, and 1 for no results at all).
func TestKernelData(t *testing.T) {
	const resource = "kunit-resource-test kunit-try-catch-test string-stream-test"
	const kselftest = "selftests: membarrier: membarrier_test_single_thread " +
		"selftests: membarrier: membarrier_test_multi_thread"
	tests := map[string]struct {
		status Status
		counts Counts
		names  string
	}{
		"config_printk_time":                      {Pass, Counts{Passed: 10}, resource},
		"insufficient_memory":                     {None, Counts{}, ""},
		"interrupted_tap_output":                  {Pass, Counts{Passed: 10}, resource},
		"is_test_passed-all_passed":               {Pass, Counts{Passed: 10}, "sysctl_test example"},
		"is_test_passed-all_passed_nested":        {Pass, Counts{Passed: 7}, "sysctl_test example"},
		"is_test_passed-failure":                  {Fail, Counts{Passed: 9, Failed: 1}, "sysctl_test example"},
		"is_test_passed-kselftest":                {Pass, Counts{Passed: 4}, kselftest}, // there 2: it leaves out "# ok"
		"is_test_passed-missing_plan":             {Pass, Counts{Passed: 10}, "sysctl_test example"},
		"is_test_passed-no_tests_no_plan":         {Pass, Counts{Passed: 1, Errors: 1}, "suite"},
		"is_test_passed-no_tests_run_no_header":   {None, Counts{}, ""},
		"is_test_passed-no_tests_run_with_header": {None, Counts{Errors: 1}, ""},
		"kernel_panic_interrupt":                  {Crash, Counts{Passed: 8, Crashed: 2, Errors: 2}, resource},
		"multiple_prefixes":                       {Pass, Counts{Passed: 10}, resource},
		"output_isolated_correctly":               {Pass, Counts{Passed: 2}, "example"},
		"output_with_prefix_isolated_correctly":   {Pass, Counts{Passed: 10}, resource},
		"parse_attributes":                        {Pass, Counts{Passed: 1}, "suite"},
		"parse_ktap_output":                       {Pass, Counts{Passed: 3}, "suite"},
		"parse_subtest_header":                    {Pass, Counts{Passed: 1}, "suite"},
		"pound_no_prefix":                         {Pass, Counts{Passed: 10}, resource},
		"pound_sign":                              {Pass, Counts{Passed: 10}, resource},
		"skip_all_tests":                          {Skip, Counts{Skipped: 5}, "string-stream-test example"},
		"skip_tests":                              {Pass, Counts{Passed: 4, Skipped: 1}, "string-stream-test example"},
		"strip_hyphen":                            {Pass, Counts{Passed: 2}, "sysctl_test example"},
	}
	files, err := filepath.Glob("testdata/kunit/*.log")
	if err != nil || len(files) != len(tests) {
		t.Fatalf("%d files for %d tests: %v", len(files), len(tests), err)
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			log, err := os.ReadFile("testdata/kunit/test_" + name + ".log")
			if err != nil {
				t.Fatal(err)
			}
			root := parse(string(log), 100)
			if root.Status != tt.status || root.Counts() != tt.counts || names(root.Tests) != tt.names {
				t.Errorf("%s, %+v, tests %s", root.Status, root.Counts(), names(root.Tests))
			}
		})
	}
}

// tree prints results in a form to compare.
func tree(t *Test) string {
	var b strings.Builder
	b.WriteString(t.Name + "=" + string(t.Status))
	if t.Reason != "" {
		fmt.Fprintf(&b, "{%s}", t.Reason)
	}
	if t.Measurement != "" {
		fmt.Fprintf(&b, "<%s>", t.Measurement)
	}
	if len(t.Errors) > 0 {
		fmt.Fprintf(&b, "%q", t.Errors)
	}
	if len(t.Tests) > 0 {
		var subs []string
		for _, sub := range t.Tests {
			subs = append(subs, tree(sub))
		}
		fmt.Fprintf(&b, "(%s)", strings.Join(subs, ", "))
	}
	return b.String()
}

func TestParse(t *testing.T) {
	for name, tt := range map[string]struct{ out, want string }{
		"directives": {"KTAP version 1\n1..7\nok 1 a # SKIP why\nnot ok 2 b # SKIP: why\nnot ok 3 c # TODO later\n" +
			"ok 4 d # XFAIL so\nnot ok 5 e # TIMEOUT 45 seconds\nok 6 # skip no name\nok 7 - f # time=3ms\n",
			"=fail(a=skip{why}, b=skip{why}, c=skip{TODO later}, d=pass{XFAIL so}, e=fail{TIMEOUT 45 seconds}, " +
				"=skip{no name}, f=pass{time=3ms})"},
		"a number is wrong":   {"KTAP version 1\n1..2\nok 1 a\nok 3 b\n", `=pass["test number 3, want 2"](a=pass, b=pass)`},
		"more than planned":   {"KTAP version 1\n1..1\nok 1 a\nok 2 b\n", `=pass["2 tests, planned were 1"](a=pass, b=pass)`},
		"the plan comes last": {"TAP version 13\nok 1 a\nok 2 b\n1..2\n", "=pass(a=pass, b=pass)"},
		"less than planned": {"KTAP version 1\n1..3\nok 1 a\n", `=crash["2 of 3 tests have no result"]` +
			"(a=pass, test 2 of 3=crash{no result}, test 3 of 3=crash{no result})"},
		"skipped by the plan": {"TAP version 13\n1..0 # SKIP no device\n", "=skip(all tests=skip{no device})"},
		"another version":     {"KTAP version 2\n1..1\nok 1 a\n", `=pass["version 2, want 1"](a=pass)`},
		"bail out": {"TAP version 13\n1..3\nok 1 a\nBail out! no memory\n",
			"=crash(a=pass, Bail out!=crash{no memory})"},
		"results without numbers": {"TAP version 13\nok - a\nnot ok\n1..2\n", "=fail(a=pass, =fail)"},
		"KTAP needs numbers":      {"KTAP version 1\nok - a\nok 1 b\n", "=pass(b=pass)"},
		"TAP 14's header": {"TAP version 14\n1..1\n# Subtest: outer\n    1..1\n    ok 1 - inner\nok 1 - outer\n",
			"=pass(outer=pass(inner=pass))"},
		"YAML":                        {"TAP version 13\n1..1\nnot ok 1 a\n  ---\n  ok 7 no\n  ...\n", "=fail(a=fail)"},
		"a YAML block without an end": {"TAP version 13\n1..2\nok 1 a\n  ---\nok 2 b\n", "=pass(a=pass, b=pass)"},
		"kselftest": {"TAP version 13\n1..1\n# timeout set to 45\n# TAP version 13\n# 1..2\n# ok 1 a\n# # Totals\n" +
			"# not ok 2 b\nnot ok 1 selftests: x: y # exit=1\n",
			"=fail(selftests: x: y=fail{exit=1}(a=pass, b=fail))"},
		"a module after another": {"KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: s\n    1..1\n    ok 1 a\n" +
			"ok 1 s\nKTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: r\n    1..1\n    ok 1 b\nok 1 r\n",
			"=pass(s=pass(a=pass), r=pass(b=pass))"},
		"parameters": {"KTAP version 1\n1..1\n    # Subtest: s\n    1..1\n        KTAP version 1\n        # Subtest: p\n" +
			"        ok 1 0\n        not ok 2 1\n    not ok 1 p\nnot ok 1 s\n", "=fail(s=fail(p=fail(0=pass, 1=fail)))"},
		"the suite failed, its tests did not": {"KTAP version 1\n1..1\n  # Subtest: s\n  1..1\n  ok 1 a\nnot ok 1 s\n",
			"=fail(s=fail(a=pass))"},
		"a suite without a result": {"KTAP version 1\n1..2\n  # Subtest: s\n  1..1\n  ok 1 a\n  # Subtest: r\n  1..1\n" +
			"  ok 1 b\nok 2 r\n", `=crash(s=crash["no result line"](a=pass), r=pass(b=pass))`},
		"another name": {"KTAP version 1\n1..2\n  # Subtest: s\n  1..1\n  ok 1 a\nok 2 r\n",
			`=crash(s=crash["no result line"](a=pass), r=pass)`},
		"no test ran": {"KTAP version 1\n1..1\n  # Subtest: s\n  1..0\nok 1 s\n", `=none(s=none["no tests ran"])`},
		"it died in a suite": {"[    1.0] KTAP version 1\r\n[    1.0] 1..1\r\n[    1.0]     # Subtest: s\r\n" +
			"[    1.0] BUG: no\r\n", `=crash(s=crash["no result line"])`},
		"behind a program's output": {"KTAP version 1\n1..1\n...[    1.0] ok 1 a\n", "=pass(a=pass)"},
		"LAVA": {"<LAVA_SIGNAL_STARTRUN smoke 1_1>\n<LAVA_SIGNAL_STARTTC a>\n<LAVA_SIGNAL_ENDTC a>\n" +
			"<LAVA_SIGNAL_TESTCASE TEST_CASE_ID=a RESULT=pass MEASUREMENT=1.5 UNITS=s>\n" +
			"<LAVA_SIGNAL_TESTSET START set>\n[    1.0] <LAVA_SIGNAL_TESTCASE TEST_CASE_ID=b RESULT=fail>\n" +
			"<LAVA_SIGNAL_TESTSET STOP>\n<LAVA_SIGNAL_TESTCASE TEST_CASE_ID=c RESULT=unknown>\n" +
			"<LAVA_SIGNAL_STARTTC d>\n",
			"=crash(smoke=crash(a=pass<1.5 s>, set=fail(b=fail), c=crash{result unknown}, d=crash{no result}))"},
		"LAVA without a run": {"<LAVA_SIGNAL_TESTCASE TEST_CASE_ID=a RESULT=skip>\n<LAVA_SIGNAL_TESTSET START>\n" +
			"<LAVA_SIGNAL_TESTCASE>\n", "=skip(lava=skip(a=skip, =none))"},
		"nothing": {"ok 1 a\n1..2\n# Subtest: s\n", "=none"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tree(parse(tt.out, 7)); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// TestLog: a test that did not pass has the lines before its result, and the caller learns of each
// test as it ends.
func TestLog(t *testing.T) {
	var told []string
	p := Parser{Ended: func(t *Test, depth int) {
		told = append(told, fmt.Sprintf("%d %s %s %q", depth, t.Name, t.Status, t.Log))
	}}
	fmt.Fprint(&p, "KTAP version 1\n1..3\n  # Subtest: s\n  1..2\n  one\n  ok 1 a\n  # b: two\n    three\n"+
		"  not ok 2 b\n"+"four\nnot ok 1 s\n[    1.0] five\nok 2 c\n[    1.0] [T1] six\n")
	p.Close()
	want := []string{
		`1 a pass []`, `1 b fail ["  # b: two" "    three"]`, `0 s fail ["four"]`, `0 c pass []`,
		`0 test 3 of 3 crash ["six"]`,
	}
	if !reflect.DeepEqual(told, want) {
		t.Errorf("got  %s\nwant %s", strings.Join(told, "\n     "), strings.Join(want, "\n     "))
	}
	root := parse("KTAP version 1\n"+strings.Repeat("x\n", maxLog+5)+"not ok 1 s\n", 9)
	if n := len(root.Tests[0].Log); n != maxLog {
		t.Errorf("%d lines are kept, want %d", n, maxLog)
	}
}

// TestBounds: a guest cannot make the tree grow without end.
func TestBounds(t *testing.T) {
	deep := "KTAP version 1\n"
	for i := range 1000 {
		deep += strings.Repeat(" ", i+1) + "KTAP version 1\n"
	}
	for name, out := range map[string]string{
		"a large plan":    "KTAP version 1\n1..2000000000\nok 1 a\n",
		"a plan too long": "KTAP version 1\n1..99999999999999999999\nok 1 a\n",
		"many tests":      "KTAP version 1\n" + strings.Repeat("ok 1 a\n", maxTests*2),
		"signals":         strings.Repeat("<LAVA_SIGNAL_STARTRUN a>\n", maxTests*2),
		"deep":            deep,
		"names":           "KTAP version 1\nok 1 " + strings.Repeat("n", 1<<20) + "\n",
		"logs":            "KTAP version 1\n" + strings.Repeat(strings.Repeat("l\n", 99)+"not ok 1 a\n", 9999),
	} {
		root := parse(out, 1<<16)
		if n, bytes := size(root); n > maxTests+1 || bytes > maxLogs+n*(2*maxName+maxError*100) {
			t.Errorf("%s: %d tests, %d bytes", name, n, bytes)
		}
	}
}

func size(t *Test) (n, bytes int) {
	n, bytes = 1, len(t.Name)+len(t.Reason)
	for _, s := range append(t.Log, t.Errors...) {
		bytes += len(s)
	}
	for _, sub := range t.Tests {
		m, b := size(sub)
		n, bytes = n+m, bytes+b
	}
	return n, bytes
}

// FuzzParse: the results do not depend on the sizes of the writes, and every test has a status.
func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/kunit/*.log")
	for _, name := range files {
		log, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		if len(log) < 2000 {
			f.Add(string(log), uint8(7))
		}
	}
	f.Add("TAP version 14\n# Subtest: a\n    1..1 # SKIP\n  ---\nBail out!\n<LAVA_SIGNAL_TESTSET START>\n", uint8(0))
	f.Fuzz(func(t *testing.T, out string, size uint8) {
		root := parse(out, int(size)+1)
		if whole := parse(out, len(out)+1); !reflect.DeepEqual(root, whole) {
			t.Errorf("%s, in writes of %d bytes %s", tree(whole), int(size)+1, tree(root))
		}
		var check func(*Test)
		check = func(sub *Test) {
			switch sub.Status {
			case Pass, Fail, Skip, Crash, None:
			default:
				t.Errorf("status %q of %q", sub.Status, sub.Name)
			}
			for _, s := range sub.Tests {
				check(s)
			}
		}
		check(root)
	})
}
