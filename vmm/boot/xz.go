package boot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// The parts of the .xz container (tukaani.org/xz/xz-file-format.txt) that a
// kernel is packed in: one stream, of blocks filtered by LZMA2, or by the x86
// BCJ filter and LZMA2. The container is read here because the library that
// decodes the LZMA2 refuses all filters before it, and on x86 every xz kernel has one.
const (
	xzHeaderSize  = 12
	filterX86     = 0x04
	filterLZMA2   = 0x21
	xzCompressed  = 0x40 // block flags: the compressed size is there
	xzUncompresed = 0x80
)

var errXZ = errors.New("xz data is damaged")

// xzCheck is the size of each integrity check.
var xzCheck = [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}

// vli reads a variable-length integer and returns it and what follows.
func vli(b []byte) (uint64, []byte, bool) {
	v, n := binary.Uvarint(b[:min(len(b), 9)])
	if n <= 0 {
		return 0, nil, false
	}
	return v, b[n:], true
}

func decodeXZ(dst, src []byte) error {
	if len(src) < 2*xzHeaderSize || string(src[len(src)-2:]) != "YZ" || src[6] != 0 ||
		crc32.ChecksumIEEE(src[6:8]) != binary.LittleEndian.Uint32(src[8:]) {
		return errXZ
	}
	check := src[7] & 0xf
	for at := xzHeaderSize; at < len(src) && src[at] != 0; { // 0 is the index that follows the blocks
		hsize := (int(src[at]) + 1) * 4
		if hsize > len(src)-at {
			return errXZ
		}
		h, err := readXZBlockHeader(src[at : at+hsize])
		if err != nil {
			return err
		}
		in := bytes.NewReader(src[at+hsize:])
		// A dictionary larger than the output is of no use, and the library
		// allocates what it is told.
		dict := max(lzma.MinDictCap, min(h.dict, maxWindow, int64(len(dst))))
		r, err := lzma.Reader2Config{DictCap: int(dict)}.NewReader2(in)
		if err != nil {
			return err
		}
		n, err := io.ReadFull(r, dst)
		if err == nil {
			if _, err = io.ReadFull(r, make([]byte, 1)); err == nil {
				return errLength
			}
		}
		if !r.EOS() { // a chunk cut short may end in io.EOF too
			return err
		}
		if h.x86 {
			undoX86(dst[:n], h.start)
		}
		at = (len(src) - in.Len() + 3) &^ 3
		sum := xzCheck[check]
		if at+sum > len(src) || !xzVerify(check, dst[:n], src[at:at+sum]) {
			return errXZ
		}
		at += sum
		dst = dst[n:]
	}
	if len(dst) > 0 {
		return errLength
	}
	return nil
}

func xzVerify(check byte, out, sum []byte) bool {
	switch check {
	case 1:
		return crc32.ChecksumIEEE(out) == binary.LittleEndian.Uint32(sum)
	case 4:
		return crc64.Checksum(out, crc64.MakeTable(crc64.ECMA)) == binary.LittleEndian.Uint64(sum)
	case 10:
		h := sha256.Sum256(out)
		return bytes.Equal(h[:], sum)
	}
	return true // none, or one that no xz writes
}

// xzBlock is what a block's header tells of its filters.
type xzBlock struct {
	x86   bool // it went through the x86 filter, which counted from start
	start uint32
	dict  int64 // dictionary size of LZMA2
}

func readXZBlockHeader(h []byte) (xzBlock, error) {
	var x xzBlock
	body, sum := h[:len(h)-4], h[len(h)-4:]
	if crc32.ChecksumIEEE(body) != binary.LittleEndian.Uint32(sum) || body[1]&0x3c != 0 {
		return x, errXZ
	}
	flags, b, good := body[1], body[2:], true
	for _, f := range []byte{xzCompressed, xzUncompresed} {
		if flags&f != 0 {
			if _, b, good = vli(b); !good {
				return x, errXZ
			}
		}
	}
	var id, size uint64
	for i := range int(flags&3) + 1 {
		if id, b, good = vli(b); !good {
			return x, errXZ
		}
		if size, b, good = vli(b); !good || size > uint64(len(b)) {
			return x, errXZ
		}
		props := b[:size]
		b = b[size:]
		last := i == int(flags&3)
		switch {
		case id == filterLZMA2 && last && size == 1:
			var err error
			if x.dict, err = lzma.DecodeDictCap(props[0]); err != nil {
				return x, err
			}
		case id == filterX86 && i == 0 && !last && size == 0:
			x.x86 = true
		case id == filterX86 && i == 0 && !last && size == 4:
			x.x86, x.start = true, binary.LittleEndian.Uint32(props)
		default:
			return x, errXZ
		}
	}
	return x, nil
}
