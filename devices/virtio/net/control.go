package net

import (
	"encoding/binary"

	"gvm/devices/virtio"
	"gvm/devices/virtio/virtq"
)

// Classes and commands of the control queue (5.1.6.5).
const (
	classRX     = 0 // VIRTIO_NET_CTRL_RX
	rxPromisc   = 0 // VIRTIO_NET_CTRL_RX_PROMISC
	rxAllMulti  = 1 // VIRTIO_NET_CTRL_RX_ALLMULTI
	classMAC    = 1 // VIRTIO_NET_CTRL_MAC
	macTableSet = 0 // VIRTIO_NET_CTRL_MAC_TABLE_SET
	classMQ     = 4 // VIRTIO_NET_CTRL_MQ
	mqPairsSet  = 0 // VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET

	ackOK  = 0 // VIRTIO_NET_OK
	ackErr = 1 // VIRTIO_NET_ERR
)

// commands serves the control queue.
func (d *Device) commands(w *virtio.Worker, c *virtq.Chain) error {
	var h [2]byte // class and command
	if c.Out.Len() < len(h) || c.In.Len() == 0 {
		return guestErr("5.1.6.5", "control command of %d bytes, with room for %d", c.Out.Len(), c.In.Len())
	}
	c.Out.Read(h[:])
	ack := byte(ackErr)
	if d.command(h, &c.Out) {
		ack = ackOK
	}
	c.In.Write([]byte{ack})
	w.Complete(c, 1)
	return nil
}

// command reports whether the device has done a command.
func (d *Device) command(h [2]byte, data *virtq.Buffer) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case h == [2]byte{classRX, rxPromisc}, h == [2]byte{classRX, rxAllMulti}:
		// The device filters nothing, as if both were on: a filter is best effort (5.1.6.5.2).
		return d.features&featureCtrlRX != 0 && data.Len() == 1
	case h == [2]byte{classMAC, macTableSet}:
		return d.features&featureCtrlRX != 0 && macTables(data)
	case h == [2]byte{classMQ, mqPairsSet}:
		var b [2]byte
		if d.features&featureMQ == 0 || data.Len() != len(b) {
			return false
		}
		data.Read(b[:])
		n := int(binary.LittleEndian.Uint16(b[:]))
		return n >= 1 && n <= len(d.pairs) && d.setPairs(n) == nil
	}
	return false
}

// macTables reports whether data is two struct virtio_net_ctrl_mac, of unicast and multicast
// addresses.
func macTables(data *virtq.Buffer) bool {
	for range 2 {
		var entries [4]byte
		if n, err := data.Read(entries[:]); n < len(entries) || err != nil {
			return false
		}
		n := int64(binary.LittleEndian.Uint32(entries[:])) * 6
		if n > int64(data.Len()) {
			return false
		}
		data.Take(int(n))
	}
	return data.Len() == 0
}
