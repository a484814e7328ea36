// Package embedded holds the guest that gvm runs when it is given no kernel: a small bare-metal program that looks over the
// machine, checks its virtio-scsi disks, prints a report on COM1 and powers off.
//
// Image is the ELF64 file guest.elf beside this source, entered by its PVH note (32-bit protected mode, ebx pointing at
// hvm_start_info). It boots under QEMU too:
//
//	qemu-system-x86_64 -M q35 -m 128 -nodefaults -display none -serial stdio -no-reboot -kernel guest.elf -append write \
//		-device virtio-scsi-pci,id=s -drive if=none,id=d,file=disk.img,format=raw -device scsi-hd,drive=d,bus=s.0
//
// Its C and assembler sources are in src; "make -C guest-tests/embedded" rebuilds it with gcc and binutils, and with those of
// Debian 12 to the same bytes, which a test compares.
//
// The report's last line is "PASS", or begins with "FAIL: "; on a failure the guest also raises a pvpanic event at port 0x505 if
// that device is there. The words of the command line, apart by spaces, say what else it does:
//
//	write               write a pattern to some blocks of each disk and read it back; without it disks are only read
//	journal             with write: write numbered blocks to the first disk for ever, and print which of them were answered
//	nodisk              a machine without a disk is no failure
//	movebars            move the virtio device's memory BARs before using it, to 0xd0000000 and up
//	movebars=high       the same, but the 64-bit ones above 4 GiB: to the next GiB if they are there already, else to 448 GiB
//	bench               measure the first disk instead of the checks: random reads of 4 KiB, and writes with write, at depths
//	                    1 to 64, by polling and by interrupt; in ring 3 where a KVM emulates kernel mode but not user mode
//	sanitize            overwrite the first disk in 31 passes, with one command that it does not wait for, and loop for ever
//	bench-ms=N          each measurement takes N ms, not 300
//	x2apic              switch the boot CPU's local APIC to x2APIC mode
//	crash=triple        raise a triple fault
//	crash=panic         raise a pvpanic event, then halt for ever
//	crash=reset         reset the machine by whatever works; -acpi, -cf9 or -i8042 appended names the one way to use
//	hang                halt for ever with interrupts off
//	spin                loop for ever
//	echo                print "ready", then send serial input back until a q has come
//
// Words it does not know it names and ignores. The crash words, hang, spin and echo take the place of the checks of CPUs, PCI
// and disks.
package embedded

import _ "embed"

// Image is the guest's ELF file.
//
//go:embed guest.elf
var Image []byte
