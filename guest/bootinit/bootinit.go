// Package bootinit holds the first program of a Linux guest whose boot is measured. It writes 0x41 to port 0x80, as
// cloud-hypervisor's guests do when user space runs, and gvm run --timing prints when that was; and Line to port 0x402, where
// QEMU's isa-debugcon listens, and to the console. Then it waits. A kernel without CONFIG_DEVPORT leaves it the console alone.
//
// Its source is init.S; "make -C guest/bootinit" rebuilds it with gcc and binutils, and with those of Debian 12 to the
// same bytes, which a test compares.
package bootinit

import (
	"bytes"
	_ "embed"

	"github.com/cavaliergopher/cpio"
)

// Line is what it says, before a newline.
const Line = "init runs"

//go:embed init
var program []byte

// Initramfs returns an initial root file system that has the program as /init: an uncompressed newc archive.
func Initramfs() ([]byte, error) {
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	if err := w.WriteHeader(&cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755, Links: 1, Size: int64(len(program))}); err != nil {
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
