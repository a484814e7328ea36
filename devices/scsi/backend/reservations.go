package backend

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi"
	"gvm/kvmapi/nowait"
)

// maxReservations is larger than any state of persistent reservations.
const maxReservations = 1 << 20

// reservationsMagic is how a state begins (scsi's keptMagic).
const reservationsMagic = "GVM-PR\x00"

// Reservations keeps the persistent reservations of a disk in a file beside its
// image. It is a scsi.ReservationKeeper. The file is there only as long as there
// is something to keep.
type Reservations struct{ path string }

// Reservations returns where the image's persistent reservations are kept:
// IMAGE.pr, next to the image that symbolic links lead to. The lock on the image
// covers it. nil for a block device, which has no such place.
func (b *File) Reservations() *Reservations {
	if b.block {
		return nil
	}
	return &Reservations{b.Identity() + ".pr"}
}

var _ scsi.ReservationKeeper = (*Reservations)(nil)

// Path returns the path of the file.
func (r *Reservations) Path() string { return r.path }

// Load implements scsi.ReservationKeeper.
func (r *Reservations) Load() ([]byte, error) {
	f, err := nowait.Open(r.path, os.O_RDONLY|unix.O_NOFOLLOW, 0, nowait.Regular)
	kind := (*nowait.KindError)(nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.As(err, &kind):
		return nil, fmt.Errorf("%w: %w", err, scsi.ErrReservationState)
	case err != nil:
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case fi.Size() == 0 || fi.Size() > maxReservations:
		return nil, fmt.Errorf("%s: %w", r.path, scsi.ErrReservationState)
	}
	return io.ReadAll(io.LimitReader(f, maxReservations))
}

// Save implements scsi.ReservationKeeper. After a crash the file has either the
// old or the new state. A file that is something else by now stays.
func (r *Reservations) Save(state []byte) error {
	old, err := r.Load()
	if err != nil {
		return err
	}
	if old != nil && !bytes.HasPrefix(old, []byte(reservationsMagic)) {
		return fmt.Errorf("%s: %w", r.path, scsi.ErrReservationState)
	}
	if len(state) == 0 {
		if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncDir(filepath.Dir(r.path))
	}
	tmp, err := writeSynced(r.path, state)
	if err == nil {
		err = os.Rename(tmp, r.path)
	}
	if err != nil {
		if tmp != "" {
			os.Remove(tmp)
		}
		return err
	}
	return syncDir(filepath.Dir(r.path))
}

// writeSynced writes a new file beside path that is on stable storage when it returns.
func writeSynced(path string, data []byte) (name string, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return f.Name(), errors.Join(err, f.Close())
}

// durable makes a new file durable, with the name that it has.
func durable(f *os.File, path string) error {
	if err := f.Sync(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes what was made, renamed or removed in a directory durable: a variable for tests. A
// file system that cannot (some FUSE and network ones), and a directory that only others may read,
// are left to do that in their own time.
var syncDir = func(path string) error {
	d, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return errors.Join(err, d.Close())
}
