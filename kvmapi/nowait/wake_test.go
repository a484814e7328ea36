package nowait_test

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// TestWakeAtClose: a process that is stopped goes on when the last write end of its pipe is closed.
func TestWakeAtClose(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	again, err := unix.FcntlInt(w.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), "cat")
	c.Stdin = r
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if err := nowait.WakeAtClose(r, c.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := c.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(c.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatalf("%#x, %v", status, err)
	}
	w.Close()
	if pid, err := unix.Wait4(c.Process.Pid, &status, unix.WCONTINUED|unix.WNOHANG, nil); pid != 0 || err != nil {
		t.Errorf("with another write end: %#x, %v", status, err)
	}
	unix.Close(again)
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
}
