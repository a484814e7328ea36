package disk

import (
	"context"
	"errors"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// slow is a backend whose operations wait until goOn is closed.
type slow struct {
	*block.Mem
	begun, goOn chan struct{}
}

func newSlow() *slow {
	return &slow{block.NewMem(1 << 20), make(chan struct{}, 10), make(chan struct{})}
}

func (s *slow) wait() { s.begun <- struct{}{}; <-s.goOn }

func (s *slow) Flush() error { s.wait(); return nil }

func (s *slow) Resize(int64, bool, func(*block.File, int64) error) error { s.wait(); return nil }

var _ resizer = (*slow)(nil)

func slowDisks(t *testing.T) (*Set, *slow) {
	t.Helper()
	ds := &Set{target: scsi.NewTarget(), mishaps: &mishaps{name: "vm", note: func(string) {}}}
	b := newSlow()
	if err := ds.Attach(Spec{Path: "slow", LUN: 0, BlockSize: 512, Serial: "SLOW"}, b); err != nil {
		t.Fatal(err)
	}
	ds.events = noGuest{}
	scsitest.Do(ds.target, 0, make([]byte, 6), nil, 0) // clears the unit attention of power on
	return ds, b
}

func wantConflict(t *testing.T, err error, text string) {
	t.Helper()
	var e *control.Error
	if !errors.As(err, &e) || e.Status != http.StatusConflict || !strings.Contains(e.Text, text) ||
		strings.Contains(e.Text, "\n") {
		t.Errorf("error %v, want a conflict that says %q", err, text)
	}
}

// TestChangesWaitForNothing has storage that does not answer. The list still answers, other disks
// can be changed, a second change of the disk is refused, and the machine ends.
func TestChangesWaitForNothing(t *testing.T) {
	for _, tt := range []struct {
		name   string
		state  string
		change func(context.Context, *Set) error
	}{
		{"resize", control.Resizing, func(ctx context.Context, ds *Set) error {
			_, err := ds.Resize(ctx, "0", control.ResizeDisk{Size: 1 << 20})
			return err
		}},
		{"remove", control.Removing, func(ctx context.Context, ds *Set) error {
			_, err := ds.Remove(ctx, "SLOW")
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ds, b := slowDisks(t)
			defer close(b.goOn)
			write := []byte{0x2a, 0, 0, 0, 0, 9, 0, 0, 1, 0} // gives the flush something to do
			if a := scsitest.Do(ds.target, 0, write, make([]byte, 512), 0); a.Status != scsi.Good {
				t.Fatal(a)
			}
			ctx, cancel := context.WithCancel(t.Context())
			result := make(chan error, 1)
			go func() { result <- tt.change(ctx, ds) }()
			<-b.begun
			if list := ds.List(); len(list) != 1 || list[0].Change != tt.state {
				t.Errorf("the list: %+v", list)
			}
			_, err := ds.Remove(t.Context(), "0")
			wantConflict(t, err, tt.state+" is under way")
			_, err = ds.Resize(t.Context(), "0", control.ResizeDisk{})
			wantConflict(t, err, tt.state+" is under way")
			mem := Spec{Path: "mem", Storage: Memory, Size: 1 << 20, LUN: -1, BlockSize: 512}
			if ch, err := ds.Add(t.Context(), mem); err != nil || ch.Disk.LUN != 1 {
				t.Errorf("another disk: %+v, %v", ch, err)
			}
			if _, err := ds.Remove(t.Context(), "1"); err != nil {
				t.Errorf("another disk: %v", err)
			}
			cancel() // the client disconnects
			var e *control.Error
			if err := <-result; !errors.As(err, &e) || e.Status != http.StatusGatewayTimeout {
				t.Errorf("a client that goes: %v", err)
			}
			if list := ds.List(); len(list) != 1 || list[0].Change != tt.state {
				t.Errorf("the list after that: %+v", list)
			}
			if err := ds.Close(t.Context(), true); err != nil { // would hang
				t.Error(err)
			}
			if _, err := ds.Resize(t.Context(), "0", control.ResizeDisk{}); err != control.ErrEnded {
				t.Errorf("after the end: %v", err)
			}
		})
	}
}

// TestRemoveBehindCommand removes a disk while a command of the guest uses it and another waits for
// that one. Both finish, unless that takes too long or the machine ends.
func TestRemoveBehindCommand(t *testing.T) {
	for _, tt := range []struct {
		name  string
		bound time.Duration
		ends  bool
		abort scsi.Abort
	}{
		{"finished", time.Hour, false, scsi.NotAborted},
		{"too long", time.Millisecond, false, scsi.AbortedByReset},
		{"end", time.Hour, true, scsi.AbortedByReset},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ds, b := slowDisks(t)
			ds.bounds.commands = tt.bound
			first, second := make(chan scsi.Result, 1), make(chan scsi.Result, 1)
			ds.target.Submit(&scsi.Command{CDB: []byte{0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0},
				Done: func(r scsi.Result) { first <- r }})
			<-b.begun
			ds.target.Submit(&scsi.Command{CDB: make([]byte, 6), Attr: scsi.Ordered,
				Done: func(r scsi.Result) { second <- r }})
			removed, ended := make(chan error, 1), make(chan error, 1)
			go func() {
				_, err := ds.Remove(t.Context(), "0")
				removed <- err
			}()
			for ds.target.Unit(0) != nil {
				runtime.Gosched()
			}
			if tt.ends {
				go func() { ended <- ds.Close(t.Context(), true) }()
				if err := <-removed; err != control.ErrEnded {
					t.Error(err)
				}
			}
			if tt.abort == scsi.NotAborted {
				close(b.goOn)
			}
			if r := <-second; r.Abort != tt.abort {
				t.Errorf("the second command: %+v", r)
			}
			if tt.abort != scsi.NotAborted {
				close(b.goOn)
			}
			if r := <-first; r.Abort != tt.abort {
				t.Errorf("the first command: %+v", r)
			}
			if tt.ends {
				removed = ended
			}
			if err := <-removed; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestResizeBehindCommand resizes a disk while a command of the guest uses it.
func TestResizeBehindCommand(t *testing.T) {
	for _, held := range []bool{false, true} {
		ds, b := slowDisks(t)
		ds.bounds.commands = time.Hour
		want := "gvm resume vm first"
		if !held {
			ds.bounds.commands, want = time.Millisecond, "do not end; try again"
		}
		flush := make(chan scsi.Status, 1)
		go func() { flush <- scsitest.Do(ds.target, 0, []byte{0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0}, nil, 0).Status }()
		<-b.begun
		if held {
			ds.mishaps.holds("slow", 1)
		}
		_, err := ds.Resize(t.Context(), "0", control.ResizeDisk{Size: 1 << 20})
		wantConflict(t, err, want)
		if list := ds.List(); len(list) != 1 || list[0].Change != "" {
			t.Errorf("the list: %+v", list)
		}
		close(b.goOn)
		if got := <-flush; got != scsi.Good {
			t.Errorf("the command: %v", got)
		}
		if held {
			ds.mishaps.holds("slow", -1)
		}
		ds.bounds.commands = 0
		if _, err := ds.Resize(t.Context(), "0", control.ResizeDisk{Size: 1 << 20}); err != nil {
			t.Errorf("after it: %v", err)
		}
		if err := ds.Close(t.Context(), true); err != nil {
			t.Error(err)
		}
	}
}

// TestResizeAtEnd ends a machine while a resize waits for a command: the resize gives up.
func TestResizeAtEnd(t *testing.T) {
	ds, b := slowDisks(t)
	ds.bounds.commands = time.Hour
	flush, resized := make(chan struct{}), make(chan error, 1)
	go func() {
		scsitest.Do(ds.target, 0, []byte{0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0}, nil, 0)
		close(flush)
	}()
	<-b.begun
	go func() {
		_, err := ds.Resize(t.Context(), "0", control.ResizeDisk{Size: 1 << 20})
		resized <- err
	}()
	for ds.List()[0].Change == "" {
		time.Sleep(time.Millisecond)
	}
	if err := ds.Close(t.Context(), true); err != nil {
		t.Error(err)
	}
	if err := <-resized; err != control.ErrEnded {
		t.Errorf("the resize: %v", err)
	}
	ds.changes.Wait() // would hang
	close(b.goOn)
	<-flush
}

// TestBusyDisk: a change of a disk is of no other one, not even of one with an equal backend.
func TestBusyDisk(t *testing.T) {
	ds, _ := slowDisks(t)
	for lun := 1; lun <= 2; lun++ {
		d := Spec{Path: "null", Storage: Null, LUN: lun, Size: 1 << 20, BlockSize: 512}
		if err := ds.Attach(d, block.Null(d.Size)); err != nil {
			t.Fatal(err)
		}
	}
	ds.mu.Lock()
	_, release, err := ds.claim("1", control.Removing)
	ds.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if list := ds.List(); list[1].Change != control.Removing || list[2].Change != "" {
		t.Errorf("%+v", list)
	}
	ds.mu.Lock()
	release()
	ds.mu.Unlock()
}

// TestResizeOfNameless: a refusal names the disk of a machine that has no path for it.
func TestResizeOfNameless(t *testing.T) {
	ds := &Set{target: scsi.NewTarget(), mishaps: &mishaps{}}
	if err := ds.Attach(Spec{BlockSize: 512, Serial: "X"}, block.NewMem(1<<20)); err != nil {
		t.Fatal(err)
	}
	const want = "LUN 0, (memory), keeps its size"
	if _, err := ds.Resize(t.Context(), "0", control.ResizeDisk{Size: 2 << 20}); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
