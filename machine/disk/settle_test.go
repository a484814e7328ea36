package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/lio"
	"gvm/devices/scsi/scsitest"
	"gvm/devices/virtio/vscsi"
	"gvm/kvmapi/nowait"
)

// sideFile is protection information that logs its operations with those of the image.
type sideFile struct {
	scsi.Protection
	rec  *scsitest.Recorder
	fail error
}

func (s *sideFile) WriteTuples([]byte, uint64) error { return nil }

func (s *sideFile) ClearTuples(uint64, uint64) error {
	s.rec.Note("clear tuples")
	return nil
}

func (s *sideFile) Flush() error {
	s.rec.Note("flush tuples")
	return s.fail
}

// noGuest is a guest without a driver.
type noGuest struct{}

func (noGuest) Event(vscsi.EventType, scsi.LUN, vscsi.Reason) vscsi.Delivery { return vscsi.Inactive }

// sized is a backend that can change its size, and logs that.
type sized struct {
	*scsitest.Recorder
	size      int64
	writeBack error // of WriteBack
}

func (s *sized) WriteBack(context.Context) error { return s.writeBack }

func (s *sized) Size() int64 { return s.size }

func (s *sized) Resize(n int64, _ bool, _ func(*block.File, int64) error) error {
	s.Note("resize")
	s.size = n
	return nil
}

func (s *sized) Close() error {
	s.Note("close")
	return nil
}

// protectedDisks has one disk with protection information.
func protectedDisks(t *testing.T, fault ...block.Fault) (*Set, *scsitest.Recorder, *sideFile) {
	t.Helper()
	mem := block.NewMem(1 << 20)
	rec := &scsitest.Recorder{Backend: block.NewFaulty(mem, fault...)}
	side := &sideFile{rec: rec}
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: &sized{Recorder: rec, size: 1 << 20},
		Serial: "S", Protection: side})
	if err != nil {
		t.Fatal(err)
	}
	ds := &Set{target: scsi.NewTarget(), mishaps: &mishaps{note: func(string) {}}}
	if err := ds.target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	if err := scsitest.Ready(ds.target, 0); err != nil {
		t.Fatal(err)
	}
	s := newServed(Spec{}, 0, u)
	s.gone = func() {}
	ds.served, ds.events = []served{s}, noGuest{}
	rec.Log()
	return ds, rec, side
}

// writeBlock writes block 9 of LUN 0 as v, into the cache.
func writeBlock(t *testing.T, ds *Set, v byte) {
	t.Helper()
	write := []byte{0x2a, 0, 0, 0, 0, 9, 0, 0, 1, 0}
	if a := scsitest.Do(ds.target, 0, write, bytes.Repeat([]byte{v}, 512), 0); a.Status != scsi.Good {
		t.Fatal(a)
	}
}

// TestSettle settles a disk with protection information on every path: the image becomes durable,
// and then the file beside it, even if the image fails; both failures are reported.
func TestSettle(t *testing.T) {
	both := []string{"flush", "flush tuples"}
	for _, tt := range []struct {
		name string
		do   func(ds *Set) error
		want []string
	}{
		{"remove", func(ds *Set) error { _, err := ds.Remove(context.Background(), "0"); return err }, both},
		{"end", func(ds *Set) error { return ds.Close(t.Context(), true) }, both},
		{"end of a guest that never ran", func(ds *Set) error { return ds.Close(t.Context(), false) }, nil},
		{"grow", func(ds *Set) error {
			_, err := ds.Resize(context.Background(), "0", control.ResizeDisk{Size: 2 << 20})
			return err
		}, []string{"flush tuples", "resize", "flush tuples"}},
		{"shrink", func(ds *Set) error {
			_, err := ds.Resize(context.Background(), "0", control.ResizeDisk{Size: 512 << 10, Shrink: true})
			return err
		}, []string{"flush tuples", "resize", "clear tuples", "flush tuples"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ds, rec, _ := protectedDisks(t)
			writeBlock(t, ds, 1)
			rec.Log()
			if err := tt.do(ds); err != nil {
				t.Fatal(err)
			}
			if got := rec.Log(); !slices.Equal(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
			if tt.want == nil || tt.name == "grow" || tt.name == "shrink" {
				return
			}
			bad := errors.New("no tuples today")
			ds, rec, side := protectedDisks(t, block.Fault{Op: block.OpFlush, Err: errors.New("no image today")})
			writeBlock(t, ds, 1)
			rec.Log()
			side.fail = bad
			err := tt.do(ds)
			if !errors.Is(err, bad) || !strings.Contains(err.Error(), "no image today") {
				t.Errorf("error %v, want both", err)
			}
			if got := rec.Log(); !slices.Equal(got, []string{"flush failed", "flush tuples"}) {
				t.Errorf("%q after a failure", got)
			}
		})
	}
	// Flushed data is not flushed again at the end, which takes no time then.
	ds, rec, _ := protectedDisks(t)
	writeBlock(t, ds, 1)
	if a := scsitest.Do(ds.target, 0, []byte{0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0}, nil, 0); a.Status != scsi.Good {
		t.Fatal(a)
	}
	rec.Log()
	if err := ds.Close(t.Context(), true); err != nil || len(rec.Log()) > 0 {
		t.Errorf("%v, and flushed once more", err)
	}
	// A failed write-back is followed by a flush all the same, with the files beside the image.
	ds, rec, _ = protectedDisks(t)
	writeBlock(t, ds, 1)
	rec.Log()
	bad := errors.New("no pages today")
	ds.served[0].backend().(*sized).writeBack = bad
	err := ds.Close(t.Context(), true)
	if got := rec.Log(); !errors.Is(err, bad) || !slices.Equal(got, both) {
		t.Errorf("%v, %q after a write-back that failed", err, got)
	}
}

// TestOverlayEnds ends a machine that has flushed nothing: its overlay keeps the guest's writes
// across a reboot of the host.
func TestOverlayEnds(t *testing.T) {
	dir := t.TempDir()
	d := Spec{Path: filepath.Join(dir, "base"), Overlay: filepath.Join(dir, "overlay"), LUN: -1, BlockSize: 512}
	if err := os.WriteFile(d.Path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() *Set {
		t.Helper()
		ds, err := openDisks([]Spec{d}, nil, kernelOptions{note: func(string) {}}, &mishaps{note: func(string) {}})
		if err != nil {
			t.Fatal(err)
		}
		if err := scsitest.Ready(ds.target, 0); err != nil {
			t.Fatal(err)
		}
		return ds
	}
	ds := open()
	writeBlock(t, ds, 0x5a)
	if err := ds.Close(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(d.Overlay)
	if err != nil {
		t.Fatal(err)
	}
	copy(file[32:68], "00000000-0000-0000-0000-000000000000") // another boot
	binary.BigEndian.PutUint32(file[8:], crc32.ChecksumIEEE(file[16:4096]))
	if err := os.WriteFile(d.Overlay, file, 0o600); err != nil {
		t.Fatal(err)
	}
	ds = open()
	a := scsitest.Do(ds.target, 0, []byte{0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0}, nil, 512)
	if a.Status != scsi.Good || !bytes.Equal(a.Data, bytes.Repeat([]byte{0x5a}, 512)) {
		t.Errorf("%v, % x", a, a.Data[:4])
	}
	if err := ds.Close(t.Context(), true); err != nil {
		t.Fatal(err)
	}
}

// TestSettleGivesUp ends a machine whose storage is slow to flush: the end does not wait for it,
// and the user is told.
func TestSettleGivesUp(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	ds, _, _ := protectedDisks(t, block.Fault{Op: block.OpFlush, Hang: hang})
	var notes []string
	ds.mishaps.note = func(s string) { notes = append(notes, s) }
	writeBlock(t, ds, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := ds.settle(ctx); err != nil {
		t.Error(err)
	}
	if len(notes) != 1 || !strings.Contains(notes[0], "stable storage") {
		t.Errorf("notes %q", notes)
	}
}

// TestSettleInOneEnd: the disks have the rest of the time that the end of a machine has.
func TestSettleInOneEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		defer close(hang)
		ds, _, _ := protectedDisks(t, block.Fault{Op: block.OpFlush, Hang: hang})
		ds.mishaps.note = func(string) {}
		writeBlock(t, ds, 1)
		ctx, cancel := context.WithCancel(t.Context())
		ctx = nowait.WithOneEnd(ctx)
		cancel()
		synctest.Wait()
		time.Sleep(550 * time.Millisecond)
		begin := time.Now()
		if err := ds.Close(ctx, true); err != nil {
			t.Error(err)
		}
		if took, want := time.Since(begin), 200*time.Millisecond; took != want {
			t.Errorf("took %v, want %v", took, want)
		}
	})
}

// TestEndOfStuckDisk ends a machine with a request that storage does not complete: the end does not
// wait, one note names the disk, and its storage stays open.
func TestEndOfStuckDisk(t *testing.T) {
	hang, done := make(chan struct{}), make(chan struct{})
	ds, rec, _ := protectedDisks(t, block.Fault{Op: block.OpWrite, Hang: hang})
	ds.open = []opened{{backend: ds.served[0].backend().(*sized)}}
	var notes []string
	ds.mishaps.note = func(s string) { notes = append(notes, s) }
	begun := make(chan struct{})
	rec.OnCall = func(call string) {
		if strings.HasPrefix(call, "write") {
			close(begun)
		}
	}
	ds.target.Submit(&scsi.Command{CDB: []byte{0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0}, Out: [][]byte{make([]byte, 512)},
		Done: func(scsi.Result) { close(done) }})
	<-begun
	if err := ds.Close(t.Context(), true); err != nil {
		t.Error(err)
	}
	if log := rec.Log(); len(notes) != 1 || !strings.Contains(notes[0], "not finished a request") ||
		slices.Contains(log, "close") {
		t.Errorf("notes %q, %q", notes, log)
	}
	close(hang)
	<-done
}

// TestEndOfStuckKernelTarget ends a machine whose disks the kernel does not release: the end does
// not wait, the user is told, and their images stay open. A target that closes in time counts as
// closed, even if a flush took all the time.
func TestEndOfStuckKernelTarget(t *testing.T) {
	dir := t.TempDir()
	hang, closed := make(chan struct{}), make(chan struct{})
	ds, _, _ := protectedDisks(t, block.Fault{Op: block.OpFlush, Hang: hang})
	var notes []string
	ds.mishaps.note = func(s string) { notes = append(notes, s) }
	var files []*block.File
	ds.paths = map[string]string{}
	add := func(end closer) {
		path := filepath.Join(dir, fmt.Sprint(len(files)))
		f, err := block.Open(path, block.Options{Size: 1 << 20, BlockSize: 512})
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
		ds.open = append(ds.open, opened{backend: f, undo: f.Undo})
		ds.paths[path] = path
		ds.kernels = append(ds.kernels, &kernelTarget{target: &lio.Target{WWN: "naa.5001405000000001"},
			parts: []io.Closer{end}, units: []lio.Unit{{LUN: len(files), UnitConfig: scsi.UnitConfig{Backend: f}}}})
	}
	refused := errors.New("configfs is busy")
	add(func() error { <-hang; close(closed); return nil })
	add(func() error { return refused })
	writeBlock(t, ds, 1) // its flush takes all the time
	if err := ds.Close(t.Context(), false); !errors.Is(err, refused) {
		t.Error(err)
	}
	if len(notes) != 1 || !strings.Contains(notes[0], files[0].Path()) || !strings.Contains(notes[0], "gvm lio gc") {
		t.Errorf("notes %q", notes)
	}
	for i, want := range []error{nil, fs.ErrNotExist} {
		if _, err := os.Stat(files[i].Path()); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", files[i].Path(), err, want)
		}
	}
	close(hang)
	<-closed
	files[0].Close()
}
