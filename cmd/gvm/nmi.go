package main

import (
	"github.com/urfave/cli/v2"

	"gvm/control"
)

func nmiCommand() *cli.Command {
	return stateCommand("nmi", "raise a non-maskable interrupt in a running guest",
		`Each CPU that the guest has started gets the interrupt, also one that hangs
with interrupts off, as by the NMI button of a server. Linux prints that it
does not know the reason, and panics with kernel.unknown_nmi_panic=1 or with
unknown_nmi_panic on its command line, which can start a crash kernel. A
paused machine takes the interrupt when it is resumed.

EXAMPLES
   gvm nmi            if one machine runs
   gvm nmi build`, (*control.Client).NMI)
}
