package main

import (
	"context"
	"fmt"
	"io"
	"sync"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/panics"
	"gvm/text"
)

func listCommand() *cli.Command {
	return &cli.Command{
		Name:    "list",
		Aliases: []string{"ps"},
		Usage:   "show the machines that run",
		Description: `Machines of this user, by the names that gvm run --name gave them.

EXAMPLES
   gvm list
   gvm list --json | jq '.[].pid'`,
		Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "a JSON array instead of a table"}},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usageError{fmt.Errorf("list takes no argument, and got %q", c.Args().First())}
			}
			return listMachines(c.Context, c.App.Writer, c.App.ErrWriter, c.Bool("json"))
		},
	}
}

// listMachines lists every machine. A machine that ends meanwhile, or does not answer, gives a
// note.
func listMachines(ctx context.Context, out, notes io.Writer, asJSON bool) error {
	dir := control.DefaultDirectory()
	entries, err := dir.List()
	if err != nil {
		return listError(err)
	}
	type row struct {
		control.Info
		Disks []control.Disk `json:"disks"`
	}
	answers, errs := make([]row, len(entries)), make([]error, len(entries))
	var asked sync.WaitGroup
	for i, e := range entries { // in parallel: a machine that does not answer delays no other
		asked.Go(panics.Func(func() {
			c := control.NewClient(dir, e.Name)
			if answers[i].Info, errs[i] = c.Info(ctx); errs[i] == nil {
				answers[i].Disks, errs[i] = c.Disks(ctx)
			}
		}))
	}
	asked.Wait()
	rows := []row{}
	for i, e := range entries {
		switch {
		case errs[i] == nil:
			rows = append(rows, answers[i])
		default:
			fmt.Fprintf(notes, "note: %s (process %d)\n", text.Printable(errs[i].Error()), e.PID)
		}
	}
	if asJSON {
		return writeJSON(out, rows)
	}
	if len(entries) == 0 {
		fmt.Fprintln(notes, "note: "+text.Printable(noMachine()))
	}
	if len(rows) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tPID\tSTATE\tCPUS\tMEMORY\tDISKS\tKERNEL")
	for _, r := range rows {
		kernel := r.Kernel
		if kernel == "" {
			kernel = "(the embedded guest)"
		}
		tableRow(w, r.Name, r.PID, r.State, r.CPUs, text.FormatSize(r.Memory), len(r.Disks), kernel)
	}
	return w.Flush()
}
