package machine

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"gvm/devices/virtio/vhostvsock"
	"gvm/devices/virtio/vsock"
	"gvm/guestmem"
	"gvm/kvmapi/vhost"
)

// TestVsock: a reserved CID is the user's error, and a machine has a socket device only if its Spec
// says so.
func TestVsock(t *testing.T) {
	spec := Spec{Memory: guestmem.Config{Size: 64 << 20}, Vsock: &vsock.Config{CID: 2}}
	if _, err := Start(t.Context(), spec); err == nil || !IsConfig(err) {
		t.Errorf("CID 2: %v", err)
	}
	spec.VhostVsock = &vhostvsock.Config{CID: 77}
	if _, err := Start(t.Context(), spec); err == nil || !IsConfig(err) {
		t.Errorf("CID 2, and a second device: %v", err)
	}
	spec.Vsock = &vsock.Config{CID: 77}
	if _, err := Start(t.Context(), spec); err == nil || !IsConfig(err) {
		t.Errorf("two devices: %v", err)
	}
	if _, err := os.Stat(vhost.VsockPath); errors.Is(err, fs.ErrNotExist) {
		spec.Vsock = nil
		if _, err := Start(t.Context(), spec); !errors.Is(err, fs.ErrNotExist) || IsConfig(err) ||
			!strings.Contains(err.Error(), "modprobe vhost_vsock") {
			t.Errorf("no vhost-vsock: %v", err)
		}
	}
	spec.VhostVsock = nil
	for want, cfg := range map[string]*vsock.Config{
		"dial vsock port 22: the guest has no vsock driver: the machine has no socket device": nil,
		"dial vsock port 22 of the guest: the guest has no vsock driver":                      {},
	} {
		spec.Vsock = cfg
		m, err := Start(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.DialVsock(t.Context(), 22); !errors.Is(err, vsock.ErrNoDriver) || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
		if _, err := m.Wait(); err != nil {
			t.Error(err)
		}
	}
}
