package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestBenchDisk: a row for each storage at each load, figures that are there, and
// nothing left behind.
func TestBenchDisk(t *testing.T) {
	record := filepath.Join(t.TempDir(), "disk.json")
	r := gvmRuns(t, command(t, "bench", "disk", "--time", "20ms", "--rounds", "2", "--size", "4K", "--depth", "1,16", "--queues", "1,2", "--json", record))
	if r.status != 0 {
		t.Fatalf("status %d: %s", r.status, r.errs)
	}
	rows := map[string]int{"null interrupt": 4, "mem interrupt": 4, "file interrupt": 4, "io_uring": 4, "pread": 2}
	if polling := 2 * min(runtime.NumCPU()/2, 2); polling > 0 {
		rows["null poll"], rows["mem poll"], rows["file poll"] = polling, polling, polling
	}
	if _, err := exec.LookPath("fio"); err != nil {
		delete(rows, "io_uring")
		delete(rows, "pread")
		if !strings.Contains(r.errs, "fio is not installed") {
			t.Errorf("without fio: %q", r.errs)
		}
	}
	for name, want := range rows {
		row := regexp.MustCompile(`(?m)^ *` + strings.Join(strings.Fields(name), " +") + ` +4 KiB +[12] +(1|16) +\d+\.\d +\(\d+\.\d–\d+\.\d\) +\d+\.\d\d `)
		if n := len(row.FindAllString(r.out, -1)); n != want {
			t.Errorf("%d rows of %s, want %d", n, name, want)
		}
	}
	if t.Failed() {
		t.Log(r.out)
	}
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	var all []sample
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, s := range all {
		count[strings.TrimSpace(s.Storage+" "+s.Driver)]++
		if s.IOPS <= 0 || s.CPU <= 0 || s.P50 <= 0 || s.P99 < s.P50 || s.Queues < 1 || s.Queues > 2 || s.Size != 4096 {
			t.Errorf("%+v", s)
		}
	}
	for name, want := range rows {
		if count[name] != 2*want {
			t.Errorf("%s: %d measurements in two rounds of %d", name, count[name], want)
		}
	}
}

// TestBenchRecord: a run that fails leaves an earlier record as it is, and none of its own.
func TestBenchRecord(t *testing.T) {
	dir := t.TempDir()
	old := filepath.Join(dir, "old.json")
	if err := os.WriteFile(old, []byte("[]"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, record := range []string{old, filepath.Join(dir, "new.json")} {
		if r := gvmRuns(t, command(t, "bench", "disk", "--disk", "missing.img", "--json", record)); r.status != 2 {
			t.Errorf("status %d: %s", r.status, r.errs)
		}
	}
	text, err := os.ReadFile(old)
	if made, _ := filepath.Glob(filepath.Join(dir, "*")); err != nil || string(text) != "[]" || len(made) != 1 {
		t.Errorf("%q, %v; there are %v", text, err, made)
	}
}

// TestBenchStopped: a signal ends it, and its image is gone.
func TestBenchStopped(t *testing.T) {
	p := startGVM(t, "", "bench", "disk", "--time", "20ms", "--rounds", "100000")
	for {
		if made, _ := filepath.Glob(filepath.Join(noTemp, "gvm-bench-*")); len(made) > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	p.signal(syscall.SIGTERM)
	if r := p.wait(); r.status != 143 || !strings.Contains(r.errs, "SIGTERM") {
		t.Errorf("status %d: %s", r.status, r.errs)
	}
	if left, _ := filepath.Glob(filepath.Join(noTemp, "gvm-bench-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
