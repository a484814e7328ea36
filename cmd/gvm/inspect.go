package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/inspect"
	"gvm/text"
)

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name: "inspect", Usage: "show the state of a running machine's CPUs and devices", ArgsUsage: "[VM] [PATH]",
		Description: `VM is the name or the PID of a machine, as gvm list shows them. It may be
left out if only one runs.

PATH is a part of the state, such as disk/0 or pci/00:01.0/virtio/queue/2.
Without it gvm prints everything, a path and its value on a line. A part is
busy that cannot be read within half a second: a device is stopping, or a CPU
waits for one. docs/inspect.md explains the names.

On a terminal --watch draws each reading over the last one, as much as fits;
elsewhere it prints one after the other, with --json each on a line. It ends
with status 0 when the machine ends.

The exit status is 0, 2 if the machine or the path does not exist, or 3 if
the machine does not answer.

EXAMPLES
   gvm inspect
   gvm inspect build disk/0/last
   gvm inspect build vcpu/0/rip
   gvm inspect build disk/0/task --watch
   gvm inspect build disk --json | jq '."0".commands'`,
		Flags: watchFlags("a JSON object, or one value, instead of lines"),
		Action: func(c *cli.Context) error {
			args := c.Args().Slice()
			if len(args) > 2 {
				return usageError{fmt.Errorf("inspect takes [VM] [PATH], and got %s", text.Count(len(args), "word"))}
			}
			vm, path := "", ""
			switch {
			case len(args) == 2:
				vm, path = args[0], args[1]
			case len(args) == 1 && isMachine(args[0]):
				vm = args[0]
			case len(args) == 1:
				path = args[0]
			}
			client, err := theMachine(vm)
			if err != nil {
				if entries, _ := control.DefaultDirectory().List(); path != "" && len(entries) > 1 {
					err = usageError{fmt.Errorf("%s is no machine, and for a part of the state: %w", path, err)}
				}
				return err
			}
			out := screen{out: c.App.Writer, watch: c.Bool("watch")}
			err = follow(c, client, path, 1, func(n inspect.Node) error {
				if c.Bool("json") {
					return out.showJSON(n)
				}
				var b strings.Builder
				if err := writeState(&b, path, n); err != nil {
					return err
				}
				return out.show(b.String())
			})
			if vm == "" && !out.shown && errors.As(err, new(usageError)) {
				err = usageError{fmt.Errorf("%s is neither a machine (there is %s%s) nor a part of its state: %w",
					path, client.Name(), text.Suggest(path, []string{client.Name()}), err)}
			}
			return err
		},
	}
}

// writeState writes the values of a tree, a line each.
func writeState(w io.Writer, path string, n inspect.Node) error {
	for p, v := range n.Values(path) {
		if _, err := fmt.Fprintf(w, "%s %s\n", text.Printable(p), text.Printable(fmt.Sprint(v))); err != nil {
			return err
		}
	}
	return nil
}
