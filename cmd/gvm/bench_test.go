package main

import (
	"encoding/json"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/guest-tests/lab"
	"gvm/guest/embedded"
	"gvm/machine/disk"
)

// TestBenchDisk checks for a row of plausible figures for each storage at each load.
func TestBenchDisk(t *testing.T) {
	t.Parallel()
	record, svg := filepath.Join(t.TempDir(), "disk.json"), filepath.Join(t.TempDir(), "disk.svg")
	r := gvmRuns(t, command(t, "bench", "disk", "--time", "20ms", "--rounds", "2", "--size", "4K", "--depth", "1,16",
		"--queues", "1,2", "--json", record, "--plot", svg))
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
		row := regexp.MustCompile(`(?m)^ *` + strings.Join(strings.Fields(name), " +") +
			` +4 KiB +[12] +(1|16) +\d+\.\d +\(\d+\.\d–\d+\.\d\) +\d+\.\d\d `)
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
	if drawn, err := os.ReadFile(svg); err != nil || !strings.Contains(string(drawn), "<svg") ||
		!strings.Contains(string(drawn), ">read 4 KiB, 2 queues<") ||
		!strings.Contains(string(drawn), ">file interrupt<") {
		t.Errorf("plot: %v, %.300s", err, drawn)
	}
	count := map[string]int{}
	for _, s := range all {
		count[strings.TrimSpace(s.Storage+" "+s.Driver)]++
		fio := s.Driver == "" // in 20 ms it may measure no CPU time
		if s.IOPS <= 0 || s.CPU < 0 || s.CPU == 0 && !fio || s.P50 <= 0 || s.P99 < s.P50 || s.Queues < 1 ||
			s.Queues > 2 || s.Size != 4096 {
			t.Errorf("%+v", s)
		}
	}
	for name, want := range rows {
		if count[name] != 2*want {
			t.Errorf("%s: %d measurements in two rounds of %d", name, count[name], want)
		}
	}
}

// TestBenchGuest runs every load under gvm and under each QEMU that runs here.
func TestBenchGuest(t *testing.T) {
	t.Parallel()
	record, plot := filepath.Join(t.TempDir(), "guest.json"), filepath.Join(t.TempDir(), "guest.png")
	r := gvmRuns(t, command(t, "bench", "guest", "--time", "5ms", "--rounds", "1", "--write", "--json",
		record, "--plot", plot))
	if r.status != 0 {
		t.Fatalf("status %d: %s", r.status, r.errs)
	}
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	var all []guestSample
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	if f, err := os.Open(plot); err != nil {
		t.Error(err)
	} else if _, err := png.Decode(f); err != nil {
		t.Error(err)
	}
	count := map[string]int{}
	for _, s := range all {
		count[s.VMM]++
		if s.IOPS <= 0 || s.P50 <= 0 || s.P99 < s.P50 || s.P999 < s.P99 || s.Notifications == 0 {
			t.Errorf("%+v", s)
		}
		row := regexp.MustCompile(`(?m)^ *` + s.Operation + ` +` + s.Driver + ` +` + strconv.Itoa(s.Depth) + ` +` +
			s.VMM + ` +\d+\.\d +\(\d+\.\d–\d+\.\d\) +\d+\.\d +\d+\.\d `)
		if n := len(row.FindAllString(r.out, -1)); n != 1 {
			t.Errorf("%d rows of %+v", n, s)
		}
	}
	for vmm, n := range count {
		if n != 2*2*5 {
			t.Errorf("%s: %d measurements of read and write, poll and interrupt, five depths", vmm, n)
		}
	}
	if count["gvm"] == 0 || len(count) == 1 && r.errs == "" {
		t.Errorf("%v; %q", count, r.errs)
	}
	if t.Failed() {
		t.Log(r.out)
	}
}

// TestBenchBoot checks for a row for gvm and for each QEMU that boots the embedded guest here. A
// kernel that never prints the awaited line ends in time.
func TestBenchBoot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	record := filepath.Join(dir, "boot.json")
	r := gvmRuns(t, command(t, "bench", "boot", "--rounds", "1", "--json", record))
	if r.status != 0 {
		t.Fatalf("status %d: %s", r.status, r.errs)
	}
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	var all []bootSample
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 || all[0].VMM != "gvm" || len(all) == 1 && r.errs == "" {
		t.Errorf("%+v; %q", all, r.errs)
	}
	for _, s := range all {
		stamps := s.Instruction > 0 && s.Kernel >= s.Instruction || s.Instruction == 0 && s.Kernel == 0
		if !stamps || s.First <= 0 || s.Until < s.First || s.CPU <= 0 ||
			s.Instruction == 0 && !strings.HasSuffix(s.VMM, " microvm") {
			t.Errorf("%+v", s)
		}
		if !regexp.MustCompile(`(?m)^ *` + s.VMM +
			`( +\d+\.\d| +–){2}( +\d+\.\d){2} +\(\d+\.\d–\d+\.\d\) +\d+\.\d( +\d+\.\d{3})? *$`).MatchString(r.out) {
			t.Errorf("no row of %s: %s", s.VMM, r.out)
		}
	}
	guest := filepath.Join(dir, "guest.elf") // it does not use its initrd
	if err := os.WriteFile(guest, embedded.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--cmdline", "spin", "--timeout", "1s"}, `no line with "never" within 1s`},
		{[]string{"--cmdline", "crash=reset"}, "asked for a reset"},
	} {
		args := []string{"bench", "boot", "--kernel", guest, "--until", "never", "--json", record + "2"}
		r := gvmRuns(t, command(t, append(args, c.args...)...))
		if made, _ := filepath.Glob(record + "2"); r.status == 0 || !strings.Contains(r.errs, c.want) || len(made) > 0 {
			t.Errorf("%v: status %d, %q; left %v", c.args, r.status, r.errs, made)
		}
	}
}

// TestBenchFootprint checks the figures of one machine of each VMM that runs here, and of several
// waiting ones.
func TestBenchFootprint(t *testing.T) {
	t.Parallel()
	record := filepath.Join(t.TempDir(), "footprint.json")
	r := gvmRuns(t, command(t, "bench", "footprint", "--guests", "3", "--time", "50ms", "--rounds", "1", "--json", record))
	if r.status != 0 {
		t.Fatalf("status %d: %s", r.status, r.errs)
	}
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Machines []footprint
		Idle     *idle
	}
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Machines) == 0 || v.Machines[0].VMM != "gvm" || len(v.Machines) == 1 && r.errs == "" {
		t.Errorf("%+v; %q", v.Machines, r.errs)
	}
	for _, f := range v.Machines {
		if f.Ready <= 0 || f.CPU <= 0 || f.PSS <= 0 || f.RSS < f.PSS || f.RSS > 500 || f.Threads < 2 || f.Program < 1 {
			t.Errorf("%+v", f)
		}
		columns := map[bool]string{true: "7", false: "10"}[f.VMM == "gvm"] // ratios to gvm's
		if !regexp.MustCompile(`(?m)^ *` + f.VMM + `( +[^ ]+){` + columns + `} *$`).MatchString(r.out) {
			t.Errorf("no row of %s: %s", f.VMM, r.out)
		}
	}
	if v.Idle == nil || v.Idle.Guests != 3 || v.Idle.CPU < 0 || v.Idle.CPU > 100 ||
		!strings.Contains(r.out, "3 waiting guests use ") {
		t.Errorf("%+v: %s", v.Idle, r.out)
	}
}

// TestBesideRAM checks that besideRAM leaves out only mappings as large as the guest's RAM.
func TestBesideRAM(t *testing.T) {
	smaps := `00400000-00500000 r-xp 00000000 fe:00 42                 /usr/bin/gvm
Size:               1024 kB
Rss:                 100 kB
Pss:                  40 kB
7f0000000000-7f0020000000 rw-p 00000000 00:00 0
Rss:              500000 kB
Pss:              500000 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0          [stack]
Rss:                   4 kB
Pss:                   4 kB
VmFlags: rd wr mr mw me ac sd
`
	if rss, pss := besideRAM([]byte(smaps)); rss != 104<<10 || pss != 44<<10 {
		t.Errorf("RSS %d, PSS %d", rss, pss)
	}
}

// TestProgramSize: the dynamic linker and libraries are not the program.
func TestProgramSize(t *testing.T) {
	dir := t.TempDir()
	smaps := "7f0020000000-7f0020001000 rw-p 00000000 00:00 0          [stack]\nRss: 4 kB\n"
	for name, size := range map[string]int{"ld.so": 200, "a program": 5000, "lib.so": 300, "data": 9000} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		perm := map[bool]string{true: "r--p", false: "r-xp"}[name == "data"]
		smaps += "00400000-00500000 " + perm + " 00000000 fe:00 42                 " + path + "\nRss: 4 kB\n"
	}
	if n, err := programSize([]byte(smaps)); n != 5000 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

// TestQEMUs: each version of QEMU is measured once, and has the options that it knows.
func TestQEMUs(t *testing.T) {
	dir := t.TempDir()
	program := func(name, says string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\necho '"+says+"'\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	old := program("old", "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)")
	recent := program("new", "QEMU emulator version 11.1.3")
	got := qemus(t.Context(), []string{old, program("other", "bochs 3"), filepath.Join(dir, "none"), recent,
		program("again", "QEMU emulator version 11.1.0")})
	if want := []qemu{{"qemu 7.2", old, false}, {"qemu 11.1", recent, true}}; !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	for _, q := range got {
		args := strings.Join(q.withDisk("k", "a,b", "w", "io_uring", "none", false), " ")
		if strings.Contains(args, `"iothread-vq-mapping":[{"iothread":"t"}]`) != q.mapping ||
			strings.Contains(args, "iothread=t") == q.mapping || !strings.Contains(args, "/a,,b,") {
			t.Errorf("%s: %s", q.name, args)
		}
	}
}

// TestGuestTable: gvm's figures are divided by each other VMM's of the same round, and by the best.
func TestGuestTable(t *testing.T) {
	var all []guestSample
	for round, figures := range [][3][2]float64{{{40e3, 2e3}, {20e3, 8e3}, {10e3, 4e3}}} {
		for i, vmm := range []string{"gvm", "qemu 7.2", "qemu 11.1"} {
			all = append(all, guestSample{VMM: vmm, Operation: "read", Driver: "poll", Depth: 4, Round: round,
				IOPS: figures[i][0], P50: figures[i][1]})
		}
	}
	var b strings.Builder
	if err := guestTable(&b, all); err != nil {
		t.Fatal(err)
	}
	for _, row := range []string{
		"gvm 40.0 (40.0–40.0) 2.0 0.0 2.00 0.50", // the best of each figure
		"qemu 7.2 20.0 (20.0–20.0) 8.0 0.0 2.00 0.25",
		"qemu 11.1 10.0 (10.0–10.0) 4.0 0.0 4.00 0.50",
	} {
		if !strings.Contains(strings.Join(strings.Fields(b.String()), " "), "read poll 4 "+row) {
			t.Errorf("%s\nlacks %q", b.String(), row)
		}
	}
}

// TestGuestSamples: an incomplete or empty report is an error.
func TestGuestSamples(t *testing.T) {
	line := "bench: read depth 4 poll: 2000 requests in 1000000 us; ns p50 10 p99 20 p999 30 max 40; " +
		"5 notifications, 6 interrupts\r\n"
	all, err := guestSamples("gvm", 3, []byte("hello\r\n"+line+"PASS\r\n"))
	want := guestSample{VMM: "gvm", Operation: "read", Depth: 4, Driver: "poll", Round: 3, IOPS: 2000, P50: 10,
		P99: 20, P999: 30, Max: 40, Notifications: 5, Interrupts: 6}
	if err != nil || len(all) != 1 || all[0] != want {
		t.Errorf("%+v, %v", all, err)
	}
	for console, want := range map[string]string{
		"": "did not end well", line: "did not end well",
		line + "FAIL: the disk does not answer\r\n": "the disk does not answer", "PASS\r\n": "measured nothing",
	} {
		if all, err := guestSamples("qemu", 0, []byte(console)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v", console, all, err)
		}
	}
}

// TestBenchNothing runs without fio, with a driver that would have to poll on too few CPUs: there
// is nothing to measure or draw.
func TestBenchNothing(t *testing.T) {
	// gvm inherits the one CPU of this thread, which ends with the test's goroutine.
	runtime.LockOSThread()
	var one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() > 1; cpu++ {
		one.Clear(cpu)
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := command(t, "bench", "disk", "--driver", "poll", "--queues", strconv.Itoa(disk.MaxQueues),
		"--time", "1ms", "--rounds", "1",
		"--json", filepath.Join(dir, "x.json"), "--plot", filepath.Join(dir, "x.svg"))
	c.Env = append(c.Env, "PATH="+filepath.Dir(lab.Program("gvm-plot"))) // without fio
	r := gvmRuns(t, c)
	if made, _ := filepath.Glob(filepath.Join(dir, "*")); r.status != 2 ||
		!strings.Contains(r.errs, "nothing to measure") || len(made) > 0 {
		t.Errorf("status %d, %q; made %v", r.status, r.errs, made)
	}
}

// TestBenchRecord: a failed run leaves an earlier record unchanged, and no new one.
func TestBenchRecord(t *testing.T) {
	dir := t.TempDir()
	old := filepath.Join(dir, "old.json")
	if err := os.WriteFile(old, []byte("[]"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, record := range []string{old, filepath.Join(dir, "new.json")} {
		for _, what := range []string{"disk", "guest"} {
			r := gvmRuns(t, command(t, "bench", what, "--disk", "missing.img", "--json", record))
			if r.status != 2 || !strings.HasPrefix(r.errs, "gvm: missing.img: ") {
				t.Errorf("%s: status %d: %s", what, r.status, r.errs)
			}
		}
	}
	text, err := os.ReadFile(old)
	if made, _ := filepath.Glob(filepath.Join(dir, "*")); err != nil || string(text) != "[]" || len(made) != 1 {
		t.Errorf("%q, %v; there are %v", text, err, made)
	}
}

// TestBenchStopped: a signal ends the benchmark, which removes its image.
func TestBenchStopped(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"disk", "guest", "footprint"} {
		dir := t.TempDir()
		p := startGVMAs(t, "", func(p *proc) { p.cmd.Env = append(p.cmd.Env, "TMPDIR="+dir) },
			"bench", what, "--time", "20ms", "--rounds", "100000")
		p.eventually("made an image", func() bool {
			made, _ := filepath.Glob(filepath.Join(dir, "gvm-bench-*"))
			return len(made) > 0
		})
		p.signal(syscall.SIGTERM)
		if r := p.wait(); r.status != 143 || !strings.Contains(r.errs, "SIGTERM") {
			t.Errorf("%s: status %d: %s", what, r.status, r.errs)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", what, left, err)
		}
	}
}
