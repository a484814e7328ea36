package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
	"gvm/panics"
)

// lifeFD is a descriptor of each broker and keeper, which does nothing with it: see execute.
const lifeFD = 3

// execute starts the program again as a broker or keeper, in a session of its own: signals for the
// machine's group are not for it. It returns the PID. If a signal has stopped the process, it goes
// on when the descriptor life is closed, at the latest by the end of this process. os.StartProcess
// would take half as long again: its first use in a process starts and ends a child to see whether
// there are pidfds.
func execute(args []string, files ...*os.File) (pid, life int, err error) {
	fail := func(err error) (int, int, error) { return 0, -1, fmt.Errorf("broker: start %s: %w", args[0], err) }
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	defer null.Close()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return fail(os.NewSyscallError("pipe2", err))
	}
	r := os.NewFile(uintptr(pipe[0]), "life")
	defer r.Close()
	var fds []uintptr
	for _, f := range append([]*os.File{null, null, os.Stderr, r}, files...) {
		fds = append(fds, f.Fd())
	}
	const exe = "/proc/self/exe"
	pid, err = syscall.ForkExec(exe, args, &syscall.ProcAttr{
		// It has little to do, and its memory counts for each machine. The first value counts.
		Env:   append([]string{"GOMAXPROCS=1"}, os.Environ()...),
		Files: fds,
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	runtime.KeepAlive(files)
	if err != nil {
		unix.Close(pipe[1])
		return fail(&fs.PathError{Op: "fork/exec", Path: exe, Err: err})
	}
	_ = nowait.WakeAtClose(r, pid) // fails if it has ended
	return pid, pipe[1], nil
}

// ended waits for the end of a child, and returns errEnded unless that has done all.
func ended(pid int) error {
	var s unix.WaitStatus
	for {
		switch _, err := unix.Wait4(pid, &s, 0, nil); {
		case err == unix.EINTR:
		case err != nil || s != 0:
			return errEnded
		default:
			return nil
		}
	}
}

// Weights of a process's autogroup (sched(7)), as nice values.
const (
	startNice  = "19"
	normalNice = "0"
)

// holdTime bounds the time for which the broker is stopped: a start that takes longer than the
// embedded guest's would show it as stopped to gvm list.
var holdTime = 20 * time.Millisecond

// hold stops the broker, which takes a share of the processors to start, until Shut: two hardware
// threads of one core slow each other even if no thread waits for a processor. The broker goes on
// when this process dies, too, see execute.
func (c *Client) hold() {
	_ = unix.Kill(c.pid, unix.SIGSTOP)
	time.AfterFunc(holdTime, panics.Func(c.wake))
}

// startTime is longer than the start of a machine, and than the time that Linux wants between two
// writes to an autogroup without CAP_SYS_ADMIN.
const startTime = 150 * time.Millisecond

// yieldFirst has the broker, which takes several milliseconds of a processor to start, yield to the
// machine for startTime: nothing waits for it until the guest runs. Without autogroups it does
// nothing.
func yieldFirst(pid int) {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/autogroup", pid), os.O_WRONLY, 0)
	if err != nil {
		return
	}
	if _, err := f.WriteString(startNice); err != nil {
		f.Close()
		return
	}
	time.AfterFunc(startTime, panics.Func(func() {
		defer f.Close()
		for range 20 { // other machines may start
			if _, err := f.WriteString(normalNice); !errors.Is(err, unix.EAGAIN) {
				return
			}
			time.Sleep(startTime / 3)
		}
	}))
}
