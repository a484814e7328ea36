package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/text"
)

func pauseCommand() *cli.Command {
	return stateCommand("pause", "stop the CPUs and devices of a running machine",
		`The CPUs and devices stop until gvm resume; the machine can be ended
meanwhile, and its disks can be changed. Requests that a disk has begun are
finished first; if that takes more than 10 s, gvm pause fails and the machine
runs on. --timeout of gvm run goes on.

EXAMPLES
   gvm pause          if one machine runs
   gvm pause build`, (*control.Client).Pause)
}

// stateCommand returns a command whose argument is [VM].
func stateCommand(name, usage, description string, do func(*control.Client, context.Context) error) *cli.Command {
	return &cli.Command{
		Name: name, Usage: usage, ArgsUsage: "[VM]", Description: description,
		Action: func(c *cli.Context) error {
			if c.Args().Len() > 1 {
				return usageError{fmt.Errorf("%s takes [VM], and got %s", name, text.Count(c.Args().Len(), "word"))}
			}
			client, err := theMachine(c.Args().First())
			if err != nil {
				return err
			}
			return refused(do(client, c.Context))
		},
	}
}
