package vhost

import "fmt"

// SCSIPath is the path of the vhost-scsi device.
const SCSIPath = "/dev/vhost-scsi"

// SCSIABIVersion is the version of the vhost-scsi interface that this package implements, the only
// one since Linux 3.10 (VHOST_SCSI_ABI_VERSION).
const SCSIABIVersion = 1

// Feature bits of vhost-scsi (virtio 1.3, 5.6.3).
const (
	FeatureSCSIHotplug = 1 << 1 // VIRTIO_SCSI_F_HOTPLUG
	FeatureSCSIT10PI   = 1 << 3 // VIRTIO_SCSI_F_T10_PI
)

// MaxWWPN is the length of the longest name that SetEndpoint takes, in bytes.
const MaxWWPN = 223

// Limits of the kernel's vhost-scsi (drivers/vhost/scsi.c), which it does not report: of a
// request's data, and of its header and response.
const (
	SCSIMaxPages  = 2048 // that the data of one request may touch (VHOST_SCSI_PREALLOC_SGLS)
	SCSICDBSize   = 32   // VHOST_SCSI_MAX_CDB_SIZE, and virtio's default
	SCSISenseSize = 96   // TRANSPORT_SENSE_BUFFER, and virtio's default
)

// SCSI is an open vhost-scsi device. Vring 0 is the control queue, 1 the event queue, 2 the first
// request queue.
type SCSI struct{ Device }

// OpenSCSI opens /dev/vhost-scsi. Its errors say how to fix the problem.
func OpenSCSI() (*SCSI, error) {
	d, err := open(SCSIPath, "vhost_scsi", "CONFIG_VHOST_SCSI")
	if err != nil {
		return nil, err
	}
	return &SCSI{*d}, nil
}

// ABIVersion returns this kernel's version of the vhost-scsi interface.
func (s *SCSI) ABIVersion() (int, error) {
	var v int32
	err := ioctl(&s.Device, "VHOST_SCSI_GET_ABI_VERSION", scsiGetABIVersion, &v)
	return int(v), err
}

// SetEndpoint connects the device to the target of that name in LIO: all of its portal groups
// become SCSI targets, numbered by their tags. It comes last, because with it the kernel starts
// serving and sizes its pools of commands by the existing vrings. ENODEV: no portal group of that
// name has a nexus and is free. EEXIST: the device has an endpoint. EFAULT: there is no memory
// table.
func (s *SCSI) SetEndpoint(wwpn string) error {
	return s.endpoint("VHOST_SCSI_SET_ENDPOINT", scsiSetEndpoint, wwpn)
}

// ClearEndpoint disconnects the device from its target, once the kernel has answered every request
// that it took. Without an endpoint it does nothing.
func (s *SCSI) ClearEndpoint(wwpn string) error {
	return s.endpoint("VHOST_SCSI_CLEAR_ENDPOINT", scsiClearEndpoint, wwpn)
}

func (s *SCSI) endpoint(name string, request uintptr, wwpn string) error {
	t := scsiTarget{ABIVersion: SCSIABIVersion}
	if len(wwpn) > MaxWWPN {
		return fmt.Errorf("%s: name of %d bytes: more than %d", name, len(wwpn), MaxWWPN)
	}
	copy(t.WWPN[:], wwpn)
	if err := ioctl(&s.Device, name, request, &t); err != nil {
		return fmt.Errorf("%w (target %s)", err, wwpn)
	}
	return nil
}

// EventsMissed reports whether events were lost for want of a buffer and the driver does not know
// yet.
func (s *SCSI) EventsMissed() (bool, error) {
	var v uint32
	err := ioctl(&s.Device, "VHOST_SCSI_GET_EVENTS_MISSED", scsiGetEventsMissed, &v)
	return v != 0, err
}

// SetEventsMissed sets the result of EventsMissed; the driver learns of it with the next event.
func (s *SCSI) SetEventsMissed(missed bool) error {
	var v uint32
	if missed {
		v = 1
	}
	return ioctl(&s.Device, "VHOST_SCSI_SET_EVENTS_MISSED", scsiSetEventsMissed, &v)
}
