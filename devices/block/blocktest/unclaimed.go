package blocktest

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// AwaitUnclaimed waits until no process of the host claims a block device, as by a mount. After an
// umount the device is still mounted for each process that made a mount namespace before, and for a
// moment after the end of that one.
func AwaitUnclaimed(t testing.TB, dev string) {
	t.Helper()
	for giveUp := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
			return
		}
		if err != unix.EBUSY && err != unix.EINTR || time.Now().After(giveUp) {
			t.Fatalf("%s: %v", dev, err)
		}
	}
}
