package lab

import (
	"os"

	"gvm/kvmapi/nowait"
)

// TempDir makes a directory for temporary files, whose name begins with name, and returns a
// function that removes it. It removes those of tests that were killed, as they are at their
// timeout.
func TempDir(name string) (dir string, remove func(), err error) {
	if os.Getenv(InLabEnv) == "1" { // locks of the directories outside are not seen there
		dir, err = os.MkdirTemp("", name+"-")
	} else {
		dir, err = nowait.TempDir(name + "-")
	}
	return dir, func() { os.RemoveAll(dir) }, err
}
