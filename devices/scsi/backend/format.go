package backend

import (
	"bytes"
	"io"
)

// format is a container or a compression that is not a raw image.
type format struct {
	name  string
	off   int
	magic string
	mend  string // what makes it raw; %[2]s is the path
}

const (
	convert    = "gvm takes raw images: qemu-img convert -O raw %[2]s disk.raw"
	decompress = "decompress it first: "
)

var formats = []format{
	{"overlay of gvm's", 0, overlayMagic, "give the image that it is of, with overlay=%[2]s"},
	{"protection information of gvm's", 0, tuplesMagic, "give the image that it is beside, with pi=1"},
	{"persistent reservations of gvm's", 0, reservationsMagic, "give the image that they are beside"},
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
}

// checkFormat refuses an image that starts as a container format does: its
// bytes are not the disk's, and a guest that writes to them destroys it.
func (b *File) checkFormat() error {
	head := make([]byte, min(4096, b.Size()))
	if _, err := b.ReadAt(head, 0); err != nil && err != io.EOF {
		return err
	}
	if f, ok := formatOf(head); ok {
		return badImage(ErrFormat, b.path, "%[1]s; "+f.mend, f.name, b.path)
	}
	return nil
}

// formatOf finds the format of what starts with head.
func formatOf(head []byte) (format, bool) {
	for _, f := range formats {
		if len(head) >= f.off && bytes.HasPrefix(head[f.off:], []byte(f.magic)) {
			return f, true
		}
	}
	return format{}, false
}
