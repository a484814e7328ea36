package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"gvm/devices/scsi/lio"
	"gvm/text"
)

func lioCommand() *cli.Command {
	list := &cli.Command{
		Name:  "list",
		Usage: "show vhost-scsi targets and the disks behind them, and whose they are",
		Description: `Everything in LIO that vhost-scsi can serve is shown, also the objects of
other tools. Objects of a gvm that is dead are left over: gvm lio gc removes
them.

EXAMPLES
   gvm lio list
   gvm lio list --json | jq '.[] | select(.owner.alive == false) | .name'`,
		Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "a JSON array instead of a table"}},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usageError{fmt.Errorf("lio list takes no argument, and got %q", c.Args().First())}
			}
			return lioList(c.App.Writer, c.App.ErrWriter, "", c.Bool("json"))
		},
	}
	gc := &cli.Command{
		Name:  "gc",
		Usage: "remove the objects that dead gvms left in LIO, and no others",
		Description: `A gvm that is killed cannot take down the target that its guest had. The next
gvm run with backend=vhost does it, or this command. Objects of living gvms
and of other tools stay. Each object that is gone is printed.

EXAMPLE
   sudo gvm lio gc`,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usageError{fmt.Errorf("lio gc takes no argument, and got %q", c.Args().First())}
			}
			return lioGC(c.App.Writer, c.App.ErrWriter, "")
		},
	}
	return &cli.Command{
		Name:  "lio",
		Usage: "look after the kernel's SCSI target (disks with backend=vhost)",
		Description: `gvm run makes objects in the kernel's SCSI target, LIO, for disks with
backend=vhost, under /sys/kernel/config/target, and removes them at its end.

The exit status is 0, 2 for wrong words, or 3 if the host refuses. A host
without LIO has nothing to show or to remove: 0, with a note on standard
error.

EXAMPLES
   gvm lio list       # targets, disks, and their owners; --json for scripts
   sudo gvm lio gc    # remove the objects of a killed gvm`,
		Subcommands: []*cli.Command{list, gc},
	}
}

// lioList lists the objects of the target at root; "" is the kernel's.
func lioList(out, notes io.Writer, root string, asJSON bool) error {
	objects, err := lio.List(root)
	if err := absent(notes, err); err != nil {
		return err
	}
	if asJSON {
		if objects == nil {
			objects = []lio.Object{}
		}
		return writeJSON(out, objects)
	}
	if len(objects) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "KIND\tOWNER\tNAME\tWHAT")
	for _, o := range objects {
		what := string(o.Image)
		if o.Kind == lio.KindTarget {
			var luns []string
			for _, l := range o.LUNs {
				disk := l.Disk[strings.LastIndexByte(string(l.Disk), '/')+1:]
				luns = append(luns, fmt.Sprintf("tpgt %d LUN %d %s", l.TPGT, l.LUN, disk))
			}
			what = strings.Join(luns, ", ")
		}
		tableRow(w, o.Kind, lioOwner(o.Owner), o.Name, what)
	}
	return w.Flush()
}

func lioOwner(o *lio.Owner) string {
	switch {
	case o == nil:
		return "other"
	case o.Alive:
		return fmt.Sprintf("gvm %d", o.PID)
	}
	return fmt.Sprintf("gvm %d (dead)", o.PID)
}

// lioGC removes the objects of dead gvms from the target at root, and lists them.
func lioGC(out, notes io.Writer, root string) error {
	removed, err := lio.Collect(root)
	for _, name := range removed {
		fmt.Fprintln(out, "removed", text.Printable(name))
	}
	return absent(notes, err)
}

// absent turns the errors of a host without LIO into a note, since nothing can be left there.
func absent(notes io.Writer, err error) error {
	if errors.Is(err, lio.ErrNoConfigfs) || errors.Is(err, lio.ErrNoCore) {
		fmt.Fprintln(notes, "note:", text.Printable(err.Error()))
		return nil
	}
	return err
}
