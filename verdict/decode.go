package verdict

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"

	"gvm/verdict/klog"
)

// Decode fills in the source of frames by the script decode_stacktrace.sh of a kernel tree. The
// script gets nothing of the guest's but the frames' symbols, offsets and modules, which have
// letters, digits, "_", "." and "-": it puts its input into shell arithmetic and awk programs.
func Decode(ctx context.Context, script, vmlinux, tree string, frames []klog.Frame) error {
	var in strings.Builder
	for _, f := range frames {
		fmt.Fprintf(&in, " %s+%#x/%#x", f.Symbol, f.Offset, f.Size)
		if f.Module != "" {
			fmt.Fprintf(&in, " [%s]", f.Module)
		}
		in.WriteByte('\n')
	}
	cmd := exec.CommandContext(ctx, script, vmlinux, "auto", tree)
	cmd.Stdin = strings.NewReader(in.String())
	// The script's programs, such as addr2line, read large files for seconds: they end with the script.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 100 * time.Millisecond // for a program that left the group
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", script, err)
	}
	source := regexp.MustCompile(`\(([^()]+:\d+[^()]*(?:\([^()]*\)[^()]*)*)\)`)
	lines := bytes.Split(bytes.TrimRight(out, "\n"), []byte("\n"))
	if len(lines) != len(frames) {
		return fmt.Errorf("%s: %d lines of output for %d frames", script, len(lines), len(frames))
	}
	for i, line := range lines {
		if m := source.FindSubmatch(line); m != nil {
			frames[i].Source = string(m[1])
		}
	}
	return nil
}
