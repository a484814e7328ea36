package hostfs

import (
	"encoding/binary"
	"time"
)

// Names, layouts and values are those of <linux/fuse.h>, protocol version 7.

const (
	protocolMajor = 7
	protocolMinor = 38 // the newest whose structures are known here
	minorAtLeast  = 23 // the first in which init_out has its present length
)

// Lengths of structures.
const (
	inHeaderLen  = 40
	outHeaderLen = 16
	entryOutLen  = 128
	initOutLen   = 64
	direntLen    = 24 // without the name
)

// Bits of init_in and init_out.
const (
	asyncRead       = 1 << 0  // FUSE_ASYNC_READ
	atomicTruncate  = 1 << 3  // FUSE_ATOMIC_O_TRUNC
	bigWrites       = 1 << 5  // FUSE_BIG_WRITES
	autoInvalData   = 1 << 12 // FUSE_AUTO_INVAL_DATA
	doReaddirplus   = 1 << 13 // FUSE_DO_READDIRPLUS
	readdirplusAuto = 1 << 14 // FUSE_READDIRPLUS_AUTO
	asyncDIO        = 1 << 15 // FUSE_ASYNC_DIO
	parallelDirops  = 1 << 18 // FUSE_PARALLEL_DIROPS
	maxPages        = 1 << 22 // FUSE_MAX_PAGES
	cacheSymlinks   = 1 << 23 // FUSE_CACHE_SYMLINKS
	handleKillpriv2 = 1 << 28 // FUSE_HANDLE_KILLPRIV_V2
)

// Bits of requests and answers.
const (
	setMode     = 1 << 0 // FATTR_MODE
	setUID      = 1 << 1 // FATTR_UID
	setGID      = 1 << 2 // FATTR_GID
	setSize     = 1 << 3 // FATTR_SIZE
	setAtime    = 1 << 4 // FATTR_ATIME
	setMtime    = 1 << 5 // FATTR_MTIME
	setFH       = 1 << 6 // FATTR_FH
	setAtimeNow = 1 << 7 // FATTR_ATIME_NOW
	setMtimeNow = 1 << 8 // FATTR_MTIME_NOW

	keepCache = 1 << 1 // FOPEN_KEEP_CACHE
	cacheDir  = 1 << 3 // FOPEN_CACHE_DIR

	fsyncData = 1 << 0 // FUSE_FSYNC_FDATASYNC
)

// Opcodes.
const (
	opLookup        = 1
	opForget        = 2
	opGetattr       = 3
	opSetattr       = 4
	opReadlink      = 5
	opSymlink       = 6
	opMknod         = 8
	opMkdir         = 9
	opUnlink        = 10
	opRmdir         = 11
	opRename        = 12
	opLink          = 13
	opOpen          = 14
	opRead          = 15
	opWrite         = 16
	opStatfs        = 17
	opRelease       = 18
	opFsync         = 20
	opSetxattr      = 21
	opGetxattr      = 22
	opListxattr     = 23
	opRemovexattr   = 24
	opFlush         = 25
	opInit          = 26
	opOpendir       = 27
	opReaddir       = 28
	opReleasedir    = 29
	opFsyncdir      = 30
	opCreate        = 35
	opInterrupt     = 36
	opDestroy       = 38
	opBatchForget   = 42
	opFallocate     = 43
	opReaddirplus   = 44
	opRename2       = 45
	opLseek         = 46
	opCopyFileRange = 47
	opSyncfs        = 50
	opTmpfile       = 51
)

var order = binary.LittleEndian // of the guest, which is this machine's

func put32(b []byte, v ...uint32) []byte {
	for _, v := range v {
		b = order.AppendUint32(b, v)
	}
	return b
}

func put64(b []byte, v ...uint64) []byte {
	for _, v := range v {
		b = order.AppendUint64(b, v)
	}
	return b
}

// valid splits a time of validity into seconds and nanoseconds.
func valid(d time.Duration) (uint64, uint32) {
	return uint64(d / time.Second), uint32(d % time.Second)
}
