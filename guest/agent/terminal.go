package agent

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const ttyGroup = 5 // of terminals, in every distribution

// openTerminal opens a new pseudoterminal whose slave belongs to a user.
func openTerminal(uid int) (master *os.File, slave int, _ error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("open /dev/ptmx (CONFIG_UNIX98_PTYS): %w", err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	name := fmt.Sprintf("/dev/pts/%d", number)
	if err == nil {
		slave, err = unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		unix.Close(fd)
		return nil, 0, fmt.Errorf("open %s: %w", name, err)
	}
	unix.Fchown(slave, uid, ttyGroup) // a user of a namespace may not, and owns it already
	return os.NewFile(uintptr(fd), "/dev/ptmx"), slave, nil
}

// endOfFile returns the character that ends the input of a terminal.
func endOfFile(terminal *os.File) byte {
	c := byte('D' & 0x1f)
	control(terminal, func(fd int) {
		if t, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
			c = t.Cc[unix.VEOF]
		}
	})
	return c
}
