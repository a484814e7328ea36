// Package tap opens TAP interfaces of the host (Documentation/networking/tuntap.rst): network
// interfaces whose frames a program reads and writes, here behind a struct virtio_net_hdr (virtio
// 1.3, 5.1.6).
package tap

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio/net"
)

// Tap is an open interface. Its methods are not safe for concurrent use.
type Tap struct {
	name  string
	fds   []int
	using int // queues that are attached
}

// CheckName checks the name of an interface.
func CheckName(name string) error {
	// As dev_valid_name in net/core/dev.c, whose isspace knows Latin-1. To TUNSETIFF % begins a
	// pattern.
	if name == "" || len(name) >= unix.IFNAMSIZ || name == "." || name == ".." ||
		strings.ContainsAny(name, "/:%\x00 \t\n\v\f\r") || strings.Contains(name, "\xa0") {
		return fmt.Errorf("interface name %q: want 1 to %d bytes without a space or / : %%", name, unix.IFNAMSIZ-1)
	}
	return nil
}

// device is the file that makes TAP interfaces.
const device = "/dev/net/tun"

// Open attaches to a TAP interface with so many queues, of which it uses one. If there is no
// interface of that name, it is made and goes with the last descriptor. The error says how to mend
// it.
func Open(name string, queues int) (_ *Tap, err error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	t := &Tap{name: name, using: queues}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	// A persistent interface has several queues or one, and only that is accepted.
	flags := uint16(unix.IFF_MULTI_QUEUE)
	if queues == 1 {
		flags = 0
	}
	err = t.attach(flags)
	if errors.Is(err, unix.EINVAL) && t.attach(flags^unix.IFF_MULTI_QUEUE) == nil {
		if flags != 0 {
			return nil, fmt.Errorf("interface %s was made with one queue: make it with ip tuntap add %s mode tap multi_queue, "+
				"or use queues=1", name, name)
		}
		flags, err = unix.IFF_MULTI_QUEUE, nil
	}
	for err == nil && len(t.fds) < queues {
		err = t.attach(flags)
	}
	if err != nil {
		return nil, t.explain(err)
	}
	// The length is that of a header with num_buffers, and a driver has accepted nothing yet.
	if err := unix.IoctlSetPointerInt(t.fds[0], unix.TUNSETVNETHDRSZ, net.HeaderLen); err != nil {
		return nil, fmt.Errorf("TUNSETVNETHDRSZ of %s: %w", name, err)
	}
	if err := t.SetOffloads(0); err != nil {
		return nil, err
	}
	return t, t.SetPairs(1)
}

// attach opens a queue of the interface.
func (t *Tap) attach(flags uint16) error {
	ifr, err := unix.NewIfreq(t.name)
	if err != nil {
		return err
	}
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &openError{err}
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return err
	}
	t.fds = append(t.fds, fd)
	return nil
}

// openError is an error of opening device.
type openError struct{ error }

func (e *openError) Unwrap() error { return e.error }

// explain returns the error of attach with its mend.
func (t *Tap) explain(err error) error {
	var open *openError
	_, exists := t.link(unix.SIOCGIFFLAGS)
	const create = "sudo ip tuntap add %s mode tap user $USER"
	switch isOpen := errors.As(err, &open); {
	case isOpen && errors.Is(err, unix.ENOENT):
		return fmt.Errorf("there is no %s: load the kernel's module tun (modprobe tun)", device)
	case isOpen && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)):
		return fmt.Errorf("open %s: %w: give this user access to it", device, err)
	case isOpen:
		return fmt.Errorf("open %s: %w", device, err)
	case errors.Is(err, unix.EPERM) && exists == nil:
		return fmt.Errorf("interface %s is another user's: use one of your own ("+create+"), or run gvm with "+
			"CAP_NET_ADMIN", t.name, "NAME")
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("there is no interface %s, and only CAP_NET_ADMIN may make one: "+create, t.name, t.name)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("interface %s is in use by another program: stop that, or use another interface", t.name)
	case errors.Is(err, unix.EINVAL) && exists == nil:
		return fmt.Errorf("interface %s is not a TAP interface: make one of another name with ip tuntap add NAME mode tap",
			t.name)
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("interface %s has no more queues: use fewer by queues=", t.name)
	}
	return fmt.Errorf("TUNSETIFF of %s: %w", t.name, err)
}

// link reads a field of the interface.
func (t *Tap) link(request uint) (*unix.Ifreq, error) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(t.name)
	if err != nil {
		return nil, err
	}
	return ifr, unix.IoctlIfreq(s, request, ifr)
}

// Up reports whether the interface is up.
func (t *Tap) Up() (bool, error) {
	ifr, err := t.link(unix.SIOCGIFFLAGS)
	if err != nil {
		return false, fmt.Errorf("SIOCGIFFLAGS of %s: %w", t.name, err)
	}
	return ifr.Uint16()&unix.IFF_UP != 0, nil
}

// MTU returns the interface's MTU.
func (t *Tap) MTU() (uint16, error) {
	ifr, err := t.link(unix.SIOCGIFMTU)
	if err != nil {
		return 0, fmt.Errorf("SIOCGIFMTU of %s: %w", t.name, err)
	}
	return uint16(min(ifr.Uint32(), 0xffff)), nil
}

// Queues returns a descriptor for each queue.
func (t *Tap) Queues() []int { return t.fds }

// Offloads are those that the kernel does for every TAP interface.
const Offloads = net.CSum | net.GuestCSum | net.GuestTSO4 | net.GuestTSO6 | net.GuestECN | net.HostTSO4 | net.HostTSO6 |
	net.HostECN

// SetOffloads is for net.Config: frames that are read may need these offloads of Offloads, and no
// others.
func (t *Tap) SetOffloads(features uint64) error {
	set := 0
	for bit, flag := range map[uint64]int{net.GuestCSum: unix.TUN_F_CSUM, net.GuestTSO4: unix.TUN_F_TSO4,
		net.GuestTSO6: unix.TUN_F_TSO6, net.GuestECN: unix.TUN_F_TSO_ECN} {
		if features&bit != 0 {
			set |= flag
		}
	}
	if set&(unix.TUN_F_TSO4|unix.TUN_F_TSO6) == 0 {
		set &^= unix.TUN_F_TSO_ECN // which is about TSO (set_offload in drivers/net/tun.c)
	}
	if err := unix.IoctlSetInt(t.fds[0], unix.TUNSETOFFLOAD, set); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD of %s: %w", t.name, err)
	}
	return nil
}

// SetPairs is for net.Config: the kernel uses the first n queues.
func (t *Tap) SetPairs(n int) error {
	for ; t.using > n; t.using-- {
		if err := t.setQueue(t.using-1, unix.IFF_DETACH_QUEUE); err != nil {
			return err
		}
	}
	for ; t.using < n; t.using++ {
		if err := t.setQueue(t.using, unix.IFF_ATTACH_QUEUE); err != nil {
			return err
		}
	}
	return nil
}

func (t *Tap) setQueue(i int, flag uint16) error {
	ifr, err := unix.NewIfreq(t.name)
	if err != nil {
		return err
	}
	ifr.SetUint16(flag)
	if err := unix.IoctlIfreq(t.fds[i], unix.TUNSETQUEUE, ifr); err != nil {
		return fmt.Errorf("TUNSETQUEUE of queue %d of %s: %w", i, t.name, err)
	}
	return nil
}

// Close closes the descriptors. An interface that Open made goes with them.
func (t *Tap) Close() (err error) {
	for _, fd := range t.fds {
		err = errors.Join(err, unix.Close(fd))
	}
	t.fds = nil
	return err
}
