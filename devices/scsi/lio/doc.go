// Package lio has the kernel's SCSI target (LIO) serve disk images through vhost-scsi: it makes the
// target's objects in configfs, and removes them. It knows nothing of /dev/vhost-scsi; it returns
// the WWN for VHOST_SCSI_SET_ENDPOINT.
//
// # Owners of objects
//
// The number of an adapter directory (core/fileio_N, core/iblock_N) holds the process id, the start
// time and a serial number of the gvm that made it; see owner. An adapter is made before everything
// else of a Target and removed after it, and names and WWN of everything else follow from the same
// three numbers. An owner is alive while it holds the lock (flock) on its adapter directory, or
// while a process with that id and that start time runs. The lock is on the object itself, not on a
// lock file that could be elsewhere, be deleted, or outlive its object. Every container that sees
// the objects sees it, and it ends with the process. A reboot removes locks and objects alike.
//
// A process that changes objects holds a lock on the root directory meanwhile, so that Collect
// never finds a Target half made by a living process.
//
// # Differences from package scsi
//
// The guest is to see the same disk as from package scsi: vendor, product, revision, serial number,
// block size, write cache, unmap, medium rotation and write protection are. docs/backends.md lists
// the differences; Target.Notes lists those that an option causes.
package lio
