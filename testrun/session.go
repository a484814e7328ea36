package testrun

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"gvm/guest/agent/wire"
)

// ErrNoHello is the error of Dial before the agent has said hello.
var ErrNoHello = errors.New("its agent has not said hello yet")

// ErrOver is the error of Dial when the command or the machine has ended.
var ErrOver = errors.New("its test has ended")

// RungError is the error of Dial if the agent is reached by another rung than Vsock.
type RungError struct{ Rung Rung }

func (e *RungError) Error() string {
	return fmt.Sprintf("its agent is reached by %s, which carries one command; more need vsock (CONFIG_VIRTIO_VSOCKETS)",
		e.Rung)
}

// dialPeriod is the time between two attempts to reach the agent, which listens after its hello.
const dialPeriod = 20 * time.Millisecond

// Dial connects to the agent for a session of its own, which wire.Accept begins. Errors are
// ErrNoHello, ErrOver, *RungError, and those of machine.Machine.DialVsock.
func (r *Run) Dial(ctx context.Context) (io.ReadWriteCloser, error) {
	c, err := r.dial(ctx)
	if err == nil {
		return c, nil
	}
	select {
	case <-r.exited:
		err = ErrOver
	case <-r.machine.Ended():
		err = ErrOver
	default:
	}
	return nil, err
}

func (r *Run) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	switch rung := r.chosen(); rung {
	case 0:
		return nil, ErrNoHello
	case Vsock:
	default:
		return nil, &RungError{rung}
	}
	for {
		c, err := r.machine.DialVsock(ctx, wire.VsockPort)
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-r.exited:
			return nil, err
		case <-time.After(dialPeriod):
		}
	}
}
