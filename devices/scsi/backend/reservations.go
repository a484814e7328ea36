package backend

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi"
)

// maxReservations is larger than any state of persistent reservations.
const maxReservations = 1 << 20

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
	f, err := os.OpenFile(r.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular() || fi.Size() == 0 || fi.Size() > maxReservations:
		return nil, fmt.Errorf("%s: %w", r.path, scsi.ErrReservationState)
	}
	return io.ReadAll(f)
}

// Save implements scsi.ReservationKeeper. After a crash the file has either the
// old or the new state.
func (r *Reservations) Save(state []byte) error {
	if len(state) == 0 {
		if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncDir(filepath.Dir(r.path))
	}
	tmp := r.path + ".tmp"
	if err := writeSynced(tmp, state); err != nil {
		os.Remove(tmp)
		return err
	}
	if err := os.Rename(tmp, r.path); err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(filepath.Dir(r.path))
}

// writeSynced writes a file that is on stable storage when it returns.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// syncDir makes what was renamed or removed in a directory durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
