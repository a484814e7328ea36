//go:build built

package linux

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"gvm/guest-tests/lab"
)

// gdb runs Debian's gdb in batch mode on a machine that waits at a socket, and returns its output.
func gdb(t *testing.T, socket, symbols string, commands ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for { // gvm makes the socket before the guest runs
		if _, err := os.Stat(socket); err == nil || ctx.Err() != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	args := []string{"-q", "-nx", "-batch", "-readnever"}
	for _, c := range append([]string{"set pagination off", "set confirm off", "set width 0", "set remotetimeout 60",
		"target remote " + socket}, commands...) {
		args = append(args, "-ex", c)
	}
	out, err := exec.CommandContext(ctx, hostProgram(t, "gdb", "gdb"), append(args, symbols)...).CombinedOutput()
	t.Logf("gdb: %v\n%s", err, out)
	return string(out)
}

// whenRunning returns a command that sends gdb a signal once the next command lets the guest run.
func whenRunning(signal string) string {
	return "shell (until " + lab.Program("gvm") + " list | grep -q running; do sleep 0.1; done; " +
		"kill -" + signal + " $PPID) &"
}

// inOrder fails the test unless a text has matches of the patterns one behind another.
func inOrder(t *testing.T, text string, patterns ...string) {
	t.Helper()
	for _, p := range patterns {
		at := regexp.MustCompile("(?m)" + p).FindStringIndex(text)
		if at == nil {
			t.Errorf("gdb shows no %s, in this order", p)
			return
		}
		text = text[at[1]:]
	}
}

// TestBuiltGDB: gdb debugs a kernel of 4 CPUs from its first instruction, by its symbols, and again
// while it runs; afterwards the guest runs on as if nothing had happened.
func TestBuiltGDB(t *testing.T) {
	k := builtKernel(t)
	socket := filepath.Join(t.TempDir(), "gdb")
	g := guest{kernel: k, cmdline: withTime, script: `
say ready
while ! read -t 1 line; do :; done
sync
say cpus $(nproc)
klog`}
	p, typed := startOnPipe(t, append(g.build(t), "--cpus", "4", "--gdb", "unix:"+socket, "-S")...)

	// The first breakpoint is set while the guest has no paging yet, and so takes a debug register as
	// the others, by hbreak, do: the lab's processor does not intercept int3.
	out := gdb(t, socket, k.VMLinux, "info threads", "break start_kernel", "continue", "backtrace 1",
		"info registers cr0 efer", "stepi", "stepi",
		"x/i $pc", "delete", "hbreak kernel_init", "continue", "backtrace", "x/s (char *)&linux_banner",
		"delete", "watch *(int *)&system_state", "continue", "continue", "delete",
		"hbreak kernel_execve", "continue", "info threads", "thread apply all -q backtrace 2", "detach")
	inOrder(t, out, `Thread 1 "CPU 0" \(runnable\)`, `Thread 4 "CPU 3" \(uninitialized\)`,
		`Thread 1 "CPU 0" hit Breakpoint 1, 0x[0-9a-f]+ in start_kernel \(\)`, `^#0 .* in start_kernel`,
		`^cr0 .*PG`, `^efer .*LMA`, `in start_kernel \(\)`, `=> 0x[0-9a-f]+ <start_kernel\+`,
		`hit Breakpoint 2, .* in kernel_init \(\)`, `^#0 .* in kernel_init`, `^#1 .* in ret_from_fork`, `"Linux version `+
			regexp.QuoteMeta(k.Release),
		`hit Hardware watchpoint 3: .*\n\nOld value = [01]\nNew value = [12]`, `Old value = [12]\nNew value = [23]`,
		`hit Breakpoint 4, .* in kernel_execve`, `Thread 4 "CPU 3" \((halted|runnable)\)`, `^#0 .*\n#1`, `detached`)

	p.waitFor("= ready")
	out = gdb(t, socket, k.VMLinux, whenRunning("INT"), "continue", "info threads", "hbreak __x64_sys_sync", "detach")
	inOrder(t, out, `received signal SIGINT`, `Thread 4 "CPU 3"`, `Hardware assisted breakpoint`, `detached`)

	// A client that is lost takes its breakpoints along.
	gdb(t, socket, k.VMLinux, "break __x64_sys_sync", whenRunning("KILL"), "continue")
	fmt.Fprintln(typed)
	r := p.wait()
	r.wantStatus(t, 0)
	r.want(t, map[string]string{"cpus": "4"})
	r.kernelLog(t, 1, noNetwork)
	if _, err := os.Stat(socket); err == nil {
		t.Error("gvm left its socket behind")
	}
}

// TestGDBMoved: the symbols of a vmlinux fit a kernel that KASLR has moved when gdb connects; of a
// gdb that was connected before, once it connects anew. A CPU on its way into the kernel, which has
// a user's page table with page-table isolation, knows the kernel's place as well.
func TestGDBMoved(t *testing.T) {
	k := theLab(t).Cloud
	vmlinux, err := theLab(t).Symbols(t.Context(), lab.Log(t))
	must(t, err)
	for pti, userTable := range map[string]string{"pti=off": "0x[01]0{0,3}", "pti=on": "0x1000"} {
		t.Run(pti, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "gdb")
			g := guest{kernel: k, cmdline: "kaslr " + pti, script: `
say text $(grep -m1 ' _text$' /proc/kallsyms)
say ready
while ! read -t 1 line; do sync; done
`}
			p, typed := startOnPipe(t, append(g.build(t), "--boot", "bzimage", "--gdb", "unix:"+socket, "-S")...)
			out := gdb(t, socket, vmlinux, "p/x (long)&_text", "detach")
			inOrder(t, out, `= 0xffffffff81000000$`, `detached`)

			p.waitFor("= ready")
			out = gdb(t, socket, vmlinux, "p/x (long)&_text", "x/s (char *)&linux_banner", "hbreak __x64_sys_sync",
				"continue", "backtrace 2", "x/i $pc", "delete", "hbreak *&entry_SYSCALL_64", "continue",
				"p/x $cr3 & 0x1000", "maintenance packet qOffsets", "delete", "disconnect", "target remote "+socket,
				"x/s (char *)&linux_banner", "detach")
			inOrder(t, out, `"Linux version `+regexp.QuoteMeta(k.Release), `Breakpoint 1, .* in __x64_sys_sync \(\)`,
				`^#0 .* in __x64_sys_sync`, `^#1 .* in do_syscall_64`, `=> 0x[0-9a-f]+ <__x64_sys_sync`,
				`Breakpoint 2, .* in entry_SYSCALL_64 \(\)`, `= `+userTable+`$`, `received: "(TextSeg=[0-9a-f]+)?"`,
				`"Linux version `+regexp.QuoteMeta(k.Release), `detached`)
			text := regexp.MustCompile(`(?m)= 0x([0-9a-f]+)$`).FindStringSubmatch(out)
			fmt.Fprintln(typed)
			r := p.wait()
			r.wantStatus(t, 0)
			said, _, _ := strings.Cut(r.said(t, "text"), " ")
			offsets := "TextSeg=" + said
			if said == "ffffffff81000000" { // by chance
				offsets = ""
			}
			if text == nil || text[1] != said || !strings.Contains(out, `received: "`+offsets+`"`) {
				t.Errorf("gdb has _text at %q, and the guest at %s", text, said)
			}
		})
	}
}
