package machine

import (
	"io"
	"net"
	"testing"

	"gvm/devices/virtio/console"
	"gvm/guestmem"
)

// TestPorts: two ports of one name are the user's error, and a stream that nothing reads or writes
// is closed at the end of the machine.
func TestPorts(t *testing.T) {
	near, far := net.Pipe()
	spec := Spec{Memory: guestmem.Config{Size: 64 << 20}, Ports: []console.Port{{Name: "a"}, {Name: "a"}}}
	if _, err := Start(t.Context(), spec); err == nil || !IsConfig(err) {
		t.Errorf("two ports of a name: %v", err)
	}
	spec.Ports = []console.Port{{Name: "a", Stream: far}}
	m, err := Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Wait(); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(near); err != nil || len(b) > 0 {
		t.Errorf("%q, %v: want a closed stream", b, err)
	}
}
