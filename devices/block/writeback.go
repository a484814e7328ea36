package block

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// WriteBack writes the image's pages in the page cache, in pieces, until ctx ends; a flush has
// little left to do then. A thread that waits for a flush keeps its process from ending, so the end
// of a machine comes here first. An error of the storage is told once by the kernel, to this.
func (b *File) WriteBack(ctx context.Context) error {
	const most, least = 1 << 16, 4 << 20 // pieces, and bytes of one
	step := max((b.Size()/most+least-1)/least*least, least)
	for off := int64(0); off < b.Size(); off += step {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := unix.SyncFileRange(b.fd, off, step,
			unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
		switch {
		case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ESPIPE):
			return nil
		case err != nil:
			err = b.wrap("write back", err)
			b.damage(err)
			return err
		}
	}
	return nil
}

// WriteBack is that of the file above the base.
func (o *Overlay) WriteBack(ctx context.Context) error { return o.top.WriteBack(ctx) }
