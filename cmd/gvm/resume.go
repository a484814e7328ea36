package main

import (
	"github.com/urfave/cli/v2"

	"gvm/control"
)

func resumeCommand() *cli.Command {
	return stateCommand("resume", "let a machine that was paused go on",
		`A machine pauses by gvm pause, or by itself when a disk with error=stop or
error=enospc-stop fails: it says so, and once it is resumed it does the
failed request again.

EXAMPLES
   gvm resume         if one machine runs
   gvm resume build`, (*control.Client).Resume)
}
