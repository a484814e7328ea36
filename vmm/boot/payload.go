package boot

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"
	"golang.org/x/sys/unix"
)

// maxVmlinux bounds a payload, and its decompressed size.
const maxVmlinux = 1 << 30

// compression is a compression format of kernels.
type compression struct {
	name, magic string
	trailer     int // bytes that the kernel build appends: the size (scripts/Makefile.lib, size_append)
	// open decompresses a stream. nil: gvm reads no streams of this format.
	open func(io.Reader) (io.Reader, error)
	// decode fills dst from src, and fails if src holds more, less, or damaged data, or once ended
	// returns an error. nil: it reads the result of open.
	decode func(dst, src []byte, ended func() error) error
}

var compressions = []compression{
	{"gzip", "\x1f\x8b", 0, func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }, nil},
	{"xz", "\xfd7zXZ\x00", 4, func(r io.Reader) (io.Reader, error) { return xz.NewReader(r, maxWindow) }, nil},
	{"zstd", "\x28\xb5\x2f\xfd", 4, openZstd, decodeZstd},
	{"lz4", "\x02\x21\x4c\x18", 4, nil, decodeLZ4},
	{"bzip2", "BZh", 4, func(r io.Reader) (io.Reader, error) { return bzip2.NewReader(r), nil }, nil},
	{"lzma", "\x5d\x00\x00", 4, func(r io.Reader) (io.Reader, error) {
		return lzma.ReaderConfig{DictCap: maxWindow}.NewReader(r)
	}, nil},
	{"lzo", "\x89LZO", 4, nil, func(_, _ []byte, _ func() error) error {
		return errors.New("gvm does not read it")
	}},
}

// detect returns the compression whose magic b starts with, or nil.
func detect(b []byte) *compression {
	for i := range compressions {
		if bytes.HasPrefix(b, []byte(compressions[i].magic)) {
			return &compressions[i]
		}
	}
	return nil
}

// vmlinux is a kernel extracted from a bzImage.
type vmlinux struct {
	elf     *elfKernel
	image   []byte
	mapping []byte // the mapping that holds image
	format  string
}

func (v *vmlinux) free() { _ = unix.Munmap(v.mapping) }

// scratch returns n zero bytes outside the Go heap, which Munmap frees at once.
func scratch(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("allocate %d bytes for the decompressed kernel: %w", n, err)
	}
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	return b, nil
}

// extract decompresses the payload of a bzImage, or takes the result from the cache directory if
// there is one and it has it.
func (im *Image) extract(cache string) (*vmlinux, error) {
	bad := func(format string, args ...any) (*vmlinux, error) {
		return nil, &ImageError{im.Name, fmt.Sprintf(format, args...), "use the boot mode bzimage"}
	}
	base, n := im.hdr.code()
	n = min(n, im.Size-base)
	off, size := int64(im.hdr.u32(hdrPayloadOff)), int64(im.hdr.u32(hdrPayloadLen))
	if size < 16 || off+size > n {
		return bad("has no payload that can be taken out")
	}
	if size > maxVmlinux {
		return bad("has a payload of %d MiB, and gvm decompresses %d MiB at most", size>>20, maxVmlinux>>20)
	}
	magic := make([]byte, 6)
	if err := im.File.ReadFull(magic, base+off); err != nil {
		return nil, err
	}
	c := detect(magic)
	if c == nil {
		return bad("has a payload of unknown compression (it starts with %x)", magic)
	}
	v := &vmlinux{format: c.name}
	path := ""
	if cache != "" {
		var err error
		payload := &File{Name: im.Name, ReaderAt: io.NewSectionReader(im.File, base+off, size), Size: size}
		if path, err = CachePath(cache, payload, cacheSuffix); err != nil {
			return nil, err
		}
		v.image, v.mapping = cached(path)
	}
	hit := v.image != nil
	if hit {
		im.cached.Store(&path)
	} else {
		src, err := scratch(int(size))
		if err != nil {
			return nil, err
		}
		defer unix.Munmap(src)
		if err := im.File.ReadFull(src, base+off); err != nil {
			return nil, err
		}
		// The kernel's own decompressor needs at least this much.
		out := binary.LittleEndian.Uint32(src[len(src)-4:])
		if out == 0 || out > im.hdr.u32(hdrInitSize) || out > maxVmlinux {
			return bad("has a payload that says it decompresses to %d bytes", out)
		}
		if v.image, err = scratch(int(out)); err != nil {
			return nil, err
		}
		v.mapping = v.image
		if err := c.decompress(v.image, src[:len(src)-c.trailer], im.File.ended); err != nil {
			v.free()
			if errors.As(err, new(*stoppedError)) {
				return nil, err
			}
			return bad("has a payload that cannot be decompressed (%s: %v)", c.name, err)
		}
	}
	var err error
	if v.elf, err = parseELF(im.Name+" (decompressed)", bytes.NewReader(v.image), int64(len(v.image))); err != nil {
		v.free()
		return nil, err
	}
	if !hit && path != "" {
		whole := v.elf // still reads the whole image
		trimmed := trim(v.image)
		k, err := parseELF(im.Name, bytes.NewReader(trimmed), int64(len(trimmed)))
		if err == nil && k.entry == whole.entry && k.pvh == whole.pvh { // neither was in the trimmed part
			Store(path, trimmed)
			im.cached.Store(&path)
		}
	}
	return v, nil
}

// trim removes the parts of a parsed ELF file that loading does not need: sections, and the zeros
// at the end of segments. In a bzImage's vmlinux these zeros are all of its .bss and .brk (more
// than a third of Debian's kernel). trim changes image and returns its first part; it leaves a file
// whose segments contain its headers as it is.
func trim(image []byte) []byte {
	le := binary.LittleEndian
	phoff, phnum := le.Uint64(image[32:]), le.Uint16(image[56:]) // ELF-64 header: e_phoff, e_phnum
	end := max(64, phoff+uint64(phnum)*56)
	headers := end
	table := image[phoff:][:int(phnum)*56]
	filesz := make([]uint64, phnum)
	for i := range filesz {
		p := table[i*56:]
		off := le.Uint64(p[8:])
		filesz[i] = le.Uint64(p[32:])
		switch elf.ProgType(le.Uint32(p)) {
		case elf.PT_LOAD:
			if filesz[i] > 0 && off < headers {
				return image
			}
			filesz[i] = uint64(len(bytes.TrimRight(image[off:][:filesz[i]], "\x00")))
			end = max(end, off+filesz[i])
		case elf.PT_NOTE:
			end = max(end, off+filesz[i])
		}
	}
	for i, n := range filesz {
		le.PutUint64(table[i*56+32:], n)
	}
	clear(image[40:48]) // e_shoff
	clear(image[60:64]) // e_shnum, e_shstrndx
	return image[:min(end, uint64(len(image)))]
}

// ExtractELF returns the decompressed vmlinux of a bzImage, or the file itself if it is an ELF
// kernel. Errors are *ImageError.
func ExtractELF(f *File) ([]byte, error) {
	im, err := NewImage(f)
	if err != nil {
		return nil, err
	}
	if im.elf != nil {
		b := make([]byte, f.Size)
		return b, f.ReadFull(b, 0)
	}
	v, err := im.extract("")
	if err != nil {
		return nil, err
	}
	defer v.free()
	return bytes.Clone(v.image), nil
}

// Segments calls look with the content of each of the kernel's segments, as far as the file has it,
// until look returns false. It decompresses a bzImage, or takes it from the cache directory if
// there is one and it has it.
func (im *Image) Segments(cache string, look func([]byte) bool) error {
	k := im.elf
	if k == nil {
		v, err := im.extract(cache)
		if err != nil {
			return err
		}
		defer v.free()
		k = v.elf
	}
	for _, p := range k.loads {
		if p.Filesz > maxVmlinux {
			return &ImageError{im.Name, fmt.Sprintf("has a segment of %d MiB, and gvm reads %d MiB at most", p.Filesz>>20,
				maxVmlinux>>20), wantWhole}
		}
		b := make([]byte, p.Filesz)
		if err := (&File{Name: im.Name, ReaderAt: k.r, Size: int64(p.Off + p.Filesz)}).ReadFull(b, int64(p.Off)); err != nil {
			return err
		}
		if !look(b) {
			break
		}
	}
	return nil
}

var errLength = errors.New("the length is not the one that the payload's end tells")

// decompressPiece is the size of a read of a stream between two calls of ended.
const decompressPiece = 1 << 20

// decompress fills dst from src, and fails if src holds more, less, or damaged data, or once ended
// returns an error.
func (c *compression) decompress(dst, src []byte, ended func() error) error {
	if c.decode != nil {
		return c.decode(dst, src, ended)
	}
	in := bytes.NewReader(src)
	r, err := c.open(in)
	if err != nil {
		return err
	}
	for len(dst) > 0 {
		if err := ended(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, dst[:min(len(dst), decompressPiece)])
		if err != nil {
			return err
		}
		dst = dst[n:]
	}
	// The checksum is verified at the end of the stream.
	var more [1]byte
	if _, err := io.ReadFull(r, more[:]); err == nil || err == io.EOF && in.Len() > 0 {
		return errLength
	} else if err != io.EOF {
		return err
	}
	return nil
}

// Decompress returns a reader of the data that r has in one of the kernel's formats but lz4 and
// lzo, or r's own data if they begin like none. Close frees memory, and leaves r open.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	magic, err := in.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	c := detect(magic)
	if c == nil {
		return io.NopCloser(in), nil
	}
	if c.open == nil {
		return nil, fmt.Errorf("the data are compressed with %s, which gvm does not read here", c.name)
	}
	out, err := c.open(in)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.name, err)
	}
	if d, ok := out.(*zstd.Decoder); ok {
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(out), nil
}

// maxWindow is the largest window of packed kernels: that of zstd --ultra -22, and of xz in the
// newest kernels. lzma -9 uses half of it. It bounds the memory that a header can make the
// libraries allocate.
const maxWindow = 128 << 20

// openZstd returns a *zstd.Decoder. With one thread it starts no goroutine.
func openZstd(r io.Reader) (io.Reader, error) {
	return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
}

// decodeZstd is one call of the library, which nothing ends: the end of a machine does not wait for
// it (Prepared.load in vmm). A stream, which could end, would need as much memory again.
func decodeZstd(dst, src []byte, _ func() error) error {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow),
		zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return err
	}
	defer d.Close()
	out, err := d.DecodeAll(src, dst[:0])
	if err != nil {
		return err
	}
	if len(out) != len(dst) || &out[0] != &dst[0] {
		return errLength
	}
	return nil
}

// lz4Block is the decompressed size of every block of an lz4 legacy frame but the last.
const lz4Block = 8 << 20

// decodeLZ4 reads the legacy frame format: the magic number, and blocks that each start with their
// compressed size.
func decodeLZ4(dst, src []byte, ended func() error) error {
	src = src[4:]
	for len(dst) > 0 {
		if err := ended(); err != nil {
			return err
		}
		if len(src) < 4 {
			return io.ErrUnexpectedEOF
		}
		n := binary.LittleEndian.Uint32(src)
		if src = src[4:]; uint64(n) > uint64(len(src)) {
			return io.ErrUnexpectedEOF
		}
		want := min(len(dst), lz4Block)
		got, err := lz4.UncompressBlock(src[:n], dst[:want])
		if err != nil {
			return err
		}
		if got != want {
			return errLength
		}
		src, dst = src[n:], dst[want:]
	}
	if len(src) > 0 {
		return errLength
	}
	return nil
}
