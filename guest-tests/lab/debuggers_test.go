//go:build built

package lab

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDebuggers: Debian's crash and gdb open the core of a stock kernel that panicked, which gvm
// run --crash-core wrote, with the kernel's debug symbols: the panic, variables, and the backtraces
// of the CPUs. They run here, as they are slow in the lab.
func TestDebuggers(t *testing.T) {
	l := setUp(t)
	vmlinux, err := l.Symbols(t.Context(), Log(t))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "gvm/cmd/gvm")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var out bytes.Buffer
	code, err := l.Run(t.Context(), Command{
		Args: []string{filepath.Join(dir, "gvm"), "run", "--kernel", l.Cloud.BZImage, "--memory", "256M", "--cpus", "2",
			"--crash-dir", dir, "--crash-core"}, // there is no root file system
		Env:      []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "XDG_CACHE_HOME=" + l.Cache},
		Writable: []string{dir}, Fast: true, CPUs: 1, Stdout: &out, Stderr: &out,
	})
	if err != nil || code != 5 {
		t.Fatalf("status %d, %v\n%s", code, err, &out)
	}
	core, err := one(filepath.Join(dir, "*", "vmcore"))
	if err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	commands := filepath.Join(dir, "commands")
	if err := os.WriteFile(commands, []byte("sys\nbt\np init_task.comm\nlog\nquit\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const banner = `"Linux version %s `
	release := regexp.QuoteMeta(l.Cloud.Release)
	for _, tt := range []struct {
		args []string
		want []string // in this order
	}{
		{[]string{"crash", "-s", "-i", commands, vmlinux, core}, []string{
			`RELEASE: ` + release, `PANIC: "Kernel panic - not syncing: VFS: Unable to mount root fs`,
			`#0 \[[0-9a-f]+\] panic at `, `mount_block_root at `, `kernel_init at `, `"swapper/0`,
			`Linux version ` + release}},
		{[]string{"gdb", "-q", "-nx", "-batch", "-ex", "info threads", "-ex", "p init_task.comm", "-ex", "x/s linux_banner",
			"-ex", "p ((struct list_head *)init_task.tasks.next)->prev == &init_task.tasks",
			"-ex", "thread apply all -q bt", vmlinux, core,
		}, []string{
			`\* 1 .* 0x`, ` 2 .* 0x`, `"swapper/0`, fmt.Sprintf(banner, release), `= 1`,
			` in panic \(`, ` in mount_block_root \(`, ` in kernel_init \(`}},
	} {
		cmd := exec.CommandContext(t.Context(), tt.args[0], tt.args[1:]...)
		b, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v", tt.args[0], err)
		}
		rest := string(b)
		for _, want := range tt.want {
			at := regexp.MustCompile(want).FindStringIndex(rest)
			if at == nil {
				t.Errorf("%s shows no %s, in this order:\n%s", tt.args[0], want, b)
				break
			}
			rest = rest[at[1]:]
		}
		t.Logf("%s: %d lines", tt.args[0], strings.Count(string(b), "\n"))
	}
}
