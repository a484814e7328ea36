package gvm_test

import (
	"cmp"
	"debug/buildinfo"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Limits of gvm before main. Each start of a guest pays for it: see docs/performance.md.
const (
	mostBytes    = 13_500_000 // size of the program; package http's Server or Transport adds 1.24 MB, --gdb 145 kB
	mostPlain    = 14_500_000 // size with every package inlined, as TestStart builds it
	mostInit     = 36 << 10   // allocated by a package
	mostAllocs   = 64         // allocations of a package
	mostAllInits = 144 << 10  // allocated by all packages
	initNoise    = 2 << 10    // allocated by a package that is not listed
)

// linked are the modules that gvm links.
var linked = []string{
	"github.com/HdrHistogram/hdrhistogram-go",
	"github.com/bobuhiro11/gokvm",
	"github.com/cavaliergopher/cpio",
	"github.com/cespare/xxhash/v2",
	"github.com/klauspost/compress",
	"github.com/mikelolasagasti/xz",
	"github.com/pierrec/lz4/v4",
	"github.com/ulikunitz/xz",
	"github.com/urfave/cli/v2",
	"github.com/xrash/smetrics",
	"golang.org/x/sys",
	"golang.org/x/term",
}

// initialized are the packages outside the standard library that do work before main. Prefer
// sync.OnceValue, and tables that the linker fills.
var initialized = []string{
	"github.com/klauspost/compress/internal/snapref", // the tables of CRC-32C, 0.15 ms, with zstd
	"github.com/mikelolasagasti/xz",                  // the tables of CRC-64
	"github.com/urfave/cli/v2",
	"gvm/devices/scsi",
	"main",
}

// TestStart checks the size of gvm and its work before main against the lists above. Times depend
// on the machine, so the test only logs them. It builds without the flags with which the packages
// of a release compile, so that it shares what other tests have compiled; TestSize builds with
// them.
func TestStart(t *testing.T) { testStart(t, mostPlain, "BUILDFLAGS=-buildvcs=false -ldflags=-s") }

// TestSize does the same with the program that users get.
func TestSize(t *testing.T) { testStart(t, mostBytes) }

func testStart(t *testing.T, most int64, words ...string) {
	// Reading the directories here tells go test's cache which files the programs depend on.
	if err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != "." && (d.Name()[0] == '.' || d.Name() == "bin") {
			return fs.SkipDir
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if out, err := exec.Command("make", append(words, "build", "BIN="+dir)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	gvm := filepath.Join(dir, "gvm")
	fi, err := os.Stat(gvm)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes", fi.Size())
	if fi.Size() > most {
		t.Errorf("gvm has %d bytes: want %d at most", fi.Size(), most)
	}
	info, err := buildinfo.ReadFile(gvm)
	if err != nil {
		t.Fatal(err)
	}
	var modules []string
	for _, m := range info.Deps {
		modules = append(modules, m.Path)
		if !slices.Contains(linked, m.Path) {
			t.Errorf("gvm links %s: move heavy code to a program of its own, such as gvm-plot, "+
				"or add the module to linked", m.Path)
		}
	}
	for _, path := range linked {
		if !slices.Contains(modules, path) {
			t.Errorf("gvm does not link %s any longer: take it off the list", path)
		}
	}

	type initTask struct {
		bytes, allocs int
		times         []time.Duration
	}
	tasks := map[string]*initTask{}
	const runs = 7
	for range runs {
		c := exec.Command(gvm, "--version")
		c.Env = append(os.Environ(), "GODEBUG=inittrace=1")
		var errs strings.Builder
		c.Stderr = &errs
		if err := c.Run(); err != nil {
			t.Fatalf("%v\n%s", err, &errs)
		}
		for _, m := range initLine.FindAllStringSubmatch(errs.String(), -1) {
			k := tasks[m[1]]
			if k == nil {
				k = &initTask{}
				tasks[m[1]] = k
			}
			took, err := time.ParseDuration(m[2] + "ms")
			if err != nil {
				t.Fatal(err)
			}
			bytes, _ := strconv.Atoi(m[3])
			allocs, _ := strconv.Atoi(m[4])
			k.bytes, k.allocs, k.times = max(k.bytes, bytes), max(k.allocs, allocs), append(k.times, took)
		}
	}
	all := 0
	median := func(k *initTask) time.Duration { return slices.Sorted(slices.Values(k.times))[len(k.times)/2] }
	for _, name := range slices.SortedFunc(maps.Keys(tasks),
		func(a, b string) int { return cmp.Compare(median(tasks[b]), median(tasks[a])) }) {
		k := tasks[name]
		all += k.bytes
		if took := median(k); took >= 10*time.Microsecond {
			t.Logf("%8s %6d bytes %4d allocations: %s", took, k.bytes, k.allocs, name)
		}
		if k.bytes > mostInit || k.allocs > mostAllocs {
			t.Errorf("%s allocates %d bytes in %d pieces before main: want %d in %d at most", name, k.bytes,
				k.allocs, mostInit, mostAllocs)
		}
		own := name == "main" || strings.HasPrefix(name, "gvm/") || strings.Contains(strings.Split(name, "/")[0], ".")
		if own && k.bytes >= initNoise && !slices.Contains(initialized, name) {
			t.Errorf("%s allocates %d bytes before main, and is not in the list", name, k.bytes)
		}
	}
	for _, name := range initialized {
		if tasks[name] == nil || tasks[name].bytes < initNoise {
			t.Errorf("%s has nothing to do before main any longer: take it off the list", name)
		}
	}
	if len(tasks) < 20 || all > mostAllInits {
		t.Errorf("%d packages allocate %d bytes before main: want %d at most", len(tasks), all, mostAllInits)
	}
}

// initLine matches the line that GODEBUG=inittrace=1 prints for a package (package runtime).
var initLine = regexp.MustCompile(`(?m)^init (\S+) @\S+ ms, (\S+) ms clock, (\d+) bytes, (\d+) allocs$`)
