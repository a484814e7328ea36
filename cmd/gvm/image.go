package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi/sidecar"
	"gvm/machine/disk"
	"gvm/text"
)

func imageCommand() *cli.Command {
	// sub makes a subcommand with the arguments words.
	sub := func(
		name, words, usage, description string, min, max int, flags []cli.Flag,
		do func(*cli.Context, []string) error,
	) *cli.Command {
		return &cli.Command{
			Name: name, Usage: usage, ArgsUsage: words, Description: description, Flags: flags,
			Action: func(c *cli.Context) error {
				if n := c.NArg(); n < min || n > max {
					return usageError{fmt.Errorf("image %s takes %s, and got %s", name, words, text.Count(n, "word"))}
				}
				return do(c, c.Args().Slice())
			},
		}
	}
	create := sub("create", "PATH SIZE", "make a raw image", `The image is sparse: it takes no room until it is written.

EXAMPLES
   gvm image create disk.img 20G
   gvm image create --prealloc disk.img 20G`, 2, 2,
		[]cli.Flag{
			&cli.BoolFlag{Name: "prealloc", Usage: "take all of its room from the file system at once"},
			&cli.BoolFlag{Name: "raw",
				Usage: "make it raw although its name is that of another format, such as .qcow2"},
		},
		func(c *cli.Context, args []string) error {
			size, err := disk.ParseSize(args[0], args[1])
			if err != nil {
				return err
			}
			if err := block.CheckName(args[0]); err != nil && !c.Bool("raw") {
				return imageError(err)
			}
			return imageError(block.Create(args[0], size, c.Bool("prealloc")))
		})
	info := sub("info", "PATH", "show an image's format, size and users", `EXAMPLES
   gvm image info disk.img
   gvm image info --json disk.img | jq .allocated`, 1, 1,
		[]cli.Flag{&cli.BoolFlag{Name: "json", Usage: "a JSON object"}},
		func(c *cli.Context, args []string) error {
			i, err := block.Inspect(args[0])
			if err != nil {
				return imageError(err)
			}
			if c.Bool("json") {
				return writeJSON(c.App.Writer, i)
			}
			return showImage(c.App.Writer, i)
		})
	resize := sub("resize", "PATH SIZE", "change the size of a raw image that no machine has",
		`gvm disk resize changes that of a machine that runs.

EXAMPLES
   gvm image resize disk.img 40G
   gvm image resize --shrink disk.img 10G    the data behind is lost`, 2, 2,
		[]cli.Flag{
			&cli.BoolFlag{Name: "shrink", Usage: "the image may become smaller: the data behind its new end is lost"},
			&cli.StringFlag{Name: "lock", Value: "on",
				Usage: "`on|off`: off goes on without a lock on a file system that has none"},
		},
		func(c *cli.Context, args []string) error {
			size, err := disk.ParseSize(args[0], args[1])
			if err != nil {
				return err
			}
			lock := c.String("lock")
			if lock != "on" && lock != "off" {
				return usageError{text.OneOfNames("--lock ", lock, []string{"on", "off"})}
			}
			f, err := block.Open(args[0], block.Options{NoLock: lock == "off"})
			if _, there := os.Lstat(args[0]); args[0] != "" && errors.Is(there, fs.ErrNotExist) {
				return imageError(fmt.Errorf("%s: %w; gvm image create makes an image", args[0], fs.ErrNotExist))
			}
			if fi, _ := os.Stat(args[0]); errors.Is(err, block.ErrSize) && fi != nil && fi.Size() == 0 {
				err = fmt.Errorf("%s: is empty; remove it, and make an image with gvm image create", args[0])
				return configError{err}
			}
			if errors.Is(err, block.ErrLocked) {
				err = fmt.Errorf("%w%s", err, ofMachine(c.Context, args))
			}
			if err != nil {
				return imageError(err)
			}
			defer f.Close()
			return imageError(f.Resize(size, c.Bool("shrink"), sidecar.Cut))
		})
	return &cli.Command{
		Name:  "image",
		Usage: "make, show and resize raw disk images",
		Description: `The exit status is 0, 2 if the words or the image are wrong, or 3 if the host
fails.

EXAMPLES
   gvm image create disk.img 20G
   gvm image info disk.img
   gvm image resize disk.img 40G`,
		Subcommands: []*cli.Command{create, info, resize},
	}
}

// ofMachine returns a hint how to resize an image that a machine uses: words are its path and a
// size. It asks the machines, as an ordinary user sees no files of a process in the sandbox.
func ofMachine(ctx context.Context, words []string) string {
	image, err := os.Stat(words[0])
	if err != nil {
		return ""
	}
	dir := control.DefaultDirectory()
	entries, _ := dir.List()
	for _, e := range entries {
		disks, _ := control.NewClient(dir, e.Name).Disks(ctx)
		for _, d := range disks {
			st, err := os.Stat(string(d.Path))
			if err == nil && os.SameFile(st, image) && !d.ReadOnly && d.Options["overlay"] == "" {
				return fmt.Sprintf("; gvm disk resize %s %s resizes it there", e.Name, strings.Join(words, " "))
			}
		}
	}
	return ""
}

// imageError gives an error of the backend its exit status.
func imageError(err error) error {
	if err == nil {
		return nil
	}
	return disk.ImageError{Err: err}
}

func showImage(out io.Writer, i block.Info) error {
	use := "no process"
	switch {
	case i.Writer > 0:
		use = fmt.Sprintf("process %d, for writing", i.Writer)
	case i.Writer < 0:
		use = "another process, for writing"
	case i.Readers:
		use = "for reading"
	}
	if i.Host != "" {
		use = string(i.Host)
	}
	_, err := fmt.Fprintf(out, "path       %s\nformat     %s\nsize       %s\n", text.Printable(string(i.Path)), i.Format,
		text.FormatSize(uint64(i.Size)))
	if i.Format != "block device" && err == nil {
		_, err = fmt.Fprintf(out, "allocated  %s\n", text.FormatSize(uint64(i.Allocated)))
	}
	if i.Base != "" && err == nil {
		_, err = fmt.Fprintf(out, "base       %s\n", text.Printable(string(i.Base)))
	}
	if err == nil {
		_, err = fmt.Fprintf(out, "in use by  %s\n", use)
	}
	return err
}
