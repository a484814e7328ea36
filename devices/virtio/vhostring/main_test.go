package vhostring_test

import (
	"fmt"
	"os"
	"testing"

	"gvm/guest-tests/lab"
	"gvm/guestmem"
	"gvm/kvmapi/vhost"
)

// TestMain has the tests run where the kernel serves networks and sockets: here, or in the lab.
func TestMain(m *testing.M) {
	os.Exit(lab.Main(m, lab.Options{Direct: serves, Modules: []string{"vhost_vsock"}}))
}

func serves() (bool, string) {
	net, err := vhost.OpenNet()
	if err != nil {
		return false, err.Error()
	}
	net.Close()
	vsock, err := vhost.OpenVsock()
	if err != nil {
		return false, err.Error()
	}
	vsock.Close()
	return os.Getuid() == 0, fmt.Sprintf("vhost-net and vhost-vsock are here, and the user is %d", os.Getuid())
}

func newMemory(t *testing.T) *guestmem.Memory {
	t.Helper()
	mem, err := guestmem.Map(guestmem.Config{Size: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return mem
}

// must fails the test at an error of its own.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
