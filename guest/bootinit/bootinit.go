// Package bootinit holds the first program of a Linux guest whose boot is measured. It writes 0x41
// to port 0x80, as cloud-hypervisor's guests do when user space runs; gvm run --timing prints the
// time of that write. It writes Line to port 0x402, the port of QEMU's isa-debugcon, and to the
// console. Then it waits. With a kernel without CONFIG_DEVPORT it can use only the console.
//
// Its source is init.S. "make -C guest/bootinit" rebuilds it with gcc and binutils; with those of
// Debian 12 the bytes are the same, which a test compares.
package bootinit

import (
	_ "embed"

	"gvm/guest/initramfs"
)

// Line is the program's output, before a newline.
const Line = "init runs"

//go:embed init
var program []byte

// Initramfs returns an initial root file system that has the program as /init: an uncompressed newc
// archive.
func Initramfs() ([]byte, error) {
	b := initramfs.New()
	b.File("init", 0o755, program)
	image, err := b.Image()
	if err != nil {
		return nil, err
	}
	archive := make([]byte, image.Size)
	return archive, image.ReadFull(archive, 0)
}
