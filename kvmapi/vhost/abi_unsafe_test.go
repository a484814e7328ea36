package vhost

import (
	"fmt"
	"math/bits"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"
)

// golden reads testdata/abi.golden, a C compiler's output for linux/vhost.h.
func golden(t *testing.T) map[string]uint64 {
	t.Helper()
	b, err := os.ReadFile("testdata/abi.golden")
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		var kind, name string
		var v uint64
		if _, err := fmt.Sscanf(line, "%s %s %d", &kind, &name, &v); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		m[kind+" "+name] = v
	}
	return m
}

func TestABIMatchesKernelHeaders(t *testing.T) {
	var (
		vs vringState
		vf vringFile
		va vringAddr
		mm memory
		mr memoryRegion
		vw vringWorker
		st scsiTarget
	)
	bit := func(feature uint64) uint64 { return uint64(bits.TrailingZeros64(feature)) }
	have := map[string]uint64{
		"sizeof vhost_vring_state":                   uint64(unsafe.Sizeof(vs)),
		"offset vhost_vring_state.num":               uint64(unsafe.Offsetof(vs.Num)),
		"sizeof vhost_vring_file":                    uint64(unsafe.Sizeof(vf)),
		"offset vhost_vring_file.fd":                 uint64(unsafe.Offsetof(vf.FD)),
		"sizeof vhost_vring_addr":                    uint64(unsafe.Sizeof(va)),
		"offset vhost_vring_addr.flags":              uint64(unsafe.Offsetof(va.Flags)),
		"offset vhost_vring_addr.desc_user_addr":     uint64(unsafe.Offsetof(va.Desc)),
		"offset vhost_vring_addr.used_user_addr":     uint64(unsafe.Offsetof(va.Used)),
		"offset vhost_vring_addr.avail_user_addr":    uint64(unsafe.Offsetof(va.Avail)),
		"offset vhost_vring_addr.log_guest_addr":     uint64(unsafe.Offsetof(va.Log)),
		"sizeof vhost_memory":                        uint64(unsafe.Offsetof(mm.Regions)),
		"offset vhost_memory.nregions":               uint64(unsafe.Offsetof(mm.NRegions)),
		"sizeof vhost_memory_region":                 uint64(unsafe.Sizeof(mr)),
		"offset vhost_memory_region.guest_phys_addr": uint64(unsafe.Offsetof(mr.GuestPhysAddr)),
		"offset vhost_memory_region.memory_size":     uint64(unsafe.Offsetof(mr.MemorySize)),
		"offset vhost_memory_region.userspace_addr":  uint64(unsafe.Offsetof(mr.UserspaceAddr)),
		"offset vhost_memory_region.flags_padding":   uint64(unsafe.Offsetof(mr.FlagsPadding)),
		"sizeof vhost_worker_state":                  uint64(unsafe.Sizeof(workerState{})),
		"sizeof vhost_vring_worker":                  uint64(unsafe.Sizeof(vw)),
		"offset vhost_vring_worker.worker_id":        uint64(unsafe.Offsetof(vw.WorkerID)),
		"sizeof vhost_scsi_target":                   uint64(unsafe.Sizeof(st)),
		"offset vhost_scsi_target.vhost_wwpn":        uint64(unsafe.Offsetof(st.WWPN)),
		"offset vhost_scsi_target.vhost_tpgt":        uint64(unsafe.Offsetof(st.TPGT)),
		"offset vhost_scsi_target.reserved":          uint64(unsafe.Offsetof(st.Reserved)),

		"value VHOST_GET_FEATURES":             uint64(getFeatures),
		"value VHOST_SET_FEATURES":             uint64(setFeatures),
		"value VHOST_SET_OWNER":                uint64(setOwner),
		"value VHOST_SET_MEM_TABLE":            uint64(setMemTable),
		"value VHOST_NEW_WORKER":               uint64(newWorker),
		"value VHOST_FREE_WORKER":              uint64(freeWorker),
		"value VHOST_SET_VRING_NUM":            uint64(setVringNum),
		"value VHOST_SET_VRING_ADDR":           uint64(setVringAddr),
		"value VHOST_SET_VRING_BASE":           uint64(setVringBase),
		"value VHOST_GET_VRING_BASE":           uint64(getVringBase),
		"value VHOST_ATTACH_VRING_WORKER":      uint64(attachVringWorker),
		"value VHOST_GET_VRING_WORKER":         uint64(getVringWorker),
		"value VHOST_SET_VRING_KICK":           uint64(setVringKick),
		"value VHOST_SET_VRING_CALL":           uint64(setVringCall),
		"value VHOST_SET_VRING_ERR":            uint64(setVringErr),
		"value VHOST_SET_BACKEND_FEATURES":     uint64(setBackendFeatures),
		"value VHOST_GET_BACKEND_FEATURES":     uint64(getBackendFeatures),
		"value VHOST_SCSI_SET_ENDPOINT":        uint64(scsiSetEndpoint),
		"value VHOST_SCSI_CLEAR_ENDPOINT":      uint64(scsiClearEndpoint),
		"value VHOST_SCSI_GET_ABI_VERSION":     uint64(scsiGetABIVersion),
		"value VHOST_SCSI_SET_EVENTS_MISSED":   uint64(scsiSetEventsMissed),
		"value VHOST_SCSI_GET_EVENTS_MISSED":   uint64(scsiGetEventsMissed),
		"value VHOST_NET_SET_BACKEND":          uint64(netSetBackend),
		"value VHOST_VSOCK_SET_GUEST_CID":      uint64(vsockSetGuestCID),
		"value VHOST_VSOCK_SET_RUNNING":        uint64(vsockSetRunning),
		"value VHOST_SCSI_ABI_VERSION":         SCSIABIVersion,
		"value -VHOST_FILE_UNBIND":             -fileUnbind,
		"value VHOST_F_LOG_ALL":                bit(FeatureLogAll),
		"value VHOST_NET_F_VIRTIO_NET_HDR":     bit(FeatureNetHeader),
		"value VIRTIO_F_VERSION_1":             bit(FeatureVersion1),
		"value VIRTIO_SCSI_F_HOTPLUG":          bit(FeatureSCSIHotplug),
		"value VIRTIO_SCSI_F_T10_PI":           bit(FeatureSCSIT10PI),
		"value VIRTIO_SCSI_CDB_DEFAULT_SIZE":   SCSICDBSize,
		"value VIRTIO_SCSI_SENSE_DEFAULT_SIZE": SCSISenseSize,
	}
	want := golden(t)
	for name, w := range want {
		if h, ok := have[name]; !ok {
			t.Errorf("%s is in abi.golden and not compared", name)
		} else if h != w {
			t.Errorf("%s = %d, the kernel header has %d", name, h, w)
		}
	}
	for name := range have {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is not in abi.golden: add it to abi.c", name)
		}
	}
}

// TestGoldenIsCurrent compiles abi.c against this machine's headers.
func TestGoldenIsCurrent(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc here (Debian: apt-get install gcc linux-libc-dev); the golden file is compared all the same")
	}
	bin := filepath.Join(t.TempDir(), "abi")
	if out, err := exec.Command(gcc, "-Wall", "-Werror", "-o", bin, "testdata/abi.c").CombinedOutput(); err != nil {
		t.Fatalf("compile testdata/abi.c: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/abi.golden")
	if err != nil {
		t.Fatal(err)
	}
	if string(out) != string(want) {
		t.Errorf("testdata/abi.golden differs from the output of testdata/abi.c; the difference:\n%s", out)
	}
}

// TestOpenErrorsNameTheMend opens a missing device and an inaccessible one.
func TestOpenErrorsNameTheMend(t *testing.T) {
	_, err := open(filepath.Join(t.TempDir(), "none"), "vhost_scsi", "CONFIG_VHOST_SCSI")
	if err == nil || !strings.Contains(err.Error(), "modprobe vhost_scsi") ||
		!strings.Contains(err.Error(), "CONFIG_VHOST_SCSI") {
		t.Errorf("no such device: %v", err)
	}
	if os.Getuid() == 0 {
		return // root may open everything
	}
	closed := filepath.Join(t.TempDir(), "closed")
	if err := os.WriteFile(closed, nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := open(closed, "vhost_scsi", "CONFIG_VHOST_SCSI"); err == nil ||
		!strings.Contains(err.Error(), "run as root") {
		t.Errorf("no permission: %v", err)
	}
}
