package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"gvm/guestmem"
	"gvm/inspect"
	"gvm/panics"
	"gvm/vmm/vmcore"
)

// coreEnds are the exit statuses of ends that get a core with --crash-core. The memory of a guest
// that powered off shows no fault, and a bug of gvm is not in the guest.
var coreEnds = []int{exitCrash, exitPanic, exitWatchdog, exitTimeout}

// coreTick is the time between two looks at the writing of a core.
const coreTick = 100 * time.Millisecond

// makeCore makes the file of the core.
func (r *crashRecord) makeCore() (*coreFile, error) {
	urgent.making.Lock()
	defer urgent.making.Unlock()
	file, named, err := r.files.Core()
	if err != nil {
		return nil, err
	}
	f := &coreFile{File: file, path: file.Name(), regular: true, named: named, record: r.files}
	if f.named {
		removeAtEnd(f.remove)
	}
	return f, nil
}

// writeCore writes the core of the stopped machine into the record. It calls alive as long as the
// storage takes parts of it. A signal gives it up, and so does Ctrl-a x unless --timeout has ended
// the machine.
func (r *crashRecord) writeCore(mem *guestmem.Memory, cpus []vmcore.CPU, alive func()) (err error) {
	ctx := r.ctx
	if ctx.Err() != nil { // the end of the machine
		var giveUp context.CancelCauseFunc
		ctx, giveUp = context.WithCancelCause(context.WithoutCancel(ctx))
		setGiveUp(giveUp)
		defer func() {
			setGiveUp(nil)
			giveUp(nil)
		}()
	}
	f, err := r.makeCore()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.discard()) }()
	var writing atomic.Int64 // since when, by inspect.Clock; 0: nothing is being written
	over, done := make(chan struct{}), make(chan struct{})
	defer func() { close(over); <-done }()
	panics.Go(func() {
		defer close(done)
		begin := inspect.Clock()
		for said := false; ; {
			select {
			case <-over:
				return
			case <-ctx.Done():
				return
			case <-time.After(coreTick):
			}
			now, since := inspect.Clock(), time.Duration(writing.Load())
			if since == 0 || now-since < recordPatience {
				alive()
			}
			if !said && now-begin > time.Second {
				said = true
				note(fmt.Sprintf("writing the guest's memory to %s: a signal gives it up", f.path))
			}
		}
	})
	size, _, err := vmcore.Write(ctx, mem, cpus, func(off int64, p []byte) error {
		writing.Store(int64(inspect.Clock()))
		defer writing.Store(0)
		return f.put(off, p)
	})
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("given up: %w", context.Cause(ctx))
	}
	if err == nil {
		err = f.finish(size)
	}
	return err
}
