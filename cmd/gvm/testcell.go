package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"gvm/kvmapi/nowait"
	"gvm/panics"
	"gvm/testrun"
	"gvm/testrun/matrix"
)

// cellArg0 is the first word of a process that runs a cell of a matrix, and the rest the command
// line of gvm test. It reads its cellOrder from standard input, at whose end it ends its machine,
// and writes cellMessages to standard output. It is a process as the sandbox holds for all of one.
const cellArg0 = "gvm-cell"

// cellOrder has the facts of an attempt at a cell that are not on the command line.
type cellOrder struct {
	Cell     matrix.Cell
	Name     string // of the files of --output
	Machine  string // its name
	Waiting  []int  // bounds of the disks, by the limits for all machines
	Requests []int  // and of the shares
	Allow    []byte // the file of --allow, which may be a pipe
}

// cellMessage is a note, or the end of the attempt, whose output it has. A guest may have taken
// over the process that writes it: the reader bounds it, and prints its text escaped.
type cellMessage struct {
	Note      string          `json:",omitempty"`
	Result    *testrun.Result `json:",omitempty"`
	Out, Errs []string        `json:",omitempty"`
}

// ordered is the order of this process; nil: it is no cell's.
var ordered *cellOrder

// takeOrder returns the command line of a cell's process, whose order it sets.
func takeOrder(args []string) ([]string, error) {
	if err := json.NewDecoder(os.Stdin).Decode(&ordered); err != nil {
		return nil, fmt.Errorf("gvm-cell: read the order: %w", err)
	}
	return slices.Concat([]string{"gvm"}, args[1:]), nil
}

// runCell runs the attempt of the order, and writes its messages.
func (t *testConfig) runCell(o *cellOrder) error {
	out := json.NewEncoder(os.Stdout)
	t.kernel, t.spec.CPUs, t.machineName = string(o.Cell.Kernel), o.Cell.CPUs, o.Machine
	t.note = func(s string) { _ = out.Encode(cellMessage{Note: s}) } // if the parent is gone, so is the reader
	t.output, t.allow.text = &cellOutput{}, o.Allow
	if t.matrix.dir != "" {
		t.output.path = filepath.Join(t.matrix.dir, o.Name)
	}
	res := t.runOrder(o)
	return out.Encode(cellMessage{Result: res, Out: t.output.out.lines(), Errs: t.output.errs.lines()})
}

func (t *testConfig) runOrder(o *cellOrder) (res *testrun.Result) {
	var err error
	if t.spec.Disks, err = t.matrix.parseDisks(o.Cell.Backend); err != nil {
		return untested(err)
	}
	t.spec.Disks = append(t.spec.Disks, t.scratch...)
	for i := range t.spec.Disks {
		t.spec.Disks[i].Waiting = o.Waiting[i]
	}
	for i := range t.spec.Shares {
		t.spec.Shares[i].Requests = o.Requests[i]
	}
	t.spec.Begin(takeBegun())
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	defer catchSignals(ctx, stop)()
	panics.Go(func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop(endError{exitTerminated, errors.New("stopped by the process of the matrix")})
	})
	return t.runMachine(ctx, nil, func(*testrun.Run) {})
}

// Bounds of a cell's process.
const (
	cellPatience = 900 * time.Millisecond // from the end of its standard input to its own
	cellMargin   = 5 * time.Second        // from --timeout, which it counts itself, to the end by this process
	maxMessages  = 64 << 20               // bytes
)

// runProcess runs an attempt in a process of its own, until the end of ctx. note takes its notes. A
// guest may have taken the process over, so that it counts no time and does not end.
func (t *testConfig) runProcess(ctx context.Context, o *cellOrder, note func(string)) (end cellMessage) {
	fail := func(err error) cellMessage {
		return cellMessage{Result: untested(fmt.Errorf("the process of the machine: %w", err))}
	}
	timed, over := t.timed(ctx, cellMargin)
	defer over()
	c := exec.CommandContext(timed, ownProgram)
	c.Args, c.Stderr = slices.Concat([]string{cellArg0}, os.Args[1:]), os.Stderr
	stdin, in, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer stdin.Close()
	defer in.Close()
	c.Stdin = stdin
	out, err := c.StdoutPipe()
	if err != nil {
		return fail(err)
	}
	c.WaitDelay = cellPatience
	c.Cancel = func() error { // the first ends its machine; another process may have the second
		time.AfterFunc(cellPatience, panics.Func(func() { _ = out.Close() }))
		return in.Close()
	}
	if err := c.Start(); err != nil {
		return fail(err)
	}
	err = nowait.WakeAtClose(stdin, c.Process.Pid) // this process may be killed while that one is stopped
	_ = stdin.Close()                              // else a long order to a dead process waits for ever
	if err == nil {
		err = json.NewEncoder(in).Encode(o)
	}
	if err != nil { // also for the end of timed
		_ = c.Process.Kill()
	}
	for messages := json.NewDecoder(io.LimitReader(out, maxMessages)); end.Result == nil; {
		var m cellMessage
		if messages.Decode(&m) != nil {
			break
		}
		if m.Note != "" {
			note(m.Note)
		}
		if m.Result != nil {
			end = m
		}
	}
	_ = in.Close()
	kill := time.AfterFunc(cellPatience, panics.Func(func() { _ = c.Process.Kill() }))
	_ = c.Wait() // ProcessState has it
	kill.Stop()
	cut := end.Result == nil || end.Result.Kind == testrun.Stopped
	switch cause := context.Cause(ctx); {
	case cut && cause == nil && timed.Err() != nil:
		end.Result = testrun.TimedOut(fmt.Errorf("%w, and the process of the machine ran on", context.Cause(timed)))
	case end.Result == nil && cause == nil:
		return fail(fmt.Errorf("it ended without a verdict: %v", c.ProcessState))
	case end.Result == nil:
		end = fail(cause)
		end.Result.Kind = testrun.Stopped
		fallthrough
	case cut && cause != nil:
		end.Result.Cause, end.Result.Text = cause, cause.Error()
		end.Result = t.stopped(end.Result)
	}
	return end
}
