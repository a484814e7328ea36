package net

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

func TestNew(t *testing.T) {
	mac := [6]byte{2}
	for want, c := range map[string]Config{
		"MAC address 00 00 00 00 00 00": {Queues: []int{1}},
		"MAC address 01 00 00 00 00 00": {MAC: [6]byte{1}, Queues: []int{1}},
		"0 queue pairs: want 1 to 16":   {MAC: mac},
		"17 queue pairs: want 1 to 16":  {MAC: mac, Queues: make([]int, 17)},
		"MTU 67: want 68 or more":       {MAC: mac, Queues: []int{1}, MTU: 67},
		"without SetPairs":              {MAC: mac, Queues: []int{1, 2}},
	} {
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestConfig(t *testing.T) {
	for _, tt := range []struct {
		c        Config
		features uint64
		config   string
	}{
		{Config{MAC: [6]byte{2, 3, 4, 5, 6, 7}, Queues: []int{1}, Offloads: CSum | featureMQ}, 0x3007_8021,
			"020304050607" + "0100" + "0100" + "0000"},
		{Config{MAC: [6]byte{2}, Queues: []int{1, 2}, MTU: 9000, Offloads: allOffloads,
			SetPairs: func(int) error { return nil }}, 0x3047_bbab, "020000000000" + "0100" + "0200" + "2823"},
	} {
		d, err := New(tt.c)
		if err != nil {
			t.Fatal(err)
		}
		if f, c := d.Features(), hex.EncodeToString(d.Config()); f != tt.features || c != tt.config {
			t.Errorf("features %#x, want %#x; configuration %s, want %s", f, tt.features, c, tt.config)
		}
	}
}

func TestTransmit(t *testing.T) {
	r := newRig(t, 1, virtio.FeatureEventIdx)
	for i, n := range []int{0, 14, 60, 1514, MaxFrame - HeaderLen} {
		r.send(0, frame(n, byte(i)))
		if got := r.take(0); !bytes.Equal(got, frame(n, byte(i))) {
			t.Errorf("a frame of %d bytes came as %d", n, len(got))
		}
	}
	r.send(0, frame(MaxFrame+1-HeaderLen, 0)) // is dropped
	r.send(0, frame(60, 9))
	if got := r.take(0); !bytes.Equal(got, frame(60, 9)) {
		t.Error("the next frame does not come")
	}
	r.sent(0, 7)
	if p := r.dev.pairs[0]; p.txDropped.Load() != 1 || p.txFrames.Load() != 6 {
		t.Errorf("%d dropped, %d sent", p.txDropped.Load(), p.txFrames.Load())
	}
}

// TestReceive: frames go to one buffer, or to as many as they need.
func TestReceive(t *testing.T) {
	r := newRig(t, 1, featureMrgRxB|virtio.FeatureEventIdx)
	small, large := frame(60, 1), frame(60_000, 2)
	r.inject(0, small) // before there is a buffer
	for range 100 {
		r.add(0, 1000)
	}
	r.receive(0, small, 72)
	for range 2 { // the second is expected to be large
		r.inject(0, large)
		full := bytes.Repeat([]byte{1}, 60) // 60 full buffers
		want := make([]int, 0, 61)
		for range full {
			want = append(want, 1000)
		}
		r.receive(0, large, append(want, 12)...)
		for range 60 {
			r.add(0, 1000)
		}
	}
	for i := range byte(10) {
		r.inject(0, frame(988, i))
		r.receive(0, frame(988, i), 1000)
	}
	if n := r.dev.pairs[0].rxFrames.Load(); n != 13 {
		t.Errorf("%d frames", n)
	}
}

// TestReceiveWaits: a frame that the buffers do not hold waits for more, also over a stop.
func TestReceiveWaits(t *testing.T) {
	r := newRig(t, 1, featureMrgRxB)
	b := frame(2500, 3)
	r.add(0, 1000)
	r.inject(0, b)
	r.add(0, 1000)
	r.stop()
	r.activate()
	r.inject(0, frame(20, 4))
	if _, _, ok := r.q[0].Used(); ok {
		t.Error("a buffer came back")
	}
	r.add(0, 1000)
	r.receive(0, b, 1000, 1000, 512)
	r.stop()
	r.add(0, 32)
	r.activate()
	r.receive(0, frame(20, 4), 32)
}

// TestReceiveWhole: without VIRTIO_NET_F_MRG_RXBUF a frame has one buffer, or is lost.
func TestReceiveWhole(t *testing.T) {
	r := newRig(t, 1, 0)
	r.add(0, 1526)
	r.inject(0, frame(2000, 1))
	r.inject(0, frame(1514, 2))
	r.receive(0, frame(1514, 2), 1526)
	r.inject(0, []byte("short"))
	r.add(0, 1526)
	r.inject(0, frame(60, 3))
	r.receive(0, frame(60, 3), 72)
	if n := r.dev.pairs[0].rxDropped.Load(); n != 2 {
		t.Errorf("%d dropped, want 2", n)
	}
}

// TestBackpressure: the device keeps a frame that the backend does not take, and a stop gives it
// back.
func TestBackpressure(t *testing.T) {
	r := newRig(t, 1, virtio.FeatureEventIdx)
	d := r.q[1]
	const frames = 100
	at := d.Alloc(HeaderLen + 60_000)
	for i := range byte(frames) {
		own := d.Alloc(HeaderLen)
		d.Bytes(own, HeaderLen)[0] = i
		d.Add(virtqtest.Seg{Addr: own, Len: HeaderLen}, virtqtest.Seg{Addr: at, Len: 60_000})
	}
	r.publish(1)
	got := 0
	if _, _, err := d.Wait(); err != nil {
		t.Fatal(err)
	}
	for got++; ; got++ {
		r.stop()
		r.activate()
		if _, _, ok := d.Used(); !ok {
			break
		}
	}
	if got == 0 || got == frames {
		t.Errorf("the socket holds %d frames", got)
	}
	for i := range byte(frames) {
		if b := r.take(0); len(b) != HeaderLen+60_000 || b[0] != i {
			t.Fatalf("frame %d has %d bytes", i, len(b))
		}
	}
	r.sent(0, frames-got)
}

// TestBackendEnds: the link goes down, and the device keeps taking frames.
func TestBackendEnds(t *testing.T) {
	r := newRig(t, 1, featureMrgRxB|featureStatus)
	r.add(0, 100)
	unix.Shutdown(r.peer[0], unix.SHUT_RDWR)
	if err := <-r.failed; !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if c := r.dev.Config(); c[6] != 0 || r.changes.Load() != 1 {
		t.Errorf("status %d, %d changes", c[6], r.changes.Load())
	}
	r.send(0, frame(60, 0))
	r.sent(0, 1)
	r.add(0, 100)
	r.stop()
	r.activate()
	if len(r.failed) > 0 || r.changes.Load() != 1 {
		t.Error("it ended twice")
	}
}

// TestPairs: the driver chooses how many queue pairs it uses.
func TestPairs(t *testing.T) {
	r := newRig(t, 3, featureMrgRxB|featureCtrlVQ|featureMQ|virtio.FeatureEventIdx)
	const control = 6
	for i := range 3 {
		r.add(i, 100)
		r.inject(i, frame(50, byte(i)))
	}
	r.receive(0, frame(50, 0), 62)
	set := func(ack, pairs byte) {
		t.Helper()
		if got := r.control(control, classMQ, mqPairsSet, pairs, 0); got != ack {
			t.Errorf("%d pairs: ack %d", pairs, got)
		}
	}
	set(ackErr, 0)
	set(ackErr, 4)
	if _, _, ok := r.q[2].Used(); ok {
		t.Error("a pair is in use before it may be")
	}
	set(ackOK, 3)
	r.receive(1, frame(50, 1), 62)
	r.receive(2, frame(50, 2), 62)
	r.send(2, frame(60, 9))
	if got := r.take(2); !bytes.Equal(got, frame(60, 9)) {
		t.Error("the third pair sends something else")
	}
	r.stop()
	r.activate()
	r.add(1, 100)
	r.inject(1, frame(50, 7))
	r.receive(1, frame(50, 7), 62)
	set(ackOK, 2)
	r.add(2, 100)
	r.inject(2, frame(50, 8))
	set(ackOK, 2) // after the kick of the add
	r.send(2, frame(60, 1))
	r.sent(2, 2)
	if _, _, ok := r.q[4].Used(); ok || r.dev.pairs[2].txDropped.Load() != 1 {
		t.Error("the third pair is in use")
	}
	if err := r.dev.Reset(); err != nil {
		t.Error(err)
	}
	if want := []int{3, 2, 2, 1}; len(r.used) != 4 || [4]int(r.used) != [4]int(want) {
		t.Errorf("SetPairs %v, want %v", r.used, want)
	}
}

func TestControl(t *testing.T) {
	r := newRig(t, 2, featureCtrlVQ|featureCtrlRX) // without VIRTIO_NET_F_MQ: its queue is the third
	for command, ack := range map[string]byte{
		"\x00\x00\x01": ackOK, "\x00\x01\x00": ackOK, "\x00\x00": ackErr, "\x00\x02\x01": ackErr,
		"\x01\x00\x01\x00\x00\x00abcdef\x00\x00\x00\x00":       ackOK,
		"\x01\x00\x00\x00\x00\x00\x02\x00\x00\x00abcdefabcdef": ackOK,
		"\x01\x00\x00\x00\x00\x00\x02\x00\x00\x00abcdefabcde":  ackErr,
		"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00a":            ackErr,
		"\x01\x00\xff\xff\xff\xff\x00\x00\x00\x00":             ackErr,
		"\x01\x00\x00":     ackErr,
		"\x01\x01abcdef":   ackErr,
		"\x03\x00":         ackErr,
		"\x04\x00\x01\x00": ackErr,
		"\xff\xff":         ackErr,
	} {
		if got := r.control(2, []byte(command)...); got != ack {
			t.Errorf("command % x: ack %d, want %d", command, got, ack)
		}
	}
}

// TestOffloads: the backend gives the guest frames as the driver's features say.
func TestOffloads(t *testing.T) {
	for features, want := range map[uint64]uint64{
		0:                     0,
		allOffloads:           allOffloads,
		GuestCSum | GuestTSO6: GuestCSum | GuestTSO6,
		GuestTSO4 | HostTSO4:  HostTSO4,
	} {
		r := newRig(t, 1, features)
		r.stop()
		r.activate()
		if len(r.offloads) != 1 || r.offloads[0] != want {
			t.Errorf("features %#x: offloads %#x, want %#x", features, r.offloads, want)
		}
	}
}

// TestGuestErrors: a driver that breaks a rule breaks its device alone.
func TestGuestErrors(t *testing.T) {
	for want, tt := range map[string]struct {
		queue int
		segs  []virtqtest.Seg
	}{
		"device-readable buffer in a receive queue":        {0, []virtqtest.Seg{{Len: 50}, {Len: 100, Write: true}}},
		"receive buffer of 11 bytes: no room for a header": {0, []virtqtest.Seg{{Len: 11, Write: true}}},
		"device-writable buffer in a transmit queue":       {1, []virtqtest.Seg{{Len: 50}, {Len: 1, Write: true}}},
		"frame of 11 bytes: no header":                     {1, []virtqtest.Seg{{Len: 11}}},
		"control command of 1 bytes, with room for 1":      {2, []virtqtest.Seg{{Len: 1}, {Len: 1, Write: true}}},
		"control command of 4 bytes, with room for 0":      {2, []virtqtest.Seg{{Len: 4}}},
		"a chain in queue 3":                               {3, []virtqtest.Seg{{Len: 100}}},
	} {
		r := newRig(t, 2, featureCtrlVQ|featureMrgRxB)
		r.add(0, 100)
		r.q[tt.queue].Add(tt.segs...)
		r.publish(tt.queue)
		r.inject(0, frame(20, 0)) // uses the first buffer, so that the second is looked at
		if tt.queue == 0 {
			r.receive(0, frame(20, 0), 32)
		}
		if got := r.guestError(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
