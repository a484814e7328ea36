package block

import (
	"errors"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// Resize gives the image n bytes, or takes the size that it has by now if n is
// 0, as that of a block device, which is not gvm's to change. The new part of
// an image that grows reads as zeroes. Less than before is ErrSize unless
// shrink is set. On an error the size is as it was.
//
// The caller keeps all other operations away from an image that becomes smaller. cut, which may be
// nil, is called before the image changes, and drops the data beside it for bytes from size on.
func (b *File) Resize(n int64, shrink bool, cut func(b *File, size int64) error) error {
	has, err := b.currentSize()
	if err != nil {
		return b.wrap("resize", err)
	}
	size := n
	if n == 0 {
		size = has
	}
	if n < 0 || n%b.blockSize != 0 {
		return badImage(ErrSize, b.path, "size %d is not a multiple of the block size %d; %d is",
			n, b.blockSize, roundUp(n, b.blockSize))
	}
	if err := b.checkSize(size); err != nil {
		return err
	}
	switch most := max(b.Size(), has); {
	case size < most && !shrink:
		return badImage(ErrSize, b.path,
			"has %d bytes, and would have %d: the data behind them would be lost, which --shrink allows", most, size)
	case size == has:
	case b.block:
		return badImage(ErrSize, b.path, "is a block device of %d bytes, size says %d", has, size)
	case b.readOnly:
		return badImage(ErrSize, b.path, "is readonly and keeps its %d bytes", has)
	default:
		if cut != nil { // first, so that no new block gets an old one's data, even after a failure
			if err := cut(b, min(size, has)); err != nil {
				return err
			}
		}
		if err := b.f.Truncate(size); err != nil {
			return nowait.CreateError(b.path, err)
		}
	}
	b.size.Store(size)
	return nil
}

// roundUp returns the first positive multiple of block that is n or more.
func roundUp(n, block int64) int64 { return max((n+block-1)/block, 1) * block }

// Undo takes back what Options.Size did to the image, for a guest that never had it. What holds
// data by now is left alone.
func (b *File) Undo() {
	if b.found == b.Size() || b.block || b.readOnly {
		return
	}
	if _, err := unix.Seek(b.fd, b.found, unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
		return
	}
	if b.made {
		_ = b.Files().Discard(b.f, b.path)
		return
	}
	_ = b.f.Truncate(b.found)
}
