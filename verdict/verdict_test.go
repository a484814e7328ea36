package verdict

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/devices/virtio/fs/hostfs/hostfstest"
	"gvm/verdict/klog"
)

const console = `[    1.000000] KTAP version 1
[    1.000001] 1..2
[    1.000002]     KTAP version 1
[    1.000003]     # Subtest: list
[    1.000004]     1..3
[    1.000005]     ok 1 add
[    1.000006]     # del: EXPECTATION FAILED at lib/list-test.c:30
[    1.000007]     not ok 2 del
[    1.000008]     ok 3 swap # SKIP not now
[    1.000009] not ok 1 list
[    1.000010] ------------[ cut here ]------------
[    1.000011] WARNING: CPU: 0 PID: 1 at lib/a.c:1 a+0x1/0x2
[    1.000012] ---[ end trace 0000000000000000 ]---
[    1.000013] BUG: sleeping function called from invalid context at lib/b.c:7
[    1.000014] CPU: 0 UID: 0 PID: 1 Comm: swapper/0
[    3.000000] BUG: sleeping function called from invalid context at lib/b.c:7
[    5.000000]     # Subtest: sort
[    5.000000]     1..1
`

func read(out string, p Policy) *Results {
	r := NewReader(p, nil)
	io.WriteString(r, out)
	return r.Close()
}

func TestResults(t *testing.T) {
	r := read(console, Policy{Fail: true})
	if got := fmt.Sprint(r.Status, r.Counts, len(r.Reports), r.Failing); got != "crash{1 1 1 1 2} 2 2" {
		t.Errorf("results: %s", got)
	}
	if first := r.First(); first == nil || first.Kind != "bug" || first.Count != 2 {
		t.Errorf("the first report is %+v", first)
	}
}

// TestManyReports: a report that fails the run is kept after any number of others.
func TestManyReports(t *testing.T) {
	var log strings.Builder
	warn := func(name string) {
		fmt.Fprintf(&log, "------------[ cut here ]------------\nWARNING: CPU: 0 PID: 1 at lib/%s.c:1 %[1]s+0x1/0x2\n"+
			"---[ end trace 0000000000000000 ]---\n", name)
	}
	for i := range maxReports + 6 {
		warn(strings.Repeat("x", i+1))
	}
	log.WriteString("BUG: one\nBUG: two\n")
	warn("z")
	r := read(log.String(), Policy{Fail: true})
	if first := r.First(); first == nil || first.Title != "BUG: one" || len(r.Reports) != maxReports ||
		r.Failing != 2 || r.Dropped != 9 {
		t.Errorf("the first is %+v of %d reports, %d fail, %d are dropped", first, len(r.Reports), r.Failing, r.Dropped)
	}
}

// TestKernelLog reads the console of a Linux 6.12 that ran KUnit's own tests and those of lists in
// QEMU, where one fails and one causes an oops on purpose. The counts are also those of kunit.py.
func TestKernelLog(t *testing.T) {
	log, err := os.ReadFile("testdata/kunit-6.12.log")
	if err != nil {
		t.Fatal(err)
	}
	r := read(string(log), Policy{Fail: true, Strict: true})
	if got := fmt.Sprint(r.Status, r.Counts, r.Errors, len(r.Tests)); got != "fail{133 1 0 5 0} [] 17" {
		t.Errorf("results: %s", got)
	}
	if len(r.Reports) != 1 || r.Reports[0].Title != "BUG: kernel NULL pointer dereference, address: 0000000000000000" {
		t.Fatalf("reports: %+v", r.Reports)
	}
	var frames []string
	for _, f := range r.Reports[0].Frames {
		if f.Sure {
			frames = append(frames, f.Symbol)
		}
	}
	const want = "kunit_test_null_dereference kunit_generic_run_threadfn_adapter kthread ret_from_fork ret_from_fork_asm"
	if got := strings.Join(frames, " "); got != want || len(r.Reports[0].Text) != 29 {
		t.Errorf("frames %s of %d lines", got, len(r.Reports[0].Text))
	}
}

// TestProgress: lines of the kernel that say that it makes no progress, and those of other CPUs at
// their time, are none. Later lines are, and a program's.
func TestProgress(t *testing.T) {
	r := NewReader(Policy{}, nil)
	for i, c := range []struct {
		line string
		is   bool
	}{
		{"[    1.000000][    T1] Linux version 6.12", true},
		{"", false},
		{"[   26.000000][    C0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [a:1]", false},
		{"[   26.000100][    C0] CPU: 0 UID: 0 PID: 1 Comm: a", false},
		{"[   26.000200][    C1] NMI backtrace for cpu 1", false},
		{"[   26.000300][    C0] Call Trace:", false},
		{"a program's", true},
		{"[   27.500000][    T7] usb: hello", true},
		{"[   48.000000][    C0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", false},
		{"[   70.000000][    C0] INFO: task a:1 blocked for more than 20 seconds.", false},
		{"[   70.000000][    C0] watchdog: CPU0: Watchdog detected hard LOCKUP on cpu 0", false},
		{"[   90.000000][    C0] BUG: KASAN: out-of-bounds in f+0x1/0x2", true},
		{"[   90.000000][    C0] Call Trace:", true},
	} {
		before := r.Progress()
		if _, err := io.WriteString(r, c.line+"\r\n"); err != nil {
			t.Fatal(err)
		}
		if is := r.Progress() > before; is != c.is {
			t.Errorf("line %d, %q: progress %t, want %t", i, c.line, is, c.is)
		}
	}
}

// TestLostText: the results have the number of messages that the kernel dropped, and words for it.
func TestLostText(t *testing.T) {
	r := NewReader(Policy{Fail: true}, nil)
	if _, err := io.WriteString(r, "** 1 printk messages dropped **\n"); err != nil {
		t.Fatal(err)
	}
	lost := r.Close().Lost
	if s := LostText(lost); lost != 1 || !strings.Contains(s, "dropped 1 message of its log") || LostText(0) != "" {
		t.Errorf("%d: %q, %q", lost, s, LostText(0))
	}
}

// TestPolicy: which reports fail a run.
func TestPolicy(t *testing.T) {
	bug := read(console, Policy{Fail: true}).First().Fingerprint
	for _, tt := range []struct {
		name  string
		p     Policy
		allow string
		want  int
	}{
		{"ignore", Policy{}, "", 0},
		{"fail", Policy{Fail: true}, "", 2},
		{"strict", Policy{Fail: true, Strict: true}, "", 3},
		{"a title", Policy{Fail: true, Strict: true}, "# known\n\n ^WARNING: .* at lib/c\\.c: \n", 3},
		{"a title that matches", Policy{Fail: true, Strict: true}, "^WARNING: .* at lib/a\\.c:\n", 2},
		{"a fingerprint", Policy{Fail: true}, bug + "\n", 0},
	} {
		var err error
		if tt.p.Allow, err = ReadAllow(strings.NewReader(tt.allow)); err != nil {
			t.Fatal(err)
		}
		if r := read(console, tt.p); r.Failing != tt.want || (r.First() != nil) != (tt.want > 0) {
			t.Errorf("%s: %d reports fail, want %d", tt.name, r.Failing, tt.want)
		}
	}
	if r := read("Kernel panic - not syncing: no\n", Policy{Fail: true, Strict: true}); r.Failing != 0 {
		t.Error("a panic fails by the policy")
	}
	if _, err := ReadAllow(strings.NewReader("ok\n(\n")); err == nil || !strings.HasPrefix(err.Error(), "line 2: ") {
		t.Errorf("a wrong expression: %v", err)
	}
	const want = "line 2: has more than 65535 bytes; want a fingerprint or a regular expression"
	if _, err := ReadAllow(strings.NewReader("ok\n" + strings.Repeat("x", 1<<16))); err == nil || err.Error() != want {
		t.Errorf("a long line: %v, want %s", err, want)
	}
}

// FuzzAllow: each line of a list allows something, is a comment, or is named by the error, with
// which there is no list.
func FuzzAllow(f *testing.F) {
	for _, s := range []string{"# known\n\n ^WARNING: .* at lib/c\\.c: \r\n", "0123456789abcdef\n", "ok\n(\n",
		"(?i)a{1,1000}", strings.Repeat("x", 70_000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		list, err := ReadAllow(strings.NewReader(s))
		lines := 1 + strings.Count(s, "\n")
		if err != nil {
			var n int
			if _, scanned := fmt.Sscanf(err.Error(), "line %d: ", &n); scanned != nil || n < 1 || n > lines || list != nil {
				t.Errorf("%q: %d rows and the error %v", s, len(list), err)
			}
			return
		}
		rows := 0
		for line := range strings.Lines(s) {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				rows++
			}
		}
		if len(list) != rows {
			t.Errorf("%q: %d rows, want %d", s, len(list), rows)
		}
		title := s[:min(len(s), klog.MaxLine)] // the time of a match grows with expression and title
		list.matches(klog.Report{Title: title, Fingerprint: s})
	})
}

const wantJUnit = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="6" failures="2" errors="2" skipped="1">
 <testsuite name="list" tests="3" failures="1" errors="0" skipped="1">
  <testcase classname="list" name="add"></testcase>
  <testcase classname="list" name="del">
   <failure message="">    # del: EXPECTATION FAILED at lib/list-test.c:30</failure>
  </testcase>
  <testcase classname="list" name="swap">
   <skipped message="not now"></skipped>
  </testcase>
 </testsuite>
 <testsuite name="sort" tests="1" failures="0" errors="1" skipped="0">
  <testcase classname="sort" name="test 1 of 1">
   <error message="no result">LOG</error>
  </testcase>
 </testsuite>
 <testsuite name="kernel" tests="1" failures="1" errors="0" skipped="0">
  <testcase classname="kernel" name="bug FINGERPRINT">
   <failure message="BUG: sleeping function called from invalid context at lib/b.c:7">` +
	`BUG: sleeping function called from invalid context at lib/b.c:7&#xA;CPU: 0 UID: 0 PID: 1 Comm: swapper/0</failure>
  </testcase>
 </testsuite>
 <testsuite name="gvm" tests="1" failures="0" errors="1" skipped="0">
  <testcase classname="gvm" name="guest">
   <error message="exit status 124">--timeout 1s elapsed</error>
  </testcase>
 </testsuite>
</testsuites>
`

func TestJUnit(t *testing.T) {
	r := read(console, Policy{Fail: true})
	r.Exit, r.End = 124, "--timeout 1s elapsed"
	var out bytes.Buffer
	if err := r.JUnit(&out); err != nil {
		t.Fatal(err)
	}
	var log []string
	for line := range strings.Lines(console[strings.Index(console, "[    1.000010]"):strings.Index(console, "[    5.0")]) {
		log = append(log, strings.TrimSpace(line[15:]))
	}
	replace := strings.NewReplacer("FINGERPRINT", r.First().Fingerprint, "LOG", strings.Join(log, "&#xA;"))
	if want := replace.Replace(wantJUnit); out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

// TestJUnitOwn: a suite that failed although its tests did not is a test case of its own.
func TestJUnitOwn(t *testing.T) {
	var out bytes.Buffer
	read("KTAP version 1\n1..1\n  # Subtest: s\n  1..1\n  ok 1 a\nnot ok 1 s\n", Policy{}).JUnit(&out)
	const want = `<testsuites tests="2" failures="1" errors="0" skipped="0">`
	if !strings.Contains(out.String(), want) || !strings.Contains(out.String(), `classname="tests" name="s"`) {
		t.Errorf("want %s in\n%s", want, out.String())
	}
}

func TestJSON(t *testing.T) {
	r := read(console, Policy{Fail: true})
	var out bytes.Buffer
	if err := r.JSON(&out); err != nil {
		t.Fatal(err)
	}
	var again Results
	if err := json.Unmarshal(out.Bytes(), &again); err != nil || !reflect.DeepEqual(*r, again) {
		t.Errorf("%v: %s", err, out.String())
	}
	out.Reset()
	read("", Policy{}).JSON(&out)
	if !strings.Contains(out.String(), `"tests": []`) || !strings.Contains(out.String(), `"reports": []`) {
		t.Errorf("empty results: %s", out.String())
	}
}

// decode decodes frames by a script.
func decode(ctx context.Context, script string, frames []klog.Frame) error {
	d, err := StartDecoder(script, "vmlinux", ".")
	if err != nil {
		return err
	}
	var all []*klog.Frame
	for i := range frames {
		all = append(all, &frames[i])
	}
	return d.Decode(ctx, all)
}

// TestDecodeStarts: the start of a script waits for no storage, as no goroutine would go on
// meanwhile.
func TestDecodeStarts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "hung")
	m := hostfstest.MountMortal(t, dir)
	m.Strike()
	d, err := StartDecoder(filepath.Join(dir, "file"), "vmlinux", ".")
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
}

// TestDecode decodes frames with a script that prints as the kernel's does, and ones that fail.
func TestDecode(t *testing.T) {
	script := filepath.Join(t.TempDir(), "decode_stacktrace.sh")
	for _, tt := range []struct{ script, want string }{
		{`while read -r line; do case $line in
			*x]) echo "f (drivers/a.c:12) x" ;;
			g.cold*) echo "g (lib/b.c:3 (discriminator 4) lib/c.h:5) " ;;
			*) echo "$line " ;;
			esac; done`, "f=drivers/a.c:12 g.cold=lib/b.c:3 (discriminator 4) lib/c.h:5 h= "},
		{"echo one", "1 lines of output for 3 frames"},
		{"exit 1", "exit status 1"},
		{"sleep 1000", "signal: killed"},
	} {
		if err := os.WriteFile(script, []byte("#!/bin/sh\n"+tt.script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		if strings.HasPrefix(tt.script, "sleep") {
			ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
		}
		frames := []klog.Frame{{Symbol: "f", Offset: 1, Size: 2, Module: "x"}, {Symbol: "g.cold"}, {Symbol: "h"}}
		got := ""
		if err := decode(ctx, script, frames); err != nil {
			got = err.Error()
		} else {
			for _, f := range frames {
				got += f.Symbol + "=" + f.Source + " "
			}
		}
		cancel()
		if !strings.HasSuffix(got, tt.want) && !strings.Contains(got, context.DeadlineExceeded.Error()) {
			t.Errorf("%s: %s, want %s", tt.script, got, tt.want)
		}
	}
}

// TestDecodeEnds ends a decoding: the programs that the script started end too.
func TestDecodeEnds(t *testing.T) {
	script, fifo := filepath.Join(t.TempDir(), "decode_stacktrace.sh"), filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// Its end is read when both programs are gone.
	text := "#!/bin/sh\n(exec sleep 1000 >" + fifo + ") & exec sleep 1000 >" + fifo + "\n"
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() { result <- decode(ctx, script, []klog.Frame{{Symbol: "f"}}) }()
	f, err := os.Open(fifo)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cancel()
	if err := <-result; err == nil {
		t.Error("no error")
	}
	if n, err := f.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read of the FIFO: %d, %v, want its end", n, err)
	}
}

// FuzzFiles: the files are well-formed for any output of the guest.
func FuzzFiles(f *testing.F) {
	f.Add(console)
	f.Add("KTAP version 1\n1..1\nnot ok 1 <&\"']]>\xff\xef\xbf\xbe\x01 # \xed\xa0\x80\n\x9b31mBUG: \xf0\x90\n")
	f.Fuzz(func(t *testing.T, out string) {
		r := read(out, Policy{Fail: true, Strict: true})
		var file bytes.Buffer
		if err := r.JUnit(&file); err != nil {
			t.Fatal(err)
		}
		for d := xml.NewDecoder(&file); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("JUnit: %v", err)
			}
		}
		file.Reset()
		if err := r.JSON(&file); err != nil || !json.Valid(file.Bytes()) {
			t.Fatalf("JSON: %v", err)
		}
	})
}
