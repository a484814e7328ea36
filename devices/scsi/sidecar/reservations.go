package sidecar

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"gvm/devices/block"
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
type Reservations struct {
	path  string
	files block.Files
}

// NewReservations returns where the image's persistent reservations are kept:
// IMAGE.pr, next to the image that symbolic links lead to. The lock on the image
// covers it. nil for a block device and for memory, which have no such place.
func NewReservations(b *block.File) *Reservations {
	path, err := b.Beside(".pr", "reservations")
	if err != nil || path == "" {
		return nil
	}
	return &Reservations{path, b.Files()}
}

var _ scsi.ReservationKeeper = (*Reservations)(nil)

// Path returns the path of the file.
func (r *Reservations) Path() string { return r.path }

// Load implements scsi.ReservationKeeper.
func (r *Reservations) Load() ([]byte, error) {
	f, err := r.files.Open(r.path, os.O_RDONLY, 0)
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
		return r.files.Remove(r.path)
	}
	return r.files.Replace(r.path, state)
}
