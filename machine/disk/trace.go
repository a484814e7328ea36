package disk

import (
	"errors"

	"gvm/devices/scsi"
	"gvm/devices/scsi/lio"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/vscsi"
	"gvm/text"
)

// TraceHeader describes the disks for a trace by gvm of the given version: gvm's own device, if
// there is one, then those of the kernel.
func (ds *Set) TraceHeader(version string, queues int) trace.Header {
	h := trace.Header{GVM: version, Kernel: trace.HostKernel()}
	describe := func(lun int, u *scsi.Unit) trace.Disk {
		k := trace.Disk{LUN: lun, Serial: text.Name(u.Serial()), Size: u.Blocks() * uint64(u.BlockSize()),
			BlockSize: u.BlockSize(), ReadOnly: u.Config().ReadOnly}
		if mode := u.Config().Cache; mode != scsi.WriteBack {
			k.Cache = CacheName(mode)
		}
		return k
	}
	if ds.InProcess() {
		d := trace.Device{Backend: "process", Queues: queues}
		for _, lun := range ds.target.LUNs() {
			n, _ := scsi.DecodeLUN(lun)
			d.Disks = append(d.Disks, describe(n, ds.target.Unit(lun)))
		}
		h.Devices = append(h.Devices, d)
	}
	for _, k := range ds.kernels {
		d := trace.Device{Backend: "vhost", Queues: queues}
		for _, u := range k.units {
			if same, err := scsi.NewUnit(u.UnitConfig); err == nil { // LIO shows the same, as it was made from the same
				d.Disks = append(d.Disks, describe(u.LUN, same))
			}
		}
		h.Devices = append(h.Devices, d)
	}
	return h
}

// TraceKernels records the kernel's tracepoints for the disks that it serves. stop ends that.
func (ds *Set) TraceKernels(f *trace.File) (stop func() error, err error) {
	var tracers []*lio.Tracer
	stop = func() error {
		var errs []error
		for _, t := range tracers {
			errs = append(errs, t.Close())
		}
		return errors.Join(errs...)
	}
	first := 0
	if ds.InProcess() {
		first = 1
	}
	for i, k := range ds.kernels {
		t, err := k.target.Trace(f.Device(uint8(first + i)))
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		tracers = append(tracers, t)
	}
	return stop, nil
}

// Device returns the only virtio device of disks that have one backend.
func (ds *Set) Device() (virtio.Device, error) {
	if len(ds.kernels) > 0 {
		return ds.kernels[0].device, nil
	}
	return vscsi.New(vscsi.Config{Target: ds.target})
}
