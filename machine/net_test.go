package machine

import (
	"errors"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/guestmem"
)

// TestNets: mistakes in networks are the user's, a guest runs beside them, and interfaces that were
// made for it go.
func TestNets(t *testing.T) {
	runtime.LockOSThread() // to the end of the thread, which goes with its network namespace
	if err := unix.Unshare(unix.CLONE_NEWNET); errors.Is(err, unix.EPERM) {
		t.Skip("a network namespace needs CAP_SYS_ADMIN")
	} else if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("the host has no TAP interfaces: ", err)
	}
	for want, nets := range map[string][]Net{
		"interface lo is not a TAP interface":   {{Tap: "one"}, {Tap: "lo"}},
		`interface name "a/b": want`:            {{Tap: "a/b"}},
		"interface one is in use":               {{Tap: "one"}, {Tap: "one"}},
		"virtio-net: MAC address 00 00 00 00 0": {{}},
		"":                                      {{Tap: "one"}, {Tap: "two", Pairs: 3}},
	} {
		var notes []string
		m, err := Start(t.Context(), Spec{Memory: guestmem.Config{Size: 64 << 20}, Nets: nets,
			Note: func(s string) { notes = append(notes, s) }})
		if (err == nil) != (want == "") || err != nil && (!IsConfig(err) || !strings.HasPrefix(err.Error(), want)) {
			t.Errorf("%v, want %s", err, want)
		}
		if err == nil {
			if _, err := m.Wait(); err != nil {
				t.Error(err)
			}
			if want := []string{
				"the interface one is down, so no frame passes: ip link set one up",
				"the interface two is down, so no frame passes: ip link set two up"}; !slices.Equal(notes, want) {
				t.Errorf("notes %q", notes)
			}
		}
		if all, err := net.Interfaces(); err != nil || len(all) != 1 {
			t.Errorf("interfaces %v are left: %v", all, err)
		}
	}
}

// TestStationMAC: the address of an interface is one of a station, its own and always the same.
func TestStationMAC(t *testing.T) {
	a, b := stationMAC("tap0"), stationMAC("tap1")
	if a == b || a != stationMAC("tap0") || a[0]&3 != 2 || b[0]&3 != 2 {
		t.Errorf("% x, % x", a, b)
	}
}
