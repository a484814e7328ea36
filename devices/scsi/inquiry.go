package scsi

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"slices"
)

// Peripheral qualifiers and device types (SPC-5 6.6.2).
const (
	typeDisk      = 0x00
	typeWellKnown = 0x1e
	noDevice      = 0x7f // qualifier 011b, type 1Fh
)

// versionDescriptors are SAM-5, SPC-4, SPC-5, SBC-3 and SBC-4, each "no version
// claimed" (SPC-5 6.6.2, Annex E).
var versionDescriptors = []uint16{0x00a0, 0x0460, 0x05c0, 0x04c0, 0x0600}

// inquiry is INQUIRY (SPC-5 6.6).
func inquiry(tk *task) error {
	evpd, page := tk.CDB[1]&0x01 != 0, tk.CDB[2]
	switch {
	case tk.CDB[1]&0x02 != 0:
		return invalidCDB(1, 1) // CMDDT, obsolete
	case !evpd && page != 0:
		return invalidCDB(2, 7)
	case !evpd:
		return tk.reply(standardInquiry(tk.u))
	case tk.u == nil:
		return invalidCDB(1, 0) // no unit, no vital product data
	}
	for _, v := range vpdPages {
		if v.code == page && v.exists(tk.u) {
			body := v.data(tk.u)
			b := append([]byte{tk.u.deviceType(), page, 0, 0}, body...)
			binary.BigEndian.PutUint16(b[2:], uint16(len(body)))
			return tk.reply(b)
		}
	}
	return invalidCDB(2, 7)
}

func (u *Unit) deviceType() byte {
	if u.wellKnown {
		return typeWellKnown
	}
	return typeDisk
}

// standardInquiry is the standard INQUIRY data of u, or of a LUN without one.
func standardInquiry(u *Unit) []byte {
	b := make([]byte, 96)
	// VERSION is SPC-4: older initiators refuse a larger number, and the version descriptors name
	// the newer standards.
	b[2] = 0x06
	b[3] = 0x10 | 0x02 // HISUP, response data format 2
	b[4] = byte(len(b) - 5)
	b[7] = 0x02 // CMDQUE
	if u == nil {
		b[0] = noDevice
		padded(b[8:16], "GVM")
		padded(b[16:36], "")
		return b
	}
	b[0] = u.deviceType()
	if !u.wellKnown {
		b[5] = 0x08 // 3PC: EXTENDED COPY
	}
	if u.cfg.Protection != nil {
		b[5] |= 0x01 // PROTECT
	}
	padded(b[8:16], u.cfg.Vendor)
	padded(b[16:32], u.cfg.Product)
	padded(b[32:36], u.cfg.Revision)
	for i, v := range versionDescriptors {
		binary.BigEndian.PutUint16(b[58+2*i:], v)
	}
	return b
}

// padded fills dst with s and spaces.
func padded(dst []byte, s string) {
	for i := copy(dst, s); i < len(dst); i++ {
		dst[i] = ' '
	}
}

// vpdPage is a vital product data page (SPC-5 7.7, SBC-4 6.6).
type vpdPage struct {
	code byte
	data func(*Unit) []byte // without the four bytes of header
}

// exists reports whether u has the page: all units have 00h, disks have the rest.
func (v vpdPage) exists(u *Unit) bool { return v.code == 0 || !u.wellKnown }

var vpdPages []vpdPage

func init() {
	vpdPages = []vpdPage{
		{0x00, supportedPages},
		{0x80, func(u *Unit) []byte { return []byte(u.serial) }},
		{0x83, deviceIdentification},
		{0x86, extendedInquiry},
		{0x8f, thirdPartyCopy},
		{0xb0, blockLimits},
		{0xb1, blockCharacteristics},
		{0xb2, blockProvisioning},
	}
}

func supportedPages(u *Unit) []byte {
	var b []byte
	for _, v := range vpdPages {
		if v.exists(u) {
			b = append(b, v.code)
		}
	}
	return b
}

// deviceIdentification has a locally assigned NAA designator and a T10 vendor
// ID one for the logical unit, both made from the serial number (SPC-5 7.7.6).
func deviceIdentification(u *Unit) []byte { return slices.Concat(u.designators()...) }

// designators returns the designation descriptors of u.
func (u *Unit) designators() [][]byte {
	sum := sha256.Sum256([]byte(u.cfg.Vendor + "\x00" + u.serial))
	naa := sum[:8]
	naa[0] = naa[0]&0x0f | 0x30 // NAA 3h: locally assigned
	id := make([]byte, 8+16, 8+16+len(u.serial))
	padded(id[:8], u.cfg.Vendor)
	padded(id[8:], u.cfg.Product)
	id = append(id, u.serial...)
	return [][]byte{append([]byte{0x01, 0x03, 0, 8}, naa...), append([]byte{0x02, 0x01, 0, byte(len(id))}, id...)}
}

// serialFrom returns the default serial number for an identity.
func serialFrom(identity string) string {
	if identity == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(identity))
	return hex.EncodeToString(sum[:10])
}

// extendedInquiry is the Extended INQUIRY Data page (SPC-5 7.7.7).
func extendedInquiry(u *Unit) []byte {
	b := make([]byte, 60)
	if u.cfg.Protection != nil {
		b[0] = 0x04 | 0x01 // SPT 000b, type 1 alone; GRD_CHK, REF_CHK
	}
	b[1] = 0x07 // HEADSUP, ORDSUP, SIMPSUP
	if u.cfg.Cache != WriteThrough {
		b[2] = 0x01 // V_SUP: the cache is volatile
	}
	return b
}

// blockLimits is the Block Limits page (SBC-4 6.6.4).
func blockLimits(u *Unit) []byte {
	b := make([]byte, 60)
	be := binary.BigEndian
	b[0] = 0x01 // WSNZ: WRITE SAME of "0 blocks, to the end" is not supported
	b[1] = maxCompareWrite
	be.PutUint16(b[2:], 1<<u.physicalExponent())
	be.PutUint32(b[4:], maxTransfer)
	be.PutUint32(b[8:], uint32(max(optimalTransfer/u.blockSize, 1<<u.physicalExponent())))
	if u.thin() {
		be.PutUint32(b[16:], maxUnmapBlocks)
		be.PutUint32(b[20:], maxUnmapRanges)
		be.PutUint32(b[24:], u.unmapGranularity())
		be.PutUint32(b[28:], 0x80000000) // UGAVALID, alignment 0
	}
	be.PutUint64(b[32:], maxWriteSame)
	return b
}

// blockCharacteristics is the Block Device Characteristics page (SBC-4 6.6.2).
func blockCharacteristics(u *Unit) []byte {
	b := make([]byte, 60)
	b[1] = 0x01 // MEDIUM ROTATION RATE: non-rotating
	if u.thin() {
		b[3] = 0x40 // WABEREQ 01b: after BLOCK ERASE every block can be read
	}
	return b
}

// blockProvisioning is the Logical Block Provisioning page (SBC-4 6.6.7).
func blockProvisioning(u *Unit) []byte {
	b := make([]byte, 4)
	if u.thin() {
		b[1] = 0x80 | 0x40 | 0x20 | 0x04 // LBPU, LBPWS, LBPWS10, LBPRZ 001b
		b[2] = 0x02                      // thin provisioned
	}
	return b
}
