// Package lio has the kernel's SCSI target (LIO) serve disk images through
// vhost-scsi: it makes the target's objects in configfs, and takes them down.
// It knows nothing of /dev/vhost-scsi; what it returns is the WWN that
// VHOST_SCSI_SET_ENDPOINT wants.
//
// # Whose an object is
//
// The number of an adapter directory (core/fileio_N, core/iblock_N) holds the
// process id, the start time and a serial number of the gvm that made it; see
// owner. An adapter is made before everything else of a Target and removed after
// it, and names and WWN of everything else follow from the same three numbers.
// An owner is alive while it holds the lock (flock) on its adapter directory, or
// while a process with that id and that start time runs. The lock is on the
// object itself: there is no lock file that could be elsewhere, be deleted, or
// outlive its object, it is seen from every container that sees the objects, and
// it ends with the process however that ends. All of it is gone after a reboot,
// as the objects are.
//
// Whatever changes objects holds a lock on the root directory meanwhile, so that
// Collect never meets a Target half made by a living process.
//
// # What LIO cannot say
//
// The guest is to see the same disk as from package scsi: vendor, product,
// revision, serial number, block size, write cache, unmap, medium rotation and
// write protection are. What differs is in docs/backends.md; what differs
// because of an option is in Target.Notes.
package lio
