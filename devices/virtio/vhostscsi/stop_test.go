package vhostscsi_test

import (
	"testing"

	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostscsi"
	"gvm/devices/virtio/virtiotest"
	"gvm/devices/virtio/virtqtest"
)

// TestStopAndContinue stops the device under load.
func TestStopAndContinue(t *testing.T) {
	const queues, slots = 2, 5
	for _, tt := range []struct {
		name     string
		rounds   int
		features uint64
	}{
		{"flags", 100, version1},
		{"event_idx", 1000, version1 | virtio.FeatureEventIdx | virtio.FeatureIndirectDesc},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tg := newTarget(t, wwn)
			tg.lun(tg.group(0, true), 0, make([]byte, 512*virtiotest.DiskBlocks(queues*slots)))
			notes := []string{}
			dev, err := vhostscsi.New(vhostscsi.Config{
				WWPN: wwn, Queues: queues, RingSize: 16, Note: func(s string) { notes = append(notes, s) },
			})
			if err != nil {
				t.Fatal(err)
			}
			defer dev.Close()
			virtiotest.StopAndContinue(t, dev, newMemory(t), virtiotest.Load{
				Rounds: tt.rounds, Features: tt.features,
				Slots: func(queue int, d *virtqtest.Driver) (list []virtiotest.Slot) {
					switch queue {
					case controlQueue:
						return []virtiotest.Slot{virtiotest.Management(d, 11)} // VIRTIO_SCSI_S_FUNCTION_REJECTED
					case eventQueue:
						return nil
					}
					for i := range slots {
						list = append(list, virtiotest.Disk(d, (queue-requestQueue)*slots+i))
					}
					return list
				},
			})
			if len(notes) > 0 {
				t.Errorf("%q", notes)
			}
		})
	}
}
