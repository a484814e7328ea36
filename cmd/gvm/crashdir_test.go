package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gvm/devices/virtio"
	"gvm/guest/embedded"
	"gvm/inspect"
	"gvm/verdict"
)

// TestCrashDirFull: a file system without room gives one line, with the mend.
func TestCrashDirFull(t *testing.T) {
	r := &crashRecord{open: func() error { return nil }, texts: map[string]*os.File{}}
	for _, name := range []string{"end", "console", "log"} {
		f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		r.texts[name] = f
	}
	r.keep([]byte("console"))
	const want = "/dev/full: no space left on device; make room, or name one on another file system"
	if err := r.write("gvm: end\n", false); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// TestCrashDir: an end that the guest did not choose leaves its message, the console and the state
// of the CPUs; another end leaves nothing.
func TestCrashDir(t *testing.T) {
	dir := t.TempDir()
	vmlinux := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(vmlinux, embedded.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		word   string
		status int
		end    string
		kernel string
	}{
		{"crash=triple", exitCrash, "gvm: the guest crashed: vCPU 0: KVM_EXIT_SHUTDOWN (triple fault)\n", ""},
		{"crash=panic", exitPanic, "gvm: guest panic: ", ""},
		{"crash=reset", exitReset, "", ""},
		{"crash=triple", exitCrash, "gvm: the guest crashed: ", vmlinux},
	} {
		args := []string{"run", "--guest-arg", tt.word, "--crash-dir", dir, "--name", "a", "--cpus=2"}
		if tt.kernel != "" {
			args = []string{"run", "-k", tt.kernel, "--bare-cmdline", "-a", tt.word, "--crash-dir", dir, "--name", "a",
				"--cpus=2"}
		}
		r := gvmRuns(t, command(t, args...))
		if r.status != tt.status {
			t.Fatalf("%s: status %d, want %d\n%s", tt.word, r.status, tt.status, r.errs)
		}
		records, err := filepath.Glob(dir + "/*Z-a*")
		if err != nil || len(records) != min(1, len(tt.end)) {
			t.Fatalf("%s: records %v, %v", tt.word, records, err)
		}
		if tt.end == "" {
			continue
		}
		if !strings.Contains(r.errs, "are in "+records[0]+"\n") {
			t.Errorf("%s: %q does not name %s", tt.word, r.errs, records[0])
		}
		text := func(name string) []byte {
			b, err := os.ReadFile(records[0] + "/" + name)
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		if end := string(text("end")); !strings.HasPrefix(end, tt.end) {
			t.Errorf("%s: the end is %q", tt.word, end)
		}
		if console := string(text("console")); console != r.out {
			t.Errorf("%s: the console is %q, want %q", tt.word, console, r.out)
		}
		if log := string(text("log")); !regexp.MustCompile(`Z gvm     the guest's first instruction\n`+
			`(?s:.*)Z console `).MatchString(log) || !strings.Contains(log, "Z gvm     "+strings.TrimPrefix(tt.end, "gvm: ")) {
			t.Errorf("%s: the log is %q", tt.word, log)
		}
		if tt.kernel != "" { // which has no symbols
			if stacks := string(text("stacks")); stacks != "no stacks: "+vmlinux+": no symbol section\n" {
				t.Errorf("the stacks are %q", stacks)
			}
		}
		var state struct {
			VCPU map[string]struct{ Rip, CR3 string }
		}
		if err := json.Unmarshal(text("state.json"), &state); err != nil || state.VCPU["0"].Rip == "" ||
			state.VCPU["1"].CR3 == "" {
			t.Errorf("%s: %v, %+v", tt.word, err, state)
		}
		if err := os.RemoveAll(records[0]); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCrashLog: the log has the lines of the console, gvm's messages, the commands and changes of
// disks, the task management functions and the events of virtio devices by time, a line for each,
// and its memory is bounded.
func TestCrashLog(t *testing.T) {
	var l crashLog
	l.add(1*time.Second, "the guest's first instruction")
	l.output(2*time.Second, []byte("one\r\ntw"))
	l.output(4*time.Second, []byte("o\n\x1b[31mthree"))
	l.add(5*time.Second, "a note\nof a file")
	disk := inspect.Group("0", inspect.Int("size", 512),
		inspect.Group("task", inspect.Group("0", inspect.Text("command", "READ(10)"), inspect.Int("lba", 8),
			inspect.Int("blocks", 1), inspect.Node{Name: "age", Value: inspect.Age(7 * time.Second)})),
		inspect.Group("last",
			inspect.Group("0", inspect.Text("command", "INQUIRY"), inspect.Node{Name: "age", Value: inspect.Age(6e9)},
				inspect.Text("status", "CHECK CONDITION"), inspect.Text("sense", "ILLEGAL REQUEST, 24/00")),
			inspect.Group("1", inspect.Text("command", "TEST UNIT READY"),
				inspect.Node{Name: "age", Value: inspect.Age(6500 * time.Millisecond)}, inspect.Text("status", "GOOD")),
			inspect.Group("2", inspect.Text("command", "READ(10)"), inspect.Int("lba", 8), inspect.Int("blocks", 1),
				inspect.Node{Name: "age", Value: inspect.Age(7 * time.Second)})))
	function := func(name, op string, age time.Duration, more ...inspect.Node) inspect.Node {
		return inspect.Group(name, append([]inspect.Node{inspect.Text("function", op), inspect.Int("lun", 3),
			{Name: "age", Value: inspect.Age(age)}}, more...)...)
	}
	happened := func(name, what string, age time.Duration, values ...inspect.Node) inspect.Node {
		return inspect.Group(name, append(append([]inspect.Node{inspect.Text("event", what)}, values...),
			inspect.Node{Name: "age", Value: inspect.Age(age)})...)
	}
	scsi := inspect.Group("00:01.0", inspect.Group("virtio", inspect.Group("device", inspect.Group("function",
		function("0", "LOGICAL UNIT RESET", 5500*time.Millisecond),
		function("1", "ABORT TASK", 6200*time.Millisecond, inspect.Text("detail", "tag 8d"),
			inspect.Text("response", "OK")))),
		inspect.Int("device_type", virtio.IDSCSI), inspect.Group("event",
			happened("0", "DEVICE_NEEDS_RESET", 4800*time.Millisecond, inspect.Text("error", "ring\n2")),
			happened("1", "DRIVER_OK", 8500*time.Millisecond, inspect.Int("queues_enabled", 3)))))
	state := inspect.Group("", inspect.Bool("paused", false), inspect.Group("disk", disk),
		inspect.Group("pci", inspect.Group("00:00.0", inspect.Group("config")), scsi),
		inspect.Group("lio", inspect.Group("naa.5", inspect.Group("1", inspect.Text("path", "/a")))),
		inspect.Group("disk_change", happened("0", "removing /a is over", 4500*time.Millisecond, inspect.Int("lun", 3))))
	var got []string
	for line := range strings.Lines(string(l.merged(&state, 10*time.Second))) {
		at, rest, _ := strings.Cut(line, " ")
		if _, err := time.Parse(time.RFC3339Nano, at); err != nil {
			t.Error(err)
		}
		got = append(got, rest)
	}
	want := []string{
		"gvm     the guest's first instruction\n",
		"pci/00:01.0 scsi: DRIVER_OK, queues_enabled 3\n",
		"console one\n", "console two\n",
		"disk/0  READ(10) lba 8 blocks 1: not answered\n",
		"disk/0  TEST UNIT READY: GOOD\n",
		"disk/3  ABORT TASK tag 8d: OK\n",
		"console \\u001b[31mthree\n",
		"disk/0  INQUIRY: CHECK CONDITION, ILLEGAL REQUEST, 24/00\n",
		"disk/3  LOGICAL UNIT RESET: not answered\n",
		"gvm     a note\\u000aof a file\n",
		"pci/00:01.0 scsi: DEVICE_NEEDS_RESET, error ring\\u000a2\n",
		"disk    removing /a is over, lun 3\n",
		"lio/naa.5/1 the kernel serves this disk: gvm does not see its commands\n",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	for i := range 100_000 {
		l.output(time.Duration(i)*time.Second, []byte("a\n"))
		l.add(time.Duration(i)*time.Second, "note")
	}
	if len(l.times) > logMarks || len(l.events) > logEvents {
		t.Errorf("%d times, %d events", len(l.times), len(l.events))
	}
	lines := l.lines()
	if last := lines[len(lines)-1]; last.time != 99_999*time.Second {
		t.Errorf("the last line is at %v", last.time)
	}
	for i, e := range lines[1:] {
		if e.time < lines[i].time {
			t.Fatalf("line %d: %v after %v", i+1, e.time, lines[i].time)
		}
	}
}

// TestCrashRecordLate: all parts of a record together have recordPatience, so storage that does
// each of them slowly delays the end no longer than storage that hangs.
func TestCrashRecordLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, begin := &crashRecord{}, time.Now()
		var last error
		for range 10 {
			done := make(chan error, 1)
			time.AfterFunc(recordPatience/4-1, func() { done <- nil })
			if last = r.await(done); last != nil {
				break
			}
		}
		if got := time.Since(begin); last != errRecordLate || got != recordPatience {
			t.Errorf("%v after %v, want %v after %v", last, got, errRecordLate, recordPatience)
		}
	})
}

// TestCrashRecordNames: records of one second have names of their own, and the console's end is
// kept.
func TestCrashRecordNames(t *testing.T) {
	dir := t.TempDir()
	line := strings.Repeat("x", 1000) + "\n"
	for range 3 {
		r, err := newCrashRecord(dir, false)
		if err != nil {
			t.Fatal(err)
		}
		r.files.Machine = "a"
		for range 5 * recordConsole / len(line) {
			r.keep([]byte(line))
		}
		r.keep([]byte("last\n"))
		if err := r.write("end", false); err != nil {
			t.Fatal(err)
		}
	}
	records, err := filepath.Glob(dir + "/*/console")
	if err != nil || len(records) != 3 {
		t.Fatalf("%v, %v", records, err)
	}
	b, err := os.ReadFile(records[0])
	if err != nil || len(b) != recordConsole || !strings.HasSuffix(string(b), "x\nlast\n") {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// TestCrashRecordOfFault: gvm run opens the record of a fault that the verdict of the console will
// find while its broker is there, and no other.
func TestCrashRecordOfFault(t *testing.T) {
	for console, want := range map[string]int{
		"[    1.000000] BUG: kernel NULL pointer dereference, address: 0000000000000000\n" +
			"[    1.000001] Oops: 0002 [#1] SMP\n[    1.000002] ---[ end trace 0000000000000000 ]---\n": 4,
		"[    1.000000] fine\n": 0,
	} {
		dir := t.TempDir()
		r, err := newCrashRecord(dir, false)
		if err != nil {
			t.Fatal(err)
		}
		w := &watch{reader: verdict.NewReader(verdict.Policy{Fail: true}, nil)}
		if _, err := w.reader.Write([]byte(console)); err != nil {
			t.Fatal(err)
		}
		r.prepare(nil, w)
		opened, _ := filepath.Glob(dir + "/*/*")
		_, err = w.finish(nil)
		err = r.finish(err)
		written, _ := filepath.Glob(dir + "/*/*")
		if len(opened) != want || len(written) != want || (exitStatus(err) == exitFault) != (want > 0) {
			t.Errorf("%q: %v, then %v, and %v", console, opened, written, err)
		}
		if want > 0 {
			if b, err := os.ReadFile(filepath.Dir(written[0]) + "/end"); !strings.Contains(string(b), "NULL pointer") {
				t.Errorf("the end is %q, %v", b, err)
			}
		}
	}
}
