package klog

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// Reports in the form of Linux 6.12, without printk's prefixes.
const (
	warnReport = `------------[ cut here ]------------
refcount_t: underflow; use-after-free.
WARNING: CPU: 1 PID: 77 at lib/refcount.c:28 refcount_warn_saturate+0xba/0x110
Modules linked in: example(OE)
CPU: 1 UID: 0 PID: 77 Comm: insmod Tainted: G           OE      6.12.0 #1
RIP: 0010:refcount_warn_saturate+0xba/0x110
Code: 44 00 00 <0f> 0b e9
RSP: 0018:ffffc90000217c58 EFLAGS: 00010282
Call Trace:
 <TASK>
 ? __warn+0x89/0x130
 ? refcount_warn_saturate+0xba/0x110
 example_put.isra.0+0x2b/0x40 [example]
 do_one_initcall+0x58/0x300
 </TASK>
---[ end trace 0000000000000000 ]---
`
	oopsReport = `BUG: kernel NULL pointer dereference, address: 0000000000000010
#PF: supervisor write access in kernel mode
#PF: error_code(0x0002) - not-present page
PGD 0 P4D 0
Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI
CPU: 0 UID: 0 PID: 90 Comm: sh Not tainted 6.12.0 #1
RIP: 0010:sysrq_handle_crash+0x1a/0x20
Call Trace:
 <TASK>
 __handle_sysrq+0xa0/0x180
 write_sysrq_trigger+0x28/0x40
 proc_reg_write+0x5a/0xa0
 </TASK>
CR2: 0000000000000010
---[ end trace 0000000000000000 ]---
`
	kasanReport = `==================================================================
BUG: KASAN: slab-use-after-free in read_it+0xa8/0xbc [example]
Read of size 1 at addr ffff8881044ec37b by task insmod/2760

CPU: 1 UID: 0 PID: 2760 Comm: insmod Not tainted 6.12.0 #698
Call Trace:
 <TASK>
 dump_stack_lvl+0x94/0xd8
 print_report+0x73/0x280
 kasan_report+0x144/0x187
 read_it+0xa8/0xbc [example]
 do_one_initcall+0xa5/0x3ae
 </TASK>

Allocated by task 2760:
 kasan_save_stack+0x43/0xd0
 make_it+0x56/0xbc [example]

The buggy address belongs to the object at ffff8881044ec300
==================================================================
`
	lockdepReport = `======================================================
WARNING: possible circular locking dependency detected
6.12.0 #1 Not tainted
------------------------------------------------------
insmod/88 is trying to acquire lock:
ffffffffc0002080 (a){+.+.}-{3:3}, at: locks_init+0x3c/0x1000 [locks]

-> #1 (b){+.+.}-{3:3}:
       lock_acquire+0xd1/0x2d0
       __mutex_lock+0x9a/0xe50

stack backtrace:
CPU: 0 UID: 0 PID: 88 Comm: insmod Not tainted 6.12.0 #1
Call Trace:
 <TASK>
 dump_stack_lvl+0x5d/0x80
 print_circular_bug.cold+0x178/0x1be
 check_noncircular+0x14e/0x170
 __lock_acquire+0x1247/0x21f0
 lock_acquire+0xd1/0x2d0
 __mutex_lock+0x9a/0xe50
 locks_init+0x5a/0x1000 [locks]
 </TASK>
`
	kcsanReport = `==================================================================
BUG: KCSAN: data-race in reader / writer

write to 0xffffffffc009a628 of 8 bytes by task 487 on cpu 3:
 writer+0x1d/0x30
 access_thread+0x89/0xd0

read to 0xffffffffc009a628 of 8 bytes by task 488 on cpu 6:
 reader+0x10/0x20
 access_thread+0x89/0xd0

Reported by Kernel Concurrency Sanitizer on:
CPU: 6 UID: 0 PID: 488 Comm: access_thread Not tainted 6.12.0 #1
==================================================================
`
	ubsanReport = `------------[ cut here ]------------
UBSAN: array-index-out-of-bounds in drivers/example.c:12:9
index 5 is out of range for type 'int [4]'
CPU: 2 UID: 0 PID: 1 Comm: swapper/0 Not tainted 6.12.0 #1
Call Trace:
 <TASK>
 dump_stack_lvl+0x64/0x80
 __ubsan_handle_out_of_bounds+0x95/0xd0
 example_probe+0x30/0x50
 </TASK>
---[ end trace ]---
`
	hungReport = `INFO: task kworker/0:2:1234 blocked for more than 120 seconds.
      Not tainted 6.12.0 #1
"echo 0 > /proc/sys/kernel/hung_task_timeout_secs" disables this message.
task:kworker/0:2     state:D stack:0     pid:1234  tgid:1234  ppid:2      flags:0x00004000
Call Trace:
 <TASK>
 __schedule+0x3f2/0xb40
 schedule+0x27/0xf0
 example_wait+0x11/0x20
 </TASK>
`
	stallReport = `rcu: INFO: rcu_preempt self-detected stall on CPU
rcu: 	2-....: (2100 ticks this GP) idle=b2b4/1/0x4000000000000000 softirq=44/44 fqs=525
rcu: 	(t=2100 jiffies g=-1091 q=4 ncpus=4)
CPU: 2 UID: 0 PID: 70 Comm: insmod Not tainted 6.12.0 #1
RIP: 0010:spin+0x5/0x10 [example]
Call Trace:
 <IRQ>
 ? rcu_dump_cpu_stacks+0xc4/0x100
 </IRQ>
 <TASK>
 do_one_initcall+0x58/0x300
 </TASK>
`
	softReport = `watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [insmod:70]
CPU: 1 UID: 0 PID: 70 Comm: insmod Not tainted 6.12.0 #1
RIP: 0010:spin+0x5/0x10 [example]
Call Trace:
 <TASK>
 do_one_initcall+0x58/0x300
 </TASK>
`
)

// console returns text with printk's time stamps, from at on.
func console(text string, at float64) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		fmt.Fprintf(&b, "[%12.6f] %s\r\n", at, strings.TrimSuffix(line, "\n"))
		at += 0.000010
	}
	return b.String()
}

// reports reads a console in writes of size bytes.
func reports(out string, size int) (got []Report) {
	r := &Reader{Report: func(r Report) { got = append(got, r) }}
	for rest := []byte(out); len(rest) > 0; {
		n := min(size, len(rest))
		r.Write(rest[:n])
		rest = rest[n:]
	}
	r.Close()
	return got
}

func symbols(frames []Frame) (names []string) {
	for _, f := range frames {
		if f.Sure {
			names = append(names, f.Symbol)
		}
	}
	return names
}

func TestReports(t *testing.T) {
	for _, tt := range []struct {
		text, title string
		kind        Kind
		cpu         string
		lines       int
		frames      string
	}{
		{warnReport, "WARNING: CPU: 1 PID: 77 at lib/refcount.c:28 refcount_warn_saturate+0xba/0x110", Warn, "1", 15,
			"refcount_warn_saturate example_put.isra.0 do_one_initcall"},
		{oopsReport, "BUG: kernel NULL pointer dereference, address: 0000000000000010", Oops, "0", 15,
			"sysrq_handle_crash __handle_sysrq write_sysrq_trigger proc_reg_write"},
		{kasanReport, "BUG: KASAN: slab-use-after-free in read_it+0xa8/0xbc [example]", KASAN, "1", 18,
			"dump_stack_lvl print_report kasan_report read_it do_one_initcall"},
		{lockdepReport, "WARNING: possible circular locking dependency detected", Lockdep, "0", 22,
			"dump_stack_lvl print_circular_bug.cold check_noncircular __lock_acquire lock_acquire __mutex_lock locks_init"},
		{kcsanReport, "BUG: KCSAN: data-race in reader / writer", KCSAN, "3", 12, "writer access_thread"},
		{ubsanReport, "UBSAN: array-index-out-of-bounds in drivers/example.c:12:9", UBSAN, "2", 10,
			"dump_stack_lvl __ubsan_handle_out_of_bounds example_probe"},
		{hungReport, "INFO: task kworker/0:2:1234 blocked for more than 120 seconds.", HungTask, "", 10,
			"__schedule schedule example_wait"},
		{stallReport, "rcu: INFO: rcu_preempt self-detected stall on CPU", RCUStall, "2", 12, "spin do_one_initcall"},
		{softReport, "watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [insmod:70]", SoftLockup, "1", 7,
			"spin do_one_initcall"},
	} {
		t.Run(string(tt.kind), func(t *testing.T) {
			got := reports(console("booting\n"+tt.text, 3)+console("later\n", 9), 1<<20)
			if len(got) != 1 {
				t.Fatalf("%d reports, want 1: %+v", len(got), got)
			}
			r := got[0]
			if r.Kind != tt.kind || r.Title != tt.title || r.CPU != tt.cpu || !strings.HasPrefix(r.Time, "3.0000") {
				t.Errorf("%s %q, CPU %q, at %s", r.Kind, r.Title, r.CPU, r.Time)
			}
			if len(r.Text) != tt.lines {
				t.Errorf("%d lines, want %d:\n%s", len(r.Text), tt.lines, strings.Join(r.Text, "\n"))
			}
			if names := strings.Join(symbols(r.Frames), " "); names != tt.frames {
				t.Errorf("frames %s, want %s", names, tt.frames)
			}
		})
	}
}

// TestTitles: the kind of a title alone.
func TestTitles(t *testing.T) {
	for line := range strings.Lines(`
oops Oops: general protection fault, probably for non-canonical address: 0000 [#1] PREEMPT SMP
oops general protection fault: 0000 [#1] SMP
oops BUG: unable to handle page fault for address: ffffffffc0000000
oops traps: PANIC: double fault, error_code: 0x0
panic PANIC: early exception 0x0e IP 10:ffffffff81c0ffee error 0 cr2 0x0
panic Kernel panic - not syncing: VFS: Unable to mount root fs
bug kernel BUG at mm/slub.c:4321!
bug BUG: sleeping function called from invalid context at mm/slab.h:1
bug BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0
kmsan BUG: KMSAN: uninit-value in f+0x1/0x2
kfence BUG: KFENCE: out-of-bounds read in f+0x1/0x2
lockdep WARNING: inconsistent lock state
lockdep WARNING: suspicious RCU usage
lockdep WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected
lockdep [ BUG: Invalid wait context ]
lockdep WARNING: bad unlock balance detected!
warn WARNING: lib/refcount.c:28 at refcount_warn_saturate+0xba/0x110, CPU#1: insmod/77
rcu-stall INFO: rcu_sched detected stalls on CPUs/tasks:
rcu-stall rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 7-... }
hard-lockup NMI watchdog: Watchdog detected hard LOCKUP on cpu 1
hung-task INFO: task a b:12 blocked in I/O wait for more than 30 seconds.
none Warning: unable to open an initial console.
none WARNING: this kernel is old
none traps: prog[77] general protection fault ip:401000 sp:7ffc error:0
none DEBUG: nothing
none rcu: INFO: rcu fine
none prog[77]: segfault at 0 ip 0000000000401000 sp 00007ffc error 4
`) {
		want, title, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		for _, prefix := range []string{"", "[    1.000000] ", "<4>[    1.000000][   T77] ", "<1>", "[    T1] "} {
			kind := Kind("none")
			for _, r := range reports(prefix+title+"\n", 9) {
				kind = r.Kind
			}
			if string(kind) != want {
				t.Errorf("%q: kind %s, want %s", prefix+title, kind, want)
			}
		}
	}
}

// TestForms reads one report in the forms of consoles, and text that is none.
func TestForms(t *testing.T) {
	const bug = "BUG: sleeping function called"
	for name, tt := range map[string]struct {
		out  string
		want int
	}{
		"behind a prompt":               {"/ # [    1.000000] " + bug + "\r\n", 1},
		"colours":                       {"\x1b[31m[    1.000000] \x1b[1m" + bug + "\x1b[0m\r\n", 1},
		"never ended":                   {"[    1.000000] " + bug, 1},
		"a program, syslog":             {"<12>[    1.000000] " + bug + "\r\n", 0},
		"a program, no time":            {bug + "\r\n", 1},
		"a program behind a time stamp": {"[    1.000000] Linux\r\n" + bug + "\r\n", 0},
		"a program's address":           {"[10.0.0.1]:22 is up\r\n" + bug + "\r\n", 1},
		"a program's seconds":           {"[1.5] built [0.52s]\r\n" + bug + "\r\n", 1},
		"a program's name in brackets":  {"[T1] begins\r\n[C12] too\r\n" + bug + "\r\n", 1},
		"a program behind a caller":     {"[    T1] Linux\r\n" + bug + "\r\n", 0},
		"a program behind a high task":  {"[T12345] Linux\r\n" + bug + "\r\n", 0},
		"a program behind a level":      {"<6>Linux\r\n" + bug + "\r\n", 0},
		"quoted":                        {"grep '" + bug + "' log\r\n", 0},
		"two":                           {"[    1.000000] " + bug + "\r\n[    1.000001] " + bug + "\r\n", 2},
	} {
		if got := reports(tt.out, 5); len(got) != tt.want {
			t.Errorf("%s: %d reports, want %d", name, len(got), tt.want)
		}
	}
}

// TestOtherCaller: lines of another task, and of programs, are not part of a report.
func TestOtherCaller(t *testing.T) {
	got := reports("[    1.000000][   T77] BUG: sleeping function called\r\n[    1.000001][   T88] usb: hello\r\n"+
		"a program's\r\n[    1.000002][   T77] Call Trace:\r\n[    1.000003][   T77]  f+0x1/0x2\r\n", 64)
	want := []string{"BUG: sleeping function called", "Call Trace:", " f+0x1/0x2"}
	if len(got) != 1 || !reflect.DeepEqual(got[0].Text, want) {
		t.Errorf("%+v, want the lines %q", got, want)
	}
}

// TestLost: the messages that the kernel dropped are counted, before, behind and without stamps.
func TestLost(t *testing.T) {
	r := Reader{Report: func(Report) {}}
	_, _ = r.Write([]byte("** 3 printk messages dropped **\r\n[    1.000000] Linux version 6.12\n" +
		"login: ** 40 printk messages dropped **\n** 999999999999 printk messages dropped **\n"))
	r.Close()
	if r.Lost != 43 {
		t.Errorf("%d messages, want 43", r.Lost)
	}
	for range 10 {
		_, _ = r.Write([]byte("** 999999999 printk messages dropped **\n"))
	}
	if r.Lost != maxLost {
		t.Errorf("%d messages, want %d", r.Lost, maxLost)
	}
}

// TestFingerprint: the fingerprint survives another boot, and tells two faults apart.
func TestFingerprint(t *testing.T) {
	again := strings.NewReplacer("0xba/0x110", "0xbc/0x120", "CPU: 1", "CPU: 3", "PID: 77", "PID: 1078",
		"ffffc90000217c58", "ffffc90000ab7c58", "example_put.isra.0", "example_put.constprop.1")
	all := map[string]Kind{}
	for _, text := range []string{warnReport, oopsReport, kasanReport, lockdepReport, kcsanReport, ubsanReport,
		hungReport, stallReport, softReport} {
		r := reports(console(text, 3), 1<<20)[0]
		if was, ok := all[r.Fingerprint]; ok {
			t.Errorf("%s and %s have the fingerprint %s", was, r.Kind, r.Fingerprint)
		}
		all[r.Fingerprint] = r.Kind
		if other := reports(console(again.Replace(text), 70000), 100)[0]; other.Fingerprint != r.Fingerprint {
			t.Errorf("%s: fingerprint %s, in another boot %s", r.Kind, r.Fingerprint, other.Fingerprint)
		}
	}
	one, two := reports(console(warnReport, 1), 99)[0],
		reports(console(strings.ReplaceAll(warnReport, "example_put", "example_get"), 1), 99)[0]
	if one.Fingerprint == two.Fingerprint {
		t.Error("another caller has the same fingerprint")
	}
	lockup := strings.NewReplacer("CPU#1", "CPU#0", "22s", "48s", "insmod:70", "modprobe:71")
	if a, b := reports(softReport, 99)[0], reports(lockup.Replace(softReport), 99)[0]; a.Fingerprint != b.Fingerprint {
		t.Error("the fingerprint of a lockup depends on its CPU, time or task")
	}
}

// TestBounds: an endless report is cut.
func TestBounds(t *testing.T) {
	got := reports("BUG: no end\n"+strings.Repeat(" f+0x1/0x2\n", 10000)+strings.Repeat("x", 1<<20), 1<<20)
	if len(got) != 1 || len(got[0].Text) != maxText || len(got[0].Frames) != maxFrames {
		t.Fatalf("%d reports; %d lines, %d frames", len(got), len(got[0].Text), len(got[0].Frames))
	}
	got = reports("BUG: long lines\n"+strings.Repeat(strings.Repeat("x", MaxLine-1)+"\n", 100), 1<<20)
	if n := len(strings.Join(got[0].Text, "")); len(got) != 1 || n > maxBytes+MaxLine {
		t.Fatalf("%d reports, %d bytes of text", len(got), n)
	}
}

// FuzzReader: the reports do not depend on the sizes of the writes, and stay bounded.
func FuzzReader(f *testing.F) {
	for _, text := range []string{warnReport, oopsReport, kasanReport, lockdepReport, kcsanReport} {
		f.Add(console(text, 1), uint8(7))
	}
	f.Add("/ # \x1b[1m<0>[    1.0][T1] [ BUG: Invalid wait context ]\r\n", uint8(0))
	f.Fuzz(func(t *testing.T, out string, size uint8) {
		got := reports(out, int(size)+1)
		if whole := reports(out, len(out)+1); !reflect.DeepEqual(got, whole) {
			t.Errorf("%+v, in writes of %d bytes %+v", whole, int(size)+1, got)
		}
		for _, r := range got {
			if len(r.Text) > maxText || len(r.Frames) > maxFrames+1 || len(r.Fingerprint) != 16 {
				t.Errorf("%d lines, %d frames, fingerprint %q", len(r.Text), len(r.Frames), r.Fingerprint)
			}
			for _, line := range r.Text {
				if len(line) > MaxLine || strings.ContainsAny(line, "\x1b\n\r\x00") {
					t.Errorf("line %q", line)
				}
			}
		}
	})
}
