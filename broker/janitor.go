package broker

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/lio"
	"gvm/panics"
	"gvm/text"
)

// unit is a disk for a target of the kernel's, in a message to a Janitor.
type unit struct {
	Serial      string `json:",omitempty"`
	ReadOnly    bool
	BlockSize   int
	Cache       scsi.CacheMode
	Physical    int   // scsi.UnitConfig.PhysicalBlockExponent
	Granularity int64 // block.Facts.Granularity
}

// jailed has a Janitor change the kernel's target of a machine in a jail.
type jailed struct{ client *Client }

// newJailed returns the kernel of a broker in a jail. conn leads to the machine's Janitor.
func newJailed(machine string, conn *net.UnixConn) kernel {
	j := jailed{newClient(machine, conn, func(string) {})}
	panics.Go(j.client.receive)
	return kernel{j.addTo, j.removeFrom, func(int, string) error { return errors.ErrUnsupported }}
}

func (j jailed) addTo(_ int, wwn string, u lio.Unit) ([]string, error) {
	facts, files := u.Backend.(*block.File).Export()
	flag := unix.O_RDWR
	if u.ReadOnly {
		flag = unix.O_RDONLY
	}
	// The descriptor shows this user's right to the image, and has none of the machine's locks.
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", files[0].Fd()), flag|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: string(facts.Path), Err: err}
	}
	f := os.NewFile(uintptr(fd), string(facts.Path))
	defer f.Close()
	return j.ask(message{Op: addTo, Path: facts.Identity, WWN: wwn, LUN: u.LUN, Unit: &unit{u.Serial, u.ReadOnly,
		u.BlockSize, u.Cache, u.PhysicalBlockExponent, facts.Granularity}}, f)
}

func (j jailed) removeFrom(_ int, wwn string, lun int) error {
	_, err := j.ask(message{Op: removeFrom, WWN: wwn, LUN: lun})
	return err
}

func (j jailed) ask(m message, files ...*os.File) (notes []string, err error) {
	a, err := j.client.call(m, nil, files...)
	if errors.Is(err, errEnded) {
		err = errors.New("the janitor that changes the kernel's disks has ended: this machine keeps those that it has")
	}
	return a.Notes, err
}

// Janitor changes the kernel's target of a machine in a jail. It is outside of the jail and has
// root's rights. It is asked by the machine's broker, which a user may control who may not get more
// rights by that: the disks are files of the jail that this user has open.
type Janitor struct {
	Machine int      // its PID
	Jail    *os.File // the jail's directory, with its path on the host as name
	Images  []string // paths that are the same in the jail and on the host, and lead to images

	kernel kernel        // nil functions: those of package lio
	rest   time.Duration // after each request; 0: janitorRest
	added  int           // disks, less those removed
}

// janitorRest is the time between two requests, in which processes of other machines get the lock
// of LIO.
const janitorRest = 100 * time.Millisecond

// maxAdded bounds the kernel's memory for disks, for which no control group of the machine's
// counts.
const maxAdded = 256

// Serve answers requests until the other end of the pair is closed.
func (j *Janitor) Serve(pair *os.File) error {
	c, err := net.FileConn(pair)
	if err != nil {
		return fmt.Errorf("janitor: %w", err)
	}
	defer c.Close()
	pair.Close()
	j.serve(c.(*net.UnixConn))
	return nil
}

func (j *Janitor) serve(c *net.UnixConn) {
	if j.kernel.addTo == nil {
		j.kernel = kernel{addTo: lio.AddTo, removeFrom: lio.RemoveFrom}
	}
	if j.rest == 0 {
		j.rest = janitorRest
	}
	for r := newReceiver(c); ; time.Sleep(j.rest) {
		m, _, files, err := r.next()
		if err != nil {
			return
		}
		notes, err := j.do(m, files)
		closeAll(files)
		a := message{ID: m.ID, Op: m.Op, Notes: notes, Err: encodeError(err, j.Machine)}
		if send(c, a, nil) != nil {
			return
		}
	}
}

// do serves a request. The caller closes the files.
func (j *Janitor) do(m message, files []*os.File) (notes []string, err error) {
	switch {
	case m.Op == addTo && m.Unit != nil && len(files) == 1:
		if notes, err = j.addTo(m, files[0]); err == nil {
			j.added++
		}
	case m.Op == removeFrom:
		if err = j.kernel.removeFrom(j.Machine, m.WWN, m.LUN); err == nil {
			j.added--
		}
	default:
		err = fmt.Errorf("janitor: %.20q: unknown request", m.Op)
	}
	return notes, err
}

// refused is an error that the user of the control socket can mend.
type refused string

func (r refused) Error() string { return string(r) }

func (r refused) Unwrap() error { return lio.ErrUnit }

func (j *Janitor) addTo(m message, image *os.File) ([]string, error) {
	path, f, err := j.open(string(m.Path))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if j.added >= maxAdded {
		return nil, refused(fmt.Sprintf("%s: the kernel serves %d added disks of this machine already", path, j.added))
	}
	given, err := image.Stat()
	if err != nil {
		return nil, err
	}
	found, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !os.SameFile(given, found) {
		return nil, refused(path + ": was replaced after it was opened")
	}
	device := found.Mode().Type() == fs.ModeDevice
	if !mayUse(image, !m.Unit.ReadOnly) || !found.Mode().IsRegular() && !device {
		return nil, refused(path + ": is not open for the disk's reads and writes")
	}
	size, err := image.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	b, err := block.Import(block.Facts{Path: text.Name(path), Identity: text.Name(path), Size: size,
		BlockSize: int64(m.Unit.BlockSize), Granularity: max(m.Unit.Granularity, 0), ReadOnly: m.Unit.ReadOnly,
		Block: device}, []*os.File{f}, block.Options{})
	if err != nil {
		return nil, err
	}
	return j.kernel.addTo(j.Machine, m.WWN, lio.Unit{LUN: m.LUN, UnitConfig: scsi.UnitConfig{Backend: b,
		Serial: m.Unit.Serial, ReadOnly: m.Unit.ReadOnly, BlockSize: m.Unit.BlockSize, Cache: m.Unit.Cache,
		PhysicalBlockExponent: m.Unit.Physical}})
}

// open opens the image that has a path in the jail, to name it only, and returns its path on the
// host. No link of the jail's user and no file system that this user has mounted leads elsewhere.
func (j *Janitor) open(path string) (onHost string, f *os.File, err error) {
	dir, name, how := unix.AT_FDCWD, path, unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS}
	onHost = path
	if !slices.Contains(j.Images, path) {
		const run = "/run/"
		below, ok := strings.CutPrefix(path, run)
		if !ok || !filepath.IsLocal(below) {
			return "", nil, refused(fmt.Sprintf("%s: in a jail the kernel serves images of the command line and of %s: "+
				"put it there, and add it as /run/NAME", path, filepath.Join(j.Jail.Name(), run)))
		}
		dir, name, onHost = int(j.Jail.Fd()), path[1:], filepath.Join(j.Jail.Name(), path)
		how.Resolve |= unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV
	}
	fd, err := unix.Openat2(dir, name, &how)
	if err == unix.EXDEV {
		return "", nil, refused(fmt.Sprintf("%s: in a jail the kernel serves no image of a file system that is mounted "+
			"in %s", onHost, filepath.Join(j.Jail.Name(), "run")))
	}
	if err != nil {
		return "", nil, &fs.PathError{Op: "open", Path: onHost, Err: err}
	}
	return onHost, os.NewFile(uintptr(fd), onHost), nil
}

// mayUse reports whether a descriptor shows the right of the process that has opened it to read a
// file, and to write anywhere in it.
func mayUse(f *os.File, write bool) bool {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&(unix.O_PATH|unix.O_APPEND) != 0 {
		return false
	}
	mode := flags & unix.O_ACCMODE
	return mode == unix.O_RDWR || mode == unix.O_RDONLY && !write
}
