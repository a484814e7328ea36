package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"gvm/control"
	"gvm/text"
)

func sysrqCommand() *cli.Command {
	return &cli.Command{
		Name: "sysrq", Usage: "press a key of SysRq in a running guest", ArgsUsage: "[VM] KEY",
		Description: `A break and KEY go to the guest's first serial port. Linux takes KEY for a
command of SysRq: l prints where its CPUs are, w and t its tasks, m its
memory, h all commands; s, u and b sync the disks, remount them read-only and
boot, c crashes the kernel. It needs CONFIG_MAGIC_SYSRQ_SERIAL, the console
ttyS0, which a program has open, and a kernel.sysrq that allows the command:
sysrq_always_enabled on the kernel's command line allows all.

The command returns when the guest has read KEY. A guest that does not within
5 s, because it hangs with interrupts off, needs gvm nmi.

EXAMPLES
   gvm sysrq w              if one machine runs
   gvm sysrq build l`,
		Action: func(c *cli.Context) error {
			args := c.Args().Slice()
			if len(args) < 1 || len(args) > 2 {
				return usageError{fmt.Errorf("sysrq takes [VM] KEY, and got %s", text.Count(len(args), "word"))}
			}
			vm := ""
			if len(args) == 2 {
				vm = args[0]
			} else if len(args[0]) > 1 && isMachine(args[0]) {
				return usageError{fmt.Errorf("sysrq takes [VM] KEY: %s is a machine, and KEY is missing", args[0])}
			}
			client, err := theMachine(vm)
			if err != nil {
				return err
			}
			return refused(client.SysRq(c.Context, control.SysRq{Key: args[len(args)-1]}))
		},
	}
}
