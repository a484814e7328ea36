package vmm

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"gvm/verdict/klog"
)

// The lines of a panic and of an orderly end, as Linux prints them.
const (
	panicked   = "Kernel panic - not syncing: sysrq triggered crash"
	offset     = "[   12.345678] Kernel Offset: 0x2a000000 from 0xffffffff81000000\r\n"
	endMarker  = "---[ end Kernel panic - not syncing: sysrq triggered crash ]---"
	restarting = "[   13.000000] reboot: Restarting system\r\n"
)

// TestPanicText reads panics in the forms in which a console shows them, and text that is no panic.
func TestPanicText(t *testing.T) {
	long := strings.Repeat("a progress bar that never ends ", 1000)
	for _, tt := range []struct {
		name, out, want string
	}{
		// printk's own prefixes.
		{"bare", panicked + "\n", panicked},
		{"time", "[   12.345678] " + panicked + "\r\n", panicked},
		{"a machine up for months", "[12345678.123456] " + panicked + "\r\n", panicked},
		{"syslog", "<0>" + panicked + "\r\n", panicked},
		{"syslog, time", "<0>[   12.345678] " + panicked + "\r\n", panicked},
		{"syslog, time, task", "<0>[   12.345678][    T1] " + panicked + "\r\n", panicked},
		{"syslog, CPU", "<0>[    C0] " + panicked + "\r\n", panicked},
		{"time, task", "[   12.345678][ T1234] " + panicked + "\r\n", panicked},
		{"task, no time", "[    T1] " + panicked + "\r\n", panicked},
		{"space between", "[   12.345678] [    C3] " + panicked + "\r\n", panicked},
		{"Android's process", "<0>[   12.345678] [1:      swapper/0:    1] " + panicked + "\r\n", panicked},
		{"its interrupt", "[   12.345678]I[1:      swapper/0:    1] " + panicked + "\r\n", panicked},
		{"no colon", "[    0.000000] Kernel panic - not syncing\r\n", "Kernel panic - not syncing"},
		{"early exception", "PANIC: early exception 0x0d IP 10:ffffffff81c0ffee error 0 cr2 0xffff888001000000\r\n",
			"PANIC: early exception 0x0d IP 10:ffffffff81c0ffee error 0 cr2 0xffff888001000000"},
		{"LF", "a\n" + panicked + "\n", panicked},
		{"CR alone", "a\r" + panicked + "\rb", panicked},
		{"LF CR", "a\n\r" + panicked + "\n\r", panicked},
		{"never ended", "a\r\n[   12.345678] " + panicked, panicked},
		{"NULs", "\x00\x00[   12.3456\x0078] Kernel pa\x00nic - not syncing: sysrq triggered crash\x00\r\n", panicked},
		{"bell, backspaces", "\a[   12.345678] \b" + panicked + "\a\r\n", panicked},
		{"earlycon's and the console's", strings.Repeat("[    0.000000] "+panicked+"\r\n", 2), panicked},
		// Escape sequences.
		{"colour around", "\x1b[0;1;31m[   12.345678] " + panicked + "\x1b[0m\r\n", panicked},
		{"colour between", "\x1b[32m[   12.345678]\x1b[0m \x1b[31mKernel panic - not syncing: sysrq\x1b[1m " +
			"triggered crash\x1b[m\r\n", panicked},
		{"line erased", "/ # \x1b[2K\x1b[1G" + panicked + "\r\n" + offset, panicked},
		{"character set, keypad", "\x1b(B\x1b=" + panicked + "\r\n", panicked},
		{"window title", "\x1b]0;root@guest: ~\a[   12.345678] " + panicked + "\r\n", panicked},
		{"a title that does not end", "\x1b]0;root@guest[   12.345678] " + panicked + "\r\n", panicked},
		{"window title, bare", "\x1b]0;root@guest: ~\a" + panicked + "\r\n", panicked},
		{"window title, ST", "\x1b]2;root@guest\x1b\\" + panicked + "\r\n", panicked},
		{"window title with colours", "\x1b]2;root\x1b[1m@guest\x1b\\" + panicked + "\r\n", panicked},
		{"window title, 8 bits", "\x9d2;root@guest\x9c" + panicked + "\r\n", panicked},
		{"window title in UTF-8", "\x1b]2;\u011b\u010d\u2501\a" + panicked + "\r\n", panicked},
		{"a title that colours end", "\x1b]2;root@guest[   12.345678] " + panicked + "\x1b[m\r\n", panicked},
		{"a long title", "\x1b]52;c;" + strings.Repeat("QUJD", 2000) + "\a" + panicked + "\r\n", panicked},
		{"titles", "\x1b]1;a\a\x1b]2;b\x1b\\" + panicked + "\r\n", panicked},
		{"device control", "\x1bP+q544e\x1b\\" + panicked + "\r\n", panicked},
		{"device control, 8 bits", "\x901$r0m\x9c" + panicked + "\r\n", panicked},
		{"device control around a title", "\x1bPtmux;\x1b\x1b]2;t\a\x1b\\" + panicked + "\r\n", panicked},
		{"other strings", "\x1bXs\x1b\\\x1b^p\x1b\\\x1b_a\x1b\\\x98s\x9c\x9ep\x9c\x9fa\x9c" + panicked + "\r\n", panicked},
		{"a string that is canceled", "\x1bP+q\x18" + panicked + "\r\n", panicked},
		{"a sequence that is canceled", "\x1b[3\x1a" + panicked + "\r\n", panicked},
		{"colour, 8 bits", "\x9b0;1;31m" + panicked + "\x9bm\r\n", panicked},
		{"colour, 8 bits in UTF-8", "\u009b31m" + panicked + "\u009bm\r\n", panicked},
		{"8-bit controls", "\x84\x8d" + panicked + "\r\n", panicked},
		{"bytes like 8-bit controls", panicked + " \u011b\u011bm\u2501\u2510\u011d\r\n",
			panicked + " \u011b\u011bm\u2501\u2510\u011d"},
		{"a title says it", "\x1b]2;[    1.0] Kernel panic - not syncing: no\a/ # \r\n", ""},
		{"a sequence that the panic cuts", "\x1b[3[   12.345678] " + panicked + "\r\n" + offset, panicked},
		// A line that other output began.
		{"prompt, time", "/ # [   12.345678] " + panicked + "\r\n", panicked},
		{"prompt, syslog", "guest login: <0>" + panicked + "\r\n", panicked},
		{"prompt, syslog, time", "guest login: <0>[   12.345678][   T99] " + panicked + "\r\n", panicked},
		{"prompt, task", "~ # [    T1] " + panicked + "\r\n", panicked},
		{"a record cut by another", "[   12.345677] systemd[1]: Starting[   12.345678] " + panicked + "\r\n", panicked},
		{"prompt, bare", "/ # " + panicked + "\r\nCPU: 0 PID: 1 Comm: sh Not tainted 5.10.0\r\n", panicked},
		{"prompt, bare, 6.12", "/ # " + panicked + "\r\nCPU: 0 UID: 0 PID: 1 Comm: sh Not tainted 6.12.0\r\n", panicked},
		{"prompt, bare, rebooting", "/ # " + panicked + "\r\nRebooting in 1 seconds..", panicked},
		{"dropped records, old kernels", "** 12 printk messages dropped ** [   12.345678] " + panicked + "\r\n", panicked},
		{"dropped records, bare", "** 12 printk messages dropped ** " + panicked + "\r\n" + endMarker + "\r\n", panicked},
		{"long line", long + "[   12.345678] " + panicked + "\r\n", panicked},
		{"long line, bare", long + panicked + "\r\n" + offset, panicked},
		{"a long message", panicked + " " + strings.Repeat("x", 1<<20) + "\r\n",
			panicked + " " + strings.Repeat("x", klog.MaxLine-len(panicked)-1)},
		// After the panic.
		{"the last panic", "[    1.000000] Kernel panic - not syncing: one\r\n" +
			"[    2.000000] Kernel panic - not syncing: two\r\n", "Kernel panic - not syncing: two"},
		{"crash kernel", panicked + "\r\n" + offset + "[    0.000000] Linux version 6.12.0\r\n" + restarting, panicked},
		{"a quote after it", panicked + "\r\nno 'Kernel panic - not syncing: quoted' here\r\n", panicked},
		// Text that the kernel did not print.
		{"nothing", "hello\r\n", ""},
		{"quoted", "grep 'Kernel panic - not syncing: ' log\r\n", ""},
		{"typed at a prompt", "/ # echo Kernel panic - not syncing: no\r\n", ""},
		{"/dev/kmsg, syslog", "<12>[   12.345678] Kernel panic - not syncing: no\r\n", ""},
		{"/dev/kmsg, syslog, inside", "/ # <8>[   12.345678] Kernel panic - not syncing: no\r\n", ""},
		{"printed, then a restart in order", "Kernel panic - not syncing: no\r\n" + restarting, ""},
		{"the same, old kernels", "Kernel panic - not syncing: no\r\nRestarting system.\r\n", ""},
		{"printed, then sysrq b", "Kernel panic - not syncing: no\r\n[    2.000000] sysrq: Resetting\r\n", ""},
		{"printed, then kexec", "Kernel panic - not syncing: no\r\n" +
			"[    2.000000] kexec_core: Starting new kernel\r\n[    0.000000] Linux version 6.12.0\r\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, size := range []int{len(tt.out), 7, 1} { // of a write
				var passed bytes.Buffer
				w := &consoleWatch{out: &passed, on: true, final: func() {}, halt: func() {}}
				for rest := []byte(tt.out); len(rest) > 0; {
					n, err := w.Write(rest[:min(size, len(rest))])
					if err != nil {
						t.Fatal(err)
					}
					rest = rest[n:]
				}
				if got := w.panicText(false); got != tt.want {
					t.Errorf("writes of %d: %.200q, want %.200q", size, got, tt.want)
				}
				if passed.String() != tt.out {
					t.Errorf("writes of %d: %d bytes passed, want %d", size, passed.Len(), len(tt.out))
				}
			}
		})
	}
}

// TestPanicFinal: only the kernel's last line after a panic calls final.
func TestPanicFinal(t *testing.T) {
	for out, want := range map[string]bool{
		panicked + "\r\n" + endMarker + "\r\n":                                        true,
		"<0>[    1.0][T1] " + panicked + "\r\n<0>[    1.0][T1] " + endMarker + "\r\n": true,
		"/ # " + panicked + "\r\n" + endMarker + "\r\n":                               true,
		panicked + "\r\n[    1.0] ---[ end Kernel panic - not syncing: old\r\n":       true,
		panicked + "\r\nRebooting in 10 seconds..\r\n":                                true,
		panicked + "\r\n" + offset:                                                    false,
		endMarker + "\r\n":                                                            false,
		panicked + "\r\n# grep '" + endMarker + "' log\r\n":                           false,
		"grep 'Kernel panic - not syncing: ' log; grep '" + endMarker + "'\r\n":       false,
		panicked + "\r\n<12>[    1.0] " + endMarker + "\r\n":                          false,
	} {
		got := false
		w := &consoleWatch{out: new(bytes.Buffer), on: true}
		w.final = func() {
			w.silent() // final may call silent: no lock is held
			got = true
		}
		fmt.Fprint(w, out)
		if got != want {
			t.Errorf("%q: final %v, want %v", out, got, want)
		}
	}
}

// FuzzConsole: the result does not depend on the sizes of the writes.
func FuzzConsole(f *testing.F) {
	f.Add([]byte("/ # \x1b[1m<0>[    1.0][T1] "+panicked+"\r\n"+endMarker+"\r\n"), uint8(3))
	f.Add([]byte(strings.Repeat("x", klog.MaxLine)+panicked+"\x1b]0;"+restarting), uint8(1))
	f.Fuzz(func(t *testing.T, out []byte, size uint8) {
		read := func(size int) (text string, final bool) { // final may be called for each write
			var passed bytes.Buffer
			w := &consoleWatch{out: &passed, on: true, final: func() { final = true }, halt: func() {}}
			for rest := out; len(rest) > 0; {
				n := min(size, len(rest))
				fmt.Fprintf(w, "%s", rest[:n])
				rest = rest[n:]
			}
			if !bytes.Equal(passed.Bytes(), out) {
				t.Fatal("not all was passed on")
			}
			return w.panicText(false), final
		}
		text, final := read(len(out) + 1)
		if again, f := read(int(size) + 1); again != text || f != final {
			t.Errorf("%q, final %v, at %d bytes a write %q, %v", text, final, int(size)+1, again, f)
		}
		if len(text) > klog.MaxLine || strings.ContainsAny(text, "\x1b\n\r\x00") {
			t.Errorf("the text is %q", text)
		}
	})
}
