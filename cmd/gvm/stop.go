package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/kvmapi/nowait"
	"gvm/text"
)

const stopPatience = 10 * time.Second // bounds the wait for a stopped machine to end

func stopCommand() *cli.Command {
	return &cli.Command{
		Name: "stop", Usage: "have a running machine power off", ArgsUsage: "[VM]",
		Description: `The guest's power button is pressed, and a guest that has not powered
itself off within --grace is stopped. A guest without a driver for the
button is stopped at once. gvm run then ends with status 0 if the guest
powered off, and with 143 if it was stopped. The command returns when the
machine has ended. A machine of gvm test sends its command SIGTERM instead.

EXAMPLES
   gvm stop                       if one machine runs
   gvm stop build --grace 1m
   gvm stop --force build         stop it at once`,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "grace", Value: 10 * time.Second,
				Usage: "`DURATION` that the guest has to power off"},
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "stop the machine without asking the guest"},
		},
		Action: func(c *cli.Context) error {
			grace := c.Duration("grace")
			switch {
			case c.Args().Len() > 1:
				return usageError{fmt.Errorf("stop takes [VM], and got %s", text.Count(c.Args().Len(), "word"))}
			case grace < 0 || grace > control.MaxGrace:
				return usageError{fmt.Errorf("--grace %s: want 0 to %s", grace, control.MaxGrace)}
			case c.Bool("force"):
				grace = 0
			}
			client, err := theMachine(c.Args().First())
			if err != nil {
				return err
			}
			return stopMachine(c.Context, client, grace)
		},
	}
}

// stopMachine asks the machine to stop, and returns when it and its process are gone.
func stopMachine(ctx context.Context, client *control.Client, grace time.Duration) error {
	before, err := find(client)
	if err != nil {
		return listError(err)
	}
	process, err := client.Process(ctx)
	if err == nil {
		defer process.Close()
	} // else its process cannot be waited for: other PID namespace, or kernel before 5.3
	answer, err := client.Stop(ctx, control.Stop{GraceMS: grace.Milliseconds()})
	if err != nil && !isBetween(err) { // else the machine ends already
		return refused(err)
	}
	if answer.Outlived {
		process = nil
	}
	wait := stopPatience
	if answer.Asked {
		wait += grace
	}
	late, lost := time.After(wait), (<-chan time.Time)(nil)
	for listed := true; ; {
		now, e := find(client)
		if e != nil {
			return listError(e)
		}
		// Another machine may have the name by now.
		listed = listed && now != nil && before != nil && now.PID == before.PID
		switch {
		case !listed && (process == nil || processEnded(process)):
			return nil
		case !listed && err != nil && lost == nil:
			lost = time.After(patience)
		}
		select {
		case <-lost: // its process may run on, with other machines: the answer would tell
			return nil
		case <-late:
			switch {
			case !listed:
				return fmt.Errorf("machine %s has ended, but not its process after %v: "+
					"it may wait for a reader of its output", client.Name(), wait)
			case err != nil:
				return err
			}
			return fmt.Errorf("machine %s has not ended after %v; kill -9 its process (gvm list)", client.Name(), wait)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// processEnded reports whether the process of a pidfd has ended.
func processEnded(pidfd *os.File) bool {
	events, err := nowait.Events(int(pidfd.Fd()), unix.POLLIN)
	return err == nil && events != 0
}
