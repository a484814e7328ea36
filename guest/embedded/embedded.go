// Package embedded holds the guest that gvm runs without a kernel: a small bare-metal program that
// inspects the machine, checks its virtio-scsi disks, prints a report on COM1 and powers off.
//
// Image is the ELF64 file guest.elf beside this source, entered by its PVH note (32-bit protected
// mode, ebx pointing at hvm_start_info). It boots under QEMU too:
//
//	qemu-system-x86_64 -M q35 -m 128 -nodefaults -display none -serial stdio -no-reboot \
//		-kernel guest.elf -append write -device virtio-scsi-pci,id=s \
//		-drive if=none,id=d,file=disk.img,format=raw -device scsi-hd,drive=d,bus=s.0
//
// Its C and assembler sources are in src. "make -C guest/embedded" rebuilds it with gcc and
// binutils; with those of Debian 12 the bytes are the same, which a test compares.
//
// The report's last line is "PASS", or begins with "FAIL: "; on a failure the guest also raises a
// pvpanic event at port 0x505 if that device is there. Words lists the words of the command line,
// which are separated by spaces. The guest reports words that it does not know and ignores them;
// gvm run refuses them (Known). The crash words, hang, spin and echo replace the checks of CPUs,
// PCI and disks.
package embedded

import _ "embed"

// Image is the guest's ELF file.
//
//go:embed guest.elf
var Image []byte
