package main

import (
	"github.com/urfave/cli/v2"

	"gvm/control"
)

func resetCommand() *cli.Command {
	return stateCommand("reset", "start the guest of a running machine again",
		`The guest starts again at once, as by the reset button of a PC, even if it
hangs or has panicked. It loses the data that it has not written to its
disks. The machine, its name and its disks stay, also without
--on-reset=reboot of gvm run. A paused machine stays paused.

EXAMPLES
   gvm reset          if one machine runs
   gvm reset build`, (*control.Client).Reset)
}
