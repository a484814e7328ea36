package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/broker"
	"gvm/control"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/jail"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/sandbox"
	"gvm/testrun"
	"gvm/text"
	"gvm/vmm"
)

// remote serves a machine on the control socket.
type remote struct {
	info control.Info
	*machine.Machine
	pausePatience time.Duration
	memory        guestmem.Config // the guest's

	memoryNoted sync.Once
}

func (r *remote) Info() control.Info {
	i := r.info
	i.State = control.Running
	if r.Paused() {
		i.State = control.Paused
	}
	return i
}

// pausePatience bounds the wait of a pause for CPUs and devices. A CPU may be blocked on console
// output that no program reads, a device by storage that does not answer.
const pausePatience = 10 * time.Second

var errNotPausing = control.Errorf(http.StatusGatewayTimeout, "a CPU does not stop: is the output of gvm run taken?")

func (r *remote) Pause(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.pausePatience, errNotPausing)
	defer cancel()
	return r.pauseError(r.Machine.Pause(ctx))
}

func (r *remote) Resume() error { return r.pauseError(r.Machine.Resume()) }

// Stop implements gvm stop.
func (r *remote) Stop(s control.Stop) (control.Stopped, error) {
	if err := r.canStop(s); err != nil {
		return control.Stopped{}, err
	}
	return control.Stopped{Asked: r.Machine.Stop(errStopped, time.Duration(s.GraceMS)*time.Millisecond)}, nil
}

// canStop refuses to give a paused guest time.
func (r *remote) canStop(s control.Stop) error {
	if s.GraceMS > 0 && r.Paused() {
		return control.Errorf(http.StatusConflict,
			"the machine is paused, and its guest cannot power off: gvm resume it first, or gvm stop --force")
	}
	return nil
}

// errStopped is the end by gvm stop.
var errStopped = endError{exitTerminated, errors.New("stopped by gvm stop")}

// Reset implements gvm reset.
func (r *remote) Reset() error { return r.pauseError(r.Machine.Reset()) }

// NMI implements gvm nmi.
func (r *remote) NMI(ctx context.Context) error {
	err := r.Machine.NMI(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return control.Errorf(http.StatusGatewayTimeout, "a CPU does not stop: is the output of gvm run taken?")
	}
	return r.pauseError(err)
}

// Core implements gvm dump.
func (r *remote) Core(ctx context.Context) (io.ReadCloser, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, r.pausePatience, errNotPausing)
	defer cancel()
	c, err := r.Machine.Core(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = errNotPausing
	}
	return c, r.pauseError(err)
}

// Console implements gvm console.
func (r *remote) Console() io.ReadWriteCloser { return r.Machine.Attach() }

// HVC implements gvm console --hvc.
func (r *remote) HVC() (io.ReadWriteCloser, error) {
	a, err := r.Machine.AttachHVC()
	if err != nil {
		return nil, err
	}
	return a, nil
}

// sysRqPatience bounds the wait for the guest's driver.
const sysRqPatience = 5 * time.Second

var errNoDriver = control.Errorf(http.StatusGatewayTimeout,
	"the guest does not read its serial port: it hangs, or nothing has its console ttyS0 open")

// SysRq implements gvm sysrq.
func (r *remote) SysRq(ctx context.Context, key byte) error {
	ctx, cancel := context.WithTimeoutCause(ctx, sysRqPatience, errNoDriver)
	defer cancel()
	err := r.Machine.SysRq(ctx, key)
	if errors.Is(err, vmm.ErrPaused) {
		return control.Errorf(http.StatusConflict, "machine %s is paused: gvm resume it first", r.info.Name)
	}
	return r.pauseError(err)
}

// Inspect implements gvm inspect.
func (r *remote) Inspect(ctx context.Context, path string) (inspect.Node, error) {
	n, err := r.Machine.Inspect(ctx, path)
	return n, r.pauseError(err)
}

// pauseError converts an error of a Pauser or an Inspector for the control socket.
func (r *remote) pauseError(err error) error {
	var busy *vmm.BusyError
	switch {
	case errors.As(err, &busy) && errors.Is(err, errNotPausing):
		return control.Errorf(http.StatusGatewayTimeout,
			"%s does not finish the guest's requests: does its storage answer, and are iops= and bps= not too low?",
			busy.Device)
	case errors.Is(err, vmm.ErrPaused):
		return control.Errorf(http.StatusConflict, "machine %s is paused already", r.info.Name)
	case errors.Is(err, vmm.ErrDebugged), errors.Is(err, vmm.ErrResumed), errors.Is(err, machine.ErrDumping):
		return control.Errorf(http.StatusConflict, "machine %s: %v", r.info.Name, err)
	case errors.Is(err, vmm.ErrNotPaused):
		return control.Errorf(http.StatusConflict, "machine %s is not paused", r.info.Name)
	case errors.Is(err, vmm.ErrNotRunning):
		return control.Errorf(http.StatusServiceUnavailable, "%v", err)
	}
	return err
}

func (r *remote) AddDisk(ctx context.Context, a control.AddDisk) (control.Change, error) {
	d, err := disk.Added(a)
	if err != nil {
		return control.Change{}, err
	}
	if err := spareFiles(thisHost()); err != nil {
		return control.Change{}, control.Errorf(http.StatusConflict, "--disk %s: %v", d.Name(), err)
	}
	if d.Waits() {
		if _, err := boundWaits("a disk takes", 0, 1, []*disk.Spec{&d}, nil, thisHost()); err != nil {
			return control.Change{}, control.Errorf(http.StatusConflict, "--disk %s: %v", d.Name(), err)
		}
	}
	if d.Storage == disk.Memory {
		warn, err := checkAddedMemory(r.memory, r.Machine.Disks(), &d, thisHost())
		if err != nil {
			return control.Change{}, control.Errorf(http.StatusConflict, "--disk %s: %v", d.Name(), err)
		}
		if warn != "" {
			r.memoryNoted.Do(func() { note(warn) })
		}
	}
	change, err := r.Machine.AddDisk(ctx, d)
	if e := (*control.Error)(nil); errors.As(err, &e) && e.Status == http.StatusNotFound {
		if in := jail.Here(); in != nil {
			err = control.Errorf(e.Status, "%v; the machine is in a jail: put it in %s, and add it as /run/NAME",
				err, filepath.Join(in.Dir, "run"))
		}
	}
	return change, err
}

// Agent refuses: the guest's programs are its own.
func (r *remote) Agent(context.Context) (io.ReadWriteCloser, error) {
	return nil, control.Errorf(http.StatusNotFound,
		"machine %s has no agent: gvm exec, gvm shell and gvm cp are for machines of gvm test", r.info.Name)
}

// testRemote serves a machine of gvm test.
type testRemote struct {
	remote
	run    *testrun.Run
	matrix bool
}

// Stop sends SIGTERM to the guest's command, whose end is that of the machine.
func (r *testRemote) Stop(s control.Stop) (control.Stopped, error) {
	if err := r.canStop(s); err != nil {
		return control.Stopped{}, err
	}
	asked := r.run.Terminate(int(unix.SIGTERM), errStopped, time.Duration(s.GraceMS)*time.Millisecond)
	return control.Stopped{Asked: asked, Outlived: r.matrix}, nil
}

// agentPatience bounds the wait for the agent.
const agentPatience = 5 * time.Second

var errSilentAgent = fmt.Errorf("not within %v: its guest may hang", agentPatience)

// Agent implements gvm exec.
func (r *testRemote) Agent(ctx context.Context) (io.ReadWriteCloser, error) {
	if r.Paused() {
		return nil, control.Errorf(http.StatusConflict, "machine %s is paused: gvm resume it first", r.info.Name)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, agentPatience, errSilentAgent)
	defer cancel()
	c, err := r.run.Dial(ctx)
	switch {
	case err == nil:
		return c, nil
	case errors.Is(err, testrun.ErrOver):
		return nil, control.Errorf(http.StatusServiceUnavailable, "machine %s ends: %v", r.info.Name, err)
	case errors.Is(err, errSilentAgent):
		err = errSilentAgent
	case errors.Is(err, testrun.ErrNoHello), errors.As(err, new(*testrun.RungError)):
		return nil, control.Errorf(http.StatusConflict, "machine %s: %v", r.info.Name, err)
	}
	return nil, control.Errorf(http.StatusGatewayTimeout, "the agent of machine %s does not answer: %v", r.info.Name, err)
}

// Reset refuses: a test has one life of its guest.
func (r *testRemote) Reset() error {
	return control.Errorf(http.StatusConflict,
		"machine %s runs a test, which a reset would lose: gvm stop it", r.info.Name)
}

// name returns the machine's name, if it can have that.
func (rc *runConfig) name() string {
	return cmp.Or(rc.spec.Name, rc.machineName, "gvm-"+strconv.Itoa(os.Getpid()))
}

// startBroker starts the machine's broker, unless there is no sandbox. It is early, because
// everything else of the start is beside it.
func (rc *runConfig) startBroker(note func(string)) {
	var janitor *os.File
	if in := jail.Here(); in != nil && in.Janitor != 0 {
		janitor = os.NewFile(uintptr(in.Janitor), "janitor")
	}
	if rc.sandbox == sandbox.Off {
		janitor.Close()
		return
	}
	rc.broker = broker.Start(rc.name(), note, janitor)
	rc.spec.Files = rc.broker
}

// endBroker ends the broker, unless closeSocket has.
func (rc *runConfig) endBroker() {
	if rc.broker != nil {
		_ = rc.broker.End() // the keeper is there too
	}
}

// claimName claims the machine's name and opens its control socket, for closeSocket. If no socket
// can be opened, a machine with a chosen name fails, and any other runs without a socket, with a
// note.
func (rc *runConfig) claimName(note func(string)) (*control.Server, error) {
	name := rc.name()
	awaitFatal()
	urgent.making.Lock()
	defer urgent.making.Unlock()
	s, err := control.Claim(control.DefaultDirectory(), name)
	switch {
	case errors.Is(err, control.ErrInUse):
		return nil, configError{fmt.Errorf("--name %s: %w; choose another name, or gvm stop %[1]s first", name, err)}
	case err != nil && rc.spec.Name != "":
		return nil, fmt.Errorf("--name %s: %w", name, err)
	case err != nil:
		if i := slices.IndexFunc(rc.spec.Disks, func(d disk.Spec) bool { return d.OnError != disk.Report }); i >= 0 {
			return nil, configError{fmt.Errorf("--disk %s: error=: nothing could resume the machine: %w",
				rc.spec.Disks[i].Name(), err)}
		}
		if rc.spec.Watchdog == vmm.WatchdogPause {
			return nil, configError{fmt.Errorf("--watchdog pause: nothing could resume the machine: %w", err)}
		}
		note(fmt.Sprintf("gvm disk and gvm list will not find this machine: %v%s", err, mend(err)))
		s = nil
	default:
		rc.spec.Name = name
	}
	if s == nil {
		return nil, nil
	}
	if rc.broker != nil {
		if err := rc.broker.Serve(s, control.DefaultDirectory()); err != nil {
			return nil, errors.Join(err, rc.closeSocket(s))
		}
	}
	releaseAtEnd(s)
	return s, nil
}

// closeSocket closes a control socket and ends the broker. Without a socket s is nil.
func (rc *runConfig) closeSocket(s *control.Server) error {
	if s == nil {
		rc.endBroker()
		return nil
	}
	err := s.Close()
	forgetAtEnd(s)
	return err
}

// info returns the machine's description of itself.
func (rc *runConfig) info() control.Info {
	kernel := ""
	if rc.spec.Kernel != nil {
		kernel = disk.Absolute(rc.spec.Kernel.Name)
	}
	return control.Info{Name: rc.spec.Name, PID: os.Getpid(), GVM: version, Kernel: text.Name(kernel),
		CPUs: rc.spec.CPUs, Memory: rc.spec.Memory.Size}
}

// theMachine returns a client for the machine with the given name or PID. An empty word means the
// only running machine.
func theMachine(word string) (*control.Client, error) {
	dir := control.DefaultDirectory()
	entries, err := dir.List()
	if err != nil {
		return nil, listError(err)
	}
	// Ask the machine a question first, so that no command goes to one that does not answer.
	client := func(e control.Entry) (*control.Client, error) {
		c := control.NewClient(dir, e.Name)
		_, err := c.Info(context.Background())
		if errors.Is(err, control.ErrNoAnswer) || errors.Is(err, control.ErrNoListener) ||
			errors.Is(err, control.ErrNoSocket) {
			return nil, fmt.Errorf("%w (process %d)", err, e.PID)
		}
		return c, nil
	}
	if word == "" && len(entries) == 1 {
		return client(entries[0])
	}
	var names []string
	var found *control.Entry // by its PID: one that has the word for a name goes before
	for i, e := range entries {
		switch {
		case word == e.Name:
			return client(e)
		case word == strconv.Itoa(e.PID):
			found = &entries[i]
		}
		names = append(names, e.Name)
	}
	switch {
	case found != nil:
		return client(*found)
	case len(names) == 0:
		said := noMachine()
		if !strings.Contains(said, ";") {
			said += "; start one with gvm run or gvm test"
		}
		return nil, usageError{errors.New(said)}
	case word == "":
		return nil, usageError{fmt.Errorf("several machines run: name one of %s", strings.Join(names, ", "))}
	}
	return nil, usageError{fmt.Errorf("no machine of this user has the name or PID %s; there %s %s%s", word,
		map[bool]string{true: "is", false: "are"}[len(names) == 1], strings.Join(names, ", "),
		text.Suggest(word, names))}
}

// noMachine says that no machine runs, and where others may run.
func noMachine() string {
	said := "no machine of this user runs"
	if dir, uid, ok := control.Foreign(); ok {
		name := fmt.Sprintf("user %d", uid)
		if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
			name = "user " + u.Username
		}
		said += fmt.Sprintf("; XDG_RUNTIME_DIR is %s of %s, for whose machines run gvm as that user", dir, name)
	}
	return said
}

// listError is an error of a list of machines, with its exit status.
func listError(err error) error {
	return disk.ImageError{Err: fmt.Errorf("list machines: %w", err)}
}

// refused gives a machine's refusal the exit status that gvm run would have for the same error.
func refused(err error) error {
	var e *control.Error
	if errors.As(err, &e) && e.Status < http.StatusInternalServerError {
		return usageError{err}
	}
	return err
}

// tableRow writes a row of printable cells.
func tableRow(w io.Writer, cells ...any) {
	words := make([]string, len(cells))
	for i, c := range cells {
		words[i] = text.Printable(fmt.Sprint(c))
	}
	fmt.Fprintln(w, strings.Join(words, "\t"))
}
