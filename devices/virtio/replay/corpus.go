package replay

import (
	"encoding/binary"
	"time"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
)

// Disks of the corpus, each LUN 0 of a device of its own: one like most disks, one
// with large blocks, one whose last block is not addressed by 32 bits, and one
// that is read-only. Several LUNs on a device and a LOGICAL UNIT RESET bring
// down a host with Linux 6.1 (docs/backends.md).
var corpusDisks = []trace.Disk{
	{Serial: "corpus-0", Size: 64 << 20, BlockSize: 512},
	{Serial: "corpus-1", Size: 64 << 20, BlockSize: 4096},
	{Serial: "corpus-2", Size: 3 << 40, BlockSize: 512},
	{Serial: "corpus-3", Size: 1 << 20, BlockSize: 512, ReadOnly: true},
}

// Corpus returns requests that find out where two targets differ, and the disks
// that they are for: every operation code that gvm's target or LIO has, with good
// and bad fields, at both ends of the disk and past it, with allocation lengths
// and buffers that are too short and too long; those of sg3_utils; every
// operation code that neither has; logical units that there are not; and task
// management. They build on one another: some are there to bring a unit into
// the state that the next ones are about.
func Corpus() (trace.Header, []trace.Record) {
	c := &corpus{}
	for i := range corpusDisks {
		c.device = i
		c.powerOn()
		c.discovery()
		c.rows()
		c.blocks()
	}
	c.device = 0
	c.modes()
	c.provisioning()
	c.reservations()
	c.others()
	c.sweep()
	c.transport()
	h := trace.Header{Start: time.Unix(0, 0)}
	for _, d := range corpusDisks {
		h.Devices = append(h.Devices, trace.Device{Backend: "process", Queues: 1, Disks: []trace.Disk{d}})
	}
	return h, c.list
}

type corpus struct {
	device int // that requests are for
	attr   scsi.TaskAttr
	list   []trace.Record
}

// size returns the bytes of a block of the device, and its last block.
func (c *corpus) size() (block int, last uint64) {
	d := corpusDisks[c.device]
	return d.BlockSize, d.Size/uint64(d.BlockSize) - 1
}

func (c *corpus) add(r trace.Record) {
	r.Time = time.Duration(len(c.list)) * time.Microsecond
	r.Tag = uint64(len(c.list))
	r.Device = uint8(c.device)
	c.list = append(c.list, r)
}

// in is a command with n bytes of room for data-in.
func (c *corpus) in(n int, cdb []byte) {
	c.add(trace.Record{Kind: trace.Command, LUN: trace.UnitLUN(0), Attr: c.attr, CDB: cdb, In: uint32(n)})
}

// out is a command with n bytes of data-out: made up, or zeros for a command
// that does not write them to blocks.
func (c *corpus) out(n int, cdb []byte) {
	if scsi.ParameterList(cdb) {
		c.param(zeros(n), cdb)
		return
	}
	c.add(trace.Record{Kind: trace.Command, LUN: trace.UnitLUN(0), Attr: c.attr, CDB: cdb, Out: uint32(n)})
}

// param is a command whose data-out is a parameter list.
func (c *corpus) param(list string, cdb []byte) {
	c.add(trace.Record{Kind: trace.Command, LUN: trace.UnitLUN(0), Attr: c.attr, CDB: cdb, Out: uint32(len(list)),
		Payload: []byte(list)})
}

var be = binary.BigEndian

// CDBs, by their common fields (SPC-5, SBC-4).

func cdb6(op, b1, b2 byte, n int) []byte { return []byte{op, b1, b2, byte(n >> 8), byte(n), 0} }

func cdb10(op, b1 byte, lba uint64, n int) []byte {
	b := make([]byte, 10)
	b[0], b[1] = op, b1
	be.PutUint32(b[2:], uint32(lba))
	be.PutUint16(b[7:], uint16(n))
	return b
}

func cdb12(op, b1 byte, lba uint64, n int) []byte {
	b := make([]byte, 12)
	b[0], b[1] = op, b1
	be.PutUint32(b[2:], uint32(lba))
	be.PutUint32(b[6:], uint32(n))
	return b
}

func cdb16(op, b1 byte, lba uint64, n int) []byte {
	b := make([]byte, 16)
	b[0], b[1] = op, b1
	be.PutUint64(b[2:], lba)
	be.PutUint32(b[10:], uint32(n))
	return b
}

// inquiry asks for a page of vital product data, or with evpd 0 for standard data.
func inquiry(evpd, page byte, n int) []byte { return cdb6(0x12, evpd, page, n) }

func (c *corpus) discovery() {
	c.in(0, cdb6(0x00, 0, 0, 0)) // TEST UNIT READY: the unit attention of power on
	c.in(0, cdb6(0x00, 0, 0, 0))
	for _, n := range []int{0, 4, 5, 36, 57, 96, 255} {
		c.in(n, inquiry(0, 0, n))
	}
	c.in(512, inquiry(0, 0, 512))
	c.in(20, inquiry(0, 0, 96)) // the buffer is shorter than the allocation length
	c.in(96, inquiry(0, 0x80, 96))
	c.in(96, inquiry(2, 0, 96)) // CMDDT, which is obsolete
	for _, page := range []byte{0x00, 0x80, 0x83, 0x86, 0xb0, 0xb1, 0xb2} {
		for _, n := range []int{0, 3, 4, 12, 252} {
			c.in(n, inquiry(1, page, n))
		}
	}
	for _, page := range []byte{0x01, 0x82, 0x84, 0x85, 0x87, 0x88, 0x89, 0x8a, 0xb3, 0xb6, 0xc0, 0xff} {
		c.in(252, inquiry(1, page, 252))
	}
	c.in(96, cdb6(0x03, 1, 0, 96)) // REQUEST SENSE, DESC
	c.in(8, cdb10(0x25, 0, 0, 0))  // READ CAPACITY(10)
	c.in(4, cdb10(0x25, 0, 0, 0))
	c.in(64, cdb10(0x25, 0, 0, 0))
	c.in(8, cdb10(0x25, 0, 1, 0))      // an LBA without PMI
	c.in(32, cdb16(0x9e, 0x10, 1, 32)) // READ CAPACITY(16)
	c.in(32, cdb16(0x9e, 0x1f, 0, 32))
	for _, sel := range []byte{1, 2, 3, 0x10, 0x11, 0x12, 0x7f} { // REPORT LUNS
		b := cdb12(0xa0, 0, 0, 4096)
		b[2] = sel
		c.in(4096, b)
	}
	for _, option := range []byte{0, 0x80, 1, 2, 3, 4, 7} { // REPORT SUPPORTED OPERATION CODES
		for _, what := range [][3]byte{{0x28, 0, 0}, {0x9e, 0, 0x10}, {0xfe, 0, 0}} {
			b := cdb12(0xa3, 0x0c, 0, 8192)
			b[2] = option
			copy(b[3:], what[:])
			c.in(8192, b)
		}
	}
	repd := cdb12(0xa3, 0x0d, 0, 16) // REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS
	repd[2] = 0x80
	c.in(16, repd)
	c.in(2, cdb12(0xa3, 0x0d, 0, 2))
}

// rows are the commands of the rows of gvm's target. A write behind each that may write leaves the
// disks of both targets alike if one does not have the command.
func (c *corpus) rows() {
	bs, last := c.size()
	for _, p := range scsi.Probes(bs, last) {
		if p.Out > 0 {
			c.out(p.Out, p.CDB)
		} else {
			c.in(p.In, p.CDB)
		}
		if lba, n, ok := scsi.Extent(p.CDB); ok && p.Writes {
			c.out(int(n)*bs, cdb16(0x8a, 0, lba, int(n)))
		}
		c.started(p.CDB)
	}
}

// started starts the unit if the CDB stops it.
func (c *corpus) started(cdb []byte) {
	if cdb[0] == 0x1b { // START STOP UNIT
		c.in(0, []byte{0x1b, 0, 0, 0, 1, 0})
	}
}

// blocks are commands that read, write or check blocks, with the fields that are theirs.
func (c *corpus) blocks() {
	bs, last := c.size()
	// Fields beside address and length: DPO, FUA, FUA_NV, protection, IMMED.
	for _, b1 := range []byte{0x10, 0x08, 0x02, 0x20, 0xe0} {
		c.out(bs, cdb10(0x2a, b1, 16, 1))
		c.in(bs, cdb10(0x28, b1, 16, 1))
		c.in(bs, cdb16(0x88, b1, 16, 1))
	}
	c.in(0, cdb10(0x35, 2, 0, 0))
	c.in(0, cdb16(0x91, 2, 0, 0))
	c.in(0, cdb10(0x34, 2, 0, 8))
	group := cdb10(0x28, 0, 16, 1)
	group[6] = 0x3f
	c.in(bs, group)
	naca := cdb10(0x28, 0, 16, 1)
	naca[9] = 4
	c.in(bs, naca)
	// Buffers that do not fit.
	c.out(bs, cdb10(0x2a, 0, 16, 4))
	c.out(bs, cdb10(0x28, 0, 16, 1))
	c.in(bs, cdb10(0x2a, 0, 16, 1))
	c.in(0, cdb10(0x28, 0, 0, 0xffff))
	// Comparison: block 32 gets the data to compare.
	c.filled(cdb10(0x2a, 0, 32, 1), 0x5a, 1)
	c.filled(cdb10(0x2f, 2, 32, 1), 0x5a, 1) // VERIFY, BYTCHK 01b
	c.filled(cdb10(0x2f, 2, 32, 1), 0xa5, 1)
	c.filled(cdb10(0x2f, 4, 32, 1), 0x5a, 1) // 10b, reserved
	c.filled(cdb10(0x2f, 6, 32, 1), 0x5a, 1) // 11b: one block with each
	c.filled(cdb12(0xaf, 2, 32, 1), 0x5a, 1)
	c.filled(cdb16(0x8f, 2, 32, 1), 0x5a, 1)
	c.filled(cdb16(0x8f, 2, 32, 1), 0xa5, 1)
	c.filled(cdb12(0xae, 2, 33, 1), 0x5a, 1)
	caw := func(flags byte, lba uint64, n int) []byte {
		b := cdb16(0x89, flags, lba, 0)
		b[13] = byte(n)
		return b
	}
	c.filled(caw(0, 32, 1), 0x5a, 2) // COMPARE AND WRITE
	c.filled(caw(0, 32, 1), 0xa5, 2)
	c.filled(caw(0, 32, 2), 0x5a, 4)
	c.filled(caw(0, 32, 0), 0x5a, 0)
	c.filled(caw(0, 32, 1), 0x5a, 1)
	c.filled(caw(8, 32, 1), 0x5a, 2)
	c.filled(caw(0x20, 32, 1), 0x5a, 2)
	c.filled(caw(0, last, 2), 0x5a, 4)
	c.filled(caw(0, last+1, 1), 0x5a, 2)
	c.in(bs, cdb10(0x28, 0, 32, 1))
}

// filled is a command with blocks of the byte as its data-out.
func (c *corpus) filled(cdb []byte, fill byte, blocks int) {
	bs, _ := c.size()
	b := make([]byte, blocks*bs)
	for i := range b {
		b[i] = fill
	}
	c.param(string(b), cdb)
}

func (c *corpus) modes() {
	for _, page := range []byte{0x00, 0x01, 0x08, 0x0a, 0x1c, 0x3f, 0x02, 0x1a} {
		for _, pc := range []byte{0, 0x40, 0x80, 0xc0} {
			c.in(252, cdb6(0x1a, 0, pc|page, 252))
		}
		c.in(252, cdb6(0x1a, 8, page, 252)) // DBD
		c.in(512, cdb10(0x5a, 0, uint64(page)<<24, 512))
		c.in(512, cdb10(0x5a, 0x18, uint64(page)<<24, 512)) // LLBAA, DBD
	}
	for _, sub := range []int{1, 0xff} {
		for _, page := range []byte{0x0a, 0x3f} {
			c.in(252, cdb6(0x1a, 0, page, sub<<8|252))
		}
	}
	for _, n := range []int{0, 1, 4, 12, 20} {
		c.in(n, cdb6(0x1a, 0, 0x3f, n))
		c.in(n, cdb10(0x5a, 0, 0x3f<<24, n))
	}
	c.in(24, cdb6(0x1a, 0, 0x08, 24))

	caching := func(wce byte) string { return "\x08\x12" + string([]byte{wce}) + zeros(17) }
	for _, list := range []string{
		zeros(4) + caching(0), // write cache off
		zeros(4) + caching(4), // and on again
		zeros(4) + "\x08\x11\x04" + zeros(16),
		zeros(4) + "\x08\x12\x05" + zeros(17),
		zeros(4) + "\x01\x0a" + zeros(10),
		zeros(4) + "\x0a\x0a" + zeros(10),
		zeros(4) + "\x3e\x02" + zeros(2),
		"\x00\x00\x00\x08" + zeros(8) + caching(4),
		"\x00\x00\x00\x08" + "\x00\x02\x00\x00\x00\x00\x02\x00" + caching(4),
		"\x05\x00\x00\x00" + caching(4),
		zeros(3),
		zeros(4),
		"",
	} {
		c.param(list, cdb6(0x15, 0x10, 0, len(list))) // MODE SELECT(6), PF
		c.in(0, cdb6(0x00, 0, 0, 0))
		c.in(24, cdb6(0x1a, 8, 0x08, 24))
	}
	list := zeros(8) + caching(4)
	c.param(list, cdb10(0x55, 0x10, 0, len(list)))
	c.param(list, cdb10(0x55, 0x11, 0, len(list))) // SP
	c.param(list, cdb10(0x55, 0x00, 0, len(list)))
	c.param(list, cdb10(0x55, 0x10, 0, len(list)-2))
	c.param(list, cdb10(0x55, 0x10, 0, len(list)+2))
	c.in(0, cdb6(0x00, 0, 0, 0))
}

func zeros(n int) string { return string(make([]byte, n)) }

// descriptors is UNMAP's parameter list of some ranges.
func descriptors(ranges ...[2]uint64) string {
	b := make([]byte, 8, 8+16*len(ranges))
	be.PutUint16(b, uint16(6+16*len(ranges)))
	be.PutUint16(b[2:], uint16(16*len(ranges)))
	for _, r := range ranges {
		b = be.AppendUint64(b, r[0])
		b = be.AppendUint32(b, uint32(r[1]))
		b = append(b, 0, 0, 0, 0)
	}
	return string(b)
}

func (c *corpus) provisioning() {
	bs, last := c.size()
	unmap := func(list string) { c.param(list, cdb10(0x42, 0, 0, len(list))) }
	for i := range corpusDisks {
		c.device = i
		unmap(descriptors([2]uint64{0, 8}))
	}
	c.device = 0
	c.out(64*bs, cdb10(0x2a, 0, 64, 64))
	unmap(descriptors([2]uint64{64, 16}, [2]uint64{96, 8}))
	c.in(64*bs, cdb10(0x28, 0, 64, 64))
	unmap(descriptors([2]uint64{64, 0}))
	unmap(descriptors([2]uint64{last, 1}))
	unmap(descriptors([2]uint64{last, 2}))
	unmap(descriptors([2]uint64{1 << 40, 1}))
	unmap(descriptors())
	unmap(descriptors([2]uint64{0, 1})[:20])
	unmap(zeros(4))
	unmap("")
	unmap(descriptors(make([][2]uint64, 300)...))
	c.param(descriptors([2]uint64{0, 1}), cdb10(0x42, 1, 0, 24)) // ANCHOR
	c.param(descriptors([2]uint64{0, 1}), cdb10(0x42, 0, 0, 16))
	// WRITE SAME: UNMAP, ANCHOR, NDOB, LBDATA, protection; 0 blocks are all.
	c.out(64*bs, cdb10(0x2a, 0, 64, 64))
	for _, b1 := range []byte{0x00, 0x08, 0x10, 0x18, 0x01, 0x09, 0x02, 0x04, 0x20} {
		for _, n := range []int{bs, 0, 2 * bs} {
			c.out(n, cdb16(0x93, b1, 64, 32))
		}
		c.out(bs, cdb10(0x41, b1, 64, 32))
		c.in(64*bs, cdb10(0x28, 0, 64, 64))
	}
	c.out(32*bs, cdb10(0x2a, 0, 1024, 32))
	c.filled(cdb16(0x93, 8, 1024, 32), 0x5a, 1) // UNMAP with data that is not zero
	c.in(32*bs, cdb10(0x28, 0, 1024, 32))
	c.param(zeros(bs), cdb16(0x93, 0, last, 2))
	c.param(zeros(bs), cdb16(0x93, 0, 0, 1<<30))
}

// reservations, of which gvm turns LIO's off for its disks.
func (c *corpus) reservations() {
	const key = "\x00\x00\x00\x00\x00\x00\x00\x01"
	for action := byte(0); action <= 8; action++ {
		c.param(zeros(8)+key+zeros(8), cdb10(0x5f, action, 0x01000000, 24))
	}
	for _, op := range []byte{0x16, 0x17} { // RESERVE(6), RELEASE(6)
		c.in(0, cdb6(op, 0, 0, 0))
	}
	for _, op := range []byte{0x56, 0x57} {
		c.in(0, cdb10(op, 0, 0, 0))
	}
	c.in(0, cdb6(0x00, 0, 0, 0))
}

// others are commands that concern the unit as a whole.
func (c *corpus) others() {
	for _, flags := range []byte{0, 1, 2, 3} { // START STOP UNIT: START, LOEJ
		c.in(0, []byte{0x1b, 0, 0, 0, flags, 0})
		c.in(0, cdb6(0x00, 0, 0, 0))
		c.in(512, cdb10(0x28, 0, 0, 1))
	}
	c.in(0, []byte{0x1b, 1, 0, 0, 1, 0})    // IMMED
	c.in(0, []byte{0x1b, 0, 0, 0, 0x31, 0}) // a power condition
	c.in(0, []byte{0x1b, 0, 0, 0, 1, 0})
	for _, prevent := range []int{0, 1, 3, 0} {
		c.in(0, cdb6(0x1e, 0, 0, prevent))
	}
	for _, page := range []byte{0x00, 0x0d, 0x2f, 0x3f} { // LOG SENSE
		c.in(512, append([]byte{0x4d, 0, 0x40 | page, 0, 0, 0, 0}, 2, 0, 0))
	}
	c.in(16, append([]byte{0x4d, 0, 0x40, 0xff, 0, 0, 0}, 0, 16, 0)) // of supported subpages
	c.in(8, append([]byte{0x37, 0, 0x1d, 0, 0, 0, 0}, 0, 8, 0))      // READ DEFECT DATA
	c.in(8, append([]byte{0x37, 0, 0x1e, 0, 0, 0, 0}, 0, 8, 0))
	c.in(16, cdb12(0xb7, 0x18, 0, 16))
	c.in(512, cdb10(0x3c, 0, 0, 512)) // READ BUFFER
	c.out(512, cdb10(0x3b, 0, 0, 512))
	c.in(0, cdb6(0x1d, 4, 0, 0))               // SEND DIAGNOSTIC, self-test
	c.in(512, cdb6(0x1c, 0, 0, 512))           // RECEIVE DIAGNOSTIC RESULTS
	c.in(512, cdb12(0xa3, 0x0a, 0, 512))       // REPORT TARGET PORT GROUPS
	c.in(4, cdb12(0xa3, 0x0a, 0, 4))           //
	c.in(512, cdb12(0xa3, 0x05, 0, 512))       // REPORT IDENTIFYING INFORMATION
	c.in(512, cdb12(0xa3, 0x0f, 0, 512))       // REPORT TIMESTAMP
	c.param(zeros(8), cdb12(0xa4, 0x0a, 0, 8)) // SET TARGET PORT GROUPS
	c.in(0, cdb10(0x48, 0x01, 0, 0))           // SANITIZE that ends without any: OVERWRITE without a parameter list,
	c.in(0, cdb10(0x48, 0x02, 0, 1))           // BLOCK ERASE with one,
	c.in(0, cdb10(0x48, 0x1f, 0, 0))           // EXIT FAILURE MODE
	c.in(0, cdb16(0x9c, 0, 0, 0))              // WRITE ATOMIC(16)
	c.in(512, cdb16(0x85, 0, 0, 512))          // ATA PASS-THROUGH(16), as smartctl asks
	c.in(512, cdb12(0xa1, 0, 0, 512))
}

// sweep sends every operation code, and those with service actions with every
// one of them, with no other field set.
func (c *corpus) sweep() {
	for op := range 256 {
		b := make([]byte, 16)
		b[0] = byte(op)
		c.in(512, b)
		c.started(b)
	}
	for _, op := range []byte{0x5e, 0x83, 0x84, 0x9e, 0x9f, 0xa3} {
		for action := range byte(32) {
			c.in(512, cdb16(op, action, 0, 0))
		}
	}
	variable := make([]byte, 32) // VARIABLE LENGTH CDB: READ(32), WRITE SAME(32), XDWRITEREAD(32)
	for _, action := range []uint16{0x0009, 0x000d, 0x0007} {
		variable[0], variable[7] = 0x7f, 0x18
		be.PutUint16(variable[8:], action)
		c.in(512, append([]byte(nil), variable...))
	}
	c.in(0, cdb6(0x00, 0, 0, 0))
}

// transport has the requests of virtio-scsi itself: addresses, attributes, directions, task
// management, resets.
func (c *corpus) transport() {
	at := func(lun [8]byte, n int, cdb []byte) {
		c.add(trace.Record{Kind: trace.Command, LUN: lun, CDB: cdb, In: uint32(n)})
	}
	for _, lun := range [][8]byte{
		{1, 0, 0, 0},             // peripheral device addressing, as flat space in the rest
		{1, 0, 0, 9},             // no unit there
		{1, 0, 0x40, 9},          //
		{1, 1, 0x40, 0},          // no target there
		{0, 0, 0x40, 0},          // not of the form that virtio has
		{1, 0, 0xc1, 1},          // the REPORT LUNS well-known logical unit
		{0xc1, 1, 0, 0},          //
		{1, 0, 0x40, 0, 0x40, 1}, // a second level
	} {
		at(lun, 0, cdb6(0x00, 0, 0, 0))
		at(lun, 96, inquiry(0, 0, 96))
		at(lun, 252, inquiry(1, 0, 252))
		at(lun, 96, cdb6(0x03, 0, 0, 96))
		at(lun, 4096, cdb12(0xa0, 0, 0, 4096))
		at(lun, 512, cdb10(0x28, 0, 0, 1))
	}
	for _, attr := range []scsi.TaskAttr{scsi.Ordered, scsi.HeadOfQueue, scsi.ACA, 7} {
		c.attr = attr
		c.in(512, cdb10(0x28, 0, 0, 1))
		c.out(512, cdb10(0x2a, 0, 0, 1))
	}
	c.attr = scsi.Simple
	both := trace.Record{Kind: trace.Command, LUN: trace.UnitLUN(0), CDB: cdb10(0x28, 0, 0, 1), In: 512, Out: 512,
		Payload: make([]byte, 512)}
	c.add(both)
	for function := range uint32(9) {
		for _, lun := range []int{0, 9} {
			c.add(trace.Record{Kind: trace.TaskManagement, LUN: trace.UnitLUN(lun), Function: function})
			c.in(0, cdb6(0x00, 0, 0, 0))
			c.in(0, cdb6(0x00, 0, 0, 0))
		}
	}
	c.add(trace.Record{Kind: trace.TaskManagement, LUN: [8]byte{1, 1, 0x40, 0}, Function: 5})
	c.add(trace.Record{Kind: trace.Reset})
	c.in(0, cdb6(0x00, 0, 0, 0))
	c.in(0, cdb6(0x00, 0, 0, 0))
	c.powerOn()
	c.in(0, cdb6(0x00, 0, 0, 0))
	c.in(0, cdb6(0x00, 0, 0, 0))
}

func (c *corpus) powerOn() { c.add(trace.Record{Kind: trace.PowerOn}) }
