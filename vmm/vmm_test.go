package vmm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"gvm/devices/pci"
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/guest/embedded"
	"gvm/guestmem"
	"gvm/kvmapi"
	"gvm/kvmapi/eventfd"
	"gvm/vmm/boot"
)

func TestMMIO64IsAboveRAM(t *testing.T) {
	for _, c := range []struct {
		size uint64
		bits uint
		want pci.Window
		fits bool
	}{
		{512 << 20, 40, pci.Window{Base: 4 << 30, Size: mmio64Size}, true},
		{3 << 30, 40, pci.Window{Base: 4 << 30, Size: mmio64Size}, true},
		{6 << 30, 40, pci.Window{Base: 7 << 30, Size: mmio64Size}, true},
		{6<<30 + 4096, 40, pci.Window{Base: 8 << 30, Size: mmio64Size}, true},
		{63 << 30, 36, pci.Window{}, true},
		{63<<30 + 4096, 36, pci.Window{}, false},
	} {
		m, err := guestmem.Map(guestmem.Config{Size: c.size})
		if err != nil {
			t.Fatal(err)
		}
		if w := mmio64(m, c.bits); w != c.want {
			t.Errorf("%#x bytes, %d bits: window %#x", c.size, c.bits, w)
		}
		if err := checkRAM(m, c.bits); (err == nil) != c.fits {
			t.Errorf("%#x bytes, %d bits: %v", c.size, c.bits, err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

func system(t *testing.T) *kvmapi.System {
	t.Helper()
	sys, err := kvmapi.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sys.Close() })
	return sys
}

func TestVectorKeepsAndDeliversPending(t *testing.T) {
	vm, err := system(t).CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	if err := vm.CreateIRQChip(); err != nil {
		t.Fatal(err)
	}
	in := interrupts{vm: vm}
	v, err := in.vector()
	if err != nil {
		t.Fatal(err)
	}
	msg := pci.Message{Addr: 0xfee0_0000, Data: 0x41}
	steps := []struct {
		name    string
		do      func() error
		pending bool
	}{
		{"signal while masked", v.Event().Signal, true},
		{"unmask delivers it", func() error { return v.Unmask(msg) }, false},
		// Before Linux 5.11 the counter keeps it until then.
		{"signal while unmasked is consumed by mask", func() error {
			return errors.Join(v.Event().Signal(), v.Mask())
		}, false},
		{"mask again", v.Mask, false},
		{"signal while masked again", v.Event().Signal, true},
		{"unmask with another message", func() error { return v.Unmask(pci.Message{Addr: 0xfee0_0000, Data: 0x42}) }, false},
		{"change the message", func() error { return v.Unmask(msg) }, false},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if v.Event().Pending() != s.pending {
			t.Errorf("%s: pending is %v", s.name, !s.pending)
		}
	}
	gsi := v.(*vector).gsi
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if again, err := in.vector(); err != nil || again.(*vector).gsi != gsi {
		t.Errorf("the GSI of a closed vector is not used again: %v, %v", again, err)
	}
}

// testConsole collects output and types input for a test.
type testConsole struct {
	mu  sync.Mutex
	out bytes.Buffer
	to  chan io.Writer

	greeted func() // if set, called at the embedded guest's first line
}

func (c *testConsole) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out.Write(p)
	if c.greeted != nil && bytes.Contains(c.out.Bytes(), []byte("gvm embedded guest")) {
		c.greeted()
	}
	return len(p), nil
}

func (c *testConsole) Connect(w Input) {
	if c.to != nil && w != nil {
		c.to <- w
	}
}

func embeddedKernel(t *testing.T) *boot.Image {
	t.Helper()
	k, err := boot.NewImage(&boot.File{Name: "embedded", ReaderAt: bytes.NewReader(embedded.Image),
		Size: int64(len(embedded.Image))})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestEndings(t *testing.T) {
	sys := system(t)
	errAsked := errors.New("asked to")
	for _, c := range []struct {
		words string
		want  Ending
		err   string
	}{
		{"nodisk", PoweredOff, ""},
		{"crash=reset", GuestReset, ""},
		{"crash=panic", GuestPanic, "the guest's kernel panicked"},
		{"crash=triple", GuestCrashed, "KVM_EXIT_SHUTDOWN (triple fault)"},
		{"spin", Stopped, "asked to"},
	} {
		console := &testConsole{}
		ctx, cancel := context.WithCancelCause(t.Context())
		if c.want == Stopped {
			console.greeted = func() { cancel(errAsked) }
		}
		out, err := Run(ctx, sys, Config{
			Memory:  guestmem.Config{Size: 64 << 20},
			CPUs:    2,
			Kernel:  embeddedKernel(t),
			CmdLine: c.words,
			Devices: []virtio.Device{rng.New()},
			Console: console,
		})
		cancel(nil)
		if err != nil {
			t.Fatalf("%s: %v", c.words, err)
		}
		if out.Ending != c.want || (out.Err == nil) != (c.err == "") ||
			out.Err != nil && !strings.Contains(out.Err.Error(), c.err) {
			t.Errorf("%s\n%s: %s, %v", console.out.String(), c.words, out.Ending, out.Err)
		}
		if c.want == GuestCrashed && !strings.Contains(out.Report, "code at rip: ") &&
			!strings.HasPrefix(out.Report, "the guest's registers are lost: ") &&
			!strings.HasPrefix(out.Report, "the guest's general registers are all that is left: ") { // before 5.19
			t.Errorf("%s: the report lacks the code:\n%s", c.words, out.Report)
		}
		if c.want == GuestCrashed && !strings.Contains(out.Report, "pci/00:01.0/virtio: device_type 4, ") {
			t.Errorf("%s: the report lacks the device:\n%s", c.words, out.Report)
		}
		if !strings.Contains(console.out.String(), "gvm embedded guest") {
			t.Errorf("%s: the console has %q", c.words, console.out.String())
		}
	}
}

func TestRebootInPlaceAndDescriptors(t *testing.T) {
	sys := system(t)
	before := openFDs(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	console := &testConsole{to: make(chan io.Writer, 100)}
	go func() {
		for range 4 { // the fourth life ends the test
			<-console.to
		}
		cancel()
	}()
	cfg := Config{
		Memory:    guestmem.Config{Size: 64 << 20},
		Kernel:    embeddedKernel(t),
		CmdLine:   "crash=reset",
		Devices:   []virtio.Device{rng.New()},
		Console:   console,
		Rebooting: true,
	}
	begun := Begin()
	if _, err := begun.System(); err != nil {
		t.Fatal(err)
	}
	cfg.Prepared = begun.Prepare(cfg) // for the first life
	out, err := Run(ctx, sys, cfg)
	if err := errors.Join(cfg.Prepared.Close(), begun.Close()); err != nil {
		t.Error(err)
	}
	if err != nil || out.Ending != Stopped {
		t.Fatalf("%s, %v, %v", out.Ending, out.Err, err)
	}
	if n := strings.Count(console.out.String(), "reset next"); n < 3 {
		t.Errorf("%d resets on the console", n)
	}
	if after := openFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// TestPrepareForNothing: closing an unused Prepared releases everything.
func TestPrepareForNothing(t *testing.T) {
	sys := system(t)
	for _, size := range []uint64{64 << 20, 1} { // 1 is refused
		before := openFDs(t)
		if err := Prepare(sys, Config{Memory: guestmem.Config{Size: size}}).Close(); err != nil {
			t.Error(err)
		}
		if after := openFDs(t); after != before {
			t.Errorf("%d bytes: %d descriptors before, %d after", size, before, after)
		}
	}
	var released Prepared
	released.released.Store(true)
	if err := released.makeCPUs(sys, Config{CPUs: 1024}); !errors.Is(err, errReleased) {
		t.Errorf("vCPUs of a machine that is released: %v", err)
	}
	before := openFDs(t)
	b := Begin()
	if _, err := b.System(); err != nil {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("begun alone: %d descriptors before, %d after", before, after)
	}
}

func TestConfigErrors(t *testing.T) {
	sys := system(t)
	for _, c := range []struct {
		name string
		edit func(*Config)
		want string
	}{
		{"CPUs", func(c *Config) { c.CPUs = 1 << 20 }, "1048576 CPUs"},
		{"negative CPUs", func(c *Config) { c.CPUs = -1 }, "-1 CPUs"},
		{"command line", func(c *Config) { c.CmdLine = "a\nb" }, "newline"},
	} {
		before := openFDs(t)
		cfg := Config{Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t), Devices: []virtio.Device{rng.New()}}
		c.edit(&cfg)
		_, err := Run(t.Context(), sys, cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		if after := openFDs(t); after != before {
			t.Errorf("%s: %d descriptors before, %d after", c.name, before, after)
		}
	}
}

// openFDs counts this process's descriptors by asking for the lowest free ones.
func openFDs(t *testing.T) int {
	t.Helper()
	e, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	return e.Fd()
}
