package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/panics"
	"gvm/text"
	"gvm/vmm"
)

// remote serves a machine on the control socket.
type remote struct {
	info control.Info
	*machine.Machine
	pausePatience time.Duration
}

func (r *remote) Info() control.Info {
	i := r.info
	i.State = control.Running
	if r.Paused() {
		i.State = control.Paused
	}
	return i
}

// pausePatience bounds the wait of a pause for CPUs and devices. A CPU may be blocked on console output
// that no program reads, a device by storage that does not answer.
const pausePatience = 10 * time.Second

var errNotPausing = control.Errorf(http.StatusGatewayTimeout, "a CPU does not stop: is the output of gvm run taken?")

func (r *remote) Pause(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.pausePatience, errNotPausing)
	defer cancel()
	return r.pauseError(r.Machine.Pause(ctx))
}

func (r *remote) Resume() error { return r.pauseError(r.Machine.Resume()) }

// pauseError converts a Pauser's error for the control socket.
func (r *remote) pauseError(err error) error {
	var busy *vmm.BusyError
	switch {
	case errors.As(err, &busy) && errors.Is(err, errNotPausing):
		return control.Errorf(http.StatusGatewayTimeout,
			"%s does not finish the guest's requests: does its storage answer, and are iops= and bps= not too low?",
			busy.Device)
	case errors.Is(err, vmm.ErrPaused):
		return control.Errorf(http.StatusConflict, "machine %s is paused already", r.info.Name)
	case errors.Is(err, vmm.ErrNotPaused):
		return control.Errorf(http.StatusConflict, "machine %s is not paused", r.info.Name)
	case errors.Is(err, vmm.ErrNotRunning):
		return control.Errorf(http.StatusServiceUnavailable, "%v", err)
	}
	return err
}

func (r *remote) AddDisk(ctx context.Context, a control.AddDisk) (control.Change, error) {
	d, err := disk.Parse(string(a.Disk))
	if err != nil {
		return control.Change{}, control.Errorf(http.StatusBadRequest, "%v", err)
	}
	for _, path := range []*string{&d.Path, &d.Overlay} {
		if d.Storage != disk.Image || *path == "" || filepath.IsAbs(*path) ||
			path == &d.Overlay && *path == disk.OverlayOn {
			continue
		}
		if !filepath.IsAbs(string(a.Dir)) {
			return control.Change{}, control.Errorf(http.StatusBadRequest,
				"--disk %s: a relative path, and no absolute directory that it starts from", *path)
		}
		*path = filepath.Join(string(a.Dir), *path)
	}
	return r.Machine.AddDisk(ctx, d)
}

// claimName claims the machine's name and opens its control socket. If no socket can be opened, a
// machine with a chosen name fails, and any other runs without a socket, with a note.
func (rc *runConfig) claimName() (*control.Server, error) {
	name := rc.spec.Name
	if name == "" {
		name = "gvm-" + strconv.Itoa(os.Getpid())
	}
	s, err := control.Claim(control.DefaultDirectory(), name)
	switch {
	case errors.Is(err, control.ErrInUse):
		return nil, configError{fmt.Errorf("--name %s: %w", name, err)}
	case err != nil && rc.spec.Name != "":
		return nil, fmt.Errorf("--name %s: %w", name, err)
	case err != nil:
		note(fmt.Sprintf("gvm disk and gvm list will not find this machine: %v", err))
		return nil, nil
	}
	rc.spec.Name = name
	urgent.Lock()
	urgent.release = s.Release
	urgent.Unlock()
	return s, nil
}

// info returns the machine's description of itself.
func (rc *runConfig) info() control.Info {
	kernel := ""
	if rc.spec.Kernel != nil {
		kernel = disk.Absolute(rc.spec.Kernel.Name)
	}
	return control.Info{Name: rc.spec.Name, PID: os.Getpid(), GVM: version, Kernel: text.Name(kernel),
		CPUs: rc.spec.CPUs, Memory: rc.spec.Memory.Size}
}

// theMachine returns a client for the machine with the given name or PID. An empty word means the
// only running machine.
func theMachine(word string) (*control.Client, error) {
	dir := control.DefaultDirectory()
	entries, err := dir.List()
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	// Ask the machine a question first, so that no command goes to one that does not answer.
	client := func(e control.Entry) (*control.Client, error) {
		c := control.NewClient(dir, e.Name)
		if _, err := c.Info(context.Background()); errors.Is(err, control.ErrNoAnswer) {
			return nil, fmt.Errorf("%w (process %d)", err, e.PID)
		}
		return c, nil
	}
	if word == "" && len(entries) == 1 {
		return client(entries[0])
	}
	var names []string
	for _, e := range entries {
		if word == e.Name || word == strconv.Itoa(e.PID) {
			return client(e)
		}
		names = append(names, e.Name)
	}
	switch {
	case len(names) == 0:
		return nil, usageError{errors.New("no machine of this user runs")}
	case word == "":
		return nil, usageError{fmt.Errorf("several machines run: name one of %s", strings.Join(names, ", "))}
	}
	return nil, usageError{fmt.Errorf("no machine of this user has the name or PID %s; there %s %s%s", word,
		map[bool]string{true: "is", false: "are"}[len(names) == 1], strings.Join(names, ", "),
		text.Suggest(word, names))}
}

// refused gives a machine's refusal the exit status that gvm run would have for the same error.
func refused(err error) error {
	var e *control.Error
	if errors.As(err, &e) && e.Status < http.StatusInternalServerError {
		return usageError{err}
	}
	return err
}

func listCommand() *cli.Command {
	return &cli.Command{
		Name:  "list",
		Usage: "show the machines that run",
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
		return fmt.Errorf("list machines: %w", err)
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
		fmt.Fprintln(notes, "note: no machine of this user runs")
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

func resumeCommand() *cli.Command {
	return stateCommand("resume", "let a machine that was paused go on",
		`A machine pauses by gvm pause, or by itself when a disk with error=stop or
error=enospc-stop fails: it says so, and once it is resumed it does the
failed request again.

EXAMPLES
   gvm resume         if one machine runs
   gvm resume build`, (*control.Client).Resume)
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
		`DISK is a value of gvm run --disk (gvm help disk), with backend=process.
Without lun= the disk gets the lowest LUN that is free. The guest sees it
come without a rescan.

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
has under way are aborted, and data that it has not written yet is lost:
unmount the disk there first.

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

// tableRow writes a row of printable cells.
func tableRow(w io.Writer, cells ...any) {
	words := make([]string, len(cells))
	for i, c := range cells {
		words[i] = text.Printable(fmt.Sprint(c))
	}
	fmt.Fprintln(w, strings.Join(words, "\t"))
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
