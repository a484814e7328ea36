package kernel

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cavaliergopher/cpio"

	"gvm/vmm/boot"
)

// Bounds of the data of a package that gvm reads and keeps. Nothing else of it is kept.
const (
	maxImage    = 256 << 20
	maxUnpacked = 8 << 30 // with debug information a kernel's package has some 5 GiB
	maxHeader   = 64 << 20
)

const debMagic = "!<arch>\n" // ar(5)

// opener opens the archive in a package. If whole is set, it is read to its end.
type opener func(ctx context.Context, file *boot.File, whole bool) (entries, error)

// packages are the formats of packages.
var packages = []struct {
	magic   string
	entries opener
}{
	{debMagic, debEntries},
	{"\xed\xab\xee\xdb", rpmEntries},
}

// packageOf returns the opener of a package's format, or nil if file is no package.
func packageOf(file *boot.File) (opener, error) {
	head := make([]byte, min(file.Size, int64(len(debMagic))))
	if _, err := file.ReadAt(head, 0); err != nil {
		return nil, err
	}
	for _, p := range packages {
		if bytes.HasPrefix(head, []byte(p.magic)) {
			return p.entries, nil
		}
	}
	return nil, nil
}

// entries are the files of an archive, in its order. next returns io.EOF behind the last one. The
// reader is that of the file, and nil for anything but a regular file.
type entries struct {
	next  func() (name string, r io.Reader, err error)
	close func() error
}

// unpack reads the kernel in a package, up to the last file that is needed. Configuration and
// modules may be in another package beside it.
func unpack(ctx context.Context, file *boot.File, open opener) (*Kernel, error) {
	k := &Kernel{}
	version, err := k.scan(ctx, file, open)
	if err != nil {
		return nil, err
	}
	if k.Image == nil {
		return nil, &boot.ImageError{Name: file.Name, What: "is a package without a kernel (boot/vmlinuz-RELEASE or " +
			"lib/modules/RELEASE/vmlinuz)", Mend: "give the one with the kernel's image, such as linux-image-RELEASE"}
	}
	if k.Release = release(k.Image.Release()); k.Release == "" {
		k.Release = version
	}
	if k.Modules.Path == "" {
		k.scanBeside(ctx, file.Name, version)
	}
	return k, context.Cause(ctx)
}

// scan reads the kernel in a package, its configuration and the place of its modules. If k has an
// image already, k.Modules.version is its version, and scan ends at the modules.
func (k *Kernel) scan(ctx context.Context, file *boot.File, open opener) (version string, err error) {
	damaged := func(err error) error { return damaged(ctx, file.Name, err) }
	in, err := open(ctx, file, false)
	if err != nil {
		return "", damaged(err)
	}
	defer in.close()
	image, config, modules := k.Modules.version, "", ""
	beside := image != ""
	for k.Image == nil || config == "" && !beside || modules == "" {
		name, r, err := in.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", damaged(err)
		}
		kind, version := member(name)
		switch {
		case version == "" || r == nil || beside && version != image:
		case kind == "vmlinuz" && k.Image == nil:
			b, err := ReadAll(r, maxImage)
			if err != nil {
				return "", damaged(fmt.Errorf("%s: %w", name, err))
			}
			image = version
			if k.Image, err = boot.NewImage(boot.InMemory(ctx, file.Name+" ("+name+")", b)); err != nil {
				return "", err
			}
		case kind == "config" && k.Config.Text == nil:
			b, err := ReadAll(r, maxConfig)
			if err != nil {
				return "", damaged(fmt.Errorf("%s: %w", name, err))
			}
			config, k.Config = version, newConfig(b, file.Name+" ("+name+")")
		case kind == "modules" && modules == "":
			modules = version
		}
	}
	if config != "" && config != image {
		k.Config = Config{}
	}
	if modules == image {
		k.Modules = Modules{Path: file.Name, Kind: Packed, version: image}
	}
	return image, nil
}

// modulePackages begin the names of packages with the modules of a release: of Debian since Linux 7
// and Ubuntu, and of Fedora.
var modulePackages = []struct{ prefix, suffix string }{{"linux-modules-", "_"}, {"kernel-modules-core-", ".rpm"}}

// scanBeside finds the modules in another package, in the directory of the kernel's. It is no
// matter for an error if there is none.
func (k *Kernel) scanBeside(ctx context.Context, path, version string) {
	dir := filepath.Dir(path)
	for _, name := range names(dir, 1<<17) {
		if !slices.ContainsFunc(modulePackages, func(p struct{ prefix, suffix string }) bool {
			return strings.HasPrefix(name, p.prefix+version+p.suffix)
		}) || !isFile(filepath.Join(dir, name)) {
			continue
		}
		file, err := boot.OpenFile(ctx, filepath.Join(dir, name))
		if err != nil {
			continue
		}
		found := &Kernel{Image: k.Image, Config: k.Config, Modules: Modules{version: version}}
		if open, err := packageOf(file); err == nil && open != nil {
			_, err := found.scan(ctx, file, open)
			if err == nil && found.Modules.Path != "" {
				k.Config, k.Modules = found.Config, found.Modules
			}
		}
		file.Close()
	}
}

// damaged reports a failed read of a package.
func damaged(ctx context.Context, name string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w while %s was read", context.Cause(ctx), name)
	}
	return &boot.ImageError{Name: name, What: fmt.Sprintf("is a package that cannot be read (%v)", err),
		Mend: "download it again"}
}

// Packed calls f with each regular file of the package that is in the directory of the modules, by
// its path there, until f returns an error, which Packed returns if it is not io.EOF. Errors of the
// package are *boot.ImageError, or the cause of ctx.
func (m Modules) Packed(ctx context.Context, f func(name string, r io.Reader) error) error {
	file, err := boot.OpenFile(ctx, m.Path)
	if err != nil {
		return err
	}
	defer file.Close()
	open, err := packageOf(file)
	if err == nil && open == nil {
		err = errors.New("it is no package any more")
	}
	if err != nil {
		return damaged(ctx, m.Path, err)
	}
	in, err := open(ctx, file, true)
	if err != nil {
		return damaged(ctx, m.Path, err)
	}
	defer in.close()
	for {
		name, r, err := in.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return damaged(ctx, m.Path, err)
		}
		if rest, ok := below(name); ok && r != nil {
			version, inside, ok := strings.Cut(rest, "/")
			if !ok || version != m.version {
				continue
			}
			broken := &readError{Reader: r}
			if err := f(inside, broken); err == io.EOF && broken.err == nil {
				return nil
			} else if broken.err != nil {
				return damaged(ctx, m.Path, fmt.Errorf("%s: %w", name, broken.err))
			} else if err != nil {
				return err
			}
		}
	}
}

// readError keeps the error of a reader.
type readError struct {
	io.Reader
	err error
}

func (r *readError) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

// below returns the path of a package's file below lib/modules.
func below(name string) (string, bool) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	return strings.CutPrefix(strings.TrimPrefix(name, "usr/"), libModules[0]+"/")
}

// member tells which part of a kernel a file of a package is, and its release; "" for no part.
func member(name string) (kind, version string) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if rest, ok := strings.CutPrefix(name, "boot/"); ok {
		for _, kind := range []string{"vmlinuz", "config"} {
			if version, ok := strings.CutPrefix(rest, kind+"-"); ok {
				return kind, release(version)
			}
		}
		return "", ""
	}
	rest, _ := below(name)
	version, file, ok := strings.Cut(rest, "/")
	switch {
	case !ok:
		return "", ""
	case file == "vmlinuz", file == "config":
		return file, release(version)
	case strings.HasPrefix(file, "kernel/"):
		return "modules", release(version)
	}
	return "", ""
}

// ReadAll reads a file of at most limit bytes, and takes memory only for bytes that are there.
func ReadAll(r io.Reader, limit int64) ([]byte, error) {
	var all bytes.Buffer
	all.Grow(readSize)
	_, err := all.ReadFrom(io.LimitReader(r, limit+1))
	b := all.Bytes()
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("it is larger than %d MiB", limit>>20)
	}
	return b, err
}

// readSize is the size of ReadAll's first read, which has most of a module.
const readSize = 64 << 10

// unpacked is decompressed data, which may be much more than the compressed: reads end with a
// context and at maxUnpacked.
type unpacked struct {
	ctx context.Context
	io.ReadCloser
	left int64
}

func (u *unpacked) Read(b []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	if u.left <= 0 {
		return 0, fmt.Errorf("its content is larger than %d GiB", maxUnpacked>>30)
	}
	n, err := u.ReadCloser.Read(b[:min(len(b), 1<<20)])
	u.left -= int64(n)
	return n, err
}

// decompress returns the decompressed data of a part of a file. If they are wanted whole, several
// threads decompress them if they can be.
func decompress(ctx context.Context, r *io.SectionReader, whole bool) (*unpacked, error) {
	if blocks, header := xzBlocks(r, r.Size()); whole && blocks != nil {
		return &unpacked{ctx, newParallel(ctx, r, blocks, header), maxUnpacked}, nil
	}
	d, err := boot.Decompress(r)
	if err != nil {
		return nil, err
	}
	return &unpacked{ctx, d, maxUnpacked}, nil
}

// debEntries opens the data of a Debian package (deb(5)): an ar archive with a compressed tar
// archive, data.tar.*.
func debEntries(ctx context.Context, file *boot.File, whole bool) (entries, error) {
	const header = 60
	var h [header]byte
	for off := int64(len(debMagic)); ; {
		if _, err := file.ReadAt(h[:], off); err != nil {
			return entries{}, errors.New("it is no Debian package, or truncated: it has no data.tar")
		}
		size, err := strconv.ParseInt(strings.TrimRight(string(h[48:58]), " "), 10, 64)
		if err != nil || size < 0 || string(h[58:]) != "`\n" {
			return entries{}, fmt.Errorf("it has a damaged ar header at %d", off)
		}
		if off += header; strings.HasPrefix(string(h[:]), "data.tar") {
			data, err := decompress(ctx, io.NewSectionReader(file, off, size), whole)
			if err != nil {
				return entries{}, err
			}
			return tarEntries(data), nil
		}
		off += size + size&1
	}
}

func tarEntries(data io.ReadCloser) entries {
	archive := tar.NewReader(data)
	return entries{func() (string, io.Reader, error) {
		h, err := archive.Next()
		if err != nil {
			return "", nil, err
		}
		if h.Typeflag != tar.TypeReg {
			return h.Name, nil, nil
		}
		return h.Name, archive, nil
	}, data.Close}
}

// rpmEntries opens the payload of an RPM package (format version 3 and 4): a lead, two headers, and
// a compressed cpio archive.
func rpmEntries(ctx context.Context, file *boot.File, whole bool) (entries, error) {
	off := int64(96) // the lead
	for i := range 2 {
		var h [16]byte
		if _, err := file.ReadAt(h[:], off); err != nil || string(h[:4]) != "\x8e\xad\xe8\x01" {
			return entries{}, fmt.Errorf("it has no RPM header at %d", off)
		}
		entries, size := int64(binary.BigEndian.Uint32(h[8:])), int64(binary.BigEndian.Uint32(h[12:]))
		off += 16 + 16*entries + size
		if i == 0 { // the signature is padded to a multiple of 8
			off = (off + 7) &^ 7
		}
	}
	if off > min(file.Size, maxHeader) {
		return entries{}, errors.New("its RPM headers are damaged")
	}
	data, err := decompress(ctx, io.NewSectionReader(file, off, file.Size-off), whole)
	if err != nil {
		return entries{}, err
	}
	archive := cpio.NewReader(data)
	return entries{func() (string, io.Reader, error) {
		h, err := archive.Next()
		if err != nil {
			return "", nil, err
		}
		if h.Size < 0 { // the library would panic
			return "", nil, fmt.Errorf("%q has size %d", h.Name, h.Size)
		}
		if h.Mode&cpio.ModeType != cpio.TypeReg {
			return h.Name, nil, nil
		}
		return h.Name, archive, nil
	}, data.Close}, nil
}
