package main

import (
	"context"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"
)

func benchCommand() *cli.Command {
	return &cli.Command{
		Name:        "bench",
		Usage:       "measure this host",
		Description: "gvm help bench disk, and so on, describes each measurement.",
		Subcommands: []*cli.Command{benchDiskCommand(), benchGuestCommand(), benchBootCommand(),
			benchFootprintCommand()},
	}
}

// benchAction parses the command line of a benchmark, which has --rounds, and runs the benchmark
// until it ends or a signal arrives.
func benchAction[B interface {
	run(context.Context, io.Writer) error
}](parse func(*cli.Context) (B, error)) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.Args().Present() {
			return usageError{fmt.Errorf("unexpected argument %q; see gvm help bench %s",
				c.Args().First(), c.Command.Name)}
		}
		if n := c.Int("rounds"); n < 1 {
			return usageError{fmt.Errorf("--rounds %d: want 1 or more", n)}
		}
		b, err := parse(c)
		if err != nil {
			return usageError{err}
		}
		addProcs()
		ctx, stop := context.WithCancelCause(context.Background())
		defer stop(nil)
		defer catchSignals(ctx, stop)()
		defer endWithin(ctx, hostPatience, func() {})()
		return b.run(ctx, c.App.Writer)
	}
}
