package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi/trace"
	"gvm/machine/disk"
	"gvm/vmm"
)

// TestQueues checks the number of request queues. A device has a control and an event queue as
// well.
func TestQueues(t *testing.T) {
	for _, tt := range []struct{ cpus, queues, want int }{{1, 0, 1}, {4, 0, 4}, {4, 2, 2}, {70, 0, disk.MaxQueues}} {
		none, err := disk.Open(t.Context(), nil, disk.Config{})
		if err != nil {
			t.Fatal(err)
		}
		made, err := scsiDevice{
			queues: (&Spec{CPUs: tt.cpus, Queues: tt.queues}).RequestQueues(), disks: none}.inProcess()
		if err != nil {
			t.Fatal(err)
		}
		if got := len(made[0].QueueSizes()) - 2; got != tt.want {
			t.Errorf("%d CPUs, --queues %d: %d request queues, want %d", tt.cpus, tt.queues, got, tt.want)
		}
	}
}

// TestCreateTrace checks the header of a run's trace.
func TestCreateTrace(t *testing.T) {
	ds, err := disk.Open(t.Context(), nil, disk.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := ds.Attach(disk.Spec{Serial: "S", LUN: 4, BlockSize: 4096}, block.NewMem(1<<20)); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "run.trace")
	f, err := createTrace(path, ds.TraceHeader("1.2.3", 3))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := createTrace(path, ds.TraceHeader("1.2.3", 3)); !IsConfig(err) {
		t.Errorf("a trace in use: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	r, err := trace.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	want := []trace.Device{{Backend: "process", Queues: 3,
		Disks: []trace.Disk{{LUN: 4, Serial: "S", Size: 1 << 20, BlockSize: 4096}}}}
	if h := r.Header; h.GVM != "1.2.3" || h.Kernel == "" || time.Since(h.Start) > time.Hour ||
		fmt.Sprint(h.Devices) != fmt.Sprint(want) {
		t.Errorf("header %+v", h)
	}
	if _, err := createTrace(filepath.Join(dir, "none", "x"), ds.TraceHeader("1.2.3", 1)); !IsConfig(err) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := createTrace("/dev/full", ds.TraceHeader("1.2.3", 1)); err == nil || IsConfig(err) {
		t.Errorf("a full disk: %v", err)
	}
}

// TestPanic: a panic in a goroutine of the machine is an outcome of Wait, with the state of a
// machine that ran, and all is closed.
func TestPanic(t *testing.T) {
	for name, tt := range map[string]struct {
		Spec
		state string
	}{
		"the machine":     {Spec{Phase: func(string) { panic("broken") }}, ""},
		"the serial port": {Spec{Console: Output(broken{}), GuestArgs: []string{"hang"}}, "\npci/00:01.0/virtio: "},
	} {
		t.Run(name, func(t *testing.T) {
			s := tt.Spec
			s.Memory.Size = 64 << 20
			m, err := Start(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			out, err := m.Wait()
			if err != nil || out.Ending != vmm.Bug || out.Err.Error() != "panic: broken" ||
				!strings.Contains(out.Report, "machine_test.go") || !strings.Contains(out.Report, tt.state) {
				t.Errorf("%+v, %v", out, err)
			}
		})
	}
}

// broken panics when the guest writes to it.
type broken struct{}

func (broken) Write([]byte) (int, error) { panic("broken") }

// stuckCloser is a file on storage that does not answer until it is closed as a channel.
type stuckCloser chan struct{}

func (c stuckCloser) Close() error {
	<-c
	return errors.New("late")
}

// TestCloseTrace: the end of a machine waits for the storage of its trace, until an end was asked
// for.
func TestCloseTrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		stuck, ended := make(stuckCloser), make(chan error, 1)
		go func() { ended <- closeTrace(ctx, "t.trace", stuck) }()
		synctest.Wait()
		if len(ended) > 0 {
			t.Error("it does not wait")
		}
		cancel()
		const want = "trace t.trace: its storage does not answer; gvm ends without the end of the trace"
		if err := <-ended; err == nil || err.Error() != want {
			t.Errorf("after the end: %v", err)
		}
		close(stuck)
		if err := closeTrace(ctx, "t.trace", stuck); err == nil || err.Error() != "late" {
			t.Errorf("storage that answers: %v", err)
		}
	})
}
