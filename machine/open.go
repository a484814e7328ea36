package machine

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"gvm/devices/virtio"
	"gvm/devices/virtio/console"
	"gvm/devices/virtio/fs"
	"gvm/devices/virtio/fs/hostfs"
	"gvm/devices/virtio/vhostvsock"
	"gvm/panics"
	"gvm/text"
)

// openPorts makes the device of the ports, of which the virtio console is the first.
func (m *Machine) openPorts(s *Spec) (err error) {
	ports := s.Ports
	if s.HVC {
		m.hvc = newHVC()
		m.later(m.hvc.close)
		ports = append([]console.Port{m.hvc.port()}, ports...)
	}
	if len(ports) == 0 {
		return nil
	}
	if m.ports, err = console.New(ports); err != nil {
		return configError{err}
	}
	m.later(m.ports.Close)
	return nil
}

// openVhostVsock opens a socket device that the kernel serves.
func openVhostVsock(s Spec) (*vhostvsock.Device, error) {
	if s.Vsock != nil {
		return nil, configError{errors.New("two socket devices: want Vsock or VhostVsock")}
	}
	cfg := *s.VhostVsock
	if cfg.Note == nil {
		cfg.Note = s.Note
	}
	d, err := vhostvsock.New(cfg)
	if errors.Is(err, vhostvsock.ErrInUse) {
		err = configError{err}
	}
	return d, err
}

// openShares opens the shared directories, which divide the descriptors that they may have.
func (m *Machine) openShares(ctx context.Context, shares []fs.Share) (devices []virtio.Device, _ error) {
	var opened []*fs.Device
	m.later(func() error {
		var closes sync.WaitGroup // at once, as each may wait for the host
		for _, d := range opened {
			closes.Go(panics.Func(d.Close))
		}
		closes.Wait()
		return nil
	})
	tags := map[string]bool{}
	for _, s := range shares {
		if tags[s.Tag] {
			return nil, configError{fmt.Errorf("two shares have the tag %s; give each its own", text.Printable(s.Tag))}
		}
		tags[s.Tag] = true
		files, err := hostfs.DefaultFiles()
		if err != nil {
			return nil, err
		}
		s.Files = files / len(shares)
		d, err := openShare(ctx, s)
		if err != nil {
			return nil, err
		}
		opened, devices = append(opened, d), append(devices, d)
	}
	return devices, nil
}

// openShare opens a share. If ctx ends first, a file system of the host that does not answer is
// left.
func openShare(ctx context.Context, s fs.Share) (*fs.Device, error) {
	type opened struct {
		d   *fs.Device
		err error
	}
	done := make(chan opened)
	panics.Go(func() {
		d, err := fs.New(s)
		select {
		case done <- opened{d, err}:
		case <-ctx.Done():
			if err == nil {
				d.Close()
			}
		}
	})
	select {
	case o := <-done:
		if o.err != nil {
			return nil, configError{o.err}
		}
		return o.d, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
