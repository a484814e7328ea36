package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/urfave/cli/v2"
)

// verb is a command for a running machine.
type verb struct {
	name    string
	words   string // behind the name of the machine
	status  int    // on a machine of gvm run whose guest has no drivers
	once    string // on standard error then
	status2 int    // the second time
	twice   string
}

const (
	noAgent = "gvm: machine build has no agent: "
	noHVC   = "gvm: the machine has no virtio console: start it with gvm run --hvc"
)

// verbs are all commands for a running machine, in an order that gives each its preconditions.
var verbs = []verb{
	{name: "list"},
	{name: "balloon", words: "8M", once: "no balloon driver yet", twice: "no balloon driver yet"},
	{name: "inspect", words: "paused"},
	{name: "stat"},
	{name: "disk list"},
	{name: "disk add", words: "extra.img,serial=extra", status2: exitUsage, twice: "extra.img: given twice: "},
	{name: "disk resize", words: "extra 2M"},
	{name: "disk remove", words: "extra", status2: exitUsage, twice: "gvm: no disk of this machine has the LUN, "},
	{name: "dump", words: "core", once: "no VMCOREINFO", status2: exitUsage, twice: "core: exists; remove it, "},
	{name: "console", status: exitQuit, once: "stopped by SIGINT", status2: exitQuit, twice: "stopped by SIGINT"},
	{name: "console", words: "--hvc", status: exitUsage, once: noHVC, status2: exitUsage, twice: noHVC},
	{name: "exec", words: "-- true", status: exitUsage, once: noAgent, status2: exitUsage, twice: noAgent},
	{name: "shell", status: exitUsage, once: noAgent, status2: exitUsage, twice: noAgent},
	{name: "cp", words: ":x .", status: exitUsage, once: noAgent, status2: exitUsage, twice: noAgent},
	{name: "pause", status2: exitUsage, twice: "gvm: machine build is paused already"},
	{name: "sysrq", words: "h", status: exitUsage, once: "is paused: gvm resume it first",
		status2: exitUsage, twice: "is paused: gvm resume it first"},
	{name: "resume", status2: exitUsage, twice: "gvm: machine build is not paused"},
	{name: "reset"},
	{name: "stop", status2: exitUsage, twice: "gvm: no machine of this user runs"},
	{name: "nmi"}, // which a busy host may not raise in time: TestNMICommand
}

// args returns the words of the command line for a machine.
func (v verb) args(machine string) []string {
	words := strings.Fields(v.name)
	if v.name == "list" {
		return words
	}
	if strings.HasPrefix(v.words, ":") {
		return append(words, strings.Fields(machine+v.words)...)
	}
	return append(append(words, machine), strings.Fields(v.words)...)
}

// TestVerbs tries each command for a running machine as a newcomer would: without a machine, with a
// wrong name, the second time, on a machine that is paused, on one whose process is stopped, and on
// one that has ended. An error is one line with its reason, and its status tells whose it is.
func TestVerbs(t *testing.T) {
	var walk func(path string, cs []*cli.Command)
	walk = func(path string, cs []*cli.Command) {
		for _, c := range cs {
			name := strings.TrimSpace(path + " " + c.Name)
			walk(name, c.Subcommands)
			tried := slices.ContainsFunc(verbs, func(v verb) bool { return v.name == name })
			if strings.Contains(c.ArgsUsage, "VM") && !tried {
				t.Errorf("gvm %s %s is not tried", name, c.ArgsUsage)
			}
		}
	}
	walk("", app(nil).Commands)

	runtime, dir := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "extra.img"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	inDir := func(p *proc) { p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+runtime) }
	start := func() *proc {
		t.Helper()
		p := startGVMAs(t, dir, inDir, guestRun("--name=build", "--balloon", "hang")...)
		p.expect("hanging")
		return p
	}
	try := func(v verb, machine string) result {
		t.Helper()
		c := command(t, v.args(machine)...)
		c.Dir, c.Env = dir, append(c.Env, "XDG_RUNTIME_DIR="+runtime)
		return gvmRuns(t, c)
	}
	p := start()
	for _, v := range verbs {
		if v.name != "list" {
			v.check(t, "a wrong name", try(v, "biuld"), exitUsage,
				"gvm: no machine of this user has the name or PID biuld; there is build")
		}
	}
	for _, v := range verbs {
		once := func() result { return try(v, "build") }
		switch strings.TrimSpace(v.name + " " + v.words) {
		case "nmi":
			continue
		case "console": // it ends with the machine
			once = func() result {
				c := startGVMAs(t, dir, inDir, v.args("build")...)
				c.expect("hanging")
				c.signal(syscall.SIGINT)
				return c.wait()
			}
		}
		v.check(t, "once", once(), v.status, v.once)
		if v.name == "reset" { // else the second one may find no guest
			p.expectCount("hanging", 2)
		}
		v.check(t, "twice", once(), v.status2, v.twice)
		if v.name == "reset" {
			p.expectCount("hanging", 3)
		}
	}
	p.wait()

	p = start()
	if err := os.Remove(filepath.Join(dir, "core")); err != nil {
		t.Fatal(err)
	}
	if r := try(verb{name: "pause"}, "build"); r.status != 0 {
		t.Errorf("gvm pause: %+v", r)
	}
	for _, v := range verbs {
		status, reason := v.status, v.once
		switch v.name {
		case "console", "nmi", "resume":
			continue
		case "pause":
			status, reason = v.status2, v.twice
		case "stop":
			status, reason = exitUsage, "gvm: the machine is paused, and its guest cannot power off: gvm resume it first, "
		}
		v.check(t, "paused", try(v, "build"), status, reason)
	}
	resumed := try(verb{name: "resume"}, "build")
	for strings.Contains(resumed.errs, "does not run now") { // between two lives of the guest
		resumed = try(verb{name: "resume"}, "build")
	}
	if resumed.status != 0 {
		t.Errorf("gvm resume: %+v", resumed)
	}
	p.expectCount("hanging", 2) // once after the reset
	p.signal(syscall.SIGSTOP)
	var tried sync.WaitGroup
	for _, v := range verbs { // all at once: each waits for an answer
		tried.Go(func() {
			status := exitHost
			if v.name == "list" {
				status = 0
			}
			v.check(t, "a stopped process", try(v, "build"), status,
				"machine build: no answer: its process is stopped (kill -CONT PID) (process ")
		})
	}
	tried.Wait()
	p.signal(syscall.SIGKILL)
	p.wait()
	for _, v := range verbs {
		if v.name != "list" {
			v.check(t, "a killed process", try(v, "build"), exitUsage,
				"gvm: no machine of this user runs; start one with gvm run or gvm test\n")
		}
	}
}

// TestVerbsOfStranger tries the commands as a user who is not the machines' owner, root: with a
// directory of its own for machines, with root's, and, if this is root, with two of root's that
// only root can make. None of them tells of a machine.
func TestVerbsOfStranger(t *testing.T) {
	home, err := os.MkdirTemp("", "gvm-stranger-") // which the user can reach, not as that of t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(home) })
	own, mixed := filepath.Join(home, "own"), filepath.Join(home, "mixed")
	if err := errors.Join(os.Chmod(home, 0o755), os.Mkdir(own, 0o700)); err != nil {
		t.Fatal(err)
	}
	const none = "no machine of this user runs"
	foreign := none + "; XDG_RUNTIME_DIR is %s of user root, for whose machines run gvm as that user\n"
	type situation struct{ name, runtime, reason string }
	situations := []situation{
		{"as another user", own, none + "; start one with gvm run or gvm test\n"},
		{"as another user, in the owner's directory", "/usr", fmt.Sprintf(foreign, "/usr")},
	}
	path, credential := self(t), (*syscall.Credential)(nil)
	if os.Getuid() == 0 {
		const uid = 65534
		path, credential = copyOfSelf(t, home), &syscall.Credential{Uid: uid, Gid: uid}
		if err := errors.Join(os.Chown(own, uid, uid),
			os.MkdirAll(mixed+"/gvm", 0o700), os.Chown(mixed, uid, uid)); err != nil {
			t.Fatal(err)
		}
		unreachable := t.TempDir()
		situations = append(situations,
			situation{"in a directory that it cannot reach", unreachable, fmt.Sprintf(foreign, unreachable)},
			situation{"in a directory with the owner's", mixed, mixed + "/gvm is not this user's, but user 0's: " +
				"permission denied; run gvm as that user\n"})
	}
	for _, s := range situations {
		for _, v := range verbs {
			c := command(t, v.args("build")...)
			c.Path, c.Dir = path, own
			c.Env = append(environment(own), "XDG_RUNTIME_DIR="+s.runtime)
			c.SysProcAttr.Credential = credential
			status, reason := exitUsage, s.reason
			if v.name == "list" && s.runtime != mixed {
				status, reason = 0, strings.Replace(reason, "; start one with gvm run or gvm test", "", 1)
			}
			v.check(t, s.name, gvmRuns(t, c), status, reason)
		}
	}
}

// check checks the end of a command.
func (v verb) check(t *testing.T, situation string, r result, status int, reason string) {
	t.Helper()
	if status != 0 && (v.name == "exec" || v.name == "shell") {
		status = exitUntested
	}
	if r.status != status || !strings.Contains(r.errs, reason) || strings.Count(r.errs, "\n") != min(len(reason), 1) {
		t.Errorf("%s: gvm %s: status %d, %q; want %d, %q", situation, v.name, r.status, r.errs, status, reason)
	}
}
