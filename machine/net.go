package machine

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"os"

	"gvm/devices/virtio"
	"gvm/devices/virtio/net"
	"gvm/devices/virtio/net/tap"
	"gvm/devices/virtio/vhostnet"
	"gvm/text"
)

// Net describes a network device.
type Net struct {
	// Device has the device's configuration. With Tap, Start sets all of it but MAC.
	Device net.Config
	// Tap is the name of a TAP interface of the host. If there is none, it is made, and goes with the
	// machine.
	Tap string
	// Pairs is the number of queue pairs with Tap; 0 is 1.
	Pairs int
	// Vhost says whether the kernel serves the queue pairs with Tap, by vhost-net.
	Vhost Vhost
}

// Vhost is a choice of the kernel's service.
type Vhost int

// Choices of the kernel's service: if the host has it for this user, never, or always.
const (
	VhostAuto Vhost = iota
	VhostOff
	VhostOn
)

// stationMAC returns the MAC address of the guest's end of an interface: a locally administered one
// that depends on the host and the interface, so that it is the same at the next run.
func stationMAC(name string) (mac [6]byte) {
	id, _ := os.ReadFile("/etc/machine-id") // without one, addresses of two hosts may be the same
	h := fnv.New64a()
	h.Write(id)
	h.Write([]byte("\x00" + name))
	copy(mac[:], h.Sum(nil))
	mac[0] = mac[0]&^1 | 2
	return mac
}

// openNets makes the network devices. The caller's descriptors stay the caller's.
func (m *Machine) openNets(nets []Net, note func(string)) (devices []virtio.Device, _ error) {
	for _, n := range nets {
		c := n.Device
		if n.Tap != "" {
			t, err := tap.Open(n.Tap, cmp.Or(n.Pairs, 1))
			if err != nil {
				return nil, configError{err}
			}
			m.later(t.Close)
			if up, err := t.Up(); err != nil {
				return nil, err
			} else if !up {
				note(fmt.Sprintf("the interface %s is down, so no frame passes: ip link set %s up", text.Printable(n.Tap),
					text.Printable(n.Tap)))
			}
			if c.MTU, err = t.MTU(); err != nil {
				return nil, err
			}
			if c.MAC == [6]byte{} {
				c.MAC = stationMAC(n.Tap)
			}
			c.Queues, c.Offloads, c.SetOffloads, c.SetPairs = t.Queues(), tap.Offloads, t.SetOffloads, t.SetPairs
			if n.Vhost != VhostOff {
				k, err := vhostnet.Open(t.Queues(), note)
				switch {
				case err == nil:
					m.later(k.Close)
					c.Kernel = k
				case n.Vhost == VhostOn:
					return nil, configError{err}
				}
			}
			c.Failed = func(err error) {
				note(fmt.Sprintf("the guest's network is down: interface %s has ended: %v", text.Printable(n.Tap), err))
			}
		}
		d, err := net.New(c)
		if err != nil {
			return nil, configError{err}
		}
		devices = append(devices, d)
	}
	return devices, nil
}
