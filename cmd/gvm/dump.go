package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"gvm/broker"
	"gvm/control"
	"gvm/kvmapi/nowait"
	"gvm/machine/disk"
	"gvm/text"
)

func dumpCommand() *cli.Command {
	return &cli.Command{
		Name: "dump", Usage: "write the memory of a running machine to a file", ArgsUsage: "VM FILE",
		Description: `FILE becomes an ELF core, which crash, gdb and drgn open with the guest
kernel's vmlinux. It has the memory, the registers of each CPU, and Linux's
note VMCOREINFO. Pages of zeros become holes. FILE must not exist, or be a
pipe; - is standard output. The machine is paused meanwhile.

Linux keeps the note in memory, where gvm searches for it. A guest without it
is dumped too, and a line says so.

EXAMPLES
   gvm dump build vmcore && crash vmlinux vmcore
   gvm dump build - | zstd >vmcore.zst`,
		Action: func(c *cli.Context) error {
			if c.Args().Len() != 2 {
				return usageError{fmt.Errorf("dump takes VM FILE, and got %s", text.Count(c.Args().Len(), "word"))}
			}
			client, err := theMachine(c.Args().First())
			if err != nil {
				return err
			}
			return dump(client, c.Args().Get(1))
		},
	}
}

// dump writes a core of a machine to path.
func dump(client *control.Client, path string) (err error) {
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	defer catchSignals(ctx, stop)()
	f, err := nowait.Until(ctx, func() string { return path + " was made" },
		func() (*coreFile, error) { return createCore(path) }, func(f *coreFile) { _ = f.discard() })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.discard()) }()
	defer endWithin(ctx, patience, func() { _ = f.remove() })()
	size, release, err := client.Core(ctx, f.put)
	if err == nil {
		err = f.finish(size)
	}
	if err != nil {
		return refused(err)
	}
	if release == "" {
		note("the memory of " + client.Name() + " has no VMCOREINFO: the guest is no Linux, has not come that" +
			" far, or lacks CONFIG_CRASH_DUMP; crash may need --kaslr")
		return nil
	}
	note(fmt.Sprintf("dumped %s, Linux %s", client.Name(), text.Printable(release)))
	return nil
}

// coreFile is the file of a dump. A regular one has its name once it is complete.
type coreFile struct {
	*os.File // nil: complete
	path     string
	regular  bool
	named    bool           // the file system has no O_TMPFILE: path names the file already
	at       int64          // of a pipe: the bytes that it has got
	record   *broker.Record // of a record's file, whose name it makes and removes; nil: of none
}

// createCore makes the file for a dump, or opens the pipe or the character device at path.
func createCore(path string) (*coreFile, error) {
	if path == "-" {
		if term.IsTerminal(int(os.Stdout.Fd())) {
			return nil, usageError{errors.New("a dump is not for a terminal: name a file, or a pipe behind it")}
		}
		fd, err := unix.FcntlInt(os.Stdout.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("standard output: %w", err)
		}
		return &coreFile{File: os.NewFile(uintptr(fd), "standard output"), path: path}, nil
	}
	fi, err := os.Lstat(path)
	switch {
	case err == nil && fi.Mode().IsRegular():
		return nil, configError{fmt.Errorf("%s: exists; remove it, or name another file", path)}
	case err == nil:
		f, err := nowait.Open(path, os.O_WRONLY, 0, nowait.Pipe|nowait.CharDevice)
		if err != nil {
			return nil, outputError(path, err)
		}
		return &coreFile{File: f, path: path}, nil
	}
	c := &coreFile{File: nowait.Unnamed(path, 0o600), path: path, regular: true}
	if c.File != nil {
		return c, nil
	}
	c.named = true
	if c.File, _, err = nowait.Make(path, os.O_WRONLY|os.O_EXCL, 0o600, nowait.Regular); err != nil {
		return nil, namedError(nowait.CreateError(path, err))
	}
	return c, nil
}

var zeros [64 << 10]byte

// put writes a part of the dump.
func (c *coreFile) put(off int64, p []byte) (err error) {
	if c.regular {
		_, err = c.WriteAt(p, off)
		return hostError(err)
	}
	for c.at < off && err == nil {
		var n int
		n, err = c.Write(zeros[:min(off-c.at, int64(len(zeros)))])
		c.at += int64(n)
	}
	if err == nil && len(p) > 0 {
		var n int
		n, err = c.Write(p)
		c.at += int64(n)
	}
	return hostError(err)
}

func hostError(err error) error {
	if err != nil {
		err = disk.ImageError{Err: err}
	}
	return err
}

// finish gives the complete file its size and its name.
func (c *coreFile) finish(size int64) error {
	if !c.regular {
		return c.put(size, nil)
	}
	if err := c.Truncate(size); err != nil {
		return hostError(err)
	}
	switch {
	case c.record != nil:
		if err := c.record.LinkCore(); err != nil {
			return hostError(err)
		}
	case !c.named:
		err := nowait.Name(c.File)
		if err == unix.EEXIST {
			return configError{fmt.Errorf("%s: exists by now; remove it, or name another file", c.path)}
		}
		if err != nil {
			return hostError(nowait.CreateError(c.path, err))
		}
	}
	f := c.File
	c.File = nil
	return hostError(f.Close()) // the last writes of some network file systems
}

// discard removes a file that is not complete, and closes it.
func (c *coreFile) discard() error {
	if c.File == nil {
		return nil
	}
	return errors.Join(c.remove(), c.Close())
}

// remove removes the name of a file that has one.
func (c *coreFile) remove() error {
	switch {
	case c.record != nil:
		return c.record.RemoveCore()
	case c.regular && c.named:
		return nowait.Remove(c.File, c.path)
	}
	return nil
}
