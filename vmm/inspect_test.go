package vmm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
	"gvm/devices/virtio"
	"gvm/devices/virtio/rng"
	"gvm/devices/virtio/vscsi"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/panics"
)

// TestInspectCPUs reads the registers of CPUs that run, wait for their start and are paused.
func TestInspectCPUs(t *testing.T) {
	waitForCPUs(t)
	c, p, i := &shownConsole{wrote: make(chan struct{}, 1)}, &Pauser{}, &Inspector{}
	if _, err := i.Read(t.Context(), ""); err != ErrNotRunning {
		t.Errorf("before the start: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	sys := system(t)
	go func() {
		defer close(ended)
		if _, err := Run(ctx, sys, Config{
			Memory: guestmem.Config{Size: 64 << 20}, CPUs: 2, Kernel: embeddedKernel(t), CmdLine: "spin",
			Devices: []virtio.Device{rng.New()}, Console: c, Pauser: p, Inspector: i,
		}); err != nil {
			t.Error(err)
		}
	}()
	c.waitFor("spinning")
	for _, paused := range []bool{false, true, false} {
		if paused {
			if err := p.Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
		} else if p.Paused() {
			if err := p.Resume(); err != nil {
				t.Fatal(err)
			}
		}
		n, err := i.Read(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]any{
			"paused": paused, "vcpu/0/mp_state": "runnable", "vcpu/1/mp_state": "uninitialized",
			"vcpu/1/rip": inspect.Hex(0xfff0), "vcpu/1/apic_id": uint32(1), "memory/0/size": 64 << 20,
			"com1/mcr":                       inspect.Hex(0x0b),
			"pci/00:01.0/virtio/device_type": rng.New().ID(), "pci/00:01.0/virtio/device_status": inspect.Hex(0),
			"pci/00:01.0/virtio/queue/0/queue_enable": false, "pci/00:00.0/config/vendor_id": inspect.Hex(0x8086),
			"rtc/register_a": inspect.Hex(0x26), "acpi_pm/pm1_cnt": inspect.Hex(1),
			"ioapic/pin/23/masked": true, "ioapic/pin/23/requested": false, "vcpu/1/apic/svr": inspect.Hex(0xff),
			"vcpu/1/apic/irr": "", "vcpu/1/apic/isr": "",
		} {
			if got := n.Get(path); got != want {
				t.Errorf("%s is %v (%[2]T), want %v (%[3]T)", path, got, want)
			}
		}
		if rip, ok := n.Get("vcpu/0/rip").(inspect.Hex); !ok || rip == 0 {
			t.Errorf("vcpu/0/rip is %v", n.Get("vcpu/0/rip"))
		}
	}
	n, err := i.Read(t.Context(), "vcpu")
	if io, ok := n.Get("0/exit/io").(uint64); err != nil || !ok || io == 0 || n.Get("1/exit/io") != uint64(0) ||
		n.Get("0/exit/interrupted") == uint64(0) {
		t.Errorf("exits: %v, %v", n, err)
	}
	if n.Get("0/kvm/exits") == uint64(0) { // nil: KVM has no statistics
		t.Errorf("exits that KVM counted: %v", n)
	}
	if n, err := i.Read(t.Context(), "vcpu/0/cr3"); err != nil || n.Name != "cr3" || n.Value == nil {
		t.Errorf("%+v, %v", n, err)
	}
	if _, err := i.Read(t.Context(), "vcpu/2"); !errors.As(err, new(*inspect.PathError)) {
		t.Errorf("no vCPU: %v", err)
	}
	reading := make(chan struct{})
	go func() { // the end cuts it short
		defer close(reading)
		for {
			if _, err := i.Read(t.Context(), ""); err != nil {
				return
			}
		}
	}()
	cancel()
	<-ended
	<-reading
	if _, err := i.Read(t.Context(), ""); err != ErrNotRunning {
		t.Errorf("after the end: %v", err)
	}
}

// TestInspectMeetsEnd: a reading that the machine's end cuts short is none.
func TestInspectMeetsEnd(t *testing.T) {
	i := &Inspector{}
	var stop func() Outcome
	var c *shownConsole
	_, c, stop = pausableWith(t, "spin", Config{CPUs: 1, Inspector: i, Inspect: func() []inspect.Node {
		return []inspect.Node{inspect.Lazy("slow", func(ctx context.Context) ([]inspect.Node, bool) {
			go stop()
			<-ctx.Done()
			return nil, false
		})}
	}})
	c.waitFor("spinning")
	if n, err := i.Read(t.Context(), ""); err != ErrNotRunning {
		t.Errorf("%v, %v", n.Get("slow"), err)
	}
}

// TestInspectStuckDevice: a device that does not stop is busy, and nothing else is; the vCPU that
// waits for it answers once it is free.
func TestInspectStuckDevice(t *testing.T) {
	s := &stuck{rng.New(), make(chan struct{}, 1), make(chan struct{})}
	m, err := newMachine(t.Context(), system(t), Config{
		Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t), Devices: []virtio.Device{s, rng.New()},
	})
	if err != nil {
		t.Fatal(err)
	}
	h := &hostile{m, rand.New(rand.NewPCG(1, 2))}
	h.put(&h.mmio, h.config(1)+4, 2, 6)
	at := h.bar(1, 0)
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		h.put(&h.mmio, at+0x14, 1, 0) // device_status: reset
	}()
	<-s.resetting
	n, err := m.state().Read(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for path, v := range n.Values("") {
		busy := path == "pci/00:01.0/virtio" || path == "vcpu/0" // which no thread runs
		if busy != (v == inspect.Busy) {
			t.Errorf("%s is %v", path, v)
		}
	}
	if report := m.stateReport(); report != "vcpu/0: busy\npci/00:01.0/virtio: busy\n"+
		"pci/00:02.0/virtio: device_type 4, device_status 0x0\n" {
		t.Errorf("the report has %q", report)
	}
	close(s.until)
	<-wrote
	if n, err := m.state().Read(t.Context(), "pci/00:01.0/virtio/device_status"); err != nil || n.Value != inspect.Hex(0) {
		t.Errorf("%+v, %v", n, err)
	}
	if err := m.close(); err != nil {
		t.Error(err)
	}
}

// TestInspectRequest: a request that storage does not finish shows in its queue, in its disk and in
// the report of a crash. The reason why a device needs a reset shows too.
func TestInspectRequest(t *testing.T) {
	target := scsi.NewTarget()
	called, release := make(chan struct{}, 1), make(chan struct{})
	u, err := scsi.NewUnit(scsi.UnitConfig{Serial: "A", Backend: &scsitest.Recorder{Backend: block.NewMem(1 << 20),
		OnCall: func(string) { called <- struct{}{}; <-release }}})
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Attach(0, u); err != nil {
		t.Fatal(err)
	}
	disk, err := vscsi.New(vscsi.Config{Target: target, Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	m, err := newMachine(t.Context(), system(t), Config{
		Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t), Devices: []virtio.Device{rng.New(), disk},
		Inspect: func() []inspect.Node {
			return []inspect.Node{inspect.Group("disk", inspect.Group("0", u.Inspect()...))}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	h := &hostile{m, rand.New(rand.NewPCG(1, 2))}
	h.start(2)
	if err := scsitest.Ready(target, 0); err != nil {
		t.Fatal(err)
	}
	h.command(2, []byte{0x2a, 0, 0, 0, 0, 7, 0, 0, 1, 0}, make([]byte, 512))
	<-called
	n, err := m.state().Read(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	const queue = "pci/00:02.0/virtio/queue/2/"
	for path, want := range map[string]any{
		queue + "queue_enable": true, queue + "queue_size": uint16(ringSize),
		queue + "queue_desc": inspect.Hex(ringsAt + 2<<16), queue + "avail_idx": uint16(1), queue + "used_idx": uint16(0),
		queue + "last_avail_idx": uint16(1), queue + "in_flight": 1,
		"pci/00:02.0/virtio/device_status": inspect.Hex(15), "pci/00:02.0/virtio/device/num_queues": 2,
		"disk/0/tasks": 1, "disk/0/task/0/command": "WRITE(10)", "disk/0/task/0/lba": uint64(7),
		"disk/0/last/0/command": "WRITE(10)", "disk/0/last/0/status": nil, "disk/0/last/1/command": "TEST UNIT READY",
	} {
		if got := n.Get(path); got != want {
			t.Errorf("%s is %v (%[2]T), want %v (%[3]T)", path, got, want)
		}
	}
	report := m.stateReport()
	for _, want := range []string{
		"pci/00:02.0/virtio: device_type 8, device_status 0xf\n",
		queue[:len(queue)-1] + ": avail_idx 1, used_idx 0, last_avail_idx 1, in_flight 1\n",
		"disk/0/task/0: command WRITE(10), lba 7, blocks 1, age ",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("no %q in the report:\n%s", want, report)
		}
	}
	close(release)
	h.put(&h.mmio, h.config(2)+4, 2, 0) // an owner that does not know the rings
	n, err = m.state().Read(t.Context(), "pci/00:02.0/virtio")
	if err != nil || n.Get("device_status") != inspect.Hex(15|64) || n.Get("device_state") != "failed" ||
		n.Get("error") != "bus mastering and memory decoding were turned off" {
		t.Errorf("%+v, %v", n, err)
	}
	if err := m.close(); err != nil {
		t.Error(err)
	}
}

// waitForCPUs has the state of CPUs wait for a busy host, for a test in which all of them run.
func waitForCPUs(t *testing.T) {
	ask, report := askPatience, reportTime
	askPatience, reportTime = 5*time.Second, 10*time.Second
	t.Cleanup(func() { askPatience, reportTime = ask, report })
}

// TestReportEnds: a run that ends by its deadline or by a bug of gvm has the state in its report,
// and one that was asked to end has none.
func TestReportEnds(t *testing.T) {
	waitForCPUs(t)
	for _, tt := range []struct {
		cause error
		want  string // the lines, the numbers as N
	}{
		{context.Canceled, ""},
		{context.DeadlineExceeded, report("runnable")},
		{fmt.Errorf("asked: %w", &panics.Panic{Value: "test"}), report("runnable")},
	} {
		c := &shownConsole{wrote: make(chan struct{}, 1)}
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			c.waitFor("spinning")
			cancel(tt.cause)
		}()
		out, err := Run(ctx, system(t), Config{
			Memory: guestmem.Config{Size: 64 << 20}, CPUs: 2, Kernel: embeddedKernel(t), CmdLine: "spin",
			Devices: []virtio.Device{rng.New()}, Console: c,
		})
		if err != nil || out.Ending != Stopped || out.Err != tt.cause {
			t.Fatalf("%+v, %v", out, err)
		}
		got := regexp.MustCompile(`(0x)?[0-9a-f]*[0-9][0-9a-f]*(,|\n)`).ReplaceAllString(out.Report, "N$2")
		got = regexp.MustCompile(`(?m)^vcpu/./kvm: .*\n`).ReplaceAllString(got, "") // as the host's KVM counts
		if got != tt.want {
			t.Errorf("%v: %q, want %q", tt.cause, got, tt.want)
		}
	}
}

func report(state string) string {
	return "vcpu/0: mp_state " + state + ", rip N, rflags N, cpl N\nvcpu/0/exit: io N, mmio N, interrupted N\n" +
		"vcpu/1: mp_state uninitialized, rip N, rflags N, cpl N\nvcpu/1/exit: io N, mmio N, interrupted N\n" +
		"pci/00:01.0/virtio: device_type N, device_status N\n"
}

// TestReportBounds: a report has a bounded number of lines, and says how many more there are.
func TestReportBounds(t *testing.T) {
	var disks []inspect.Node
	for i := range 3 * reportLines {
		disks = append(disks, inspect.Group(fmt.Sprint(i), inspect.Group("task",
			inspect.Group("0", inspect.Text("command", "WRITE(10)")))))
	}
	m, err := newMachine(t.Context(), system(t), Config{
		Memory: guestmem.Config{Size: 64 << 20}, Kernel: embeddedKernel(t), CPUs: reportCPUs + 3,
		Inspect: func() []inspect.Node { return []inspect.Node{inspect.Group("disk", disks...)} },
	})
	if err != nil {
		t.Fatal(err)
	}
	report := m.stateReport()
	if n := strings.Count(report, "\n"); n != reportCPUs+1+reportLines+1 ||
		!strings.Contains(report, "\n3 more vCPUs\n") ||
		!strings.HasSuffix(report, fmt.Sprintf("\n%d more lines about devices\n", 2*reportLines)) {
		t.Errorf("%d lines: %q", n, report)
	}
	if err := m.close(); err != nil {
		t.Error(err)
	}
}

// TestReportAfterBug: a state that a bug left unreadable does not hide the bug.
func TestReportAfterBug(t *testing.T) {
	if got := afterBug(func() string { panic("second") }); got != "no state of the machine: second\n" {
		t.Errorf("%q", got)
	}
}
