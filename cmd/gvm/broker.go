package main

import (
	"os/signal"
	"syscall"
)

// runBroker is the program of the broker and of the keeper. It returns the exit status.
func runBroker(args []string, program func(args []string, log func(string)) error) int {
	signal.Ignore(syscall.SIGPIPE) // a closed output gives a write error
	defer stderr.flush(patience)
	t := newTrimmer() // its start is over
	_ = t.trim()      // else it takes more memory, for nothing
	t.close()
	if err := program(args, note); err != nil {
		note(err.Error())
		return exitHost
	}
	return 0
}
