package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/control"
	"gvm/guest/agent/wire"
)

// agentMachine has an agent without a guest. It runs cat, and commands whose first word is their
// end.
type agentMachine struct {
	evilMachine
	build   string
	signals chan int
}

func (agentMachine) Info() control.Info { return control.Info{Name: "fake"} }

func (m agentMachine) Agent(context.Context) (io.ReadWriteCloser, error) {
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		a, err := wire.Dial(far, wire.AgentConfig{Hello: wire.Hello{Build: m.build},
			Signal: func(n int) { m.signals <- n }})
		if err != nil {
			return
		}
		cmd, err := a.Command()
		if err != nil {
			return
		}
		var e wire.Exit
		switch args := cmd.Args; args[0] {
		case "cat":
			_, _ = io.Copy(a.Stdout, a.Stdin)
			_, _ = io.WriteString(a.Stderr, "errors\n")
			e.Status = len(args) - 1
		case "sleep":
			_, _ = io.WriteString(a.Stdout, "sleeps")
			e.Signal = <-m.signals
		case "stubborn":
			_, _ = io.WriteString(a.Stdout, "stubborn")
			for {
				select {
				case n := <-m.signals:
					fmt.Fprintf(a.Stdout, ", took %d", n)
				case <-a.Gone():
					return
				}
			}
		case "lost":
			return
		default:
			e = wire.Exit{Status: 127, Err: "run " + string(args[0]) + ": no such file"}
		}
		_ = a.Stdout.Close()
		_ = a.Stderr.Close()
		_ = a.Exit(e, time.Minute)
	}()
	return near, nil
}

// TestExec: a command of a session has its own streams and end, and all that keeps it from running
// is one line and the status 125.
func TestExec(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	inDir := func(p *proc) { p.cmd.Env = append(p.cmd.Env, "XDG_RUNTIME_DIR="+dir) }
	build, err := wire.BuildID(ownProgram)
	if err != nil {
		t.Fatal(err)
	}
	m := agentMachine{build: build, signals: make(chan int, 1)}
	for name, m := range map[string]control.Machine{"fake": m, "bare": evilMachine{},
		"other": agentMachine{build: "another", signals: m.signals}} {
		s, err := control.Claim(control.DefaultDirectory(), name)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.Serve(m)
	}
	for _, c := range []struct {
		args, in  string
		status    int
		out, errs string
	}{
		{"exec fake -- cat", "in\xff\x00put", 0, "in\xff\x00put", "errors\n"},
		{"exec fake cat -x --", "", 2, "", "errors\n"},
		{"exec fake -- none", "", 127, "", "gvm: run none: no such file\n"},
		{"exec fake -- lost", "", 125, "", "gvm: machine fake ended, or its agent, before the command did\n"},
		{"exec fake -- lost", strings.Repeat("unread", 1<<16), 125, "",
			"gvm: machine fake ended, or its agent, before the command did\n"},
		{"exec bare -- cat", "", 125, "", "gvm: "},
		{"exec other -- cat", "", 125, "", "gvm: wait for the agent: the agent and gvm are of different builds: "},
		{"exec absent -- cat", "", 125, "", "gvm: no machine of this user has the name or PID absent; there are "},
		{"exec fake", "", 125, "", "gvm: exec takes VM [--] COMMAND [ARGUMENT...], and got 1 word\n"},
		{"exec fake --", "", 125, "", "gvm: exec takes VM [--] COMMAND [ARGUMENT...], and got 2 words\n"},
		{"exec", "", 125, "", "gvm: exec takes VM [--] COMMAND [ARGUMENT...], and got 0 words\n"},
		{"exec --tty fake top", "", 125, "", "gvm: --tty: standard input and output are no terminal\n"},
		{"exec --no fake", "", 125, "", "gvm: "},
		{"shell fake sh", "", 125, "", "gvm: shell takes VM, and got 2 words\n"},
		{"shell fake", "", 127, "", "gvm: run sh: no such file\n"},
	} {
		cmd := command(t, strings.Fields(c.args)...)
		cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+dir)
		cmd.Stdin = strings.NewReader(c.in)
		var out, errs strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &errs
		_ = cmd.Run()
		if cmd.ProcessState.ExitCode() != c.status || out.String() != c.out || !strings.HasPrefix(errs.String(), c.errs) ||
			strings.Count(errs.String(), "\n") != 1 && c.in == "" {
			t.Errorf("gvm %s: status %d, %q, %q", c.args, cmd.ProcessState.ExitCode(), &out, &errs)
		}
	}
	for _, c := range []struct {
		in     string
		flag   int
		status int
		errs   string
	}{
		{"/proc/self/mem", os.O_RDONLY, 125, "errors\ngvm: read the command's input: input/output error\n"},
		{dir, os.O_RDONLY, 0, "errors\n"},
		{os.DevNull, os.O_WRONLY, 0, "errors\n"}, // nohup
	} {
		cmd := command(t, "exec", "fake", "--", "cat")
		cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+dir)
		in, err := os.OpenFile(c.in, c.flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		var errs strings.Builder
		cmd.Stdin, cmd.Stderr = in, &errs
		_ = cmd.Run()
		in.Close()
		if cmd.ProcessState.ExitCode() != c.status || errs.String() != c.errs {
			t.Errorf("input from %s: status %d, %q", c.in, cmd.ProcessState.ExitCode(), &errs)
		}
	}
	for i, first := range endSignals {
		p := startGVMAs(t, t.TempDir(), inDir, "exec", "fake", "--", "sleep")
		p.expect("sleeps")
		p.signal(first.Signal)
		if r := p.wait(); r.status != first.status || r.errs != "" {
			t.Errorf("%v: status %d, %q", first, r.status, r.errs)
		}
		// A command that ignores the first signal: the second one ends the session.
		second := endSignals[(i+1)%len(endSignals)]
		p = startGVMAs(t, t.TempDir(), inDir, "exec", "fake", "--", "stubborn")
		stubborn := func() result {
			p.expect("stubborn")
			p.signal(first.Signal)
			p.expect(fmt.Sprintf(", took %d", first.Signal))
			p.signal(second.Signal)
			return p.wait()
		}
		if r := stubborn(); r.status != second.status || r.errs != "gvm: stopped by "+second.name+"\n" {
			t.Errorf("%v, then %v: status %d, %q", first, second, r.status, r.errs)
		}
		p = startOnTerminalAs(t, inDir, "exec", "--tty", "fake", "--", "stubborn")
		if r := stubborn(); r.status != second.status ||
			!strings.HasSuffix(r.out, "\r\ngvm: stopped by "+second.name+"\r\n") {
			t.Errorf("%v, then %v, on a terminal: status %d, %q", first, second, r.status, r.out)
		}
	}
}

// endSignals are the signals that end a verb, and its status then.
var endSignals = []struct {
	syscall.Signal
	name   string
	status int
}{{syscall.SIGINT, "SIGINT", exitQuit}, {syscall.SIGTERM, "SIGTERM", exitTerminated},
	{syscall.SIGHUP, "SIGHUP", exitHangup}}

// TestExecSignals: the command gets the first signal, and the second ends the session. Once the
// command has ended, the first does: the reader of its output may take any time.
func TestExecSignals(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	got := make(chan int, 1)
	go func() {
		_, _ = wire.Dial(far, wire.AgentConfig{Signal: func(n int) { got <- n }})
	}()
	h, err := wire.Accept(near, wire.HostConfig{Builds: []string{""}})
	if err != nil {
		t.Fatal(err)
	}
	for _, runs := range []bool{true, false} {
		var ended error
		s := &execSession{stop: func(err error) { ended = err }}
		s.begin(h)
		if !runs {
			s.over()
		}
		cause := endError{exitTerminated, errors.New("SIGTERM")}
		s.take(cause)
		if runs {
			if n := <-got; n != 15 || ended != nil {
				t.Errorf("signal %d, %v", n, ended)
			}
			s.take(cause)
		}
		if ended != cause {
			t.Errorf("runs: %v: %v", runs, ended)
		}
	}
}
