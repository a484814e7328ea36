package disk

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// testImage makes an image of n bytes.
func testImage(t *testing.T, name string, n int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// vpd80 asks a unit for its serial number.
func vpd80(t *testing.T, ds *Set, n int) string {
	t.Helper()
	lun, _ := scsi.EncodeLUN(n)
	if err := scsitest.Ready(ds.target, lun); err != nil {
		t.Fatal(err)
	}
	r := scsitest.Do(ds.target, lun, []byte{0x12, 1, 0x80, 0, 68, 0}, nil, 68)
	if r.Status != scsi.Good || len(r.Data) < 4 {
		t.Fatalf("INQUIRY: %+v", r)
	}
	return string(r.Data[4 : 4+r.Data[3]])
}

func TestOpenDisks(t *testing.T) {
	a, b := testImage(t, "a", 1<<20), testImage(t, "b", 1<<20)
	ds, err := openDisks([]Spec{{Path: a, LUN: -1, Serial: "SN, 1", BlockSize: 512},
		{Path: b, LUN: 7, BlockSize: 512}}, nil, kernelOptions{}, &mishaps{})
	if err != nil {
		t.Fatal(err)
	}
	defer ds.Close(t.Context(), true)
	if s := vpd80(t, ds, 0); s != "SN, 1" {
		t.Errorf("serial %q", s)
	}
	if s := vpd80(t, ds, 7); s == "" || s == vpd80(t, ds, 0) {
		t.Errorf("serial of a disk without one: %q", s)
	}
}

// TestUndo checks that size= is undone only where no data can be lost.
func TestUndo(t *testing.T) {
	dir := t.TempDir()
	open := func(path string) *Set {
		ds, err := openDisks([]Spec{{Path: path, LUN: -1, Size: 2 << 20, BlockSize: 512}}, nil, kernelOptions{}, &mishaps{})
		if err != nil {
			t.Fatal(err)
		}
		return ds
	}
	size := func(path string) int64 {
		fi, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return -1
		}
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	for _, tt := range []struct {
		name    string
		grown   bool
		writeAt int64 // -1: nowhere
		want    int64
	}{
		{"created", false, -1, -1},
		{"created and written", false, 1<<20 + 8192, 2 << 20},
		{"grown", true, -1, 1 << 20},
		{"grown, old part written", true, 4096, 1 << 20},
		{"grown, new part written", true, 1<<20 + 8192, 2 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, tt.name)
			if tt.grown {
				path = testImage(t, "disk", 1<<20)
			}
			ds := open(path)
			if tt.writeAt >= 0 {
				if _, err := ds.open[0].backend.(*block.File).WriteAt([]byte("data"), tt.writeAt); err != nil {
					t.Fatal(err)
				}
			}
			if err := ds.Close(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			if got := size(path); got != tt.want {
				t.Errorf("size %d, want %d", got, tt.want)
			}
		})
	}
}

// TestOpenEnds ends an Open that waits: its error has the cause of its context and the name of the
// image that it waited for, and its work is undone.
func TestOpenEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil { // Open goes on past the end of the test
		t.Fatal(err)
	}
	cause := errors.New("stopped by the test")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	hang, over := make(chan struct{}), make(chan struct{})
	image := Spec{Path: path, LUN: -1, BlockSize: 512, Backend: Auto}
	note := func(string) { // called when backend=auto is resolved
		cancel(cause)
		<-hang
		close(over)
	}
	_, err := Open(ctx, []Spec{image}, Config{Queues: 1, Note: note})
	if !errors.Is(err, cause) || !strings.HasSuffix(err.Error(), " was opened") {
		t.Errorf("error %v", err)
	}
	close(hang)
	<-over
}
