package matrix

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"gvm/testrun"
	"gvm/text"
	"gvm/verdict"
)

// TestKernelOfBytes: the path of a kernel, which may have any bytes, comes back from JSON.
func TestKernelOfBytes(t *testing.T) {
	const path = "/boot/\xff"
	var axes Axes
	var d Done
	for _, v := range []struct{ from, to any }{
		{Axes{Kernels: []text.Name{path}}, &axes},
		{Done{Cell: Cell{Kernel: path}, Attempts: []Attempt{{Result: &testrun.Result{Kernel: path}}}}, &d},
	} {
		b, err := json.Marshal(v.from)
		if err == nil {
			err = json.Unmarshal(b, v.to)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if axes.Kernels[0] != path || d.Kernel != path || d.Attempts[0].Result.Kernel != path {
		t.Errorf("%q, %q, %q", axes.Kernels, d.Kernel, d.Attempts[0].Result.Kernel)
	}
}

// TestCells: names are unique, fit for files, and have no more than they need.
func TestCells(t *testing.T) {
	long := strings.Repeat("x", 300)
	for _, tt := range []struct {
		axes Axes
		want string
	}{
		{Axes{[]text.Name{"a/bzImage"}, []int{1}, []string{""}, 1}, "bzImage"},
		{Axes{[]text.Name{"6.1.0-13-amd64", "host"}, []int{1, 16}, []string{""}, 1},
			"6.1.0-13-amd64-cpus1 6.1.0-13-amd64-cpus16 host-cpus1 host-cpus16"},
		{Axes{[]text.Name{"a/bzImage", "../b c/bzImage"}, []int{2}, []string{""}, 1}, "a-bzImage b-c-bzImage"},
		{Axes{[]text.Name{"k", "k", "k"}, []int{1}, []string{""}, 1}, "k k-k2 k-k3"},
		{Axes{[]text.Name{"..", "/"}, []int{1}, []string{""}, 1}, "-k2 -k3"},
		{Axes{[]text.Name{text.Name(long)}, []int{1}, []string{""}, 1}, long[:maxLabel]},
		{Axes{[]text.Name{"k"}, []int{1}, []string{"process", "vhost"}, 1}, "k-process k-vhost"},
		{Axes{[]text.Name{"k"}, []int{1}, []string{"vhost"}, 10},
			"k-run01 k-run02 k-run03 k-run04 k-run05 k-run06 k-run07 k-run08 k-run09 k-run10"},
	} {
		cells, err := tt.axes.Cells()
		var names []string
		for _, c := range cells {
			names = append(names, c.Name)
		}
		if got := strings.Join(names, " "); err != nil || got != tt.want {
			t.Errorf("%v: %q, %v, want %q", tt.axes, got, err, tt.want)
		}
	}
	// The time for a name does not grow with their number: with all of them that would take hours.
	cells, err := Axes{slices.Repeat([]text.Name{"k"}, MaxCells), []int{1}, []string{""}, 1}.Cells()
	if want := fmt.Sprint("k-k", MaxCells); err != nil || cells[MaxCells-1].Name != want {
		t.Errorf("%d cells, %v, want %s at the end", len(cells), err, want)
	}
	for _, rounds := range []int{MaxCells/2 + 1, 1 << 62} {
		axes := Axes{[]text.Name{"a", "b"}, []int{1}, []string{""}, rounds}
		if cells, err := axes.Cells(); err == nil {
			t.Errorf("%d rounds: %d cells", rounds, len(cells))
		}
	}
}

// Results of runs.
var (
	pass     = testrun.Result{Kind: testrun.Exited}
	fail     = testrun.Result{Kind: testrun.Exited, Status: 3}
	panicked = testrun.Result{Kind: testrun.Panic, Status: 120, Text: "guest panic"}
	crash    = testrun.Result{Kind: testrun.Crash, Status: 121, Rung: "vsock", Text: "the guest crashed"}
	lostBoot = testrun.Result{Kind: testrun.NotTested, Status: 125, Times: testrun.Times{Entered: 1}, Text: "no word"}
	noKernel = testrun.Result{Kind: testrun.NotTested, Status: 125, Text: "k does not exist"}
	slow     = testrun.Result{Kind: testrun.Timeout, Status: 124, Rung: "vsock", Times: testrun.Times{Entered: 1}}
	stopped  = testrun.Result{Kind: testrun.Stopped, Status: 130, Text: "stopped by SIGINT"}
)

// run runs n cells, whose results are those of attempts; the last one is repeated.
func run(ctx context.Context, n, jobs, retry int, attempts func(cell int) []testrun.Result,
	each ...func(ctx context.Context)) []Done {
	cfg := Config{Jobs: jobs, Retry: retry, Began: func(Cell) {}, Ended: func(*Done) {}}
	for i := range n {
		cfg.Cells = append(cfg.Cells, Cell{Name: fmt.Sprint("c", i), Kernel: "k", CPUs: 1, Round: i})
	}
	cfg.Run = func(ctx context.Context, c Cell, attempt int) Attempt {
		for _, f := range each {
			f(ctx)
		}
		list := attempts(c.Round)
		r := list[min(attempt, len(list)-1)]
		if ctx.Err() != nil {
			r = stopped
		}
		return Attempt{Result: &r}
	}
	return Run(ctx, cfg)
}

func always(r testrun.Result) func(int) []testrun.Result {
	return func(int) []testrun.Result { return []testrun.Result{r} }
}

// TestJobs: as many cells as jobs run at a time, and each runs once.
func TestJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most, runs atomic.Int32
		start := time.Now()
		all := run(t.Context(), 7, 3, 5, always(pass), func(context.Context) {
			runs.Add(1)
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
			}
			time.Sleep(time.Second)
			now.Add(-1)
		})
		if took := time.Since(start); took != 3*time.Second || most.Load() != 3 || runs.Load() != 7 {
			t.Errorf("%d runs, %d at a time, in %s", runs.Load(), most.Load(), took)
		}
		for i, d := range all {
			if !d.Passed() || d.Name != fmt.Sprint("c", i) || d.Took != time.Second {
				t.Errorf("cell %d: %+v", i, d)
			}
		}
	})
}

// TestRetry: a cell whose guest was lost runs again, as often as asked, and all of it is counted. A
// verdict on the kernel or the command stays.
func TestRetry(t *testing.T) {
	for _, tt := range []struct {
		retry    int
		attempts []testrun.Result
		runs     int
		verdict  string
	}{
		{0, []testrun.Result{crash, pass}, 1, "crash 121"},
		{2, []testrun.Result{crash, pass}, 2, "passed"},
		{2, []testrun.Result{lostBoot, crash, fail}, 3, "exited 3"},
		{1, []testrun.Result{lostBoot}, 2, "not-tested 125"},
		{9, []testrun.Result{panicked, pass}, 1, "panic 120"},
		{9, []testrun.Result{noKernel, pass}, 1, "not-tested 125"},
		{9, []testrun.Result{slow, pass}, 1, "timeout 124"},
		{9, []testrun.Result{fail, pass}, 1, "exited 3"},
	} {
		d := &run(t.Context(), 1, 1, tt.retry, func(int) []testrun.Result { return tt.attempts })[0]
		if len(d.Attempts) != tt.runs || d.Verdict() != tt.verdict || Count([]Done{*d}).Retries != tt.runs-1 {
			t.Errorf("--retry %d %v: %d runs, %s", tt.retry, tt.attempts, len(d.Attempts), d.Verdict())
		}
	}
}

// TestStop: once the context is done no cell begins, and none is retried.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			time.Sleep(1500 * time.Millisecond)
			cancel()
		}()
		start := time.Now()
		all := run(ctx, 10, 2, 9, always(pass), func(ctx context.Context) {
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		})
		if took := time.Since(start); took != 1500*time.Millisecond {
			t.Errorf("took %s", took)
		}
		if n := Count(all); n != (Counts{Passed: 2, NotRun: 8}) || all[3].Result().Kind != testrun.Stopped ||
			all[4].Result() != nil || all[4].Verdict() != "not run" {
			t.Errorf("%v: %+v", n, all)
		}
		if n := Status(all); n != 130 {
			t.Errorf("status %d", n)
		}
	})
}

// TestStatus: the gravest verdict of the cells is that of all, and none hides another.
func TestStatus(t *testing.T) {
	kind := func(k testrun.Kind, status int) testrun.Result { return testrun.Result{Kind: k, Status: status} }
	rising := []testrun.Result{pass, noKernel, kind(testrun.NotStarted, 127), fail, kind(testrun.Signaled, 137), slow,
		kind(testrun.Hang, 122), kind(testrun.Ended, 121), crash, kind(testrun.Fault, 120), panicked, stopped}
	for n := range rising {
		list := slices.Clone(rising[:n+1])
		for range 2 {
			slices.Reverse(list)
			all := run(t.Context(), len(list), 1, 0, func(i int) []testrun.Result { return list[i : i+1] })
			if got := Status(all); got != rising[n].Status {
				t.Errorf("%v: status %d, want %d", list, got, rising[n].Status)
			}
		}
	}
	if got := Status([]Done{{Attempts: []Attempt{{Result: &pass}}}, {}}); got != 125 {
		t.Errorf("status %d with a cell that was not run", got)
	}
	two := []testrun.Result{fail, kind(testrun.Exited, 9)}
	if got := Status(run(t.Context(), 2, 1, 0, func(i int) []testrun.Result { return two[i : i+1] })); got != 3 {
		t.Errorf("status %d, want that of the first cell", got)
	}
	for kind := range strings.FieldsSeq("exited signaled not-started panic fault crash ended hang timeout stopped " +
		"not-tested") {
		if !slices.Contains(severity, testrun.Kind(kind)) {
			t.Errorf("no severity of %s", kind)
		}
	}
}

// example has a cell of each kind of end.
func example(t *testing.T) []Done {
	list := [][]testrun.Result{{pass}, {fail}, {crash, pass}, {noKernel}, {panicked}}
	all := run(t.Context(), len(list), 1, 1, func(i int) []testrun.Result { return list[i] })
	all[1].Attempts[0].Output = []string{"last words"}
	for i := range all {
		all[i].Took = 1250 * time.Millisecond
	}
	return append(all, Done{Cell: Cell{Name: "c5"}})
}

func TestTable(t *testing.T) {
	var b strings.Builder
	if err := Table(&b, example(t)); err != nil {
		t.Fatal(err)
	}
	const want = `cell  verdict         seconds  retries
c0    passed          1.2      0
c1    exited 3        1.2      0
c2    passed          1.2      1        retry 1 after: the guest crashed
c3    not-tested 125  1.2      0        k does not exist
c4    panic 120       1.2      0        guest panic
c5    not run         0.0      0
6 cells: 2 passed, 2 failed, 1 not tested, 1 not run; lost guests retried: 1
`
	if b.String() != want {
		t.Errorf("%s\nwant\n%s", &b, want)
	}
	b.Reset()
	foreign := Done{Cell: Cell{Name: "a\tb\nc"}, Attempts: []Attempt{{Result: &testrun.Result{Kind: "k\tl\nm"}}}}
	if err := Table(&b, []Done{foreign}); err != nil || strings.Count(b.String(), "\n") != 3 ||
		!strings.Contains(b.String(), `\u0009b\u000ac  k\u0009l\u000am 0`) {
		t.Errorf("words of a pod: %v, %s", err, &b)
	}
	if err := Table(full{}, nil); !errors.Is(err, errFull) {
		t.Errorf("no room: %v", err)
	}
}

// full is a writer without room.
type full struct{}

var errFull = errors.New("no room")

func (full) Write([]byte) (int, error) { return 0, errFull }

// TestJSON: the file has every verdict, those of lost guests too.
func TestJSON(t *testing.T) {
	var b strings.Builder
	if err := JSON(&b, example(t), 120); err != nil {
		t.Fatal(err)
	}
	var file struct {
		Format string
		Status int
		Counts Counts
		Cells  []struct {
			Name, Kernel string
			CPUs         int
			Seconds      float64
			Verdict      *struct {
				Kind string
				Log  []string
			}
			Lost []struct{ Kind, Text string }
		}
	}
	if err := json.Unmarshal([]byte(b.String()), &file); err != nil {
		t.Fatal(err)
	}
	cells := file.Cells
	if file.Format != Format || file.Status != 120 || file.Counts != (Counts{2, 2, 1, 1, 1}) || len(cells) != 6 ||
		cells[2].Verdict.Kind != "exited" || cells[2].Verdict.Log == nil || len(cells[2].Lost) != 1 ||
		cells[2].Lost[0].Kind != "crash" || cells[5].Verdict != nil || cells[0].Name != "c0" || cells[0].Seconds != 1.25 {
		t.Errorf("%s", &b)
	}
}

// TestJUnit: each cell is a test, and a lost guest a skipped one.
func TestJUnit(t *testing.T) {
	var b strings.Builder
	if err := JUnit(&b, example(t)); err != nil {
		t.Fatal(err)
	}
	var file struct {
		Tests    int `xml:"tests,attr"`
		Failures int `xml:"failures,attr"`
		Errors   int `xml:"errors,attr"`
		Skipped  int `xml:"skipped,attr"`
		Suites   []struct {
			Cases []struct {
				Name    string `xml:"name,attr"`
				Failure string `xml:"failure"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal([]byte(b.String()), &file); err != nil {
		t.Fatal(err)
	}
	if file.Tests != 7 || file.Failures != 2 || file.Errors != 1 || file.Skipped != 2 || len(file.Suites) != 1 ||
		file.Suites[0].Cases[2].Name != "c2 lost 1" || file.Suites[0].Cases[1].Failure != "last words" {
		t.Errorf("%s", &b)
	}
}

// TestFaultVerdict: a report of the kernel of a cell stays in its verdict.
func TestFaultVerdict(t *testing.T) {
	r := testrun.Result{Kind: testrun.Fault, Status: 120, Reports: []verdict.Report{{Count: 2, Fails: true}}}
	all := run(t.Context(), 1, 1, 0, always(r))
	var b strings.Builder
	if err := JSON(&b, all, Status(all)); err != nil || !strings.Contains(b.String(), `"count": 2`) {
		t.Errorf("%v: %s", err, &b)
	}
}
