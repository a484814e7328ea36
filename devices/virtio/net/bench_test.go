package net

import (
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
)

const benchFrame = 1514

// BenchmarkTransmit sends frames of a driver to a socket.
func BenchmarkTransmit(b *testing.B) {
	r := newRig(b, 1, virtio.FeatureEventIdx|featureMrgRxB)
	go func() {
		for buf := make([]byte, MaxFrame); ; {
			if n, _ := unix.Read(r.peer[0], buf); n <= 0 {
				return
			}
		}
	}()
	defer unix.Shutdown(r.peer[0], unix.SHUT_RDWR)
	d := r.q[1]
	at := d.Alloc(HeaderLen + benchFrame)
	b.SetBytes(benchFrame)
	b.ReportAllocs()
	for sent := 0; sent < b.N; {
		for d.Free() > 0 {
			d.Add(virtqtest.Seg{Addr: at, Len: HeaderLen + benchFrame})
		}
		r.publish(1)
		if _, _, err := d.Wait(); err != nil {
			b.Fatal(err)
		}
		sent++
		for _, _, ok := d.Used(); ok; _, _, ok = d.Used() {
			sent++
		}
	}
}

// BenchmarkReceive gives a driver frames of a socket, in buffers that are large enough.
func BenchmarkReceive(b *testing.B) {
	r := newRig(b, 1, virtio.FeatureEventIdx|featureMrgRxB)
	go func() {
		for frame := make([]byte, HeaderLen+benchFrame); ; {
			if _, err := unix.Write(r.peer[0], frame); err != nil {
				return
			}
		}
	}()
	defer unix.Shutdown(r.peer[0], unix.SHUT_RDWR)
	d := r.q[0]
	at := d.Alloc(HeaderLen + benchFrame)
	b.SetBytes(benchFrame)
	b.ReportAllocs()
	for received := 0; received < b.N; {
		for d.Free() > 0 {
			d.Add(virtqtest.Seg{Addr: at, Len: HeaderLen + benchFrame, Write: true})
		}
		r.publish(0)
		if _, _, err := d.Wait(); err != nil {
			b.Fatal(err)
		}
		received++
		for _, _, ok := d.Used(); ok; _, _, ok = d.Used() {
			received++
		}
	}
}
