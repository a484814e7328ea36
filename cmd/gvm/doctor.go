package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/bobuhiro11/gokvm/kvm"
	"github.com/urfave/cli/v2"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/guestmem"
	"gvm/jail"
	"gvm/kvmapi"
	"gvm/kvmapi/vhost"
	"gvm/machine/disk"
	"gvm/sandbox"
	"gvm/text"
	"gvm/vmm"
	"gvm/vmm/x86"
)

// capability is a KVM capability, and the loss without it.
type capability struct {
	name string
	cap  int
	lost string
}

// neededCaps are required to run gvm.
var neededCaps = []capability{
	{"KVM_CAP_IRQCHIP", int(kvm.CapIRQChip), ""},
	{"KVM_CAP_USER_MEMORY", int(kvm.CapUserMemory), ""},
	{"KVM_CAP_SET_TSS_ADDR", int(kvm.CapSetTSSAddr), ""},
	{"KVM_CAP_PIT2", int(kvm.CapPIT2), ""},
	{"KVM_CAP_IRQ_ROUTING", int(kvm.CapIRQRouting), ""},
	{"KVM_CAP_IRQFD", int(kvm.CapIRQFD), ""},
	{"KVM_CAP_IOEVENTFD", int(kvm.CapIOEventFD), ""},
	{"KVM_CAP_IMMEDIATE_EXIT", kvmapi.CapImmediateExit, ""},
}

// countCaps are limits.
var countCaps = []capability{
	{"KVM_CAP_NR_VCPUS", kvmapi.CapNRVCPUs, ""},
	{"KVM_CAP_MAX_VCPUS", kvmapi.CapMaxVCPUs, ""},
}

// usefulCaps are used if present.
var usefulCaps = []capability{
	{"KVM_CAP_TSC_DEADLINE_TIMER", kvmapi.CapTSCDeadline, "guests use the slower APIC timer"},
	{"KVM_CAP_IOEVENTFD_ANY_LENGTH", kvmapi.CapIOEventFDAnyLen, "doorbells take a slower path"},
	{"KVM_CAP_X2APIC_API", kvmapi.CapX2APICAPI, "no more than 255 CPUs"},
}

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "show the features that this host offers to guests, and how to add missing ones",
		Description: `Each line is ok, note (something optional is missing) or FAIL (gvm run will
not work), with a remedy. The exit status is 0 without a FAIL, else 3.`,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usageError{fmt.Errorf("doctor takes no argument, and got %q", c.Args().First())}
			}
			if !doctor(c.App.Writer) {
				return errors.New("this host cannot run guests; see the lines with FAIL")
			}
			return nil
		},
	}
}

// doctor writes the report and reports whether gvm run will work.
func doctor(w io.Writer) bool {
	good := true
	line := func(kind, format string, args ...any) {
		good = good && kind != "FAIL"
		fmt.Fprintf(w, "%-5s %s\n", kind, text.Printable(fmt.Sprintf(format, args...)))
	}
	doctorKVM(line)
	doctorSandbox(line)
	doctorJail(line)
	doctorVhost(line)
	doctorMemory(line)
	doctorDevices(line)
	doctorDisks(line)
	return good
}

func doctorKVM(line func(kind, format string, args ...any)) {
	sys, err := kvmapi.Open()
	if err != nil {
		line("FAIL", "%v", err)
		return
	}
	defer sys.Close()
	line("ok", "%s, API version %d", kvmapi.Device, kvmapi.APIVersion)
	for _, c := range neededCaps {
		if sys.Check(c.cap) == 0 {
			line("FAIL", "%s is missing: this kernel's KVM is too old", c.name)
		}
	}
	for _, c := range usefulCaps {
		if sys.Check(c.cap) == 0 {
			line("note", "%s is missing: %s", c.name, c.lost)
		}
	}
	line("ok", "up to %d CPUs in a guest (%d recommended)", sys.Check(kvmapi.CapMaxVCPUs), sys.Check(kvmapi.CapNRVCPUs))
	if cpuid, err := sys.SupportedCPUID(); err != nil {
		line("FAIL", "%v", err)
	} else if dropped, missing := x86.Orphans(cpuid); len(dropped) > 0 {
		line("note", "%s", orphans(dropped, missing))
	}
	mips, err := vmm.Speed(sys)
	switch {
	case err != nil:
		line("FAIL", "a tiny guest does not run: %v", err)
	case mips < vmm.EmulatedBelow:
		line("note", "guest kernel code is emulated (%.1f MIPS%s): the embedded guest runs, a Linux kernel does not; "+
			"for that use a host with VT-x or AMD-V, or go test's lab", mips, modules())
	default:
		line("ok", "guest code runs on the processor (%.0f MIPS in a tiny loop%s)", mips, modules())
	}
}

// orphans describes CPU features hidden from guests because KVM lacks others.
func orphans(dropped, missing []string) string {
	return fmt.Sprintf("this host's KVM offers %s without %s: guests do not see them; "+
		"where this host is a virtual machine, correct its processor",
		strings.Join(dropped, ", "), strings.Join(missing, ", "))
}

// modules returns the names of the loaded KVM modules.
func modules() string {
	dirs, err := os.ReadDir("/sys/module")
	if err != nil {
		return ""
	}
	var names []string
	for _, d := range dirs {
		if strings.HasPrefix(d.Name(), "kvm_") {
			names = append(names, d.Name())
		}
	}
	if len(names) == 0 {
		return ""
	}
	return ", " + strings.Join(names, ", ")
}

// doctorSandbox tells of the parts of the sandbox.
func doctorSandbox(line func(kind, format string, args ...any)) {
	r := sandbox.Check()
	for _, lack := range r.Missing {
		line("note", "sandbox: %s", lack)
	}
	if len(r.Missing) == 0 {
		line("ok", "sandbox: Landlock, version %d, and seccomp", r.Landlock)
	}
}

// doctorJail tells of the needs of gvm run --jail.
func doctorJail(line func(kind, format string, args ...any)) {
	missing := jail.Check()
	for _, lack := range missing {
		line("note", "jail: %s", lack)
	}
	if len(missing) == 0 {
		line("ok", "jail: gvm run --jail, and its limits of memory, cpus and pids")
	}
}

func doctorVhost(line func(kind, format string, args ...any)) {
	f, err := os.OpenFile("/dev/vhost-scsi", os.O_RDWR, 0)
	switch {
	case err == nil:
		f.Close()
		line("ok", "/dev/vhost-scsi; the kernel takes some %s for each request queue of a guest, "+
			"which has one a CPU unless --queues bounds them", text.FormatSize(disk.QueueMemory))
	case errors.Is(err, fs.ErrPermission):
		line("note", "/dev/vhost-scsi: no permission; the kernel's SCSI target needs root")
	default:
		line("note", "/dev/vhost-scsi is not there: modprobe vhost_scsi (CONFIG_VHOST_SCSI); "+
			"disks are served in-process without it")
	}
	switch _, err := os.Stat("/sys/kernel/config/target"); {
	case err == nil:
		line("ok", "LIO, the kernel's SCSI target, in /sys/kernel/config/target")
	default:
		line("note", "LIO is not there: mount -t configfs configfs /sys/kernel/config; "+
			"modprobe target_core_mod (CONFIG_TARGET_CORE)")
	}
}

// doctorDevices tells of the devices of networks and sockets.
func doctorDevices(line func(kind, format string, args ...any)) {
	for _, d := range []struct{ path, module, use, without string }{
		{vhost.VsockPath, "vhost_vsock", "for --vsock vhost", "--vsock unix needs none of it"},
		{"/dev/net/tun", "tun", "for networks at TAP interfaces", "there is no --net tap without it"},
		{"/dev/vhost-net", "vhost_net", "for networks at TAP interfaces", "gvm itself serves networks without it"},
	} {
		f, err := os.OpenFile(d.path, os.O_RDWR, 0)
		switch {
		case err == nil:
			f.Close()
			line("ok", "%s, %s", d.path, d.use)
		case errors.Is(err, fs.ErrPermission):
			line("note", "%s: no permission; %s", d.path, d.without)
		default:
			line("note", "%s is not there: modprobe %s; %s", d.path, d.module, d.without)
		}
	}
}

func doctorDisks(line func(kind, format string, args ...any)) {
	switch at, err := block.ReadsAtOnce("."); {
	case err != nil:
		line("note", "whether images here are read at once is not known: %v", err)
	case at:
		line("ok", "images in this directory: data in the page cache is read at once")
	default:
		line("note", "images in this directory: its file system has no RWF_NOWAIT, so that reads use helper threads, "+
			"which is slower; ext4, XFS and btrfs have it")
	}
}

func doctorMemory(line func(kind, format string, args ...any)) {
	h := thisHost()
	line("ok", "%s of memory", text.FormatSize(h.ram>>20<<20))
	pool := h.hugepagePool(0)
	told := map[string]bool{pool.what: true}
	for _, kind := range []struct {
		flag   string
		config guestmem.Config
	}{
		{"", guestmem.Config{}},
		{"--shared-memory: ", guestmem.Config{Shared: true}},
		{"--hugepages: ", guestmem.Config{Hugepages: true}},
	} {
		for _, l := range h.memoryLimits(kind.config) {
			if l.bytes < h.ram && !told[l.what] {
				told[l.what] = true
				line("note", "%s%s", kind.flag, l)
			}
		}
	}
	const many = 512
	for _, l := range h.threadLimits(many) {
		if l.bytes < many {
			line("note", "%s leaves %d threads: a guest has one for each CPU and request queue, a disk up to %d, and gvm some "+
				"%d more", l.what, l.bytes, scsi.MaxWaiting, ownThreads())
		}
	}
	switch _, err := os.Stat("/sys/kernel/mm/hugepages/hugepages-2048kB"); {
	case err != nil:
		line("note", "this kernel has no 2 MiB pages (CONFIG_HUGETLBFS): --hugepages will not work")
	case pool.bytes == 0:
		line("note", "no free 2 MiB pages: --hugepages needs sysctl vm.nr_hugepages=N")
	default:
		line("ok", "%d free 2 MiB pages for --hugepages", pool.bytes>>21)
	}
}
