package virtiotest

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"gvm/devices/virtio/virtqtest"
)

// Sizes and offsets of struct virtio_scsi_req_cmd (virtio 1.3, 5.6.6.1).
const (
	headerLen   = 51
	responseLen = 108
	tagOff      = 8
	cdbOff      = 19

	blockSize = 512
	blocks    = 4 // of each request
)

// DiskBlocks is how many logical blocks of 512 bytes n slots of a Disk need.
func DiskBlocks(n int) int64 { return int64(n) * blocks }

// Disk returns a slot with blocks of its own on target 0, LUN 0. It writes them, reads them back
// and compares, each time with other data and another tag. number is the slot's number in all
// queues.
func Disk(d *virtqtest.Driver, number int) Slot {
	s := &disk{
		mem: d, lba: uint32(number * blocks),
		header: d.Alloc(headerLen), response: d.Alloc(responseLen), data: d.Alloc(blocks * blockSize),
	}
	h := d.Bytes(s.header, headerLen)
	h[0], h[2] = 1, 0x40 // target 0, LUN 0
	return s
}

type disk struct {
	mem                    *virtqtest.Driver
	lba                    uint32
	header, response, data uint64
	sent                   uint32 // number of the request: even ones write
	ready                  bool   // a request has been carried out
}

// pattern is the data that request n writes, or reads if it is odd.
func (s *disk) pattern(n uint32) []byte {
	word := binary.BigEndian.AppendUint64(nil, uint64(s.lba)<<32|uint64(n/2))
	return bytes.Repeat(word, blocks*blockSize/len(word))
}

// Next implements Slot.
func (s *disk) Next() []virtqtest.Seg {
	read := s.sent%2 == 1
	h, data := s.mem.Bytes(s.header, headerLen), s.mem.Bytes(s.data, blocks*blockSize)
	binary.LittleEndian.PutUint64(h[tagOff:], uint64(s.lba)<<32|uint64(s.sent))
	cdb := binary.BigEndian.AppendUint32([]byte{0x2a, 0}, s.lba) // WRITE(10)
	if clear(data); read {
		cdb[0] = 0x28 // READ(10)
	} else {
		copy(data, s.pattern(s.sent))
	}
	copy(h[cdbOff:], append(cdb, 0, 0, blocks, 0))
	response := s.mem.Bytes(s.response, responseLen)
	for i := range response {
		response[i] = 0xee
	}
	segs := []virtqtest.Seg{{Addr: s.header, Len: headerLen}, {Addr: s.response, Len: responseLen, Write: true}}
	buffer := virtqtest.Seg{Addr: s.data, Len: blocks * blockSize, Write: read}
	if read {
		return append(segs, buffer)
	}
	return []virtqtest.Seg{segs[0], buffer, segs[1]}
}

// Check implements Slot. The used length is not looked at: the kernel's devices say 0.
func (s *disk) Check(uint32) error {
	r, read := s.mem.Bytes(s.response, responseLen), s.sent%2 == 1
	if r[11] == 0 && r[10] == 2 && r[12+2]&0xf == 6 && !s.ready {
		return nil // UNIT ATTENTION of before: the same request again
	}
	switch {
	case r[11] != 0 || r[10] != 0:
		return fmt.Errorf("request %d at LBA %d: response %d, status %#x, sense % x",
			s.sent, s.lba, r[11], r[10], r[12:30])
	case read && !bytes.Equal(s.mem.Bytes(s.data, blocks*blockSize), s.pattern(s.sent)):
		return fmt.Errorf("request %d at LBA %d: not the data that was written", s.sent, s.lba)
	}
	s.ready = true
	s.sent++
	return nil
}

// Management returns a slot of the control queue: QUERY TASK of a task that LUN 0 does not have,
// and the response that the device gives.
func Management(d *virtqtest.Driver, answer byte) Slot {
	return &management{mem: d, request: d.Alloc(24), response: d.Alloc(1), answer: answer}
}

type management struct {
	mem               *virtqtest.Driver
	request, response uint64
	answer            byte
}

// Next implements Slot.
func (m *management) Next() []virtqtest.Seg {
	copy(m.mem.Bytes(m.request, 24), []byte{4: 6, 8: 1, 10: 0x40, 16: 0xff, 23: 0xff})
	m.mem.Bytes(m.response, 1)[0] = 0xee
	return []virtqtest.Seg{{Addr: m.request, Len: 24}, {Addr: m.response, Len: 1, Write: true}}
}

// Check implements Slot.
func (m *management) Check(uint32) error {
	if got := m.mem.Bytes(m.response, 1)[0]; got != m.answer {
		return fmt.Errorf("QUERY TASK: response %d, not %d", got, m.answer)
	}
	return nil
}
