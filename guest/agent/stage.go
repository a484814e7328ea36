package agent

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
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
	// A collection would go on behind the limits, see execution.
	debug.SetGCPercent(-1)
	if unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) != nil { // before Linux 5.11
		unix.CloseOnExec(stageIn)
		unix.CloseOnExec(stageOut)
	}
	cmd, err := wire.ReadCommand(os.NewFile(stageIn, "command"))
	if err == nil {
		err = settle(cmd)
	}
	if err == nil && cmd.Copy != nil {
		unix.Write(stageOut, []byte(stageReady))
		unix.Close(stageOut)
		return copyFiles(cmd.Copy)
	}
	if err == nil {
		err = become(cmd)
	}
	e := wire.Exit{Status: exitNoTest, Err: err.Error()}
	json.NewEncoder(os.NewFile(stageOut, "exit")).Encode(e)
	return e.Status
}

// settle gives this process the user and the directory of cmd, and the right to its limits.
func settle(cmd *wire.Command) error {
	for _, r := range cmd.Rlimits {
		if err := allow(r); err != nil {
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

// allow raises the hard limit of this process where r is above it, which the command's user may not
// do. All that is left to do for r needs no privilege.
func allow(r wire.Rlimit) error {
	var own unix.Rlimit
	if err := unix.Getrlimit(r.Resource, &own); err != nil {
		return err
	}
	if r.Soft > r.Hard {
		return unix.EINVAL
	}
	if r.Hard <= own.Max {
		return nil
	}
	return unix.Setrlimit(r.Resource, &unix.Rlimit{Cur: own.Cur, Max: r.Hard})
}

// become executes cmd in this process. It returns only a failure before the first attempt.
func become(cmd *wire.Command) error {
	x := execution{report: make([]byte, 0, 64)}
	for _, r := range cmd.Rlimits {
		x.resources = append(x.resources, r.Resource)
		x.limits = append(x.limits, unix.Rlimit{Cur: r.Soft, Max: r.Hard})
	}
	var err error
	for _, file := range candidates(string(cmd.Args[0]), cmd.Env) {
		x.files = append(x.files, nil)
		if x.files[len(x.files)-1], err = unix.BytePtrFromString(file); err != nil {
			return fmt.Errorf("run %q: %w", file, err)
		}
	}
	if x.argv, err = syscall.SlicePtrFromStrings(strs(cmd.Args)); err != nil {
		return fmt.Errorf("pass the arguments: %w", err)
	}
	if x.envv, err = syscall.SlicePtrFromStrings(strs(cmd.Env)); err != nil {
		return fmt.Errorf("pass the environment: %w", err)
	}
	syscall.Exec("", nil, nil) // fails, and gives back the limit on open files that Go raised at its start
	x.run()
	return nil
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

// readExit reads the report of the stage of cmd. Without one the command runs, if the stage was
// ready for it.
func readExit(r io.Reader, cmd *wire.Command) (failed *wire.Exit) {
	b, _ := io.ReadAll(io.LimitReader(r, 1<<20))
	report := bytes.TrimSpace(b)
	if len(b) > 0 && len(report) == 0 {
		return nil
	}
	var e struct {
		wire.Exit
		notExecuted
	}
	switch err := json.Unmarshal(report, &e); {
	case err == nil && e.Errno != 0:
		return e.exit(cmd)
	case err == nil && e.Err != "":
		return &e.Exit
	}
	return &wire.Exit{Status: exitNoTest, Err: "the agent's process ended before it became the command"}
}

// notExecuted is the report of an execution.
type notExecuted struct {
	Errno unix.Errno
	File  int // the index of the candidate, their number if a limit could not be set
}

// exit returns the exit of cmd.
func (n notExecuted) exit(cmd *wire.Command) *wire.Exit {
	name := string(cmd.Args[0])
	files := candidates(name, cmd.Env)
	if n.File < 0 || n.File >= len(files) {
		return &wire.Exit{Status: exitNoTest, Err: fmt.Sprintf("set the resource limits: %v", n.Errno)}
	}
	e := wire.Exit{Status: 126, Err: fmt.Sprintf("run %s: %v", files[n.File], n.Errno)}
	switch {
	case n.Errno == unix.ELIBACC:
		e.Status = 127
		e.Err = fmt.Sprintf("run %s: its interpreter, or the loader of its libraries, is not in the guest", files[n.File])
	case n.Errno == unix.ENOENT && !strings.Contains(name, "/"):
		e.Status, e.Err = 127, fmt.Sprintf("run %s: there is no such command in PATH", name)
	case n.Errno == unix.ENOENT:
		e.Status = 127
	}
	return &e
}
