package block

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"

	"gvm/kvmapi/nowait"
)

// format is a container or a compression that is not a raw image.
type format struct {
	name  string
	off   int
	magic string
	mend  string // the command that makes it raw; %[2]s is the path
}

const (
	convert    = "gvm takes raw images: qemu-img convert -O raw %[2]s disk.raw"
	decompress = "decompress it first: "
)

// Beginnings of files of packages trace and sidecar, which this package does not import.
const (
	traceMagic        = "gvm-trace "
	tuplesMagic       = "GVM-PI\x00\x01"
	reservationsMagic = "GVM-PR\x00"
)

// formats are told by the start of a file. Every format of gvm's own is here, so that no command
// takes such a file for an image.
var formats = []format{
	{"overlay of gvm's", 0, overlayMagic, "give the image that it is of, with overlay=%[2]s"},
	{"protection information of gvm's", 0, tuplesMagic, "give the image that it is beside, with pi=1"},
	{"persistent reservations of gvm's", 0, reservationsMagic, "give the image that they are beside"},
	{"trace of gvm's", 0, traceMagic, "gvm trace show %[2]s reads it; for a disk, name another file"},
	{"qcow2 image", 0, "QFI\xfb", convert},
	{"QED image", 0, "QED\x00", convert},
	{"VMDK image", 0, "KDMV", convert},
	{"VMDK image", 0, "COWD", convert},
	{"VMDK image", 0, "# Disk DescriptorFile", convert},
	{"VHDX image", 0, "vhdxfile", convert},
	{"VHD image", 0, "conectix", convert},
	{"VDI image", 0x40, "\x7f\x10\xda\xbe", convert},
	{"Parallels image", 0, "WithoutFreeSpace", convert},
	{"Parallels image", 0, "WithouFreSpacExt", convert},
	{"gzip file", 0, "\x1f\x8b\x08", decompress + "gzip -dc %[2]s > disk.raw"},
	{"xz file", 0, "\xfd7zXZ\x00", decompress + "xz -dc %[2]s > disk.raw"},
	{"zstd file", 0, "\x28\xb5\x2f\xfd", decompress + "zstd -dc %[2]s > disk.raw"},
	{"bzip2 file", 4, "1AY&SY", decompress + "bzip2 -dc %[2]s > disk.raw"},
	{"lz4 file", 0, "\x04\x22\x4d\x18", decompress + "lz4 -dc %[2]s > disk.raw"},
	{"zip archive", 0, "PK\x03\x04", "unpack it first"},
	{"7z archive", 0, "7z\xbc\xaf\x27\x1c", "unpack it first"},
	{"sparse image of Android's", 0, "\x3a\xff\x26\xed", "simg2img %[2]s disk.raw makes a raw one"},
}

// trailers are the formats that are told by the last 512 bytes.
var trailers = []format{
	{"VHD image", 0, "conectix", convert},
	{"DMG image", 0, "koly", convert},
}

// suffixes are the ends of names by which people and programs know a format.
var suffixes = map[string]string{
	".qcow2": "qcow2 image", ".qcow": "qcow2 image", ".qed": "QED image", ".vmdk": "VMDK image",
	".vhdx": "VHDX image", ".vhd": "VHD image", ".vdi": "VDI image", ".dmg": "DMG image",
	".gz": "gzip file", ".xz": "xz file", ".zst": "zstd file", ".bz2": "bzip2 file", ".lz4": "lz4 file",
	".zip": "zip archive", ".7z": "7z archive", ".hdd": "Parallels image", ".hds": "Parallels image",
	".simg": "sparse image of Android's", ".pi": "file of gvm's protection information",
	".pr": "file of gvm's persistent reservations",
}

// CheckName refuses to make an image by a name that says another format, which other programs would
// believe, or that is a device's.
func CheckName(path string) error {
	if fi, err := os.Lstat(path); isDeviceName(path) && err == nil {
		return badImage(ErrNotDisk, path, "is %v, and gvm makes no file in /dev; name a file elsewhere",
			nowait.KindOf(fi.Mode()))
	} else if isDeviceName(path) {
		return badImage(ErrNotDisk, path, "there is no such device, and gvm makes no file in /dev; "+
			"check the name, or name a file elsewhere")
	}
	suffix := filepath.Ext(path)
	name, ok := suffixes[strings.ToLower(suffix)]
	if !ok {
		return nil
	}
	return badImage(ErrFormat, path,
		"is the name of a %s, and gvm makes raw ones: name it %s.img, or make it with gvm image create --raw",
		name, strings.TrimSuffix(strings.TrimSuffix(filepath.Base(path), suffix), ".img"))
}

// isDeviceName reports whether path is in /dev, where files are in the host's memory. In /dev/shm
// they are meant to be.
func isDeviceName(path string) bool {
	abs, err := filepath.Abs(path)
	return err == nil && strings.HasPrefix(abs, "/dev/") && !strings.HasPrefix(abs, "/dev/shm/")
}

// checkFormat refuses an image that starts or ends as a container format does: its
// bytes are not the disk's, and a guest that writes to them destroys it.
func (b *File) checkFormat() error {
	head := make([]byte, min(4096, b.Size()))
	if _, err := b.ReadAt(head, 0); err != nil && err != io.EOF {
		return err
	}
	f, ok := formatOf(formats, head)
	if !ok {
		tail := make([]byte, min(512, b.Size()))
		if _, err := b.ReadAt(tail, b.Size()-int64(len(tail))); err != nil && err != io.EOF {
			return err
		}
		f, ok = formatOf(trailers, tail)
	}
	if ok {
		return badImage(ErrFormat, b.path, "%[1]s; "+f.mend, f.name, b.path)
	}
	return nil
}

// formatOf finds the format among list of what starts with head.
func formatOf(list []format, head []byte) (format, bool) {
	for _, f := range list {
		if len(head) >= f.off && bytes.HasPrefix(head[f.off:], []byte(f.magic)) {
			return f, true
		}
	}
	return format{}, false
}
