package i6300esb

import (
	"testing"
	"time"

	"gvm/devices/pci"
	"gvm/devices/pci/pcitest"
)

// rig is a watchdog with a clock that the test sets.
type rig struct {
	*Device
	t       testing.TB
	clock   time.Duration
	at      time.Duration // of the timer
	fires   func()        // nil: no timer runs
	expired int
	config  pcitest.Access
	kept    Kept
}

type noSpace struct{}

func (noSpace) Map(string, uint64, uint64, pci.Handler) error { return nil }
func (noSpace) Unmap(uint64) error                            { return nil }

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t}
	d, err := New(Config{Kept: &r.kept, Expired: func() { r.expired++ }})
	if err != nil {
		t.Fatal(err)
	}
	r.Device = d
	d.now = func() time.Duration { return r.clock }
	d.after = func(after time.Duration, f func()) func() bool {
		if r.fires != nil {
			t.Error("two timers")
		}
		r.at, r.fires = r.clock+after, f
		return func() bool { r.fires = nil; return true }
	}
	b := pci.NewBus(noSpace{}, nil)
	slot, err := b.Add(d.Function())
	if err != nil {
		t.Fatal(err)
	}
	r.config = pcitest.ECAM(b, slot)
	return r
}

// pass lets time pass.
func (r *rig) pass(d time.Duration) {
	end := r.clock + d
	for r.fires != nil && r.at <= end {
		r.clock = max(r.clock, r.at)
		f := r.fires
		r.fires = nil
		f()
	}
	r.clock = end
}

// set writes a register as the driver does, which unlocks it first.
func (r *rig) set(reg uint64, n int, v uint64) {
	r.store(reload, 1, unlock1)
	r.store(reload, 1, unlock2)
	r.store(reg, n, v)
}

func (r *rig) store(reg uint64, n int, v uint64) { pcitest.Store((*registers)(r.Device), reg, n, v) }
func (r *rig) load(reg uint64, n int) uint64     { return pcitest.Load((*registers)(r.Device), reg, n) }

func (r *rig) want(expired, stage int, what string) {
	r.t.Helper()
	if r.expired != expired || r.stage != stage {
		r.t.Errorf("%s: expired %d times, stage %d; want %d, %d", what, r.expired, r.stage, expired, stage)
	}
}

// start does the steps of Linux's driver for a heartbeat of 2 s.
func (r *rig) start() {
	r.config.Write(0x60, 2, 0x0003)
	r.config.Write(0x68, 1, 0)
	r.set(reload, 2, reloadTimer|reloadTimeout)
	r.set(preload1, 4, 2<<9)
	r.set(preload2, 4, 2<<9)
	r.set(reload, 2, reloadTimer)
	r.config.Write(0x68, 1, enable)
}

func TestIdentity(t *testing.T) {
	r := newRig(t)
	if id, class := r.config.Read(0, 4), r.config.Read(8, 4); id != 0x25ab8086 || class != 0x08800000 {
		t.Errorf("%#x, class %#x", id, class)
	}
	r.config.Write(0x10, 4, 0xffffffff)
	if bar := r.config.Read(0x10, 4); bar != 0xfffffff0 {
		t.Errorf("BAR 0: %#x", bar)
	}
	r.config.Write(0x60, 4, 0xffffffff)
	if v := r.config.Read(0x60, 4); v != 0x27 {
		t.Errorf("register 0x60: %#x", v)
	}
	if a, b := r.load(preload1, 8), r.load(reload, 4); a != 0x000fffff000fffff || b != 0 {
		t.Errorf("registers %#x, %#x", a, b)
	}
}

// TestStages: the two stages, of some 1.017 s each, and what begins them again.
func TestStages(t *testing.T) {
	r := newRig(t)
	r.pass(time.Hour)
	r.want(0, 0, "not enabled")
	r.start()
	r.pass(1016 * time.Millisecond)
	r.want(0, 1, "the first stage")
	r.pass(2 * time.Millisecond)
	r.want(0, 2, "the second stage")
	r.set(reload, 2, reloadTimer)
	r.want(0, 1, "a reload")
	r.pass(2*1016*time.Millisecond + 5*time.Millisecond)
	r.want(1, 0, "the end")
	if v := r.load(reload, 2); v != reloadTimeout {
		t.Errorf("reload register: %#x", v)
	}
	r.pass(time.Hour)
	r.want(1, 0, "after the end")
	r.set(reload, 2, reloadTimer)
	r.want(1, 1, "a reload after the end")
	r.config.Write(0x68, 1, 0)
	r.pass(time.Hour)
	r.want(1, 0, "disabled")
	if err := r.reset(); err != nil || r.load(reload, 2) != reloadTimeout {
		t.Error("a reset forgot the timeout")
	}
	r.set(reload, 2, reloadTimeout)
	if v := r.load(reload, 2); v != 0 {
		t.Errorf("reload register: %#x", v)
	}
}

// TestUnlock: a register takes one write after the whole sequence.
func TestUnlock(t *testing.T) {
	for _, tt := range []struct {
		name  string
		write []uint64 // to reload
		takes bool
	}{
		{"nothing", nil, false}, {"one step", []uint64{0x80}, false}, {"the other step", []uint64{0x86}, false},
		{"the wrong order", []uint64{0x86, 0x80}, false}, {"a write between", []uint64{0x80, 0, 0x86}, false},
		{"the sequence", []uint64{0x80, 0x86}, true}, {"again", []uint64{0x80, 0x80, 0x86}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			for _, v := range tt.write {
				r.store(reload, 1, v)
			}
			r.store(preload1, 4, 0xfff12345)
			r.store(preload2, 4, 1)
			want := uint64(0xfffff<<32 | 0xfffff)
			if tt.takes {
				want = 0xfffff<<32 | 0x12345
			}
			if got := r.load(preload1, 8); got != want {
				t.Errorf("%#x, want %#x", got, want)
			}
		})
	}
}

// TestLock: a locked watchdog cannot be turned off before a reset.
func TestLock(t *testing.T) {
	r := newRig(t)
	r.start()
	r.config.Write(0x68, 1, enable|locked)
	r.config.Write(0x68, 1, 0)
	if v := r.config.Read(0x68, 1); v != enable|locked {
		t.Errorf("lock register: %#x", v)
	}
	r.pass(time.Minute)
	r.want(1, 0, "locked")
	if err := r.fn.Reset(); err != nil {
		t.Fatal(err)
	}
	if v := r.config.Read(0x68, 1); v != 0 {
		t.Errorf("lock register after a reset: %#x", v)
	}
}

// TestModes: no output, free running, and the fast clock, whose stages take a millisecond at least.
func TestModes(t *testing.T) {
	r := newRig(t)
	r.start()
	r.config.Write(0x60, 2, outputDisable)
	r.pass(time.Minute)
	r.want(0, 0, "no output")
	r.config.Write(0x60, 2, fastClock)
	r.config.Write(0x68, 1, 0)
	r.set(preload1, 4, 0)
	r.set(preload2, 4, 3100) // 3.0 ms
	r.config.Write(0x68, 1, enable|freeRunning)
	r.pass(time.Millisecond)
	r.want(0, 2, "the first stage")
	r.pass(3010 * time.Microsecond)
	r.want(1, 1, "free running")
	r.pass(40200 * time.Microsecond)
	r.want(11, 1, "free running on")
}

// TestPause: the time of a pause does not count, nor that of a process that was stopped.
func TestPause(t *testing.T) {
	r := newRig(t)
	r.Resume() // nothing
	r.start()
	r.pass(1500 * time.Millisecond)
	r.Pause()
	r.Pause()
	r.pass(time.Hour)
	r.want(0, 2, "paused")
	r.set(reload, 2, reloadTimer) // by a CPU that has not stopped yet
	r.Resume()
	r.pass(1500 * time.Millisecond)
	r.want(0, 2, "resumed")
	r.Pause()
	r.Resume()
	r.clock += time.Minute // without the timer
	r.pass(0)
	r.want(0, 2, "a process that was stopped")
	r.pass(1000 * time.Millisecond)
	r.want(0, 2, "the stage that began again")
	r.pass(20 * time.Millisecond)
	r.want(1, 0, "the end")
	r.set(reload, 2, reloadTimer)
	r.Close()
	r.pass(time.Hour)
	r.want(1, 0, "closed")
	var none *Device
	none.Pause()
	none.Resume()
	none.Close()
}

// FuzzGuest has a guest that does anything. Each 6 bytes are one step. Only an enabled watchdog
// counts, and a locked one stays enabled.
func FuzzGuest(f *testing.F) {
	f.Add([]byte("\x00\x00\x02\x03\x00\x00\x01\x0c\x01\x80\x00\x00\x01\x0c\x01\x86\x00\x00\x01\x00\x04\x05\x00\x00" +
		"\x00\x08\x01\x06\x00\x00\x02\x10\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x08\x01\x03\x00\x00\x03\x00\x00\x00\x00\x00\x00\x08\x01\x00\x00\x00\x02\xff\xff\x00\x00\x00" +
		"\x03\x01\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, ops []byte) {
		r := newRig(t)
		for ops = ops[:min(len(ops), 6*200)]; len(ops) >= 6; ops = ops[6:] {
			n := []int{1, 2, 4, 8}[ops[2]%4]
			v := uint64(ops[3]) | uint64(ops[4])<<8 | uint64(ops[5])<<16
			before, expired := r.lock, r.expired
			switch ops[0] % 5 {
			case 0:
				r.config.Write(0x60+int(ops[1]%16), n, v)
			case 1:
				r.store(uint64(ops[1])%uint64(barSize-n+1), n, v)
			case 2:
				r.pass(time.Duration(ops[1]) << (ops[2] % 32))
			case 3:
				r.setPaused(ops[1]%2 == 0)
			case 4:
				if err := r.fn.Reset(); err != nil {
					t.Fatal(err)
				}
				before = 0
			}
			if before&locked != 0 && r.lock != before {
				t.Fatalf("the locked register %#x is %#x", before, r.lock)
			}
			if r.lock&enable == 0 && (r.stage != 0 || r.fires != nil || r.expired != expired) {
				t.Fatalf("it counts, stage %d, and is not enabled", r.stage)
			}
			if (r.fires != nil) != (r.stage != 0 && !r.paused) {
				t.Fatalf("stage %d, paused %v, timer %v", r.stage, r.paused, r.fires != nil)
			}
			r.load(uint64(ops[1])%uint64(barSize-n+1), n)
		}
	})
}
