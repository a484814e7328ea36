package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// TestTestMachine: a machine of gvm test is listed, and gvm's other commands reach it.
func TestTestMachine(t *testing.T) {
	t.Parallel()
	c, running := haltedTest(t)
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	running()
	name := fmt.Sprintf("gvm-%d", c.Process.Pid)
	awaitHalt(t, name)
	for _, v := range []struct {
		args   string
		status int
		out    string
		errs   string
	}{
		{"list", 0, name + " ", ""},
		{"inspect VM sandbox/mode", 0, "sandbox/mode on\n", ""},
		{"pause VM", 0, "", ""},
		{"stop VM", 2, "", "the machine is paused"},
		{"resume VM", 0, "", ""},
		{"reset VM", 2, "", "machine VM runs a test, which a reset would lose: gvm stop it\n"},
		{"stop VM", 0, "", ""},
		{"inspect VM paused", 2, "", "no machine of this user"},
	} {
		r := ask(t, t.TempDir(), strings.Fields(strings.ReplaceAll(v.args, "VM", name))...)
		notes := errsOf(name, r.errs)
		if r.status != v.status || !strings.Contains(r.out, v.out) ||
			!strings.Contains(notes, strings.ReplaceAll(v.errs, "VM", name)) || v.errs == "" && notes != "" {
			t.Errorf("%s: status %d, %q, %q", v.args, r.status, r.out, r.errs)
		}
	}
	if r := wait(t, c); r.status != exitTerminated || !strings.Contains(errs.String(), "stopped by gvm stop") {
		t.Errorf("gvm test: status %d, %q", r.status, &errs)
	}
}

// TestMatrixMachines: the machines of a matrix have names of their own, each is in the sandbox, and
// gvm stop ends one.
func TestMatrixMachines(t *testing.T) {
	t.Parallel()
	p := startGVM(t, "", "test", "-k", testKernel(t), "-a", "hang", "--repeat=2", "--jobs=2", "--", "sh")
	pid := fmt.Sprint(p.cmd.Process.Pid)
	names := []string{"gvm-" + pid + "-1", "gvm-" + pid + "-2"}
	p.eventually("both machines are listed", func() bool {
		out := ask(t, t.TempDir(), "list").out
		return strings.Contains(out, names[0]) && strings.Contains(out, names[1])
	})
	for _, name := range names {
		r := ask(t, t.TempDir(), "inspect", name, "sandbox/mode")
		for strings.Contains(r.errs, "the machine does not run now") { // it is listed before it runs
			r = ask(t, t.TempDir(), "inspect", name, "sandbox/mode")
		}
		if r.status != 0 || r.out != "sandbox/mode on\n" {
			t.Errorf("%s: %d, %q, %q", name, r.status, r.out, r.errs)
		}
		if r := ask(t, t.TempDir(), "stop", name); r.status != 0 {
			t.Errorf("stop %s: %d, %q", name, r.status, r.errs)
		}
	}
	if r := p.wait(); r.status != exitTerminated {
		t.Errorf("status %d, %q", r.status, r.errs)
	}
}
