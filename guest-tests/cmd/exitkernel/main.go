// Exitkernel writes the kernel of package exitkernel with the status STATUS to standard output.
package main

import (
	"fmt"
	"os"
	"strconv"

	"gvm/guest-tests/exitkernel"
)

func main() {
	if len(os.Args) != 2 {
		fail("usage: exitkernel STATUS")
	}
	status, err := strconv.ParseUint(os.Args[1], 0, 8)
	if err != nil {
		fail(err)
	}
	if _, err := os.Stdout.Write(exitkernel.Image(byte(status))); err != nil {
		fail(err)
	}
}

func fail(reason any) {
	fmt.Fprintln(os.Stderr, "exitkernel:", reason)
	os.Exit(2)
}
