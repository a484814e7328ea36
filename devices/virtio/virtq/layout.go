// Package virtq is the device side of the split virtqueue (virtio 1.3, 2.7):
// the trust boundary. Everything in a ring was written by the guest; a chain
// that comes out of Next has every address and length checked, and what it
// points to is copied at most once.
package virtq

// Layout is where the driver put one queue. Addresses are guest physical.
type Layout struct {
	Size   uint16 // entries, a power of two up to 32768; 0: the driver does not use the queue
	Desc   uint64 // descriptor table, 16*Size bytes, 16-byte aligned
	Driver uint64 // available ring, 6+2*Size bytes, 2-byte aligned
	Device uint64 // used ring, 6+8*Size bytes, 4-byte aligned
}
