package scsi

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"gvm/devices/block"
	"gvm/devices/iovec"
)

// CacheMode is the promise of a unit about the durability of written data.
type CacheMode uint8

const (
	// WriteBack advertises a volatile write cache (WCE=1). Data is durable
	// when SYNCHRONIZE CACHE or a write with FUA has been answered; while the
	// initiator has turned WCE off by MODE SELECT, every write is durable when
	// it is answered.
	WriteBack CacheMode = iota
	// WriteThrough has no write cache (WCE=0, not changeable): every write is
	// durable when it is answered.
	WriteThrough
	// Unsafe advertises a write cache (WCE=1) and answers flushes and FUA at
	// once, without doing anything: data that the initiator believes to be
	// durable is lost when the host loses power or its kernel crashes. It
	// survives the end of this process. Turning WCE off changes nothing.
	Unsafe
)

// UnitConfig describes a logical unit. It needs only Backend and a serial number, its own or the
// Backend's identity.
type UnitConfig struct {
	Backend block.Backend
	// Serial is the unit serial number, 1 to 64 printable ASCII characters. The NAA and T10
	// designators are derived from it: the same serial gives the same names in every run. If it is
	// empty, it is derived from the identity of an Identified backend.
	Serial   string
	Vendor   string // T10 vendor identification, at most 8 characters; "GVM"
	Product  string // product identification, at most 16 characters; "DISK"
	Revision string // product revision level, at most 4 characters; "1"
	ReadOnly bool
	// BlockSize is the logical block size in bytes, 512 (the default) or 4096.
	BlockSize int
	// PhysicalBlockExponent is n if 2^n logical blocks make a physical one.
	PhysicalBlockExponent int
	Cache                 CacheMode
	// IOPS limits commands that use the medium, and Bandwidth the bytes that they move. A waiting
	// command does not delay its queue.
	IOPS, Bandwidth block.Limit
	// Waiting bounds the commands that wait for the medium at the same time, each of which may keep a
	// thread; 0: MaxWaiting. More wait for them, without a thread.
	Waiting int
	// Reservations keeps persistent reservations over a loss of power, for
	// initiators that ask for it (APTPL). nil: they cannot.
	Reservations ReservationKeeper
	// Protection makes the unit one with protection information of type 1 (SBC-4
	// 4.21), which is checked at every read and write, and keeps it. nil: none.
	Protection Protection
	// OnError gets every failure of the backend, for the host's log; the initiator sees only sense
	// data. It may be called from several goroutines at the same time.
	OnError func(error)
	// Retry is called after OnError; while it returns true the unit repeats the failed operation.
	// It may block: the command waits, and so does an abort of the command. A flush is never
	// repeated: the host's kernel forgets the pages that it could not write back (fsync(2)), and
	// the next flush would succeed without that data. nil: never repeat.
	Retry func(error) bool
}

// Unit is a logical unit: a direct access block device (SBC-4) over a Backend.
type Unit struct {
	cfg         UnitConfig
	b           block.Backend
	blockSize   int64
	granularity int64 // bytes, of discards; 0 for a unit without
	wellKnown   bool  // the REPORT LUNS well-known logical unit: no medium
	serial      string
	limit       *block.Limiter // nil: none
	now         block.Prompt   // nil: every transfer may wait

	blocks     atomic.Uint64                     // capacity
	wce        atomic.Bool                       // caching mode page: WCE
	swp        atomic.Bool                       // control mode page: SWP
	dSense     atomic.Bool                       // control mode page: D_SENSE
	stopped    atomic.Bool                       // START STOP UNIT
	sanitize   atomic.Int32                      // SANITIZE
	sanitizing atomic.Pointer[sanitizeOperation] // nil: none
	written    atomic.Uint64                     // writes that were not made durable, counted when done
	flushed    atomic.Uint64                     // the part of written that a flush has covered

	// medium orders commands that must not be interleaved with others: COMPARE
	// AND WRITE and MODE SELECT hold it alone, as does Resize; commands that
	// access the medium share it. It is taken after set.mu has been released, never inside.
	medium mediumLock

	// tuples keeps blocks and their protection information consistent: held alone while both
	// change, and shared while both are read. It is taken after medium.
	tuples sync.RWMutex

	// slots bounds the commands that wait for the medium at the same time, each of which
	// may keep a thread.
	slots chan struct{}

	later laterFlush

	set taskSet
}

// MaxWaiting bounds the commands of a unit that wait for its medium at the same time: more do not
// make storage faster.
const MaxWaiting = 64

const (
	maxTransfer     = 65536   // MAXIMUM TRANSFER LENGTH, blocks
	maxCompareWrite = 255     // MAXIMUM COMPARE AND WRITE LENGTH, blocks
	maxUnmapBlocks  = 1 << 20 // MAXIMUM UNMAP LBA COUNT
	maxUnmapRanges  = 256     // MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT
	maxWriteSame    = 1 << 20 // MAXIMUM WRITE SAME LENGTH, blocks
	optimalTransfer = 1 << 20 // OPTIMAL TRANSFER LENGTH, bytes
)

// NewUnit returns a unit for cfg, to be attached to a Target. The caller closes the backend, after
// Detach.
func NewUnit(cfg UnitConfig) (*Unit, error) {
	if cfg.Backend == nil {
		return nil, errors.New("scsi unit: no backend")
	}
	if cfg.BlockSize == 0 {
		cfg.BlockSize = 512
	}
	if cfg.BlockSize != 512 && cfg.BlockSize != 4096 {
		return nil, fmt.Errorf("scsi unit: block size %d: want 512 or 4096", cfg.BlockSize)
	}
	if e := cfg.PhysicalBlockExponent; e < 0 || e > 15 {
		return nil, fmt.Errorf("scsi unit: physical block exponent %d: want 0 to 15", e)
	}
	if cfg.Waiting < 0 || cfg.Waiting > MaxWaiting {
		return nil, fmt.Errorf("scsi unit: %d commands that wait: want 0 to %d", cfg.Waiting, MaxWaiting)
	}
	if cfg.Cache > Unsafe {
		return nil, fmt.Errorf("scsi unit: unknown cache mode %d", cfg.Cache)
	}
	if id, ok := cfg.Backend.(block.Identified); ok && cfg.Serial == "" {
		cfg.Serial = serialFrom(id.Identity())
	}
	for _, f := range []struct {
		name  string
		value *string
		min   int
		max   int
		def   string
	}{
		{"serial", &cfg.Serial, 1, 64, ""},
		{"vendor", &cfg.Vendor, 0, 8, "GVM"},
		{"product", &cfg.Product, 0, 16, "DISK"},
		{"revision", &cfg.Revision, 0, 4, "1"},
	} {
		if *f.value == "" {
			*f.value = f.def
		}
		if n := len(*f.value); n < f.min || n > f.max {
			return nil, fmt.Errorf("scsi unit: %s %q: want %d to %d characters",
				f.name, *f.value, max(f.min, 1), f.max)
		}
		for _, c := range []byte(*f.value) {
			if c < 0x20 || c > 0x7e {
				return nil, fmt.Errorf("scsi unit: %s %q: not printable ASCII", f.name, *f.value)
			}
		}
	}
	u := &Unit{cfg: cfg, b: cfg.Backend, blockSize: int64(cfg.BlockSize), serial: cfg.Serial}
	blocks, err := u.capacity()
	if err != nil {
		return nil, err
	}
	u.blocks.Store(blocks)
	if g := block.DiscardGranularity(u.b); g > 0 && !cfg.ReadOnly {
		u.granularity = max(g, u.blockSize)
	}
	if u.limit, err = block.NewLimiter(cfg.IOPS, cfg.Bandwidth); err != nil {
		return nil, fmt.Errorf("scsi unit: %w", err)
	}
	u.now, _ = cfg.Backend.(block.Prompt)
	u.init()
	if u.set.pr, err = loadReservations(cfg.Reservations); err != nil {
		return nil, fmt.Errorf("scsi unit: persistent reservations: %w", err)
	}
	return u, nil
}

func (u *Unit) init() {
	u.slots = make(chan struct{}, cmp.Or(u.cfg.Waiting, MaxWaiting))
	u.set.init()
}

// capacity asks the backend for its size and checks it.
func (u *Unit) capacity() (uint64, error) {
	n := u.b.Size()
	if n <= 0 || n%u.blockSize != 0 {
		return 0, fmt.Errorf("scsi unit: backend of %d bytes: want a positive multiple of the block size %d",
			n, u.blockSize)
	}
	return uint64(n / u.blockSize), nil
}

// defaults restores the state after a reset, except WCE.
func (u *Unit) defaults() {
	u.swp.Store(false)
	u.dSense.Store(false)
	u.stopped.Store(false)
}

// powerOn puts the unit in its state after a power on (SAM-5 6.3.1), for initiators that it has not
// seen.
func (u *Unit) powerOn() {
	u.defaults()
	u.wce.Store(u.cfg.Cache != WriteThrough)
	u.set.forget()
}

// Resized reads the size of the backend again. If it has changed, every initiator finds the unit
// attention CAPACITY DATA HAS CHANGED.
func (u *Unit) Resized() error {
	blocks, err := u.capacity()
	if err != nil {
		return err
	}
	was := u.blocks.Swap(blocks)
	if was != blocks {
		u.set.attention(CapacityChanged, everyone)
	}
	if p := u.cfg.Protection; p != nil && blocks < was {
		u.tuples.Lock()
		defer u.tuples.Unlock()
		return p.ClearTuples(blocks, was-blocks)
	}
	return nil
}

// Resize calls change, which gives the backend another size, while no command accesses the medium,
// and then Resized.
//
// Before and after that it flushes the protection information, so that a crash of the host leaves
// none for new blocks: reads of them would fail.
func (u *Unit) Resize(change func() error) error { return u.ResizeUntil(nil, change) }

// ErrBusy is the error of a resize when the commands of the unit did not end in time.
var ErrBusy = errors.New("commands that use the medium do not end")

// ResizeUntil is Resize that waits for commands only until cut is closed, and returns ErrBusy then.
func (u *Unit) ResizeUntil(cut <-chan struct{}, change func() error) error {
	flush := func() error {
		if p := u.cfg.Protection; p != nil {
			return p.Flush()
		}
		return nil
	}
	if err := flush(); err != nil {
		return err
	}
	if err := u.resize(cut, change); err != nil {
		return err
	}
	return flush()
}

func (u *Unit) resize(cut <-chan struct{}, change func() error) error {
	if !u.medium.lock(true, cut) {
		return ErrBusy
	}
	defer u.medium.unlock(true)
	if err := change(); err != nil {
		return err
	}
	return u.Resized()
}

// Serial returns the unit serial number.
func (u *Unit) Serial() string { return u.serial }

// Config returns the configuration of the unit, with its defaults filled in.
func (u *Unit) Config() UnitConfig { return u.cfg }

// BlockSize returns the logical block size in bytes.
func (u *Unit) BlockSize() int { return int(u.blockSize) }

// Blocks returns the capacity in logical blocks.
func (u *Unit) Blocks() uint64 { return u.blocks.Load() }

// thin reports whether logical block provisioning management works (LBPME).
func (u *Unit) thin() bool { return u.granularity > 0 }

// writeProtected returns the sense data for a write, nil if writes are allowed.
func (u *Unit) writeProtected() error {
	switch {
	case u.cfg.ReadOnly:
		return WriteProtected
	case u.swp.Load():
		return SoftwareProtected
	}
	return nil
}

// inRange checks that n blocks from lba on exist. Both come from the initiator
// and may have any value: the sum is never formed (SBC-4 4.6). Zero blocks at
// the very end are in range.
func (u *Unit) inRange(lba, n uint64) error {
	if c := u.blocks.Load(); lba > c || n > c-lba {
		return LBAOutOfRange
	}
	return nil
}

// try calls do, which uses the backend at off and returns its progress in bytes. It repeats do as
// long as that fails and Retry returns true.
func (u *Unit) try(op string, off int64, do func() (int, error)) error {
	for {
		n, err := do()
		if err == nil {
			return nil
		}
		e := &mediumError{op, off + int64(n), err}
		if u.cfg.OnError != nil {
			u.cfg.OnError(e)
		}
		if u.cfg.Retry == nil || !u.cfg.Retry(e) || op == "flush" {
			return e
		}
	}
}

// attempt is try for an optional operation of the backend: errors.ErrUnsupported is no failure, and
// returned unchanged.
func (u *Unit) attempt(op string, off int64, do func() error) error {
	unsupported := false
	err := u.try(op, off, func() (int, error) {
		err := do()
		if unsupported = errors.Is(err, errors.ErrUnsupported); unsupported {
			err = nil
		}
		return 0, err
	})
	if unsupported {
		return errors.ErrUnsupported
	}
	return err
}

// read fills iov from lba on.
func (u *Unit) read(iov [][]byte, lba uint64) error {
	if u.cfg.Protection != nil {
		return u.readChecked(nil, iov, lba, iovec.Len(iov)/int(u.blockSize), nil, checkAll)
	}
	off := int64(lba) * u.blockSize
	return u.try("read", off, func() (int, error) { return block.ReadVec(u.b, iov, off) })
}

// readNow is read that does not block; if it returns false, use read.
func (u *Unit) readNow(iov [][]byte, lba uint64) bool {
	return u.now != nil && u.cfg.Protection == nil && u.now.ReadVecNow(iov, int64(lba)*u.blockSize)
}

// durable reports whether a write has to be on stable storage when it is answered.
func (u *Unit) durable(fua bool) bool { return u.cfg.Cache != Unsafe && (fua || !u.wce.Load()) }

// writeNow is write that does not block; if it returns false, use write.
func (u *Unit) writeNow(iov [][]byte, lba uint64, fua bool) bool {
	if u.now == nil || u.cfg.Protection != nil || u.durable(fua) || !u.now.WriteVecNow(iov, int64(lba)*u.blockSize) {
		return false
	}
	u.written.Add(1)
	return true
}

// write stores iov from lba on. It is durable on return when fua is set or the
// write cache is off.
func (u *Unit) write(iov [][]byte, lba uint64, fua bool) error {
	if u.cfg.Protection != nil {
		return u.writeChecked(nil, iov, lba, nil, 0, fua || !u.wce.Load())
	}
	off := int64(lba) * u.blockSize
	durable := u.durable(fua)
	if durable && u.cfg.Retry == nil {
		return u.try("write", off, func() (int, error) { return block.WriteVecDurable(u.b, iov, off) })
	}
	err := u.store(iov, lba)
	if err == nil && durable {
		// In two steps, of which the first can be repeated.
		err = u.flush()
	}
	return err
}

// store is write without a promise.
func (u *Unit) store(iov [][]byte, lba uint64) error {
	if u.cfg.Protection != nil {
		return u.writeChecked(nil, iov, lba, nil, 0, false)
	}
	off := int64(lba) * u.blockSize
	err := u.try("write", off, func() (int, error) { return block.WriteVec(u.b, iov, off) })
	u.written.Add(1)
	return err
}

// flush makes all data written before the call durable.
func (u *Unit) flush() error {
	if u.cfg.Cache == Unsafe || u.cfg.ReadOnly {
		return nil
	}
	covered := u.written.Load()
	if err := u.try("flush", 0, func() (int, error) { return 0, u.b.Flush() }); err != nil {
		return err
	}
	if p := u.cfg.Protection; p != nil {
		if err := u.try("flush", 0, func() (int, error) { return 0, p.Flush() }); err != nil {
			return err
		}
	}
	u.covers(covered)
	return nil
}

// covers notes that the first n writes are durable.
func (u *Unit) covers(n uint64) {
	for {
		old := u.flushed.Load()
		if old >= n || u.flushed.CompareAndSwap(old, n) {
			return
		}
	}
}

// Sync makes all written data durable, for a unit that is removed: the medium, and then the
// protection information, even if the medium fails. With the cache mode Unsafe it does nothing.
func (u *Unit) Sync() error {
	if u.cfg.Cache == Unsafe || u.cfg.ReadOnly {
		return nil
	}
	covered := u.written.Load()
	err := u.b.Flush()
	if p := u.cfg.Protection; p != nil {
		err = errors.Join(err, p.Flush())
	}
	if err == nil {
		u.covers(covered)
	}
	return err
}

// Dirty reports whether Sync has anything to do.
func (u *Unit) Dirty() bool {
	return u.cfg.Cache != Unsafe && !u.cfg.ReadOnly && u.flushed.Load() != u.written.Load()
}

// flushDirty is flush if data was written since the last one.
func (u *Unit) flushDirty() error {
	if !u.Dirty() {
		return nil
	}
	return u.flush()
}

// settle ends a change of the medium other than a plain write (UNMAP, WRITE SAME): it counts as a
// write, and is durable if the write cache is off.
func (u *Unit) settle() error {
	u.written.Add(1)
	if u.wce.Load() {
		return nil
	}
	return u.flush()
}

// discard gives back as much as it can of the storage of n blocks from lba on, which then read as
// zeroes.
func (u *Unit) discard(w worker, lba, n uint64) error {
	return u.inPieces(w, lba, n, u.discardPiece)
}

// inPieces calls do for all of n blocks from lba on. Pieces end at multiples of the first one's
// size, so that none cuts a unit of storage that the backend gives back.
func (u *Unit) inPieces(w worker, lba, n uint64, do func(lba, n uint64) error) error {
	for p, first := u.pieces(), true; n > 0; first = false {
		if w.stopped() {
			return errStopped
		}
		k := p.next(n)
		if rest := lba % uint64(firstPiece/u.blockSize); k < n && k > rest {
			k -= rest
		}
		if err := do(lba, k); err != nil {
			if errors.Is(err, errors.ErrUnsupported) && !first {
				return u.repeat(w, lba, n, make([]byte, u.blockSize))
			}
			return err
		}
		lba, n = lba+k, n-k
	}
	return nil
}

func (u *Unit) discardPiece(lba, n uint64) error {
	off, size, p := int64(lba)*u.blockSize, int64(n)*u.blockSize, u.cfg.Protection
	if p != nil {
		u.tuples.Lock()
		defer u.tuples.Unlock()
	}
	err := u.attempt("discard", off, func() error {
		if p != nil {
			if err := p.ClearTuples(lba, n); err != nil {
				return err
			}
		}
		return u.b.(block.Discarder).Discard(off, size)
	})
	u.written.Add(1)
	return err
}

// zero makes n blocks from lba on read as zeroes; if discard is set, it gives their storage back if
// it can.
func (u *Unit) zero(w worker, lba, n uint64, discard bool) error {
	err := errors.ErrUnsupported
	if discard && u.thin() {
		err = u.discard(w, lba, n)
	}
	if z, ok := u.b.(block.Zeroer); ok && u.cfg.Protection == nil && errors.Is(err, errors.ErrUnsupported) {
		err = u.inPieces(w, lba, n, func(lba, n uint64) error {
			off := int64(lba) * u.blockSize
			return u.attempt("zero", off, func() error { return z.Zero(off, int64(n)*u.blockSize) })
		})
	}
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return u.repeat(w, lba, n, make([]byte, u.blockSize))
	case err != nil:
		return err
	}
	return u.settle()
}

// repeat writes block to each of n blocks from lba on.
func (u *Unit) repeat(w worker, lba, n uint64, block []byte) error {
	if err := u.fill(w, lba, n, block); err != nil {
		return err
	}
	return u.settle()
}

// fill is repeat without the end of the change.
func (u *Unit) fill(w worker, lba, n uint64, block []byte) error {
	buf := getScratch()
	defer putScratch(buf)
	for i := 0; i < len(*buf); i += len(block) {
		copy((*buf)[i:], block)
	}
	for per := uint64(len(*buf) / len(block)); n > 0; {
		if w.stopped() {
			return errStopped
		}
		k := min(n, per)
		if err := u.store([][]byte{(*buf)[:k*uint64(len(block))]}, lba); err != nil {
			return err
		}
		lba, n = lba+k, n-k
	}
	return nil
}

// scratch buffers are for data that passes through the target: comparisons and
// repeated blocks.
var scratch = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

func getScratch() *[]byte  { return scratch.Get().(*[]byte) }
func putScratch(b *[]byte) { scratch.Put(b) }

// physicalExponent returns LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT.
func (u *Unit) physicalExponent() byte { return byte(u.cfg.PhysicalBlockExponent) }

// clamp32 is n, or all ones when it does not fit.
func clamp32(n uint64) uint32 { return uint32(min(n, math.MaxUint32)) }

// unmapGranularity is the granularity in blocks, a power of two.
func (u *Unit) unmapGranularity() uint32 {
	n := uint64(u.granularity / u.blockSize)
	return clamp32(1 << bits.Len64(n-1))
}
