package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/inspect"
	"gvm/text"
)

func balloonCommand() *cli.Command {
	return &cli.Command{
		Name: "balloon", Usage: "take memory of a running guest, or show its balloon", ArgsUsage: "[VM [SIZE]]",
		Description: `The machine was started with gvm run --balloon. The guest gives SIZE of its
memory to the balloon, and so back to this host; 0 gives the guest all of its
memory. It takes its time, and takes memory back out of the balloon before it
would kill a program. Memory that the guest frees comes back without this.

Without SIZE gvm prints the size that was asked for and the actual one, in
bytes, and the guest's own statistics.

EXAMPLES
   gvm balloon build 2G
   gvm balloon build
   gvm balloon build --json | jq .stats.memfree`,
		Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "a JSON object instead of lines"}},
		Action: func(c *cli.Context) error {
			args := c.Args().Slice()
			if len(args) > 2 {
				return usageError{fmt.Errorf("balloon takes [VM [SIZE]], and got %s", text.Count(len(args), "word"))}
			}
			var size uint64
			if len(args) == 2 {
				var err error
				if size, err = text.ParseSize(args[1], 1<<20); err != nil {
					return usageError{fmt.Errorf("balloon of %s: %w", text.Word(args[1]), err)}
				}
			}
			client, err := theMachine(c.Args().First())
			if err != nil {
				return err
			}
			if len(args) < 2 {
				b, err := client.Balloon(c.Context)
				if err != nil {
					return refused(err)
				}
				if c.Bool("json") {
					return writeJSON(c.App.Writer, b)
				}
				b.Stats.Name = "stats"
				return writeState(c.App.Writer, "", inspect.Group("", inspect.Int("size", b.Size),
					inspect.Int("actual", b.Actual), inspect.Text("guest", string(b.Guest)), b.Stats))
			}
			b, err := client.ResizeBalloon(c.Context, control.ResizeBalloon{Size: size})
			if err == nil && b.Guest == control.Absent {
				note("the guest has no balloon driver yet; one that starts finds the size")
			}
			return refused(err)
		},
	}
}
