// Fuzz runs fuzz targets of this module one after the other, for a time each.
//
//	go run ./guest-tests/cmd/fuzz [-time 30m] [-run REGEXP] [-state FILE]
//	go run ./guest-tests/cmd/fuzz -table [-run REGEXP]
//
// A finding is a file below testdata/fuzz of its package, and a line with its reason; fuzzing goes
// on with the next target. FILE gets each result at once, and targets that it has are not run
// again, so a run that was interrupted goes on where it was. At the end of all the table of results
// is printed, FILE is removed, and the status is 1 if there were findings.
//
// With -table it fuzzes nothing, and writes the table of docs/fuzzing.md anew: the targets, and the
// statements of their packages that their committed corpora reach. It measures only those that
// match REGEXP, and those that are new.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("fuzz", flag.ContinueOnError)
	each := flags.Duration("time", 30*time.Minute, "fuzz each target so long")
	pattern := flags.String("run", ".", "only targets whose \"PACKAGE TARGET\" this regular expression matches")
	parallel := flags.Int("parallel", 0, "inputs at once; 0 is one for each CPU")
	state := flags.String("state", "bench/fuzz.json", "file with the results of an interrupted run")
	table := flags.Bool("table", false, "write the table of docs/fuzzing.md anew")
	if err := flags.Parse(args); err != nil {
		return err
	}
	only, err := regexp.Compile(*pattern)
	if err != nil {
		return err
	}
	all, err := targets(".")
	if err != nil {
		return err
	}
	if *table {
		return writeTable(ctx, "docs/fuzzing.md", all, only)
	}
	all = slices.DeleteFunc(all, func(t target) bool { return !only.MatchString(t.String()) })
	if len(all) == 0 {
		return fmt.Errorf("no target matches %q", *pattern)
	}
	results, err := load(*state)
	if err != nil {
		return err
	}
	for i, t := range all {
		if _, ok := results[t.String()]; ok {
			continue
		}
		fmt.Printf("fuzz: %d of %d: %s\n", i+1, len(all), t)
		r, err := fuzz(ctx, t, *each, *parallel)
		if ctx.Err() != nil {
			return fmt.Errorf("interrupted; the same command goes on with %s", t)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", t, err)
		}
		results[t.String()] = r
		if r.Finding != "" {
			fmt.Printf("fuzz: %s: found %s: %s\n", t, r.Finding, r.Reason)
		}
		if err := save(*state, results); err != nil {
			return err
		}
	}
	found := print(os.Stdout, all, results)
	if err := os.Remove(*state); err != nil {
		return err
	}
	if found > 0 {
		return fmt.Errorf("findings in %d of %d targets", found, len(all))
	}
	return nil
}

// target is a function of testing.F.
type target struct {
	dir, name string // of the package, from the top of the module
	doc       string // first sentence of its comment
}

func (t target) String() string { return t.dir + " " + t.name }

// targets finds the fuzz targets of the module at top. It leaves out modules below it.
func targets(top string) (all []target, err error) {
	err = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != top {
			_, err := os.Stat(filepath.Join(path, "go.mod"))
			if err == nil || d.Name()[0] == '.' || d.Name() == "testdata" {
				return fs.SkipDir
			}
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(top, filepath.Dir(path))
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Fuzz") {
				all = append(all, target{dir, f.Name.Name, new(doc.Package).Synopsis(f.Doc.Text())})
			}
		}
		return err
	})
	slices.SortFunc(all, func(a, b target) int { return strings.Compare(a.String(), b.String()) })
	return all, err
}

// result is the outcome of fuzzing a target. The numbers are go test's own.
type result struct {
	Execs, New int
	Finding    string  `json:",omitempty"`
	Reason     string  `json:",omitempty"` // the first line that go test says of a failure
	Seeds      float64 // statements of the package that its seeds reach, in percent
	Corpus     float64 // with the inputs that fuzzing has found on this machine
}

func load(state string) (map[string]result, error) {
	results := map[string]result{}
	text, err := os.ReadFile(state)
	if errors.Is(err, fs.ErrNotExist) {
		return results, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &results)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the results so far: %w; remove %s to begin anew", err, state)
	}
	return results, nil
}

// save replaces the file, so that an interruption leaves the old or the new results.
func save(state string, results map[string]result) error {
	text, err := json.MarshalIndent(results, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(state), 0o777); err != nil {
		return err
	}
	if err := os.WriteFile(state+".new", text, 0o666); err != nil {
		return err
	}
	return os.Rename(state+".new", state)
}

var (
	progress = regexp.MustCompile(`^fuzz: elapsed: .*, execs: (\d+) \(.*\), new interesting: (\d+) `)
	written  = regexp.MustCompile(`^\s+Failing input written to (testdata/fuzz/\S+)`)
	failed   = regexp.MustCompile(`^\s*--- FAIL: `)
	seed     = regexp.MustCompile(`^failure while testing seed corpus entry: (\S+)|^\s+--- FAIL: (Fuzz\w+/\S+)`)
)

// fuzz runs go test -fuzz. An error is one of go test itself; the last 20 lines of its output are
// in it.
func fuzz(ctx context.Context, t target, d time.Duration, parallel int) (r result, err error) {
	args := []string{"test", "-run", "^$", "-fuzz", "^" + t.name + "$", "-fuzztime", d.String(),
		"-fuzzminimizetime", "10s"}
	if parallel > 0 {
		args = append(args, "-parallel", strconv.Itoa(parallel))
	}
	c := exec.CommandContext(ctx, "go", append(args, "./"+t.dir)...)
	c.Cancel = func() error { return c.Process.Signal(os.Interrupt) }
	out, err := c.StdoutPipe()
	if err != nil {
		return r, err
	}
	c.Stderr = c.Stdout
	if err := c.Start(); err != nil {
		return r, err
	}
	last, readErr := r.read(t, out)
	if err := c.Wait(); err != nil && r.Finding == "" && !deadline(last) {
		return r, fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, strings.Join(last, "\n"))
	}
	if readErr != nil {
		return r, readErr
	}
	if r.Seeds, _, err = cover(ctx, t); r.Finding != "" {
		return r, nil // a seed that fails ends the test early
	}
	if err == nil {
		r.Corpus, err = coverCorpus(ctx, t)
	}
	return r, err
}

// deadline reports whether go test has failed because the time was over, which it can for no other
// reason (go.dev/issue/75804).
func deadline(output []string) bool {
	return slices.ContainsFunc(output, func(line string) bool {
		return strings.TrimSpace(line) == "context deadline exceeded"
	})
}

// read reads the output of go test -fuzz, and returns the end of it.
func (r *result) read(t target, out io.Reader) (last []string, err error) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 16<<20)
	failure := false
	for lines.Scan() {
		line := lines.Text()
		last = append(last[max(0, len(last)-19):], line)
		if failed.MatchString(line) {
			failure = true
		} else if failure && r.Reason == "" {
			r.Reason = strings.TrimSpace(line)
		}
		if m := progress.FindStringSubmatch(line); m != nil {
			r.Execs, _ = strconv.Atoi(m[1])
			r.New, _ = strconv.Atoi(m[2])
		}
		if m := written.FindStringSubmatch(line); m != nil {
			r.Finding = t.dir + "/" + m[1]
		} else if m := seed.FindStringSubmatch(line); m != nil && r.Finding == "" {
			r.Finding = "again by the seed " + m[1] + m[2]
		}
	}
	return last, lines.Err()
}

var covered = regexp.MustCompile(`(?m)^(?:ok\s.*\s)?coverage: ([\d.]+)% of statements`)

// coverage reads the output of a test with -v -cover: the statements reached in percent, and the
// number of inputs.
func coverage(output []byte, name string) (percent float64, inputs int, err error) {
	m := covered.FindSubmatch(output)
	if m == nil {
		return 0, 0, errors.New("the test tells no coverage")
	}
	percent, err = strconv.ParseFloat(string(m[1]), 64)
	return percent, bytes.Count(output, []byte("=== RUN   "+name+"/")), err
}

// cover measures the seeds of a target: those of f.Add, and the committed files.
func cover(ctx context.Context, t target) (percent float64, inputs int, err error) {
	out, err := command(ctx, "", "go", "test", "-v", "-count=1", "-cover", "-run", "^"+t.name+"$", "./"+t.dir)
	if err != nil {
		return 0, 0, err
	}
	return coverage(out, t.name)
}

// coverCorpus measures the seeds and the inputs that go test keeps in its cache. It runs the test
// in a directory of a module that has the cache's files beside the committed ones, and all else by
// links: a TestMain may run go build there, and a test read files of other packages.
func coverCorpus(ctx context.Context, t target) (percent float64, err error) {
	work, err := os.MkdirTemp("", "fuzz")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(work)
	cache, err := command(ctx, "", "go", "env", "GOCACHE")
	if err != nil {
		return 0, err
	}
	path, err := command(ctx, "", "go", "list", "./"+t.dir)
	if err != nil {
		return 0, err
	}
	test := filepath.Join(work, "program.test")
	if _, err := command(ctx, "", "go", "test", "-c", "-cover", "-o", test, "./"+t.dir); err != nil {
		return 0, err
	}
	from, err := filepath.Abs(".")
	if err != nil {
		return 0, err
	}
	to := filepath.Join(work, "module")
	for name := range strings.SplitSeq(filepath.Join(t.dir, "testdata/fuzz"), "/") {
		err = errors.Join(err, link(from, to, name))
		from, to = filepath.Join(from, name), filepath.Join(to, name)
	}
	trimmed := func(b []byte) string { return strings.TrimSpace(string(b)) }
	err = errors.Join(err,
		link(filepath.Join(from, t.name), filepath.Join(to, t.name), ""),
		link(filepath.Join(trimmed(cache), "fuzz", trimmed(path), t.name), filepath.Join(to, t.name), ""))
	if err != nil {
		return 0, err
	}
	dir := filepath.Join(work, "module", t.dir)
	out, err := command(ctx, dir, test, "-test.v", "-test.run", "^"+t.name+"$", "-test.gocoverdir", work)
	if err != nil {
		return 0, err
	}
	percent, _, err = coverage(out, t.name)
	return percent, err
}

// link makes symbolic links in directory to for the files of from but one, and but .git, which go
// build would read the state of. There may be no from.
func link(from, to, but string) error {
	entries, err := os.ReadDir(from)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(to, 0o777); err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == but || e.Name() == ".git" {
			continue
		}
		err := os.Symlink(filepath.Join(from, e.Name()), filepath.Join(to, e.Name()))
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func command(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = dir
	out, err := c.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(c.Args, " "), err, out)
	}
	return out, nil
}

// print writes the results as a table, and returns the number of targets with findings.
func print(w io.Writer, all []target, results map[string]result) (found int) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "package\ttarget\texecutions\tnew inputs\tseeds reach\tall reach\tfound")
	for _, t := range all {
		r := results[t.String()]
		fmt.Fprintf(table, "%s\t%s\t%d\t%d\t%.1f%%\t%.1f%%\t%s\n", t.dir, t.name, r.Execs, r.New, r.Seeds, r.Corpus,
			r.Finding)
		if r.Finding != "" {
			found++
		}
	}
	table.Flush()
	return found
}

const tableHead = "| package | target | seeds | reach | description |\n|---|---|---|---|---|\n"

// writeTable replaces the table of page. It measures the targets that the table lacks, and those
// that match again.
func writeTable(ctx context.Context, page string, all []target, again *regexp.Regexp) error {
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(text), tableHead)
	if !ok {
		return fmt.Errorf("%s has no table", page)
	}
	old, after, _ := strings.Cut("\n"+rest, "\n\n")
	var b strings.Builder
	b.WriteString(before + tableHead)
	for _, t := range all {
		var percent float64
		var inputs int
		_, figures, ok := strings.Cut(old, "\n"+t.row())
		if ok && !again.MatchString(t.String()) {
			_, err = fmt.Sscanf(figures, "%d | %f%%", &inputs, &percent)
		} else {
			percent, inputs, err = cover(ctx, t)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", t, err)
		}
		fmt.Fprintf(&b, "%s %d | %.1f%% | %s |\n", t.row(), inputs, percent, t.description())
	}
	return os.WriteFile(page, []byte(b.String()+"\n"+after), 0o666)
}

// row is the beginning of a target's line in the table.
func (t target) row() string { return fmt.Sprintf("| %s | %s |", t.dir, t.name) }

// description is the target's comment, without the name that it begins with.
func (t target) description() string {
	return strings.TrimLeft(strings.TrimPrefix(strings.TrimSuffix(t.doc, "."), t.name), ": ")
}
