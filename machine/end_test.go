package machine_test

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"gvm/control"
	"gvm/devices/block"
	"gvm/guestmem"
	"gvm/machine"
	"gvm/vmm"
	"gvm/vmm/x86"
)

// TestReboot: a machine that reboots in place does so until it is stopped.
func TestReboot(t *testing.T) {
	t.Parallel()
	g, err := begin(t, machine.Spec{Rebooting: true, GuestArgs: []string{"crash=reset"}}, image(t, 5, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	g.expect("reset next", 3)
	g.Stop(errStopped, 0)
	if out := g.wait(); out.Ending != vmm.Stopped || !errors.Is(out.Err, errStopped) {
		t.Errorf("%+v", out)
	}
}

// TestEndOfSanitize ends machines and changes their disk during a SANITIZE command, of days on the
// disk without storage: neither waits for the command. An end that does is left with a note, and a
// removal that does is not over when the test gives up. The file is not flushed, since an end tells
// of a flush that takes long.
func TestEndOfSanitize(t *testing.T) {
	stop := func(t *testing.T, g *guest) { g.Stop(errStopped, 0) }
	for _, kind := range []string{"null", "file"} {
		for name, end := range map[string]func(*testing.T, *guest){
			"stop":   stop,
			"cancel": func(_ *testing.T, g *guest) { g.stop(errStopped) },
			"remove": func(t *testing.T, g *guest) {
				_, err := g.RemoveDisk(t.Context(), "0")
				var late *control.Error
				if err != nil && !(errors.As(err, &late) && late.Status == http.StatusGatewayTimeout) {
					t.Error(err)
				}
				for len(g.Disks()) > 0 { // the host is busy
					select {
					case <-g.Ended():
						t.Fatalf("the disk is not removed: %+v", g.wait())
					case <-time.After(time.Millisecond):
					}
				}
				stop(t, g)
			},
			"resize": func(t *testing.T, g *guest) {
				if kind == "file" { // the other keeps its size
					if _, err := g.ResizeDisk(t.Context(), "0", control.ResizeDisk{Size: 512 << 20}); err != nil {
						t.Error(err)
					}
				}
				stop(t, g)
			},
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				disk := "null:1048576T"
				if kind == "file" {
					disk = filepath.Join(t.TempDir(), "disk.img")
					if err := block.Create(disk, 256<<20, false); err != nil {
						t.Fatal(err)
					}
					disk += ",cache=unsafe"
				}
				g := launch(t, "sanitize", disk)
				g.expect("sanitizing", 1)
				end(t, g)
				if out := g.wait(); !errors.Is(out.Err, errStopped) || g.said() != "" {
					t.Errorf("%+v; %s", out, g.said())
				}
			})
		}
	}
}

// TestNothingLeft checks that descriptors, goroutines and memory return to their former level after
// each way in which a machine ends or does not start.
func TestNothingLeft(t *testing.T) {
	type state struct{ fds, goroutines, mappings, shm int }
	look := func() state {
		count := func(dir string) int {
			list, err := os.ReadDir(dir)
			if err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			return len(list)
		}
		maps := read(t, "/proc/self/maps")
		return state{count("/proc/self/fd"), runtime.NumGoroutine(),
			bytes.Count(maps, []byte("kvm")) + bytes.Count(maps, []byte("memfd")), count("/dev/shm")}
	}
	img := image(t, 4, 1<<20)
	fresh := filepath.Join(t.TempDir(), "fresh")
	features, err := x86.ParseFeatures("+vmx,+svm,+ia64")
	if err != nil {
		t.Fatal(err)
	}
	words := func(w string) machine.Spec { return machine.Spec{GuestArgs: []string{w}} }
	launch(t, "", img).wait() // starts the runtime's own goroutines
	for name, tt := range map[string]struct {
		spec   machine.Spec
		disks  []string
		ending vmm.Ending // 0: it does not start
	}{
		"power-off":     {machine.Spec{CPUs: 2}, []string{img}, vmm.PoweredOff},
		"shared memory": {machine.Spec{Memory: guestmem.Config{Size: 64 << 20, Shared: true}}, nil, vmm.PoweredOff},
		"triple fault":  {words("crash=triple"), []string{img}, vmm.GuestCrashed},
		"panic":         {words("crash=panic"), []string{img}, vmm.GuestPanic},
		"reset":         {words("crash=reset"), []string{img}, vmm.GuestReset},
		"reboots": {machine.Spec{Rebooting: true, GuestArgs: []string{"crash=reset"}}, []string{img},
			vmm.Stopped},
		"many CPUs":   {machine.Spec{CPUs: 100000}, []string{img, fresh + ",size=1M"}, 0},
		"bad disk":    {machine.Spec{}, []string{img, "/none"}, 0},
		"bad feature": {machine.Spec{CPUFeatures: features}, []string{img}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			before := look()
			g, err := begin(t, tt.spec, tt.disks...)
			switch {
			case err == nil:
				if tt.ending == vmm.Stopped {
					g.expect("reset next", 3)
					g.Stop(errStopped, 0)
				}
				out, err := g.Wait()
				if out.Ending != tt.ending || (err != nil) != (tt.ending == 0) {
					t.Errorf("%+v, %v", out, err)
				}
			case tt.ending != 0 || !machine.IsConfig(err):
				t.Error(err)
			}
			left := func() bool {
				after := look()
				after.goroutines = max(after.goroutines, before.goroutines) // fewer is fine
				return after != before
			}
			for deadline := time.Now().Add(tooLong); left() && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond) // a goroutine that was told to end may still run
			}
			if left() {
				t.Errorf("%+v became %+v", before, look())
			}
		})
	}
}
