// Package vhostscsi is the virtio SCSI host device (virtio 1.3, 5.6) with the
// kernel's target behind it: /dev/vhost-scsi gets the rings, the doorbells and
// the interrupts, and this process takes no part in a request. What the guest
// sees is the PCI device that package vscsi is too. The target is one that LIO
// has already; its portal groups are the host's SCSI targets, each with its tag
// for a number.
package vhostscsi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostring"
	"gvm/kvmapi/vhost"
)

const (
	firstRequestQueue = 2 // after the control and the event queue (5.6.2)

	// sideQueueSize and the limits of the rings are those of package vscsi. The
	// default is smaller: while it has an endpoint the kernel keeps 160 KiB, which
	// no one can swap, for every entry of a request queue (measured on 6.1, 6.12).
	sideQueueSize   = 64
	defaultRingSize = 128
	maxRingSize     = 1024
	maxQueues       = 1024
)

// Config has the parameters of New.
type Config struct {
	// WWPN is the target's name in LIO, under configfs's target/vhost:
	// naa.5001405…, or one that begins with fc. or iqn.
	WWPN string
	// MaxTarget is the highest tag of the target's portal groups (tpgt_N).
	MaxTarget uint8
	Queues    int    // request queues; 0 is 1
	RingSize  uint16 // entries in each request queue, a power of two from 4 to 1024; 0 is 128
	// Workers is how many kernel threads the request queues are dealt out to,
	// up to one each, which needs Linux 6.5. 0: one each where the kernel can.
	// SharedWorker: the one thread that every device has serves all.
	Workers int
	ABI     ABIPolicy
	// Note gets a line that the user should know, and that is no error.
	Note func(string)
	// Before is vhost.Device's: it can make any ioctl fail.
	Before func(ioctl string) error
}

// SharedWorker is for Config.Workers.
const SharedWorker = -1

// ABIPolicy says which versions of the kernel's vhost-scsi interface are
// accepted. The zero value accepts the one that gvm is written for.
type ABIPolicy struct {
	any, pinned bool
	version     int
}

// AnyABI accepts any version of the kernel's.
func AnyABI() ABIPolicy { return ABIPolicy{any: true} }

// PinABI accepts version n alone.
func PinABI(n int) ABIPolicy { return ABIPolicy{pinned: true, version: n} }

// check returns a note for the user on a kernel that speaks version v.
func (p ABIPolicy) check(v int) (note string, err error) {
	want := vhost.SCSIABIVersion
	if p.pinned {
		want = p.version
	}
	switch {
	case !p.any && v != want && p.pinned:
		return "", fmt.Errorf("this kernel speaks version %d of its interface, and version %d is asked for", v, want)
	case !p.any && v > want:
		return "", fmt.Errorf("this kernel speaks version %d of its interface, gvm knows %d: "+
			"take a newer gvm, or accept the version", v, want)
	case !p.any && v < want:
		return "", fmt.Errorf("this kernel speaks version %d of its interface, gvm needs %d: "+
			"boot a newer kernel, or accept the version", v, want)
	case v != vhost.SCSIABIVersion:
		return fmt.Sprintf("vhost-scsi: this kernel speaks version %d of its interface, gvm is written for %d, "+
			"and was told to go on", v, vhost.SCSIABIVersion), nil
	}
	return "", nil
}

// Device is a virtio SCSI host that the kernel serves.
type Device struct {
	cfg      Config
	endpoint string           // the target's name as the kernel's ioctls have it
	dev      *vhost.SCSI      // nil after the kernel's half had to be closed
	kernel   uint64           // feature bits that the kernel has
	rings    *vhostring.Rings // while active
	stopped  bool             // by Stop, for the driver to continue
	hearing  atomic.Int32
	told     bool // account has called cfg.Note
}

// Hearing says whether the guest's driver hears from the kernel of logical units that come and go.
type Hearing int32

// Values of Hearing.
const (
	NoDriver Hearing = iota
	Deaf             // the driver has not negotiated VIRTIO_SCSI_F_HOTPLUG
	Paused           // the device is stopped; when it continues the driver hears that it missed something
	Hears
)

// Hearing returns that of the present driver. It may be called from any goroutine.
func (d *Device) Hearing() Hearing { return Hearing(d.hearing.Load()) }

// New opens the kernel's device and checks, before a guest runs, all that can go
// wrong: access to the module, the version and features of its interface, the
// number of queues, workers, and the target, which New takes without a queue and
// releases. Two errors remain for Activate: another process takes the target in
// between, or there is no memory for the kernel's pools of commands.
func New(cfg Config) (*Device, error) {
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.RingSize == 0 {
		cfg.RingSize = defaultRingSize
	}
	if cfg.Note == nil {
		cfg.Note = func(string) {}
	}
	d := &Device{cfg: cfg, endpoint: strings.TrimPrefix(cfg.WWPN, "fc.")}
	err := cfg.check()
	if err == nil {
		err = d.open()
	}
	if err != nil {
		return nil, fmt.Errorf("vhost-scsi: %w", err)
	}
	return d, nil
}

// isWWPN reports whether the kernel takes s as the name of a directory in target/vhost. It
// refuses some characters that the kernel takes and no such name has.
func isWWPN(s string) bool {
	kind, rest, _ := strings.Cut(s, ".")
	foreign := func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && !strings.ContainsRune(".:_-", r)
	}
	return (kind == "naa" || kind == "fc" || kind == "iqn") && rest != "" && !strings.ContainsFunc(rest, foreign)
}

func (c *Config) check() error {
	switch {
	case !isWWPN(c.WWPN) || len(c.WWPN) > vhost.MaxWWPN:
		return fmt.Errorf("target name %q: not of the form naa.5001405a1b2c3d4e (or fc.…, iqn.…)", c.WWPN)
	case c.Queues < 0 || c.Queues > maxQueues:
		return fmt.Errorf("%d request queues: want 1 to %d", c.Queues, maxQueues)
	case c.RingSize < 4 || c.RingSize > maxRingSize || c.RingSize&(c.RingSize-1) != 0:
		return fmt.Errorf("ring size %d: want a power of two from 4 to %d", c.RingSize, maxRingSize)
	case c.Workers < SharedWorker || c.Workers > c.Queues:
		return fmt.Errorf("%d workers: want 1 to one for each of %d request queues", c.Workers, c.Queues)
	}
	return nil
}

// open makes d.dev, with an owner and workers and without an endpoint.
func (d *Device) open() error {
	dev, err := vhost.OpenSCSI()
	if err != nil {
		return err
	}
	dev.Before = d.cfg.Before
	if err := d.prepare(dev); err != nil {
		return errors.Join(err, dev.Close())
	}
	d.dev = dev
	return nil
}

// Check reports whether this host has a vhost-scsi that gvm can use.
func Check(p ABIPolicy) error {
	dev, err := vhost.OpenSCSI()
	if err == nil {
		_, _, err = p.ask(dev)
		err = errors.Join(err, dev.Close())
	}
	if err != nil {
		return fmt.Errorf("vhost-scsi: %w", err)
	}
	return nil
}

// ask returns the kernel's feature bits, and a note for the user if its
// interface is one that the policy accepts.
func (p ABIPolicy) ask(dev *vhost.SCSI) (features uint64, note string, err error) {
	v, err := dev.ABIVersion()
	if err != nil {
		return 0, "", err
	}
	if note, err = p.check(v); err != nil {
		return 0, "", err
	}
	if features, err = dev.Features(); err != nil {
		return 0, "", err
	}
	if features&virtio.FeatureVersion1 == 0 {
		return 0, "", fmt.Errorf("this kernel's features %#x lack VIRTIO_F_VERSION_1: boot a newer kernel", features)
	}
	return features, note, nil
}

func (d *Device) prepare(dev *vhost.SCSI) error {
	features, note, err := d.cfg.ABI.ask(dev)
	if err != nil {
		return err
	}
	if d.kernel = features; note != "" {
		d.cfg.Note(note)
	}
	if err := dev.SetOwner(); err != nil {
		return err
	}
	switch _, err := dev.VringBase(firstRequestQueue + d.cfg.Queues - 1); {
	case errors.Is(err, unix.ENOBUFS):
		return fmt.Errorf("%d request queues: more than this kernel serves; "+
			"ask for fewer, or write the number to /sys/module/vhost_scsi/parameters/max_io_vqs", d.cfg.Queues)
	case err != nil:
		return err
	}
	if err := d.startWorkers(dev); err != nil {
		return err
	}
	// An endpoint needs a memory table, and no vrings.
	if err := dev.SetMemTable(nil); err != nil {
		return err
	}
	if err := dev.SetEndpoint(d.endpoint); err != nil {
		return d.explain(err)
	}
	return dev.ClearEndpoint(d.endpoint)
}

// startWorkers deals the request queues out to threads of their own, which
// stay until the device is closed.
func (d *Device) startWorkers(dev *vhost.SCSI) error {
	n := d.cfg.Workers
	switch n {
	case SharedWorker:
		return nil
	case 0:
		n = d.cfg.Queues
	}
	ids := make([]uint32, n)
	for i := range ids {
		id, err := dev.NewWorker()
		if errors.Is(err, unix.ENOTTY) {
			if d.cfg.Workers == 0 {
				return nil
			}
			return fmt.Errorf("%w: this kernel has one worker for all queues; "+
				"boot Linux 6.5 or newer, or ask for no number", err)
		}
		if err != nil {
			return err
		}
		ids[i] = id
	}
	for q := range d.cfg.Queues {
		if err := dev.AttachVringWorker(firstRequestQueue+q, ids[q%len(ids)]); err != nil {
			return err
		}
	}
	return nil
}

// targets is where LIO's targets of vhost are in configfs.
const targets = "/sys/kernel/config/target/vhost"

// explain adds to what VHOST_SCSI_SET_ENDPOINT answered what configfs shows:
// the kernel has one number for no such target, one without a nexus and one in
// use.
func (d *Device) explain(err error) error {
	if !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EEXIST) {
		return err
	}
	dir := filepath.Join(targets, d.cfg.WWPN)
	groups, _ := filepath.Glob(dir + "/tpgt_*") // the name has no wildcards
	nexus := false
	for _, g := range groups {
		_, err := os.ReadFile(filepath.Join(g, "nexus")) // without one: ENODEV
		nexus = nexus || err == nil
	}
	why := "another process uses it"
	switch _, e := os.Stat(dir); {
	case e != nil:
		why = fmt.Sprintf("there is no %s; make the target, and mount configfs if %s is empty",
			dir, filepath.Dir(filepath.Dir(targets)))
	case len(groups) == 0:
		why = fmt.Sprintf("it has no portal group; mkdir %s/tpgt_1", dir)
	case !nexus:
		why = fmt.Sprintf("it has no nexus; write an initiator's name to %s/nexus", groups[0])
	}
	return fmt.Errorf("%w: %s", err, why)
}

// Close stops the device and closes the kernel's half. It comes last.
func (d *Device) Close() error {
	err := d.Reset()
	if d.dev != nil {
		err = errors.Join(err, d.dev.Close())
		d.dev = nil
	}
	return err
}

// ID implements virtio.Device.
func (*Device) ID() virtio.ID { return virtio.IDSCSI }

// Features implements virtio.Device: of what the kernel has, what the transport
// can carry. T10_PI changes the layout of requests and needs disks with
// protection information; dirty logging is vhost's own; the kernel has no event
// for changed parameters (VIRTIO_SCSI_F_CHANGE).
func (d *Device) Features() uint64 {
	return d.kernel & (vhost.FeatureSCSIHotplug | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx)
}

// QueueSizes implements virtio.Device: control, event and request queues.
func (d *Device) QueueSizes() []uint16 {
	sizes := []uint16{sideQueueSize, sideQueueSize}
	for range d.cfg.Queues {
		sizes = append(sizes, d.cfg.RingSize)
	}
	return sizes
}

// Config implements virtio.Device (5.6.4). The kernel's sizes of CDB and sense
// data cannot be changed, so the device is no ConfigWriter: what the driver
// writes to them is dropped by the transport, and it reads the values in force.
func (d *Device) Config() []byte {
	ring := uint32(d.cfg.RingSize)
	// Beside the data, header and response take a descriptor each. Half of the
	// pages of the kernel's request may go to segments that start and end
	// inside one.
	segMax := min(ring-2, vhost.SCSIMaxPages/4)
	// The largest request may then touch no more pages than the kernel takes:
	// those of its length, and two more for each segment that is not aligned.
	maxSectors := (vhost.SCSIMaxPages - 2*segMax) * (4096 / 512)
	b := make([]byte, 0, 36)
	for _, v := range []uint32{
		uint32(d.cfg.Queues), // num_queues
		segMax,
		maxSectors,
		ring, // cmd_per_lun
		16,   // event_info_size
		vhost.SCSISenseSize,
		vhost.SCSICDBSize,
		uint32(d.cfg.MaxTarget) << 16, // max_channel, max_target: 16 bits each
		16383,                         // max_lun
	} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}
