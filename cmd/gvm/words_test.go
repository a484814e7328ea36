package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/virtio/vhostscsi"
)

func TestHelp(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string // parts, apart by |
	}{
		{nil, "boot Linux guests|run|doctor|completion|exit-status"},
		{[]string{"help"}, "boot Linux guests|run|doctor|completion|exit-status"},
		{[]string{"--help"}, "boot Linux guests|doctor"},
		{[]string{"--version"}, "gvm version " + version},
		{[]string{"-v"}, "gvm version " + version},
		{[]string{"help", "run"}, "EXAMPLES|--kernel|--disk|gvm help disk|--timeout|--on-reset|--cpu-features|--queues"},
		{[]string{"run", "--help"}, "EXAMPLES|--kernel"},
		{[]string{"help", "pause"}, "gvm pause build"},
		{[]string{"help", "resume"}, "error=enospc-stop|gvm resume build"},
		{[]string{"help", "abi"}, "gvm abi diff 6.1.json 6.12.json|--json"},
		{[]string{"bench", "disk", "--help"}, "gvm bench disk --depth 32|--rounds"},
		{[]string{"help", "doctor"}, "FAIL|exit status"},
		{[]string{"help", "completion"}, "source <(gvm completion bash)"},
		{[]string{"help", "exit-status"}, exitStatusHelp},
		{[]string{"exit-status"}, exitStatusHelp},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			t.Parallel()
			r := gvmRuns(t, command(t, tt.args...))
			if r.status != 0 || r.errs != "" {
				t.Errorf("status %d: %s", r.status, r.errs)
			}
			for part := range strings.SplitSeq(tt.want, "|") {
				if !strings.Contains(r.out, part) {
					t.Errorf("%s\nlacks %q", r.out, part)
				}
			}
		})
	}
}

// TestExitStatusHelp holds the table against the constants.
func TestExitStatusHelp(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "exit.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^ {1,5}(\d+)(?:, (\d+))?  \S`).FindAllStringSubmatch(exitStatusHelp, -1) {
		rows[m[1]], rows[m[2]] = true, true
	}
	found := 0
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || len(v.Names) != 1 || !strings.HasPrefix(v.Names[0].Name, "exit") {
			return true
		}
		if lit, ok := v.Values[0].(*ast.BasicLit); ok && lit.Kind == token.INT {
			found++
			if !rows[lit.Value] {
				t.Errorf("the table lacks %s = %s", v.Names[0].Name, lit.Value)
			}
		}
		return true
	})
	if found < 8 || !rows["0"] || !rows["143"] {
		t.Errorf("%d constants, rows %v", found, rows)
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	r := gvmRuns(t, command(t, "doctor"))
	if r.status != 0 || r.errs != "" || !strings.HasPrefix(r.out, "ok    /dev/kvm, API version 12\n") {
		t.Errorf("status %d: %s%s", r.status, r.out, r.errs)
	}
	for line := range strings.Lines(r.out) {
		if !regexp.MustCompile(`^(ok   |note ) \S.*\n$`).MatchString(line) {
			t.Errorf("line %q", line)
		}
	}
	for _, want := range []string{"CPUs in a guest", "MIPS", "of memory", "vhost-scsi", "2 MiB pages"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("%s\nlacks %q", r.out, want)
		}
	}
}

func TestCompletion(t *testing.T) {
	bin := t.TempDir()
	if err := os.Symlink(self(t), filepath.Join(bin, "gvm")); err != nil {
		t.Fatal(err)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		t.Run(shell, func(t *testing.T) {
			r := gvmRuns(t, command(t, "completion", shell))
			if r.status != 0 || r.errs != "" || !strings.Contains(r.out, "--generate-bash-completion") {
				t.Fatalf("status %d: %s%s", r.status, r.out, r.errs)
			}
			path, err := exec.LookPath(shell)
			if err != nil {
				t.Skipf("its syntax is not checked: %v", err)
			}
			c := exec.Command(path, "-n")
			c.Stdin = strings.NewReader(r.out)
			if out, err := c.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"bzImage", "disk.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		words []string
		want  []string
	}{
		{[]string{"gvm", "ru"}, []string{"run"}},
		{[]string{"gvm", ""}, []string{"abi", "bench", "completion", "disk", "doctor", "exit-status", "h", "help", "image", "lio", "list", "pause", "replay", "resume", "run", "stop", "trace"}},
		{[]string{"gvm", "run", "--ker"}, []string{"--kernel"}},
		{[]string{"gvm", "run", "--cpus", "2", "--mem"}, []string{"--memory"}},
		{[]string{"gvm", "run", "--cpu"}, []string{"--cpu-features", "--cpus"}},
		{[]string{"gvm", "run", "--kernel", "bz"}, []string{"bzImage"}},
		{[]string{"gvm", "run", "--disk", "di"}, []string{"disk.img"}},
	} {
		t.Run(strings.Join(tt.words, " "), func(t *testing.T) {
			t.Parallel()
			c := exec.Command(bash, "-c", `source <(gvm completion bash); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _gvm; printf '%s\n' "${COMPREPLY[@]}"`, "bash")
			c.Args = append(c.Args, tt.words...)
			c.Dir = dir
			c.Env = append(environment(), "PATH="+bin+":"+os.Getenv("PATH"))
			out, err := c.CombinedOutput()
			got := strings.Fields(string(out))
			slices.Sort(got)
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("%q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestParseSize(t *testing.T) {
	for _, tt := range []struct {
		s    string
		want uint64 // of unit 1024
		bad  string // part of the error
	}{
		{"0", 0, ""}, {"1", 1024, ""}, {"512", 512 << 10, ""},
		{"1K", 1 << 10, ""}, {"2k", 2 << 10, ""}, {"3KB", 3 << 10, ""}, {"4KiB", 4 << 10, ""},
		{"5M", 5 << 20, ""}, {"6g", 6 << 30, ""}, {"7T", 7 << 40, ""}, {"8tib", 8 << 40, ""},
		{"1.5G", 3 << 29, ""}, {"0.25", 256, ""}, {".5M", 1 << 19, ""},
		{"4194304T", 1 << 62, ""},
		{"4194305T", 0, "too large"}, {"8388608T", 0, "too large"}, {"16777216T", 0, "too large"}, {"18446744073709551615", 0, "too large"},
		{"99999999999999999999", 0, "too large"}, {"4194304.5T", 0, "too large"},
		{"", 0, "want a number"}, {"K", 0, "want a number"}, {"B", 0, "want a number"}, {"5B", 0, "want a number"}, {"5iB", 0, "want a number"},
		{"-1", 0, "want a number"}, {"-1.5M", 0, "want a number"}, {"1 M", 0, "want a number"}, {"1MM", 0, "want a number"}, {"M1", 0, "want a number"},
		{"1E3", 0, "want a number"}, {"1e3", 0, "want a number"}, {"0x10", 0, "want a number"}, {"0X10", 0, "want a number"}, {"1_000", 0, "want a number"},
		{"INF", 0, "want a number"}, {"NaN", 0, "want a number"}, {"1P", 0, "want a number"}, {"١", 0, "want a number"},
	} {
		got, err := parseSize(tt.s, 1024)
		if tt.bad == "" && (err != nil || got != tt.want) {
			t.Errorf("parseSize(%q) = %d, %v, want %d", tt.s, got, err, tt.want)
		}
		if tt.bad != "" && (err == nil || !strings.Contains(err.Error(), tt.bad) || !strings.Contains(err.Error(), strconv.Quote(tt.s))) {
			t.Errorf("parseSize(%q) = %d, %v, want an error with %q", tt.s, got, err, tt.bad)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 bytes", 1000: "1000 bytes", 1 << 10: "1 KiB", 3 << 19: "1536 KiB", 512 << 20: "512 MiB", 5 << 30: "5 GiB", 2 << 40: "2 TiB"} {
		if got := formatSize(n); got != want {
			t.Errorf("formatSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestSplitCommas(t *testing.T) {
	for s, want := range map[string][]string{
		"":           {""},
		"a":          {"a"},
		"a,b":        {"a", "b"},
		"a,,b":       {"a,b"},
		"a,,,b":      {"a,", "b"},
		"a,,,,b":     {"a,,b"},
		",a":         {"", "a"},
		"a,":         {"a", ""},
		",,":         {","},
		",,,":        {",", ""},
		"é,x,,y=z,w": {"é", "x,y=z", "w"},
	} {
		if got := splitCommas(s); !reflect.DeepEqual(got, want) {
			t.Errorf("splitCommas(%q) = %q, want %q", s, got, want)
		}
	}
}

func TestParseDisk(t *testing.T) {
	for s, want := range map[string]disk{
		"a.img":            {path: "a.img", lun: -1, blockSize: 512},
		"a,,b=c":           {path: "a,b=c", lun: -1, blockSize: 512},
		"readonly":         {path: "readonly", lun: -1, blockSize: 512},
		"a,readonly":       {path: "a", lun: -1, blockSize: 512, readOnly: true},
		"a,serial=x=y,,z":  {path: "a", lun: -1, blockSize: 512, serial: "x=y,z"},
		"a,lun=0":          {path: "a", lun: 0, blockSize: 512},
		"a,lun=16383":      {path: "a", lun: 16383, blockSize: 512},
		"a,cache=unsafe":   {path: "a", lun: -1, blockSize: 512, cache: scsi.Unsafe},
		"a,size=1000":      {path: "a", lun: -1, blockSize: 512, size: 1000},
		"a,size=1.5M":      {path: "a", lun: -1, blockSize: 512, size: 3 << 19},
		"a,block_size=512": {path: "a", lun: -1, blockSize: 512},
		"a,lun=3,block_size=4096,cache=writethrough,size=4T,serial=s,readonly": {path: "a", lun: 3, blockSize: 4096, cache: scsi.WriteThrough, size: 4 << 40, serial: "s", readOnly: true},
		"a,error=stop,physical_block_size=4096":                                {path: "a", lun: -1, blockSize: 512, onError: stopOnErrors, physical: 4096},
		"a,error=enospc-stop,iops=100,bps=1M:1G":                               {path: "a", lun: -1, blockSize: 512, onError: stopWhenFull, iops: scsi.Limit{Rate: 100}, bps: scsi.Limit{Rate: 1 << 20, Burst: 1 << 30}},
		"a,pi=1":                                                               {path: "a", lun: -1, blockSize: 512, pi: true},
		"a,pi=0":                                                               {path: "a", lun: -1, blockSize: 512},
		"a,error=report,iops=1:2":                                              {path: "a", lun: -1, blockSize: 512, iops: scsi.Limit{Rate: 1, Burst: 2}},
		"a,backend=process":                                                    {path: "a", lun: -1, blockSize: 512},
		"a,workers=2,backend=vhost":                                            {path: "a", lun: -1, blockSize: 512, backend: byKernel, workers: 2},
		"a,backend=auto,workers=shared":                                        {path: "a", lun: -1, blockSize: 512, backend: byEither, workers: vhostscsi.SharedWorker},
		"wwn=naa.5,backend=vhost":                                              {wwn: "naa.5", lun: -1, blockSize: 512, backend: byKernel},
		"wwn=iqn.a:b,,c,workers=3,backend=vhost":                               {wwn: "iqn.a:b,c", lun: -1, blockSize: 512, backend: byKernel, workers: 3},
	} {
		if got, err := parseDisk(s); err != nil || got != want {
			t.Errorf("parseDisk(%q) = %+v, %v, want %+v", s, got, err, want)
		}
	}
}

// FuzzParseDisk writes what was read as a --disk again, which must read the same.
func FuzzParseDisk(f *testing.F) {
	for _, s := range []string{"", "a", "a,,b,readonly", "a,serial=x,,y,lun=7", "a,cache=unsafe,size=1.5G,block_size=4096", "a,size=4194304T", "a,lun=99999", "a,foo=", ",,", "a,backend=vhost,workers=4", "wwn=naa.5,backend=vhost,workers=shared",
		"a,error=stop,iops=5:7,bps=1M,physical_block_size=4096", "a,pi=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseDisk(s)
		if err != nil {
			return
		}
		if (d.path == "") == (d.wwn == "") || d.workers < vhostscsi.SharedWorker || d.workers > maxQueues || d.lun < -1 || d.lun > 16383 || d.size < 0 || d.blockSize != 512 && d.blockSize != 4096 || d.cache > scsi.Unsafe {
			t.Fatalf("parseDisk(%q) = %+v", s, d)
		}
		double := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
		workers := ""
		switch {
		case d.workers > 0:
			workers = ",workers=" + strconv.Itoa(d.workers)
		case d.workers < 0:
			workers = ",workers=shared"
		}
		if d.path == "" {
			again := "wwn=" + double(d.wwn) + ",backend=vhost" + workers
			if e, err := parseDisk(again); err != nil || e != d {
				t.Fatalf("parseDisk(%q) = %+v; written as %q it is %+v, %v", s, d, again, e, err)
			}
			return
		}
		again := double(d.path) + ",backend=" + [...]string{"process", "vhost", "auto"}[d.backend] + workers
		if d.readOnly {
			again += ",readonly"
		}
		if d.serial != "" {
			again += ",serial=" + double(d.serial)
		}
		if d.lun >= 0 {
			again += ",lun=" + strconv.Itoa(d.lun)
		}
		if d.size > 0 {
			again += ",size=" + strconv.FormatInt(d.size, 10)
		}
		if d.physical > 0 {
			again += ",physical_block_size=" + strconv.Itoa(d.physical)
		}
		for name, l := range map[string]scsi.Limit{"iops": d.iops, "bps": d.bps} {
			if l.Rate > 0 {
				again += fmt.Sprintf(",%s=%d", name, l.Rate)
			}
			if l.Burst > 0 {
				again += fmt.Sprintf(":%d", l.Burst)
			}
		}
		if d.pi {
			again += ",pi=1"
		}
		again += ",error=" + [...]string{"report", "stop", "enospc-stop"}[d.onError]
		again += ",block_size=" + strconv.Itoa(d.blockSize) + ",cache=" + [...]string{"writeback", "writethrough", "unsafe"}[d.cache]
		if e, err := parseDisk(again); err != nil || e != d {
			t.Fatalf("parseDisk(%q) = %+v; written as %q it is %+v, %v", s, d, again, e, err)
		}
	})
}
