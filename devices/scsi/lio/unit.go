package lio

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/kvmapi/nowait"
)

// Unit is a disk of a Target.
type Unit struct {
	LUN int
	// UnitConfig describes the disk as for scsi.NewUnit. Its Backend must be a
	// *block.File: an image that the caller has open, with block.Options.Lend, and so
	// locked, until Target.Close or Remove has returned. OnError is never called: the kernel
	// reports failures in its own log.
	scsi.UnitConfig
}

// plan is a checked Unit with the parameters of its backstore.
type plan struct {
	Unit
	image     *block.File
	path      string // absolute, without symbolic links
	stat      fs.FileInfo
	device    bool // a block device
	serial    string
	plugin    string
	notes     []string
	blockSize int
}

func unsuitable(path, format string, a ...any) error {
	return fail(ErrUnit, nil, "%s: %s", path, fmt.Sprintf(format, a...))
}

// newPlan checks a Unit and works out its backstore. It changes nothing.
func newPlan(u Unit) (*plan, error) {
	image, ok := u.Backend.(*block.File)
	if !ok {
		return nil, fail(ErrUnit, nil, "LUN %d: LIO serves files and block devices only", u.LUN)
	}
	p := &plan{Unit: u, image: image, path: image.Identity(), plugin: fileio}
	if _, ok := scsi.EncodeLUN(u.LUN); !ok {
		return nil, unsuitable(p.path, "LUN %d: want 0 to 16383", u.LUN)
	}
	same, err := scsi.NewUnit(u.UnitConfig)
	if err != nil {
		return nil, fail(ErrUnit, err, "%s", p.path)
	}
	p.serial, p.blockSize = same.Serial(), same.BlockSize()
	if p.serial != strings.TrimSpace(p.serial) {
		return nil, unsuitable(p.path, "serial %q: LIO drops spaces at either end", p.serial)
	}
	if p.stat, err = os.Stat(p.path); err != nil {
		return nil, err
	}
	if open, err := image.Stat(); err != nil || !os.SameFile(open, p.stat) {
		return nil, errors.Join(err, fail(ErrBusy, nil, "%s: was replaced after it was opened", p.path))
	}
	p.device = p.stat.Mode()&fs.ModeDevice != 0
	if p.device || u.ReadOnly {
		p.plugin = iblock
	}
	if p.device {
		if err := p.checkDevice(); err != nil {
			return nil, err
		}
	}
	note := func(format string, a ...any) {
		p.notes = append(p.notes, p.path+": "+fmt.Sprintf(format, a...))
	}
	if u.Cache == scsi.Unsafe {
		note("LIO has no cache=unsafe: flushes are carried out, as with writeback")
	}
	if u.PhysicalBlockExponent > 0 && !p.device {
		note("LIO has no physical block size for files: the guest sees %d", p.blockSize)
	}
	return p, nil
}

// checkDevice checks the options against iblock, which takes over the write cache of the block
// device, and at least its block size.
func (p *plan) checkDevice() error {
	cache := p.queue("write_cache")
	switch {
	case p.ReadOnly:
	case p.Cache == scsi.WriteThrough && cache == "write back":
		return unsuitable(p.path, "cache=writethrough: this block device has a write cache, "+
			"which LIO shows the guest: use cache=writeback or backend=process")
	case p.Cache != scsi.WriteThrough && cache == "write through":
		p.notes = append(p.notes, p.path+": this block device has no write cache, so the guest sees none")
	}
	if n, err := strconv.Atoi(p.queue("logical_block_size")); err == nil && n > p.blockSize {
		return unsuitable(p.path, "block_size=%d: this block device has blocks of %d: use block_size=%[2]d",
			p.blockSize, n)
	}
	return nil
}

// queue reads an attribute of the block device's queue, which a partition has
// at the disk that it is part of.
func (p *plan) queue(name string) string {
	rdev := p.stat.Sys().(*syscall.Stat_t).Rdev
	dir := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(rdev), unix.Minor(rdev))
	for _, d := range []string{dir, dir + "../"} {
		if b, err := os.ReadFile(d + "queue/" + name); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

// companyID is the IEEE company id in the NAA designator of a disk (VPD page 83h): LIO makes the
// rest of it from the hexadecimal digits in the serial number, which may be few and the same for
// several disks. So the id is a hash of the serial number, with the bit set that marks a locally
// administered one.
func companyID(serial string) uint32 {
	sum := sha256.Sum256([]byte(serial))
	return 0x020000 | uint32(sum[0])&^3<<16 | uint32(sum[1])<<8 | uint32(sum[2])
}

// attribute is a file of a disk and its new contents.
type attribute struct{ name, value string }

// attributes returns the attributes that make the disk look like that of package scsi, in the order
// that the kernel accepts, all to be written after enable. Before that, the kernel overwrites
// block_size with the backstore's own, and emulate_tpu makes Linux 6.1 crash on a file that it has
// not opened yet.
func (p *plan) attributes() []attribute {
	onOff := map[bool]string{false: "0", true: "1"}
	number := func(n int64) string { return strconv.FormatInt(n, 10) }
	or := func(s, def string) string {
		if s == "" {
			return def
		}
		return s
	}
	out := []attribute{
		{"attrib/block_size", number(int64(p.blockSize))},
		{"attrib/is_nonrot", "1"},
		{"attrib/emulate_pr", "1"},
		// EXTENDED COPY reaches every other disk of this host's LIO by its NAA
		// designator, and not those of the guest alone.
		{"attrib/emulate_3pc", "0"},
		{"alua/default_tg_pt_gp/alua_access_type", "0"}, // TPGS=0: one port, no groups
		{"wwn/vendor_id", or(p.Vendor, "GVM")},
		{"wwn/product_id", or(p.Product, "DISK")},
		{"wwn/revision", or(p.Revision, "1")},
		{"wwn/company_id", fmt.Sprintf("%#06x", companyID(p.serial))},
		{"wwn/vpd_unit_serial", p.serial},
	}
	granularity := p.image.DiscardGranularity()
	thin := granularity > 0 && !p.ReadOnly
	if p.plugin == iblock {
		if thin {
			out = append(out,
				attribute{"attrib/max_unmap_block_desc_count", "256"},
				attribute{"attrib/emulate_tpu", "1"},
				attribute{"attrib/emulate_tpws", "1"})
		}
		return out
	}
	out = append(out,
		attribute{"attrib/emulate_write_cache", onOff[p.Cache != scsi.WriteThrough]},
		attribute{"attrib/optimal_sectors", number(int64(1 << 20 / p.blockSize))},
		// Linux from 7.0 on answers a short BLOCK LIMITS page, from which guests before
		// 6.9 read no limit: they take 65535 blocks, the most of WRITE SAME(10).
		attribute{"attrib/max_write_same_len", "65535"})
	if !thin {
		return out
	}
	// fileio has the length of one hole, in bytes, in 32 bits.
	return append(out,
		attribute{"attrib/max_unmap_lba_count", number(min(1<<20, 1<<31/int64(p.blockSize)))},
		attribute{"attrib/max_unmap_block_desc_count", "256"},
		attribute{"attrib/unmap_granularity", number(max(granularity/int64(p.blockSize), 1))},
		attribute{"attrib/emulate_tpu", "1"},
		attribute{"attrib/emulate_tpws", "1"},
		attribute{"attrib/unmap_zeroes_data", "1"})
}

// makeDisk makes the backstore of a plan at dir, which the caller removes, on an error too.
func (h *host) makeDisk(dir string, p *plan) error {
	if err := h.mkdir(dir); err != nil {
		return explain(err, filepath.Join(h.root, dir))
	}
	// The kernel opens the image by the path of our descriptor: its own syntax has neither commas
	// in paths nor long paths. O_PATH, because only the name is used.
	f, err := os.OpenFile(p.path, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !os.SameFile(st, p.stat) {
		return errors.Join(err, fail(ErrBusy, nil, "%s: was replaced while it was opened", p.path))
	}
	if p.ReadOnly {
		if f, err = readOnlyLoop(f, p); err != nil {
			return err
		}
		defer f.Close()
	}
	control := fmt.Sprintf("udev_path=/proc/self/fd/%d,readonly=%d", f.Fd(), btoi(p.ReadOnly))
	if p.plugin == fileio {
		control = fmt.Sprintf("fd_dev_name=/proc/self/fd/%d,fd_dev_size=%d", f.Fd(), p.image.Size())
		if p.Cache != scsi.WriteThrough {
			control += ",fd_buffered_io=1" // without it, every write is O_DSYNC
		}
	}
	todo := []attribute{{"control", control}, {"enable", "1"}}
	if len(p.path) < 510 { // SE_UDEV_PATH_LEN
		todo = append(todo, attribute{"udev_path", p.path})
	}
	for _, a := range append(todo, p.attributes()...) {
		err := h.write(dir+"/"+a.name, a.value)
		switch {
		case err == nil:
		case a.name == "wwn/company_id" && errors.Is(err, fs.ErrNotExist):
			return fail(ErrNoBackstore, nil,
				"%s: the kernel's SCSI target is older than Linux 5.11; use backend=process", p.path)
		case a.name == "enable" && errors.Is(err, unix.EBUSY):
			return fail(ErrBusy, nil,
				"%s: in use: mounted, or claimed by a device or another target; see lsblk and gvm lio list", p.path)
		case a.name == "enable":
			return fmt.Errorf("%s: the kernel's SCSI target cannot open it: %w", p.path, bare(err))
		default:
			return fmt.Errorf("%s: set %s to %q: %w", p.path, a.name, a.value, bare(err))
		}
	}
	return nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// readOnlyLoop puts a read-only loop device on an image, for iblock. fileio opens for writing,
// always. iblock with readonly=1 reports write protection to the guest, but does not refuse writes:
// on Linux 6.1 and 6.12 their data reaches the block device. A loop device refuses them. It is
// removed when its last user has closed it.
func readOnlyLoop(image *os.File, p *plan) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fail(ErrNoBackstore, err,
			"%s: readonly with backend=vhost needs a loop device: modprobe loop (CONFIG_BLK_DEV_LOOP)", p.path)
	}
	defer ctl.Close()
	file, err := nowait.Open(fmt.Sprintf("/proc/self/fd/%d", image.Fd()), os.O_RDONLY, 0,
		nowait.Regular|nowait.BlockDevice)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	for {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("%s: LOOP_CTL_GET_FREE: %w", p.path, err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		c := unix.LoopConfig{Fd: uint32(file.Fd()), Size: uint32(p.blockSize)}
		c.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
		copy(c.Info.File_name[:len(c.Info.File_name)-1], p.path)
		if err = unix.IoctlLoopConfigure(int(dev.Fd()), &c); err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) { // another process took the free one
			return nil, fmt.Errorf("%s: loop device: LOOP_CONFIGURE: %w", p.path, err)
		}
	}
}
