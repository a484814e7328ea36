// Package blocktest has an acceptance suite for the storage of disks.
package blocktest

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"gvm/devices/block"
	"gvm/panics"
)

// pattern is n bytes that differ for every seed and every 512-byte block.
func pattern(seed byte, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = seed*31 + byte(i/512)*7 + byte(i)
	}
	return p
}

// pieces cuts p into buffers of the given sizes, the last taking the rest.
func pieces(p []byte, sizes ...int) [][]byte {
	var iov [][]byte
	for _, n := range sizes {
		iov = append(iov, p[:n:n])
		p = p[n:]
	}
	return append(iov, p)
}

// TestBackend checks that the backend of open keeps the contract of block.Backend and of the
// optional interfaces it has. Every call of open must return fresh storage of at least 1 MiB that
// reads as zeroes; open arranges for its clean-up.
func TestBackend(t *testing.T, open func() block.Backend) {
	const size = 1 << 20
	read := func(t *testing.T, b block.Backend, off int64, n int) []byte {
		t.Helper()
		p := bytes.Repeat([]byte{0xee}, n)
		if k, err := b.ReadAt(p, off); err != nil || k != n {
			t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", n, off, k, err)
		}
		return p
	}
	write := func(t *testing.T, b block.Backend, off int64, p []byte) {
		t.Helper()
		if k, err := b.WriteAt(p, off); err != nil || k != len(p) {
			t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", len(p), off, k, err)
		}
	}
	same := func(t *testing.T, what string, got, want []byte) {
		t.Helper()
		if !bytes.Equal(got, want) {
			t.Errorf("%s: wrong data", what)
		}
	}

	t.Run("ReadWrite", func(t *testing.T) {
		b := open()
		end := b.Size()
		if end < size {
			t.Fatalf("Size() = %d, want %d or more", end, size)
		}
		same(t, "fresh storage", read(t, b, 0, 8192), make([]byte, 8192))
		first, last, middle := pattern(1, 4096), pattern(2, 512), pattern(3, 64<<10)
		write(t, b, 0, first)
		write(t, b, end-512, last)
		write(t, b, 128<<10, middle)
		if err := b.Flush(); err != nil {
			t.Fatalf("Flush: %v", err)
		}
		same(t, "first blocks", read(t, b, 0, 4096), first)
		same(t, "last block", read(t, b, end-512, 512), last)
		same(t, "middle", read(t, b, 128<<10, 64<<10), middle)
		same(t, "before the middle", read(t, b, 128<<10-512, 512), make([]byte, 512))
		same(t, "after the middle", read(t, b, 192<<10, 512), make([]byte, 512))
	})

	t.Run("PastTheEnd", func(t *testing.T) {
		b := open()
		end := b.Size()
		if n, err := b.ReadAt(make([]byte, 1024), end-512); err == nil {
			t.Errorf("ReadAt across the end = %d, nil", n)
		}
		if n, err := b.WriteAt(make([]byte, 1024), end-512); err == nil {
			t.Errorf("WriteAt across the end = %d, nil", n)
		}
		if b.Size() != end {
			t.Errorf("Size() is %d after a write past the end, was %d", b.Size(), end)
		}
	})

	t.Run("Prompt", func(t *testing.T) {
		b := open()
		now, ok := b.(block.Prompt)
		if !ok {
			return
		}
		end := b.Size()
		// A transfer that it reports done is done, and a refused one works by the other methods.
		p := pattern(4, 96<<10)
		iov := pieces(p, 512, 1, 4095, 0, 30000)
		if !now.WriteVecNow(iov, 4096) {
			write(t, b, 4096, p)
		}
		same(t, "WriteVecNow", read(t, b, 4096, len(p)), p)
		q := pattern(5, 64<<10)
		if !now.WriteVecNow([][]byte{q}, 8192) {
			write(t, b, 8192, q)
		}
		copy(p[4096:], q)
		got := make([]byte, len(p))
		if now.ReadVecNow(pieces(got, 17, 50000, 0, 495), 4096) {
			same(t, "ReadVecNow", got, p)
		}
		for _, off := range []int64{b.Size() - 512, b.Size(), -512} {
			if now.ReadVecNow([][]byte{got[:1024]}, off) {
				t.Errorf("ReadVecNow across the end, at %d", off)
			}
			if now.WriteVecNow([][]byte{p[:1024]}, off) {
				t.Errorf("WriteVecNow across the end, at %d", off)
			}
		}
		if n := b.Size(); n != end {
			t.Errorf("Size() is %d afterwards, was %d", n, end)
		}
	})

	t.Run("Vectored", func(t *testing.T) {
		b := open()
		p := pattern(4, 96<<10)
		iov := pieces(p, 512, 1, 4095, 0, 30000)
		if n, err := block.WriteVec(b, iov, 4096); err != nil || n != len(p) {
			t.Fatalf("WriteVec = %d, %v", n, err)
		}
		same(t, "WriteVec", read(t, b, 4096, len(p)), p)
		got := make([]byte, len(p))
		if n, err := block.ReadVec(b, pieces(got, 17, 50000, 0, 495), 4096); err != nil || n != len(p) {
			t.Fatalf("ReadVec = %d, %v", n, err)
		}
		same(t, "ReadVec", got, p)

		// More buffers than one system call takes.
		many := make([][]byte, 1500)
		q := pattern(5, 512*len(many))
		for i := range many {
			many[i] = q[512*i : 512*(i+1)]
		}
		if n, err := block.WriteVecDurable(b, many, 0); err != nil || n != len(q) {
			t.Fatalf("WriteVecDurable of %d buffers = %d, %v", len(many), n, err)
		}
		same(t, "1500 buffers", read(t, b, 0, len(q)), q)
	})

	t.Run("Discard", func(t *testing.T) {
		b := open()
		d, ok := b.(block.Discarder)
		if !ok || d.DiscardGranularity() == 0 {
			t.Log("the backend has no discard")
			return
		}
		checkClear(t, b, d.Discard)
	})

	t.Run("Zero", func(t *testing.T) {
		b := open()
		z, ok := b.(block.Zeroer)
		if !ok {
			t.Log("the backend has no zeroing")
			return
		}
		if err := z.Zero(0, 4096); errors.Is(err, errors.ErrUnsupported) {
			t.Logf("the backend has no zeroing here: %v", err)
			return
		}
		checkClear(t, b, z.Zero)
	})

	t.Run("Concurrent", func(t *testing.T) {
		b := open()
		var wg sync.WaitGroup
		errs := make(chan error, 16)
		for i := range 16 {
			wg.Go(panics.Func(func() {
				off, got := int64(i)*(32<<10), make([]byte, 32<<10)
				for round := range 8 {
					p := pattern(byte(16*i+round), len(got))
					_, err := b.WriteAt(p, off)
					if err == nil && round%4 == 3 {
						err = b.Flush()
					}
					if err == nil {
						_, err = b.ReadAt(got, off)
					}
					if err == nil && !bytes.Equal(got, p) {
						err = fmt.Errorf("goroutine %d, round %d: read other data than written", i, round)
					}
					if err != nil {
						errs <- err
						return
					}
				}
			}))
		}
		wg.Wait()
		close(errs)
		for err := range errs {
			t.Error(err)
		}
	})
}

// checkClear checks that clearRange makes exactly its range read as zeroes, on
// aligned and on odd borders.
func checkClear(t *testing.T, b block.Backend, clearRange func(off, n int64) error) {
	t.Helper()
	for _, r := range []struct{ off, n int }{{64 << 10, 128 << 10}, {512, 1024}, {300 << 10, 4096 + 512}} {
		p := pattern(6, 512<<10)
		if _, err := b.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if err := clearRange(int64(r.off), int64(r.n)); err != nil {
			t.Fatalf("%d bytes at %d: %v", r.n, r.off, err)
		}
		clear(p[r.off : r.off+r.n])
		got := make([]byte, len(p))
		if _, err := b.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, p) {
			t.Errorf("%d bytes at %d: not exactly the range reads as zeroes", r.n, r.off)
		}
	}
	if err := clearRange(b.Size()-512, 1024); err == nil {
		t.Error("a range across the end was accepted")
	}
}
