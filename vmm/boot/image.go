package boot

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
	"gvm/panics"
)

// ImageError reports user input that cannot be booted. Name is the file (or the command line), What
// completes a sentence that starts with Name, and Mend says how to fix it.
type ImageError struct{ Name, What, Mend string }

func (e *ImageError) Error() string {
	return cmp.Or(e.Name, `""`) + " " + e.What + ": " + e.Mend
}

// File is a file that Load reads into guest memory.
type File struct {
	Name string // for messages
	io.ReaderAt
	Size int64 // bytes

	look func() error // its error ends work on the file; nil: nothing does
}

// maxStream bounds the data read from a pipe or device.
const maxStream = 1 << 30

// pieceSize is the size of a read between two checks of the context.
const pieceSize = 4 << 20

// OpenFile opens a kernel or initrd; reads fail once ctx is done. The content of a pipe or block
// device is read at once, to its end; a pipe without a writer is empty. Errors are *ImageError, or
// those of stopped.
func OpenFile(ctx context.Context, path string) (*File, error) {
	return nowait.Until(ctx, func() string { return path + " was read" },
		func() (*File, error) { return openFile(ctx, path) }, func(f *File) { f.Close() })
}

func openFile(ctx context.Context, path string) (*File, error) {
	f, err := nowait.Open(path, os.O_RDONLY, 0, nowait.Regular|nowait.Pipe|nowait.BlockDevice)
	if err != nil {
		return nil, openError(path, err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, openError(path, err)
	}
	look := until(ctx, path)
	if st.Mode().IsRegular() && st.Size() > 0 {
		return &File{path, &input{f, look}, st.Size(), look}, nil
	}
	defer f.Close()
	all, size, err := drain(ctx, path, f)
	switch {
	case err != nil:
	case size > maxStream:
		err = &ImageError{path, fmt.Sprintf("does not end within %d MiB", maxStream>>20), "give a regular file"}
	case size == 0 && nowait.KindOf(st.Mode()) == nowait.Pipe:
		err = &ImageError{path, "is a pipe that no program writes", "start the program first, or give a regular file"}
	case size == 0:
		err = &ImageError{path, "is empty", wantWhole}
	}
	if err != nil {
		all.Close()
		return nil, err
	}
	return &File{path, &input{all, look}, size, look}, nil
}

// drain reads a file into memory of just its size, until it exceeds maxStream.
func drain(ctx context.Context, path string, f *os.File) (all *os.File, size int64, err error) {
	fd, err := unix.MemfdCreate("gvm-input", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, 0, fmt.Errorf("memory for %s: %w", path, err)
	}
	all = os.NewFile(uintptr(fd), path)
	// Only pipes have deadlines; the others are read in pieces.
	defer context.AfterFunc(ctx, panics.Func(func() { _ = f.SetReadDeadline(time.Now()) }))()
	for size <= maxStream {
		n, err := io.CopyN(all, f, pieceSize)
		size += n
		switch {
		case ctx.Err() != nil:
			return all, size, stopped(ctx, path)
		case err == io.EOF:
			return all, size, nil
		case err != nil:
			return all, size, openError(path, err)
		}
	}
	return all, size, nil
}

// input is a file whose reads end with the error of look.
type input struct {
	*os.File
	look func() error
}

func (in *input) ReadAt(b []byte, off int64) (n int, err error) {
	for err == nil && n < len(b) {
		if err := in.look(); err != nil {
			return n, err
		}
		var m int
		m, err = in.File.ReadAt(b[n:min(len(b), n+pieceSize)], off+int64(n))
		n += m
	}
	return n, err
}

// InMemory returns a file with the contents b. Work on it ends with ctx.
func InMemory(ctx context.Context, name string, b []byte) *File {
	return &File{name, bytes.NewReader(b), int64(len(b)), until(ctx, name)}
}

// ended returns an error once work on the file has to end.
func (f *File) ended() error {
	if f.look == nil {
		return nil
	}
	return f.look()
}

// until returns a File.look for a file whose work ends with ctx.
func until(ctx context.Context, path string) func() error {
	return func() error {
		if ctx.Err() != nil {
			return stopped(ctx, path)
		}
		return nil
	}
}

// stopped returns the error for a context that ended while a file was read.
func stopped(ctx context.Context, path string) error {
	return &stoppedError{fmt.Errorf("%w while %s was read", context.Cause(ctx), path)}
}

type stoppedError struct{ error }

func (e *stoppedError) Unwrap() error { return e.error }

// Close closes the file where OpenFile left one open.
func (f *File) Close() error {
	if c, ok := f.ReaderAt.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

func openError(path string, err error) error {
	kind := (*nowait.KindError)(nil)
	target, linkErr := os.Readlink(path)
	switch {
	case errors.As(err, &kind):
		return &ImageError{path, "is " + kind.Is.String(), "give a file"}
	case errors.Is(err, fs.ErrNotExist) && linkErr == nil:
		return &ImageError{path, "is a symbolic link to " + target + ", which does not exist",
			"remove the link, or name that file"}
	case errors.Is(err, fs.ErrNotExist):
		return &ImageError{path, "does not exist", "check the path"}
	case errors.Is(err, fs.ErrPermission):
		return &ImageError{path, "may not be read by this user", "change its permissions"}
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return &ImageError{path, fmt.Sprintf("cannot be read (%v)", err), "check the path"}
}

// ReadFull fills b from off. Errors are *ImageError, or those of stopped.
func (f *File) ReadFull(b []byte, off int64) error {
	if n, err := f.ReadAt(b, off); n < len(b) {
		if err == nil || err == io.EOF {
			return &ImageError{f.Name, "became shorter while it was read", "give a file that no program writes"}
		}
		end, part := (*stoppedError)(nil), (*ImageError)(nil) // part: a file that f is made of
		if errors.As(err, &end) || errors.As(err, &part) {
			return err
		}
		return openError(f.Name, err)
	}
	return nil
}

// Image is a kernel whose headers are checked.
type Image struct {
	*File
	elf *elfKernel   // an ELF kernel, or
	hdr *setupHeader // a bzImage

	cached atomic.Pointer[string] // its file in the cache; nil: none is known
}

// Cached returns the path in the cache of the bzImage's decompressed kernel, which Load has read or
// stored, or "".
func (im *Image) Cached() string {
	if path := im.cached.Load(); path != nil {
		return *path
	}
	return ""
}

// Open opens a kernel, as OpenFile does, and checks its headers.
func Open(ctx context.Context, path string) (*Image, error) {
	f, err := OpenFile(ctx, path)
	if err != nil {
		return nil, err
	}
	im, err := NewImage(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return im, nil
}

// NewImage checks a kernel's headers. Errors are *ImageError. The Image keeps f.
func NewImage(f *File) (*Image, error) {
	head := make([]byte, min(f.Size, 4096))
	if err := f.ReadFull(head, 0); err != nil {
		return nil, err
	}
	im := &Image{File: f}
	var err error
	switch {
	case bytes.HasPrefix(head, []byte("\x7fELF")):
		im.elf, err = parseELF(f.Name, f, f.Size)
	case isBzImage(head):
		im.hdr, err = parseSetupHeader(f.Name, head, f.Size)
	default:
		err = foreign(f.Name, head)
	}
	if err != nil {
		return nil, cmp.Or(f.ended(), err)
	}
	return im, nil
}

// foreign describes a file that is neither ELF nor bzImage.
func foreign(name string, head []byte) error {
	at := func(off int, magic string) bool {
		return off <= len(head) && bytes.HasPrefix(head[off:], []byte(magic))
	}
	const initrd = "give an initrd as initrd, and an x86-64 bzImage or vmlinux as kernel"
	switch {
	case len(head) == 0:
		return &ImageError{name, "is empty", wantWhole}
	case at(0x38, "ARM\x64"):
		return &ImageError{name, "is an arm64 kernel Image", wantKernel}
	case at(0x38, "RSC\x05"):
		return &ImageError{name, "is a RISC-V kernel Image", wantKernel}
	case at(0, "MZ") && at(4, "zimg"):
		return &ImageError{name, "is a compressed EFI kernel of another architecture", wantKernel}
	case at(0, "\x27\x05\x19\x56"):
		return &ImageError{name, "is a U-Boot uImage", wantKernel}
	case at(0, "070701"), at(0, "070702"), at(0, "070707"):
		return &ImageError{name, "is a cpio archive, as an initrd is", initrd}
	case at(0, "MZ") && len(head) < hdrNeeded:
		return &ImageError{name, "is a truncated bzImage", wantWhole}
	case at(0, "QFI\xfb"), at(0x1fe, "\x55\xaa"), at(0x438, "\x53\xef"):
		return &ImageError{name, "is a disk image", "give it as disk, and an x86-64 bzImage or vmlinux as kernel"}
	case at(0, "!<arch>\n"):
		return &ImageError{name, "is an archive (a .deb package or .a library)", "unpack it and give the bzImage in it"}
	case at(0, "MZ"):
		return &ImageError{name, "is an EFI or DOS program, not a kernel", wantKernel}
	}
	if c := detect(head); c != nil {
		return &ImageError{name, "is compressed with " + c.name + " and not a kernel as it stands",
			"decompress it if it is a vmlinux; " + initrd}
	}
	return &ImageError{name, "is neither a bzImage nor an ELF file", wantKernel}
}
