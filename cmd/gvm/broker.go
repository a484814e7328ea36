package main

import (
	"os/signal"
	"syscall"

	"gvm/broker"
)

// runBroker is the broker's program. It returns the exit status.
func runBroker(args []string) int {
	signal.Ignore(syscall.SIGPIPE) // a closed output gives a write error
	defer stderr.flush(patience)
	t := newTrimmer() // its start is over
	_ = t.trim()      // else it takes more memory, for nothing
	t.close()
	if err := broker.Main(args, note); err != nil {
		note(err.Error())
		return exitHost
	}
	return 0
}
