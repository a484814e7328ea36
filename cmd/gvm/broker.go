package main

import (
	"os/signal"
	"syscall"

	"gvm/broker"
)

// brokered has gvm run start a broker for a machine with a control socket: a variable for tests.
var brokered = false

// runBroker is the broker's program. It returns the exit status.
func runBroker(args []string) int {
	signal.Ignore(syscall.SIGPIPE) // a closed output gives a write error
	defer stderr.flush(patience)
	if err := broker.Main(args, note); err != nil {
		note(err.Error())
		return exitHost
	}
	return 0
}
