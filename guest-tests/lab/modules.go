package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"

	"gvm/guest/initramfs"
	"gvm/guest/kernel"
	"gvm/vmm/boot"
)

// modules adds the named modules of a kernel and those that they need, as files in /modules whose
// names begin with the order of loading. Those built into the kernel are left out: kernels differ
// in their sets of modules. So are the parts that make loading slow under emulation: the signature
// (the kernel would check it) and the name of the BTF section (the kernel would parse it).
func (k *Kernel) modules(ctx context.Context, b *initramfs.Builder, names []string) error {
	mods, err := initramfs.Modules(ctx, &kernel.Kernel{Image: &boot.Image{File: &boot.File{Name: k.BZImage}},
		Modules: kernel.Modules{Path: k.Modules, Kind: kernel.Installed}}, names...)
	if err != nil {
		return err
	}
	for n, m := range mods {
		data := bytes.ReplaceAll(dropSignature(m.Data), []byte("\x00.BTF\x00"), []byte("\x00.btf\x00"))
		b.File(fmt.Sprintf("modules/%03d-%s.ko", n, m.Name), 0o644, data)
	}
	return nil
}

// dropSignature removes the trailer of the kernel's scripts/sign-file.c: the signature, a struct
// module_signature, and a magic string.
func dropSignature(b []byte) []byte {
	const magic = "~Module signature appended~\n"
	const structLen = 12 // the last four bytes are the signature's length, big endian
	body, ok := bytes.CutSuffix(b, []byte(magic))
	if !ok || len(body) < structLen {
		return b
	}
	n := uint64(binary.BigEndian.Uint32(body[len(body)-4:])) + structLen
	if n > uint64(len(body)) {
		return b
	}
	return body[:uint64(len(body))-n]
}
