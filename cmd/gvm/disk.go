package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/machine/disk"
	"gvm/text"
)

func diskCommand() *cli.Command {
	// sub makes a subcommand whose arguments are [VM] and words.
	sub := func(
		name, words, usage, description string, optional int, flags []cli.Flag,
		do func(*cli.Context, *control.Client, []string) error,
	) *cli.Command {
		n := len(strings.Fields(words))
		return &cli.Command{
			Name: name, Usage: usage, ArgsUsage: strings.TrimSpace("[VM] " + words),
			Description: description, Flags: flags,
			Action: func(c *cli.Context) error {
				args := c.Args().Slice()
				if len(args) < n-optional || len(args) > n+1 {
					return usageError{fmt.Errorf("disk %s takes %s, and got %s; see gvm disk %s --help", name,
						strings.TrimSpace("[VM] "+words), text.Count(len(args), "word"), name)}
				}
				vm := ""
				if len(args) == n+1 || optional > 0 && len(args) > 1 && n > 1 && isMachine(args[0]) {
					vm, args = args[0], args[1:]
				}
				if len(args) > 0 && args[0] == "" { // which the path of the request would leave out
					return usageError{fmt.Errorf("disk %s: DISK is empty: want %s", name, strings.TrimSpace("[VM] "+words))}
				}
				client, err := theMachine(vm)
				if err == nil {
					err = refused(do(c, client, args))
				}
				return diskMissing(name, words, vm, args, err)
			},
		}
	}
	list := sub("list", "", "show the disks of a machine", `EXAMPLES
   gvm disk list
   gvm disk list build --json`, 0, []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "a JSON array instead of a table"}},
		func(c *cli.Context, m *control.Client, _ []string) error {
			disks, err := m.Disks(c.Context)
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return writeJSON(c.App.Writer, disks)
			}
			return diskTable(c.App.Writer, disks)
		})
	add := sub("add", "DISK", "give a running machine a disk",
		`DISK is a value of gvm run --disk (gvm help disk). With backend=vhost the
machine must have been started with such a disk. Without lun= the disk gets
the lowest LUN that is free. The guest sees it come without a rescan.

EXAMPLES
   gvm disk add data.img
   gvm disk add build scratch.img,size=10G,serial=SCRATCH`, 0, nil,
		func(c *cli.Context, m *control.Client, args []string) error {
			dir, err := os.Getwd()
			if err != nil {
				return err
			}
			change, err := m.AddDisk(c.Context, control.AddDisk{Disk: text.Name(args[0]), Dir: text.Name(dir)})
			return told(c, "added", change, err)
		})
	remove := sub("remove", "DISK", "take a disk away from a running machine",
		`DISK is a LUN, a path or a serial number. The guest is told; requests that it
has under way are finished, unless that takes more than 10 s, and data that
it has not written yet is lost: unmount the disk there first.

EXAMPLES
   gvm disk remove 1
   gvm disk remove build scratch.img`, 0, nil,
		func(c *cli.Context, m *control.Client, args []string) error {
			change, err := m.RemoveDisk(c.Context, diskID(args[0]))
			return told(c, "removed", change, err)
		})
	resize := sub("resize", "DISK [SIZE]", "change the size of a disk of a running machine",
		`DISK is a LUN, a path or a serial number. With SIZE the image gets that size;
without it the machine looks how large the image or the block device is by
now. The guest sees the new size without a rescan.

EXAMPLES
   gvm disk resize data.img 20G
   gvm disk resize build 0 20G
   gvm disk resize /dev/vg/data      after lvextend`, 1,
		[]cli.Flag{&cli.BoolFlag{Name: "shrink",
			Usage: "the disk may become smaller: the data behind its new end is lost"}},
		func(c *cli.Context, m *control.Client, args []string) error {
			r := control.ResizeDisk{Shrink: c.Bool("shrink")}
			if len(args) > 1 {
				var err error
				if r.Size, err = disk.ParseSize("disk "+args[0], args[1]); err != nil {
					return err
				}
			}
			change, err := m.ResizeDisk(c.Context, diskID(args[0]), r)
			return told(c, "resized", change, err)
		})
	return &cli.Command{
		Name:  "disk",
		Usage: "add, remove, resize and list the disks of a running machine",
		Description: `VM is the name or the PID of a machine, as gvm list shows them. It may be
left out if only one runs.

The exit status is 0, 2 if the words, the machine or the disk are wrong, or 3
if the host or the machine fails.

EXAMPLES
   gvm disk list
   gvm disk add scratch.img,size=10G
   gvm disk resize scratch.img 20G
   gvm disk remove scratch.img

` + diskGrammar(),
		Subcommands: []*cli.Command{list, add, remove, resize},
	}
}

// diskMissing returns an error that DISK is missing, if that is the cause of err: the arguments of
// a subcommand of gvm disk end with a machine, or with a machine and a size.
func diskMissing(name, words, vm string, args []string, err error) error {
	var refused *control.Error
	var several usageError
	if err == nil || len(args) == 0 || !(errors.As(err, &refused) && refused.Status == http.StatusNotFound ||
		refused == nil && errors.As(err, &several)) {
		return err
	}
	if vm == "" && isMachine(args[0]) {
		vm = args[0]
	} else if _, notLUN := strconv.Atoi(args[0]); vm == "" || name != "resize" || len(args) > 1 || notLUN == nil {
		return err
	} else if _, notSize := text.ParseSize(args[0], 1); notSize != nil {
		return err
	}
	return usageError{fmt.Errorf("disk %s: %s is a machine, and DISK is missing: gvm disk %s %s %s",
		name, vm, name, vm, words)}
}

// isMachine reports whether a machine has the name or PID.
func isMachine(word string) bool {
	entries, err := control.DefaultDirectory().List()
	return err == nil && slices.ContainsFunc(entries, func(e control.Entry) bool {
		return word == e.Name || word == strconv.Itoa(e.PID)
	})
}

// diskID converts the user's word for a disk to one for the machine: a path becomes absolute.
func diskID(word string) string {
	if _, err := strconv.Atoi(word); err == nil {
		return word
	}
	if _, err := os.Stat(word); err == nil || strings.Contains(word, "/") {
		return disk.Absolute(word)
	}
	return word
}

// told prints the result of a change.
func told(c *cli.Context, what string, change control.Change, err error) error {
	if err != nil {
		return err
	}
	guest := map[control.Guest]string{
		control.Missed: "; the guest had no room for the news, and finds out when it looks again",
		control.Deaf:   "; the guest's driver does not take such news, and finds out when it looks again",
		control.Absent: "; no driver is active in the guest",
	}[change.Guest]
	d := change.Disk
	line := fmt.Sprintf("%s LUN %d, %s, serial %s, %s%s", what, d.LUN, diskImage(d), d.Serial,
		text.FormatSize(uint64(d.Size)), guest)
	_, err = fmt.Fprintln(c.App.Writer, text.Printable(line))
	return err
}

// diskImage returns the name of a disk's storage for the user.
func diskImage(d control.Disk) string {
	if d.Storage != "" {
		return d.Storage + ":" + text.SizeWord(uint64(d.Size))
	}
	return cmp.Or(string(d.Path), d.WWN, "(memory)") // an older gvm sends no path for memory
}

func diskTable(out io.Writer, disks []control.Disk) error {
	if len(disks) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "LUN\tSIZE\tBLOCK\tCACHE\tMODE\tBACKEND\tSERIAL\tIMAGE")
	for _, d := range disks {
		mode := "rw"
		if d.ReadOnly {
			mode = "ro"
		}
		if d.Change != "" {
			mode += "," + d.Change
		}
		tableRow(w, d.LUN, text.FormatSize(uint64(d.Size)), d.BlockSize, d.Cache, mode,
			d.Backend, d.Serial, diskImage(d))
	}
	return w.Flush()
}
