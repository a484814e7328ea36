package vscsi

import (
	"bytes"
	"encoding/binary"
	"path/filepath"
	"slices"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/sidecar"
	"gvm/devices/virtio"
)

// headerPI is a virtio_scsi_req_cmd_pi for LUN 0.
func headerPI(out, in uint32, cdb ...byte) []byte {
	h := header(linuxLUN(0), 1, 0, cdb...)
	pi := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, out), in)
	return slices.Insert(h, 19, pi...)
}

// protectedUnit is a target with a unit that has protection information, which it returns.
func protectedUnit(t *testing.T) (*scsi.Target, *sidecar.Tuples) {
	t.Helper()
	f, err := block.Open(filepath.Join(t.TempDir(), "disk"), block.Options{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	tuples, err := sidecar.OpenTuples(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tuples.Close(); f.Close() })
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: f, Protection: tuples})
	if err != nil {
		t.Fatal(err)
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	return target, tuples
}

// TestProtection moves protection information beside data, both cut everywhere.
func TestProtection(t *testing.T) {
	target, tuples := protectedUnit(t)
	r := newRig(t, Config{Target: target, Protection: true}, featureProtection|virtio.FeatureEventIdx)
	if r.dev.Features()&featureProtection == 0 {
		t.Error("VIRTIO_SCSI_F_T10_PI is not offered")
	}
	// Linux has up to seg_max segments of data, and as many of protection information.
	if n := binary.LittleEndian.Uint32(r.dev.Config()[4:]); n != 127 || 2*n+2 > uint32(r.dev.QueueSizes()[2]) {
		t.Errorf("seg_max %d", n)
	}
	do := func(h, out []byte, in int) (code, status byte, sense, rest []byte, resid uint32) {
		t.Helper()
		cuts := func(n int, at ...int) []int { return slices.DeleteFunc(at, func(i int) bool { return i > n }) }
		resp := r.roundTrip(2, append(h, out...), cuts(59+len(out), 19, 30, 59, 62, 77), 108+in,
			cuts(108+in, 12, 108, 111, 130))
		n := binary.LittleEndian.Uint32(resp)
		return resp[11], resp[10], resp[12 : 12+n], resp[108:], binary.LittleEndian.Uint32(resp[4:])
	}
	do(headerPI(0, 0, make([]byte, 6)...), nil, 0) // POWER ON OCCURRED
	pi := []byte{0xa5, 0x5a, 0x11, 0x22, 0, 0, 0, 7, 0, 0, 0x33, 0x44, 0, 0, 0, 8}
	data := make([]byte, 1024)
	write, read := rw10(0x2a, 7, 2), rw10(0x28, 7, 2)
	write[1], read[1] = 0x20, 0x20

	// The guard of zeroes is 0: that of the first tuple is wrong.
	if code, status, sense, _, resid := do(headerPI(16, 0, write...), append(pi, data...), 0); code != 0 || status != 2 ||
		sense[2] != 0xb || sense[12] != 0x10 || sense[13] != 1 || resid != 1024 {
		t.Errorf("a wrong guard: %d, %d, % x, residual %d", code, status, sense, resid)
	}
	pi[0], pi[1] = 0, 0
	if code, status, sense, _, resid := do(headerPI(16, 0, write...), append(pi, data...), 0); code != 0 || status != 0 ||
		resid != 0 {
		t.Errorf("write: %d, %d, % x, residual %d", code, status, sense, resid)
	}
	stored := make([]byte, 16)
	if err := tuples.ReadTuples(stored, 7); err != nil || !bytes.Equal(stored, pi) {
		t.Errorf("stored % x, %v", stored, err)
	}
	if code, status, sense, got, resid := do(headerPI(0, 16, read...), nil, 16+1024); code != 0 || status != 0 ||
		resid != 0 || !bytes.Equal(got, append(pi, data...)) {
		t.Errorf("read: %d, %d, % x, residual %d, %d bytes", code, status, sense, resid, len(got))
	}
	// A driver may leave it to the device.
	if code, status, _, got, resid := do(headerPI(0, 0, read...), nil, 1024); code != 0 || status != 0 || resid != 0 ||
		!bytes.Equal(got, data) {
		t.Errorf("read without: %d, %d, residual %d", code, status, resid)
	}
	// What does not fit its buffer is the command's to refuse; what does not fit the request is no
	// request.
	if code, status, _, _, _ := do(headerPI(0, 8, read...), nil, 8+1024); code != sOverrun || status != 2 {
		t.Errorf("room for one tuple: %d, %d", code, status)
	}
	r.send(2, headerPI(0, 1025, read...), nil, 108+1024, nil)
	if err := <-r.broken; err == nil {
		t.Error("a request with more protection information than room goes on")
	}
}

// TestProtectionNotNegotiated: the header is as ever.
func TestProtectionNotNegotiated(t *testing.T) {
	target, _ := protectedUnit(t)
	r := newRig(t, Config{Target: target, Protection: true}, virtio.FeatureEventIdx)
	r.roundTrip(2, header(linuxLUN(0), 1, 0, make([]byte, 6)...), nil, 108, nil)
	resp := r.roundTrip(2, header(linuxLUN(0), 1, 0, rw10(0x28, 7, 2)...), nil, 108+1024, nil)
	if resp[10] != 0 || resp[11] != 0 || len(resp) != 108+1024 {
		t.Errorf("%d bytes: % x", len(resp), resp[:20])
	}
}
