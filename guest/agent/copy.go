package agent

import (
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/archive"
	"gvm/guest/agent/wire"
)

// copyFiles copies files in place of the command, and returns the status.
func copyFiles(c *wire.Copy) int {
	debug.SetGCPercent(100) // stage ended it
	var err error
	if c.Into {
		signal.Ignore(unix.SIGHUP) // the end of the archive comes with it, and partial files are removed
		err = archive.Unpack(os.Stdin, string(c.Path), string(c.Base))
	} else {
		err = archive.Pack(os.Stdout, string(c.Path), c.Recursive)
	}
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, err)
	if archive.Refused(err) {
		return wire.CopyRefused
	}
	return wire.CopyFailed
}
