package sandbox

import (
	_ "embed"
	"fmt"
	"strings"
)

// names has the names of the system calls by their numbers, one a line
// (arch/x86/entry/syscalls/syscall_64.tbl): a refused call has its name in the message.
//
//go:embed names.txt
var names string

// callName returns the name of a system call.
func callName(nr int) string {
	if list := strings.Split(names, "\n"); nr >= 0 && nr < len(list) && list[nr] != "" {
		return list[nr]
	}
	return fmt.Sprintf("of number %d", nr)
}
