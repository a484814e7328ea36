package broker

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"

	"golang.org/x/sys/unix"
)

// KeeperArg0 is the first word of a keeper's command line; the second one is the machine's name,
// the third one the files that it removes, as JSON.
const KeeperArg0 = "gvm-keeper"

// startKeeper starts a process that waits for this machine's end, and then removes its kernel's
// target and its own files if they are left. The broker does that too, and may have been killed.
func startKeeper(name string, own []ownFile) error {
	fail := func(err error) error { return fmt.Errorf("start the keeper of %s: %w", name, err) }
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return fail(err)
	}
	process := os.NewFile(uintptr(fd), "pidfd")
	defer process.Close()
	files, err := json.Marshal(own)
	if err != nil {
		return fail(err)
	}
	if _, _, err := execute([]string{KeeperArg0, name, string(files)}, process); err != nil { // its life is this process's
		return fail(err)
	}
	return nil
}

// Keep is the keeper's program.
func Keep(args []string) error {
	signal.Ignore() // all that can be: it ends after the machine
	var own []ownFile
	if len(args) != 3 || json.Unmarshal([]byte(args[2]), &own) != nil {
		return errors.New("gvm starts this program itself")
	}
	var pins []*os.File
	for _, f := range own {
		pins = append(pins, f.pin())
	}
	err := afterDeath(keeperFD)
	for _, f := range own {
		err = errors.Join(err, f.remove())
	}
	runtime.KeepAlive(pins)
	return err
}
