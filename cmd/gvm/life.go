package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"gvm/kvmapi/nowait"
	"gvm/panics"
)

// Bounds of the waits of a life.
const (
	hostPatience = 900 * time.Millisecond // more than that of nowait.Until, whose errors name a file, and of a record
	tidyPatience = 100 * time.Millisecond
)

// life is a command that runs a machine. Its start, and the steps behind the machine's end, may
// wait for the host: for a file system that does not answer, or a process that hangs. Once the end
// was asked for, the command goes on without them after hostPatience, and all waits that follow
// have the rest of a second: see left. They end with the process.
type life[T any] struct {
	ctx     context.Context // its end asks for the end of the start
	step    atomic.Pointer[string]
	started chan struct{}
	ended   chan endOfLife[T]
	stop    context.CancelCauseFunc
	leave   func(patience time.Duration) // is the function leave, but in tests
}

type endOfLife[T any] struct {
	result T
	asked  bool
}

func newLife[T any](ctx context.Context) *life[T] {
	ctx, stop := context.WithCancelCause(nowait.WithOneEnd(ctx))
	theLife.Store(&ctx)
	l := &life[T]{ctx: ctx, stop: stop, started: make(chan struct{}), leave: leave,
		ended: make(chan endOfLife[T], 1)}
	l.at("the machine was prepared")
	return l
}

// at names the step of the start that follows, such as "FILE was opened".
func (l *life[T]) at(step string) { l.step.Store(&step) }

// begins is the end of the start.
func (l *life[T]) begins() { close(l.started) }

// ends is the end of the machine, with the result of the command. asked: the end was asked for.
func (l *life[T]) ends(result T, asked bool) {
	if asked {
		l.stop(errEnded)
	}
	l.ended <- endOfLife[T]{result, asked}
}

// errEnded is the end of the context of a life that ended by itself.
var errEnded = errors.New("the machine has ended")

// theLife is the context of the life of this process; nil: it has none yet.
var theLife atomic.Pointer[context.Context]

// left returns how long a wait behind the life of this process may take: see nowait.Left.
func left(most time.Duration) time.Duration {
	if ctx := theLife.Load(); ctx != nil {
		return nowait.Left(*ctx, most)
	}
	return most
}

// run returns the result of f, which calls begins and ends. If it leaves f, the result is that of
// ends, or before the machine begins that of failed.
func (l *life[T]) run(f func() T, failed func(error) T) T {
	done, broke := make(chan T, 1), make(chan struct{})
	panics.Go(func() { // ends with the process at the latest
		defer close(broke) // after the handlers of a panic
		panics.Func(func() { done <- f() })()
	})
	var result T
	starts, asked, late := l.started, l.ctx.Done(), (<-chan time.Time)(nil)
	for {
		select {
		case result := <-done:
			return result
		case <-broke:
			select {
			case result := <-done:
				return result
			default:
				return failed(endError{exitBug, errors.New("")}) // a handler says what
			}
		case <-starts:
			starts, asked, late = nil, nil, nil
		case <-asked:
			asked, late = nil, time.After(nowait.Left(l.ctx, hostPatience))
		case end := <-l.ended:
			if result = end.result; end.asked {
				late = time.After(nowait.Left(l.ctx, hostPatience))
			} else if l.ctx.Err() == nil { // else the next signal ends the process
				asked = l.ctx.Done()
			}
		case <-late:
			l.leave(nowait.Left(l.ctx, tidyPatience))
			if starts != nil {
				return failed(fmt.Errorf("%w while %s", context.Cause(l.ctx), *l.step.Load()))
			}
			return result
		}
	}
}

// leave performs the steps of urgent that the goroutine which is left behind does not.
func leave(patience time.Duration) {
	done := make(chan struct{})
	panics.Go(func() { // ends with the process at the latest
		defer close(done)
		urgent.Lock()
		if urgent.restore != nil {
			_ = urgent.restore()
			urgent.restore = nil
		}
		urgent.Unlock() // a second signal ends the process at once
		removeFiles()
		urgent.making.Lock()
		defer urgent.making.Unlock()
		removeFiles() // those that were made meanwhile
	})
	select {
	case <-done:
	case <-time.After(patience):
	}
}

// within runs a part of a command that comes before its machine and looks at files, for the time of
// --timeout at most, if there is one. Signals end gvm, which catches none yet.
func within[T any](timeout time.Duration, late error, f func() (T, error)) (T, error) {
	if timeout <= 0 {
		return f()
	}
	ctx, stop := context.WithTimeoutCause(context.Background(), timeout, late)
	defer stop()
	return nowait.Until(ctx, func() string { return "the files of the command line were looked at" }, f, func(T) {})
}
