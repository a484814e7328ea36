package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
)

// Offsets of setup header fields in the bzImage and in the zero page
// (Documentation/arch/x86/boot.rst), and bits of these fields.
const (
	hdrStart        = 0x1f1
	hdrSetupSects   = 0x1f1 // u8
	hdrSysSize      = 0x1f4 // u32, in 16-byte units
	hdrBootFlag     = 0x1fe // u16
	hdrJump         = 0x200 // u16; its second byte gives the header's end
	hdrMagic        = 0x202 // "HdrS"
	hdrVersion      = 0x206 // u16
	hdrKernelVer    = 0x20e // u16, from 0x200 in the file
	hdrTypeOfLoader = 0x210 // u8
	hdrLoadFlags    = 0x211 // u8
	hdrRamdisk      = 0x218 // u32
	hdrRamdiskSize  = 0x21c // u32
	hdrCmdLinePtr   = 0x228 // u32
	hdrInitrdMax    = 0x22c // u32, highest address of an initrd's last byte
	hdrAlignment    = 0x230 // u32
	hdrRelocatable  = 0x234 // u8
	hdrXLoadFlags   = 0x236 // u16
	hdrCmdLineSize  = 0x238 // u32, without the NUL
	hdrPayloadOff   = 0x248 // u32, from the start of the protected-mode code
	hdrPayloadLen   = 0x24c // u32
	hdrPrefAddress  = 0x258 // u64
	hdrInitSize     = 0x260 // u32
	hdrNeeded       = 0x264 // the end of the last field used
	hdrMaxEnd       = 0x290 // start of the zero page's next field

	bootFlag      = 0xaa55
	loadedHigh    = 1 << 0 // loadflags
	kaslrFlag     = 1 << 1 // loadflags; for the kernel's own use
	canUseHeap    = 1 << 7 // loadflags
	xlfKernel64   = 1 << 0 // xloadflags
	xlfAbove4G    = 1 << 1 // xloadflags
	undefLoader   = 0xff   // type_of_loader
	minVersion    = 0x20c
	entry64Offset = 0x200 // of the 64-bit entry in the protected-mode code
)

// setupHeader is the start of a bzImage up to the end of its setup header. Offsets into b are those
// of the header.
type setupHeader struct{ b []byte }

func (h *setupHeader) u8(off int) uint8      { return h.b[off] }
func (h *setupHeader) u16(off int) uint16    { return binary.LittleEndian.Uint16(h.b[off:]) }
func (h *setupHeader) u32(off int) uint32    { return binary.LittleEndian.Uint32(h.b[off:]) }
func (h *setupHeader) u64(off int) uint64    { return binary.LittleEndian.Uint64(h.b[off:]) }
func (h *setupHeader) cmdlineSize() uint32   { return h.u32(hdrCmdLineSize) }
func (h *setupHeader) loadableAbove4G() bool { return h.u16(hdrXLoadFlags)&xlfAbove4G != 0 }

// code returns the place of the protected-mode code in the file.
func (h *setupHeader) code() (off, size int64) {
	sects := int64(h.u8(hdrSetupSects))
	if sects == 0 {
		sects = 4 // boot.rst, "setup_sects"
	}
	return (sects + 1) * 512, int64(h.u32(hdrSysSize)) * 16
}

func isBzImage(head []byte) bool {
	return len(head) >= hdrVersion && bytes.HasPrefix(head[hdrMagic:], []byte("HdrS"))
}

// parseSetupHeader checks the header of a bzImage of size bytes that starts with head.
func parseSetupHeader(name string, head []byte, size int64) (*setupHeader, error) {
	bad := func(mend, format string, args ...any) (*setupHeader, error) {
		return nil, &ImageError{name, fmt.Sprintf(format, args...), mend}
	}
	if len(head) < hdrNeeded {
		return bad(wantWhole, "is a truncated bzImage")
	}
	h := &setupHeader{slices.Clone(head[:min(len(head), hdrMaxEnd)])}
	if h.u16(hdrBootFlag) != bootFlag {
		return bad(wantWhole, "has a setup header without its boot flag")
	}
	if v := h.u16(hdrVersion); v < minVersion {
		return bad(wantKernel+", Linux 3.8 or newer", "has boot protocol %d.%02d, older than the 64-bit one (2.12)",
			v>>8, v&0xff)
	}
	if h.u16(hdrXLoadFlags)&xlfKernel64 == 0 {
		return bad(wantKernel, "is a 32-bit kernel")
	}
	end := hdrMagic + int(h.u8(hdrJump+1))
	if end < hdrNeeded || end > hdrMaxEnd {
		return bad(wantWhole, "has a setup header that ends at %#x", end)
	}
	if end > len(head) {
		return bad(wantWhole, "is a truncated bzImage")
	}
	h.b = h.b[:end]
	if align := h.u32(hdrAlignment); bits.OnesCount32(align) != 1 {
		return bad(wantWhole, "has a setup header with kernel_alignment %#x", align)
	}
	off, n := h.code()
	if n <= entry64Offset {
		return bad(wantWhole, "has a setup header with a kernel of %d bytes", n)
	}
	// The last 16-byte unit may be incomplete.
	if size <= off+n-16 {
		return bad(wantWhole, "is a truncated bzImage: it has %d bytes of %d", size, off+n)
	}
	return h, nil
}

// Release returns the release of a bzImage, as uname -r shows it in the guest (boot.rst,
// "kernel_version"), or "" for an ELF kernel and a bzImage without one.
func (im *Image) Release() string {
	if im.hdr == nil || im.hdr.u16(hdrKernelVer) == 0 {
		return ""
	}
	at, _ := im.hdr.code()
	from := 0x200 + int64(im.hdr.u16(hdrKernelVer))
	if from >= at { // the string is in the setup code
		return ""
	}
	b := make([]byte, min(256, at-from))
	if im.File.ReadFull(b, from) != nil {
		return ""
	}
	b, _, _ = bytes.Cut(b, []byte{0})
	release, _, _ := bytes.Cut(b, []byte(" "))
	return string(release)
}

// bzImage loads a bzImage: its vmlinux if the mode asks for it and it can be extracted, else the
// image itself.
func (ld *loader) bzImage() (Entry, error) {
	im := ld.cfg.Kernel
	if ld.cfg.Mode != BzImage {
		all := slices.Clone(ld.free.free)
		v, err := im.extract(ld.cfg.Cache)
		if err == nil {
			defer v.free()
			if err = ld.placeELF(v.elf); err == nil {
				e, err := ld.startELF(v.elf, im.hdr)
				e.Payload = v.format
				return e, err
			}
		}
		if ld.cfg.Mode == ELF || errors.As(err, new(*stoppedError)) {
			return Entry{}, err
		}
		if err := im.File.ended(); err != nil { // without the note
			return Entry{}, err
		}
		var ie *ImageError
		if errors.As(err, &ie) {
			err = errors.New(ie.Name + " " + ie.What) // without the mend: the fallback needs none
		}
		ld.note("%v; it decompresses itself in the guest", err)
		ld.free.free = all
	}
	if ld.cfg.Protocol == PVH32 {
		return Entry{}, ld.imageError("use the boot mode elf, or the 64-bit entry", "has no PVH entry as a bzImage")
	}
	addr, err := ld.placeBzImage(im.hdr)
	if err != nil {
		return Entry{}, err
	}
	off, n := im.hdr.code()
	b, err := ld.mem.Slice(addr, uint64(min(n, im.Size-off)))
	if err != nil {
		return Entry{}, err
	}
	if err := im.File.ReadFull(b, off); err != nil {
		return Entry{}, err
	}
	return ld.linux64(addr+entry64Offset, im.hdr)
}

// placeBzImage takes the memory that the kernel uses before it has a memory map: init_size bytes
// from its load address.
func (ld *loader) placeBzImage(h *setupHeader) (uint64, error) {
	_, n := h.code()
	size := max(uint64(h.u32(hdrInitSize)), uint64(n))
	pref := h.u64(hdrPrefAddress)
	if ld.free.take(pref, size) {
		return pref, nil
	}
	if h.u8(hdrRelocatable) != 0 {
		// Below pref_address the kernel would move itself there.
		if addr, ok := ld.free.low(size, uint64(h.u32(hdrAlignment)), pref, 1<<32); ok {
			return addr, nil
		}
	}
	return 0, ld.imageError(roomMend(pref, pref+size, wantWhole),
		"needs %d MiB of RAM from %#x, and the guest has %d MiB in all", (size+1<<20-1)>>20, pref, ld.mem.Size()>>20)
}
