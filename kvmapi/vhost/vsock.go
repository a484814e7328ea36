package vhost

// VsockPath is the device of the kernel's module vhost_vsock.
const VsockPath = "/dev/vhost-vsock"

// FeatureVsockSeqpacket is VIRTIO_VSOCK_F_SEQPACKET (virtio 1.3, 5.10.3), which Linux has from 5.14
// on.
const FeatureVsockSeqpacket = 1 << 1

// Vsock is a vhost-vsock device. Its vrings are rx (0) and tx (1); the event queue is not the
// kernel's.
type Vsock struct{ Device }

// OpenVsock opens /dev/vhost-vsock. Its errors say how to fix the problem.
func OpenVsock() (*Vsock, error) {
	d, err := open(VsockPath, "vhost_vsock", "CONFIG_VHOST_VSOCK")
	if err != nil {
		return nil, err
	}
	return &Vsock{*d}, nil
}

// SetGuestCID sets the address at which programs of the host reach the guest. It is EADDRINUSE for
// one that another device has, and EINVAL for one that is reserved.
func (v *Vsock) SetGuestCID(cid uint64) error {
	return ioctl(&v.Device, "VHOST_VSOCK_SET_GUEST_CID", vsockSetGuestCID, &cid)
}

// SetRunning starts the service of the vrings, or stops it and returns when the kernel has left
// them.
func (v *Vsock) SetRunning(running bool) error {
	var r int32
	if running {
		r = 1
	}
	return ioctl(&v.Device, "VHOST_VSOCK_SET_RUNNING", vsockSetRunning, &r)
}
