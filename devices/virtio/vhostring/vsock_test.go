package vhostring_test

import (
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostvsock"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
)

// TestStopSocket stops and continues a socket device of the kernel's: no byte of a connection is
// lost, changed or sent twice.
func TestStopSocket(t *testing.T) {
	const guestCID, port = 30, 5000
	listener, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(listener)
	must(t, unix.Bind(listener, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}))
	must(t, unix.Listen(listener, 1))
	for features, rounds := range map[uint64]int{0: 100, virtio.FeatureEventIdx: 1000} {
		dev, err := vhostvsock.New(vhostvsock.Config{CID: guestCID, Note: func(s string) { t.Error(s) }})
		must(t, err)
		var program sync.WaitGroup
		var closed atomic.Bool // the connection is to end
		program.Go(func() {
			fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
			if err != nil {
				t.Error(err)
				return
			}
			c := os.NewFile(uintptr(fd), "connection")
			defer c.Close()
			virtiotest.Converse(t, c, func(err error) {
				if !closed.Load() {
					t.Error(err)
				}
			})
		})
		driver := &virtiotest.Socket{GuestCID: guestCID, HostCID: unix.VMADDR_CID_HOST, Port: port}
		virtiotest.StopAndContinue(t, dev, newMemory(t), virtiotest.Load{
			Rounds: rounds, Features: virtio.FeatureVersion1 | features,
			Slots: func(queue int, d *virtqtest.Driver) []virtiotest.Slot { return driver.Slots(queue, d, 40) },
		})
		closed.Store(true)
		must(t, dev.Close())
		program.Wait()
		t.Log(driver)
	}
}
