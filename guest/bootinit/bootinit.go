// Package bootinit holds the first program of a Linux guest whose boot is measured. It writes 0x41
// to port 0x80, as cloud-hypervisor's guests do when user space runs; gvm run --timing prints the
// time of that write. It writes Line to port 0x402, the port of QEMU's isa-debugcon, and to the
// console. Then it waits. With a kernel without CONFIG_DEVPORT it can use only the console.
//
// Its source is init.S. "make -C guest/bootinit" rebuilds it with gcc and binutils; with those of
// Debian 12 the bytes are the same, which a test compares.
package bootinit

import (
	"bytes"
	_ "embed"

	"github.com/cavaliergopher/cpio"
)

// Line is the program's output, before a newline.
const Line = "init runs"

//go:embed init
var program []byte

// Initramfs returns an initial root file system that has the program as /init: an uncompressed newc
// archive.
func Initramfs() ([]byte, error) {
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	header := cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755, Links: 1, Size: int64(len(program))}
	if err := w.WriteHeader(&header); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
