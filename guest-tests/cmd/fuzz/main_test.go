package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTable checks that docs/fuzzing.md lists each fuzz target and no other, and that the
// comment of each tells its check.
func TestTable(t *testing.T) {
	all, err := targets("../../..")
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 40 {
		t.Errorf("%d fuzz targets are found", len(all))
	}
	page, err := os.ReadFile("../../../docs/fuzzing.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(page), tableHead)
	if !ok {
		t.Fatal("docs/fuzzing.md has no table")
	}
	table, _, _ := strings.Cut(rest, "\n\n")
	rows := strings.Split(strings.TrimSuffix(table, "\n"), "\n")
	for i, target := range all {
		if target.doc == "" {
			t.Errorf("%s has no comment", target)
		}
		if i >= len(rows) || !strings.HasPrefix(rows[i], target.row()) ||
			!strings.HasSuffix(rows[i], target.description()+" |") {
			t.Fatalf("line %d of the table is not that of %s: ./dev fuzz-table writes it", i+1, target)
		}
	}
	if len(rows) > len(all) {
		t.Errorf("the table has %q, which is no target: ./dev fuzz-table writes it", rows[len(all)])
	}
}

// TestRead has the lines of go test -fuzz.
func TestRead(t *testing.T) {
	const begin = "fuzz: elapsed: 0s, gathering baseline coverage: 0/3 completed\n" +
		"fuzz: elapsed: 3s, execs: 52 (17/sec), new interesting: 1 (total: 4)\n" +
		"fuzz: elapsed: 5s, execs: 90 (19/sec), new interesting: 2 (total: 5)\n"
	for _, tt := range []struct {
		name, output, finding, reason string
		deadline                      bool
	}{
		{"clean", begin + "PASS\nok  \tgvm/text\t5.2s\n", "", "", false},
		{"finding", begin + "--- FAIL: FuzzName (0.02s)\n    --- FAIL: FuzzName (0.00s)\n        name_test.go:50: wrong\n" +
			"    \n    Failing input written to testdata/fuzz/FuzzName/0123\n    To re-run:\n",
			"text/testdata/fuzz/FuzzName/0123", "name_test.go:50: wrong", false},
		{"hung", begin + "--- FAIL: FuzzName (5.02s)\n    fuzzing process hung or terminated unexpectedly: exit status 2\n" +
			"    Failing input written to testdata/fuzz/FuzzName/0123\n    To re-run:\n",
			"text/testdata/fuzz/FuzzName/0123", "fuzzing process hung or terminated unexpectedly: exit status 2", false},
		{"seed", "failure while testing seed corpus entry: FuzzName/seed#0\n--- FAIL: FuzzName (0.02s)\n" +
			"    --- FAIL: FuzzName (0.00s)\n        name_test.go:50: wrong\n        name_test.go:51: more\n",
			"again by the seed FuzzName/seed#0", "name_test.go:50: wrong", false},
		{"deadline", begin + "--- FAIL: FuzzName (5.02s)\n    context deadline exceeded\nFAIL\n", "",
			"context deadline exceeded", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var r result
			last, err := r.read(target{dir: "text", name: "FuzzName"}, strings.NewReader(tt.output))
			if err != nil || r.Finding != tt.finding || r.Reason != tt.reason || deadline(last) != tt.deadline {
				t.Errorf("finding %q, reason %q, deadline %v, error %v", r.Finding, r.Reason, deadline(last), err)
			}
			if strings.HasPrefix(tt.output, begin) && (r.Execs != 90 || r.New != 2) {
				t.Errorf("%d executions and %d new inputs, want 90 and 2", r.Execs, r.New)
			}
		})
	}
}

// TestState: an interrupted run goes on with the results that it had.
func TestState(t *testing.T) {
	state := filepath.Join(t.TempDir(), "new", "fuzz.json")
	results, err := load(state)
	if err != nil || len(results) != 0 {
		t.Fatalf("without a file: %v, %v", results, err)
	}
	a, b := target{dir: "a", name: "FuzzA"}, target{dir: "b", name: "FuzzB"}
	results[a.String()] = result{Execs: 7, New: 1, Seeds: 12.5, Corpus: 50}
	results[b.String()] = result{Finding: "b/testdata/fuzz/FuzzB/01"}
	if err := save(state, results); err != nil {
		t.Fatal(err)
	}
	if results, err = load(state); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	want := "package  target  executions  new inputs  seeds reach  all reach  found\n" +
		"a        FuzzA   7           1           12.5%        50.0%      \n" +
		"b        FuzzB   0           0           0.0%         0.0%       b/testdata/fuzz/FuzzB/01\n"
	if found := print(&out, []target{a, b}, results); found != 1 || out.String() != want {
		t.Errorf("%d findings, and the table\n%s\nwant\n%s", found, out.String(), want)
	}
	if err := os.WriteFile(state, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := load(state); err == nil || !strings.Contains(err.Error(), state) {
		t.Errorf("a broken file: %v", err)
	}
}

// TestLink: the directory that was left out stays another one, so that nothing is made in the
// source.
func TestLink(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "to")
	for _, name := range []string{"a.go", "testdata/b"} {
		path := filepath.Join(from, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := link(from, to, "testdata"); err != nil {
		t.Fatal(err)
	}
	if err := link(filepath.Join(from, "missing"), filepath.Join(to, "testdata"), ""); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(to, "a.go")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(to, "testdata/b")); err == nil {
		t.Error("testdata is the source's")
	}
}

// TestCoverCorpus: the inputs of go test's cache count, in a package whose TestMain needs the
// module and whose test reads a file of another package.
func TestCoverCorpus(t *testing.T) {
	module := fmt.Sprintf("fuzzed%d", os.Getpid()) // whose inputs in the cache are the test's own
	top := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":        "module " + module + "\n\ngo 1.21\n",
		"other/main.go": "package main\n\nfunc main() {}\n",
		"below/it/it.go": `package it

func Is(s string) bool {
	if s == "it" {
		return true
	}
	return false
}
`,
		"below/it/it_test.go": `package it

import (
	"os"
	"os/exec"
	"testing"
)

func TestMain(m *testing.M) {
	if out, err := exec.Command("go", "build", "-o", os.DevNull, "` + module + `/other").CombinedOutput(); err != nil {
		panic(string(out))
	}
	m.Run()
}

func FuzzIs(f *testing.F) {
	if _, err := os.ReadFile("../../other/main.go"); err != nil {
		f.Fatal(err)
	}
	f.Add("not it")
	f.Fuzz(func(t *testing.T, s string) { Is(s) })
}
`} {
		if err := os.MkdirAll(filepath.Join(top, filepath.Dir(name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(top, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(top)
	is := target{dir: "below/it", name: "FuzzIs"}
	without, err := coverCorpus(t.Context(), is)
	if err != nil {
		t.Fatal(err)
	}
	cache, err := command(t.Context(), "", "go", "env", "GOCACHE")
	if err != nil {
		t.Fatal(err)
	}
	inputs := filepath.Join(strings.TrimSpace(string(cache)), "fuzz", module)
	defer os.RemoveAll(inputs)
	if err := os.MkdirAll(filepath.Join(inputs, is.dir, is.name), 0o700); err != nil {
		t.Fatal(err)
	}
	const input = "go test fuzz v1\nstring(\"it\")\n"
	if err := os.WriteFile(filepath.Join(inputs, is.dir, is.name, "01"), []byte(input), 0o600); err != nil {
		t.Fatal(err)
	}
	if with, err := coverCorpus(t.Context(), is); err != nil || without >= 100 || with != 100 {
		t.Errorf("%v%% without the input, %v%% with it, %v", without, with, err)
	}
}

// TestCoverage reads the lines of go test -cover and of a test program.
func TestCoverage(t *testing.T) {
	const runs = "=== RUN   FuzzName\n=== RUN   FuzzName/seed#0\n=== RUN   FuzzName/0123\nPASS\n"
	for _, line := range []string{"coverage: 45.3% of statements\nok  \tgvm/text\t0.5s\tcoverage: 45.3% of statements\n",
		"coverage: 45.3% of statements\n"} {
		if percent, inputs, err := coverage([]byte(runs+line), "FuzzName"); err != nil || percent != 45.3 || inputs != 2 {
			t.Errorf("%q: %v%% of %d inputs, %v", line, percent, inputs, err)
		}
	}
	if _, _, err := coverage([]byte(runs), "FuzzName"); err == nil {
		t.Error("no coverage is no error")
	}
}
