package boot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"gvm/kvmapi/nowait"
)

// ImageError says that what the user gave cannot be booted: Name is the file
// (or the command line), What completes a sentence that starts with it, Mend
// says what to do.
type ImageError struct{ Name, What, Mend string }

func (e *ImageError) Error() string { return e.Name + " " + e.What + ": " + e.Mend }

// File is a file that Load reads into guest memory.
type File struct {
	Name string // for messages
	io.ReaderAt
	Size int64 // bytes
}

// maxStream bounds what is read from a pipe or device given as a file.
const maxStream = 1 << 30

// OpenFile opens a kernel or initrd for reading. A pipe and a block device are read to
// their end; a pipe that no program writes is empty. Errors are *ImageError, or
// os.ErrDeadlineExceeded if a pipe has no end by then. A zero time is never.
func OpenFile(path string, by time.Time) (*File, error) {
	f, err := nowait.Open(path, os.O_RDONLY, 0, nowait.Regular|nowait.Pipe|nowait.BlockDevice)
	if err != nil {
		return nil, openError(path, err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, openError(path, err)
	}
	if st.Mode().IsRegular() && st.Size() > 0 {
		return &File{path, f, st.Size()}, nil
	}
	defer f.Close()
	_ = f.SetReadDeadline(by) // only pipes have one
	b, err := io.ReadAll(io.LimitReader(f, maxStream+1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, err
	}
	if err != nil {
		return nil, openError(path, err)
	}
	if len(b) > maxStream {
		return nil, &ImageError{path, fmt.Sprintf("does not end within %d MiB", maxStream>>20), "give a regular file"}
	}
	if len(b) == 0 && nowait.KindOf(st.Mode()) == nowait.Pipe {
		return nil, &ImageError{path, "is a pipe that no program writes", "start the program first, or give a regular file"}
	}
	if len(b) == 0 {
		return nil, &ImageError{path, "is empty", wantWhole}
	}
	return &File{path, bytes.NewReader(b), int64(len(b))}, nil
}

// Close closes the file where OpenFile left one open.
func (f *File) Close() error {
	if c, ok := f.ReaderAt.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

func openError(path string, err error) error {
	kind := (*nowait.KindError)(nil)
	switch {
	case errors.As(err, &kind):
		return &ImageError{path, "is " + kind.Is.String(), "give a file"}
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

// readFull fills b from off.
func readFull(f *File, b []byte, off int64) error {
	if n, err := f.ReadAt(b, off); n < len(b) {
		if err == nil || err == io.EOF {
			return &ImageError{f.Name, "became shorter while it was read", "give a file that nobody writes"}
		}
		return openError(f.Name, err)
	}
	return nil
}

// Image is a kernel that has been checked as far as its headers tell.
type Image struct {
	*File
	elf *elfKernel   // an ELF kernel, or
	hdr *setupHeader // a bzImage
}

// Open opens a kernel, as OpenFile does, and checks its headers, before anything else is
// started.
func Open(path string, by time.Time) (*Image, error) {
	f, err := OpenFile(path, by)
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
	if err := readFull(f, head, 0); err != nil {
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
		return nil, err
	}
	return im, nil
}

// foreign says what a file is that is neither ELF nor bzImage.
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
		return &ImageError{name, "is compressed with " + c.name + " and not a kernel as it stands", "decompress it if it is a vmlinux; " + initrd}
	}
	return &ImageError{name, "is neither a bzImage nor an ELF file", wantKernel}
}
