package vhost

// NetPath is the device of the kernel's module vhost_net.
const NetPath = "/dev/vhost-net"

// FeatureNetHeader is VHOST_NET_F_VIRTIO_NET_HDR: the kernel makes the header of each frame, for a
// socket that has none.
const FeatureNetHeader = 1 << 27

// Net is a vhost-net device. Its vrings are a receive queue (0) and a transmit queue (1).
type Net struct{ Device }

// OpenNet opens /dev/vhost-net. Its errors say how to fix the problem.
func OpenNet() (*Net, error) {
	d, err := open(NetPath, "vhost_net", "CONFIG_VHOST_NET")
	if err != nil {
		return nil, err
	}
	return &Net{*d}, nil
}

// SetBackend has the kernel serve the vring with a queue of a TAP interface. With -1 it stops to,
// and returns when the kernel has left the vring.
func (n *Net) SetBackend(index, tap int) error {
	return vring(&n.Device, "VHOST_NET_SET_BACKEND", netSetBackend, index, &vringFile{uint32(index), int32(tap)})
}
