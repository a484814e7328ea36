// Command gvm-agent is the first program of gvm test's guests (package agent). gvm test puts it
// into their initramfs if it is beside gvm and of the same build, else gvm itself, which is five
// times as large.
package main

import (
	"fmt"
	"os"

	"gvm/guest/agent"
)

func main() {
	agent.Main(os.Args)
	fmt.Fprintln(os.Stderr, "gvm-agent: runs in the guests of gvm test, which starts it there")
	os.Exit(2)
}
