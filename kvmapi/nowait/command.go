package nowait

import (
	"context"
	"os/exec"
)

// Command is exec.CommandContext for a program by the path of a user or a file, which a shell
// starts. Go's runtime starts a program by a system call of which its scheduler does not know, and
// which lasts until the kernel has found the program: all goroutines would stop at the next garbage
// collection if the storage does not answer. The error of a program that cannot be started is that
// of Wait.
func Command(ctx context.Context, path string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", `exec "$0" "$@"`, path}, args...)...)
}
