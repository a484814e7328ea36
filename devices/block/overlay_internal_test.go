package block

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"
)

// FuzzOverlayHeader reads headers with good checksums, and writes them again.
func FuzzOverlayHeader(f *testing.F) {
	f.Add((&overlayInfo{Size: 1 << 20, BaseTime: 1, Base: "/golden.img"}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == overlayHeader {
			binary.BigEndian.PutUint32(b[8:], crc32.ChecksumIEEE(b[16:]))
		}
		i, err := decodeOverlay(b)
		if err != nil {
			return
		}
		again, err := decodeOverlay(i.encode())
		if err != nil || again != i {
			t.Errorf("%+v became %+v, %v", i, again, err)
		}
		if !bytes.HasPrefix(b, i.encode()[:8]) {
			t.Error("another magic")
		}
	})
}
