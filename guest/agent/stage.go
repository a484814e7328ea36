package agent

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/wire"
	"gvm/text"
)

// stageName is the name of the process that becomes a command which is not like the agent. Limits
// and user have to be set in the process itself: with them the agent could no longer do its own
// work.
const stageName = "gvm-agent-command"

// Descriptors of the stage, which its exec closes.
const (
	stageIn  = 3 // the command, in JSON
	stageOut = 4 // an Exit in JSON, if the command cannot be started
)

// stageReady precedes each attempt to execute the command: a space of JSON. A stage that dies
// before it was not the command.
const stageReady = "\n"

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// stage becomes the command, or reports the reason why it cannot.
func stage() int {
	if unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) != nil { // before Linux 5.11
		unix.CloseOnExec(stageIn)
		unix.CloseOnExec(stageOut)
	}
	cmd, err := wire.ReadCommand(os.NewFile(stageIn, "command"))
	e := wire.Exit{Status: exitNoTest}
	if err == nil {
		err = settle(cmd)
	}
	if err == nil && cmd.Copy != nil {
		unix.Write(stageOut, []byte(stageReady))
		unix.Close(stageOut)
		return copyFiles(cmd.Copy)
	}
	if err == nil {
		e.Status, err = become(cmd)
	}
	e.Err = err.Error()
	json.NewEncoder(os.NewFile(stageOut, "exit")).Encode(e)
	return e.Status
}

// reserveMemory takes memory for all that follows from the kernel: the command's limits on it hold
// for Go's larger process as well, which ends where it gets no more.
func reserveMemory() {
	debug.SetGCPercent(-1)
	b := make([]byte, 16<<20) // for arguments and environment, which Linux bounds by 6 MiB
	runtime.KeepAlive(b)
	runtime.GC()
}

// settle gives this process the limits, the user and the directory of cmd.
func settle(cmd *wire.Command) error {
	reserveMemory()
	for _, r := range cmd.Rlimits {
		if err := syscall.Setrlimit(r.Resource, &syscall.Rlimit{Cur: r.Soft, Max: r.Hard}); err != nil {
			return fmt.Errorf("set resource limit %d to %d and %d: %w", r.Resource, r.Soft, r.Hard, err)
		}
	}
	groups := make([]int, len(cmd.Groups))
	for i, g := range cmd.Groups {
		groups[i] = int(g)
	}
	// A kernel without CONFIG_MULTIUSER has only user 0, and not these calls. Only root may set the
	// groups, also to those that it has.
	if now, err := syscall.Getgroups(); err != nil || !slices.Equal(now, groups) {
		if err := syscall.Setgroups(groups); err != nil && (err != unix.ENOSYS || len(groups) > 0) {
			return fmt.Errorf("set the groups %v: %w", groups, err)
		}
	}
	if err := syscall.Setgid(int(cmd.GID)); err != nil && (err != unix.ENOSYS || cmd.GID != 0) {
		return fmt.Errorf("set the group %d: %w", cmd.GID, err)
	}
	if err := syscall.Setuid(int(cmd.UID)); err != nil && (err != unix.ENOSYS || cmd.UID != 0) {
		return fmt.Errorf("set the user %d: %w", cmd.UID, err)
	}
	return os.Chdir(cmp.Or(string(cmd.Dir), "/"))
}

// become executes cmd in this process. It returns only a failure and its exit status.
func become(cmd *wire.Command) (int, error) {
	name := string(cmd.Args[0])
	reason, status := error(unix.ENOENT), 127
	if !strings.Contains(name, "/") {
		reason = errors.New("there is no such command in PATH")
	}
	for _, file := range candidates(name, cmd.Env) {
		unix.Write(stageOut, []byte(stageReady))
		switch err := syscall.Exec(file, strs(cmd.Args), strs(cmd.Env)); err {
		case unix.ENOENT, unix.ENOTDIR:
			if _, err := os.Stat(file); err == nil {
				return 127, fmt.Errorf("run %s: its interpreter, or the loader of its libraries, is not in the guest", file)
			}
		case unix.EACCES: // another directory may have one
			reason, status = err, 126
		default:
			return 126, fmt.Errorf("run %s: %w", file, err)
		}
	}
	return status, fmt.Errorf("run %s: %w", name, reason)
}

// candidates returns the paths to try for a command, as execvp(3) does.
func candidates(name string, env []text.Name) []string {
	if strings.Contains(name, "/") || name == "" {
		return []string{name}
	}
	dirs := defaultPath
	for _, v := range env {
		if value, ok := strings.CutPrefix(string(v), "PATH="); ok {
			dirs = value
			break
		}
	}
	var all []string
	for dir := range strings.SplitSeq(dirs, ":") {
		if dir != "" {
			dir += "/"
		}
		all = append(all, dir+name)
	}
	return all
}

func strs(names []text.Name) []string {
	s := make([]string, len(names))
	for i, n := range names {
		s[i] = string(n)
	}
	return s
}

// readExit reads the report of a stage. Without one the command runs, if the stage was ready for
// it.
func readExit(r io.Reader) (failed *wire.Exit) {
	b, _ := io.ReadAll(io.LimitReader(r, 1<<20))
	report := bytes.TrimSpace(b)
	if len(b) > 0 && len(report) == 0 {
		return nil
	}
	e := wire.Exit{}
	if json.Unmarshal(report, &e) != nil || e.Err == "" {
		return &wire.Exit{Status: exitNoTest, Err: "the agent's process ended before it became the command"}
	}
	return &e
}
