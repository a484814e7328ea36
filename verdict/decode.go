package verdict

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"

	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/verdict/klog"
)

// Decoder is the script decode_stacktrace.sh of a kernel tree, which runs and waits for frames. A
// program that starts one early need not be able to start programs later.
type Decoder struct {
	path string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  bytes.Buffer
	stop context.CancelFunc
}

// StartDecoder starts the script for a kernel of a tree. The caller calls Decode or Close.
func StartDecoder(script, vmlinux, tree string) (*Decoder, error) {
	d := &Decoder{path: script}
	var ctx context.Context
	ctx, d.stop = context.WithCancel(context.Background())
	cmd := nowait.Command(ctx, script, vmlinux, "auto", tree)
	cmd.Stdout = &d.out
	// The script's programs, such as addr2line, read large files for seconds: they end with the
	// script.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 100 * time.Millisecond // for a program that left the group
	var err error
	if d.in, err = cmd.StdinPipe(); err == nil {
		err = cmd.Start()
	}
	if err != nil {
		d.stop()
		return nil, err
	}
	d.cmd = cmd
	return d, nil
}

// Group returns the process group of the script.
func (d *Decoder) Group() int { return d.cmd.Process.Pid }

// Close ends the script.
func (d *Decoder) Close() {
	d.stop()
	_ = d.in.Close()
	_ = d.cmd.Wait() // killed
}

// Decode fills in the source of frames, and ends the script. The script gets nothing of the guest's
// but the frames' symbols, offsets and modules, which have letters, digits, "_", "." and "-": it
// puts its input into shell arithmetic and awk programs.
func (d *Decoder) Decode(ctx context.Context, frames []*klog.Frame) error {
	defer context.AfterFunc(ctx, panics.Func(d.stop))()
	var in strings.Builder
	for _, f := range frames {
		fmt.Fprintf(&in, " %s+%#x/%#x", f.Symbol, f.Offset, f.Size)
		if f.Module != "" {
			fmt.Fprintf(&in, " [%s]", f.Module)
		}
		in.WriteByte('\n')
	}
	_, _ = io.WriteString(d.in, in.String()) // fails if the script has ended: Wait says why
	_ = d.in.Close()
	err := d.cmd.Wait()
	d.stop()
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	source := regexp.MustCompile(`\(([^()]+:\d+[^()]*(?:\([^()]*\)[^()]*)*)\)`)
	lines := bytes.Split(bytes.TrimRight(d.out.Bytes(), "\n"), []byte("\n"))
	if len(lines) != len(frames) {
		return fmt.Errorf("%s: %d lines of output for %d frames", d.path, len(lines), len(frames))
	}
	for i, line := range lines {
		if m := source.FindSubmatch(line); m != nil {
			frames[i].Source = string(m[1])
		}
	}
	return nil
}
