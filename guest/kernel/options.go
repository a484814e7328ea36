package kernel

import (
	"fmt"
	"slices"
	"strings"
)

// Option is an option of a kernel's configuration that a guest of gvm needs or profits from.
type Option struct {
	Feature  string // of Features
	Symbol   string // without CONFIG_
	Required bool   // the feature does not work without it; else it is recommended
	Why      string
	Module   string // its module, if it can be one
	needs    string // options that it depends on, for Fragment
	before   string // the option in kernels that do not have Symbol yet
}

// Features are the features that options belong to, in the order of the table.
var Features = []string{"boot", "console", "disk", "cpus", "power", "kvm", "entropy", "test", "check"}

// Options is the table of options.
var Options = []Option{
	{Feature: "boot", Symbol: "64BIT", Required: true, Why: "gvm boots x86-64 kernels"},
	{Feature: "boot", Symbol: "BINFMT_ELF", Required: true, Why: "programs"},
	{Feature: "boot", Symbol: "ACPI", Required: true, Why: "tells of CPUs, interrupts and power"},
	{Feature: "boot", Symbol: "BLK_DEV_INITRD", Why: "--initrd"},
	{Feature: "boot", Symbol: "DEVTMPFS", Why: "device files in /dev"},
	{Feature: "boot", Symbol: "PROC_FS", Why: "/proc"},
	{Feature: "boot", Symbol: "SYSFS", Why: "/sys"},
	{Feature: "boot", Symbol: "TMPFS", Why: "/run and /tmp", needs: "SHMEM"},
	{Feature: "boot", Symbol: "RTC_DRV_CMOS", Module: "rtc_cmos", Why: "the time of day", needs: "RTC_CLASS"},
	{Feature: "console", Symbol: "TTY", Required: true, Why: "terminals"},
	{Feature: "console", Symbol: "PRINTK", Required: true, Why: "the kernel's messages"},
	{Feature: "console", Symbol: "SERIAL_8250", Required: true, Why: "the serial port"},
	{Feature: "console", Symbol: "SERIAL_8250_CONSOLE", Required: true, Why: "console=ttyS0"},
	{Feature: "disk", Symbol: "PCI", Required: true, Why: "the bus of virtio devices"},
	{Feature: "disk", Symbol: "PCI_MSI", Why: "an interrupt for each queue"},
	{Feature: "disk", Symbol: "VIRTIO_PCI", Module: "virtio_pci", Required: true, Why: "virtio devices",
		needs: "VIRTIO_MENU"},
	{Feature: "disk", Symbol: "SCSI", Module: "scsi_mod", Required: true, Why: "SCSI commands", needs: "BLOCK"},
	{Feature: "disk", Symbol: "SCSI_VIRTIO", Module: "virtio_scsi", Required: true, Why: "the disks' adapter",
		needs: "SCSI_LOWLEVEL"},
	{Feature: "disk", Symbol: "BLK_DEV_SD", Module: "sd_mod", Required: true, Why: "/dev/sda"},
	{Feature: "disk", Symbol: "BLK_DEV_INTEGRITY", Why: "--disk PATH,pi=1"},
	{Feature: "cpus", Symbol: "SMP", Why: "--cpus"},
	{Feature: "cpus", Symbol: "X86_X2APIC", Why: "more than 255 CPUs"},
	{Feature: "power", Symbol: "ACPI_BUTTON", Module: "button", Why: "gvm stop and --grace", needs: "INPUT"},
	{Feature: "power", Symbol: "PVPANIC_MMIO", Module: "pvpanic_mmio", Why: "tells gvm of a panic at once",
		needs: "PVPANIC", before: "PVPANIC"},
	{Feature: "kvm", Symbol: "KVM_GUEST", Why: "KVM's clock and cheap interrupts", needs: "HYPERVISOR_GUEST PARAVIRT"},
	{Feature: "kvm", Symbol: "PVH", Why: "--entry pvh"},
	{Feature: "entropy", Symbol: "HW_RANDOM_VIRTIO", Module: "virtio_rng", Why: "random numbers of the host",
		needs: "HW_RANDOM"},
	{Feature: "test", Symbol: "VSOCKETS", Module: "vsock", Why: "streams between guest and host", needs: "NET"},
	{Feature: "test", Symbol: "VIRTIO_VSOCKETS", Module: "vmw_vsock_virtio_transport", Why: "the best way to the host",
		needs: "VIRTIO_MENU"},
	{Feature: "test", Symbol: "VIRTIO_CONSOLE", Module: "virtio_console", Why: "the next best", needs: "VIRTIO_MENU"},
	{Feature: "test", Symbol: "FUSE_FS", Module: "fuse", Why: "file systems of the host"},
	{Feature: "test", Symbol: "VIRTIO_FS", Module: "virtiofs", Why: "the host's directories", needs: "VIRTIO_MENU"},
	{Feature: "test", Symbol: "OVERLAY_FS", Module: "overlay", Why: "a root directory to write to, above the host's"},
	{Feature: "check", Symbol: "IKCONFIG", Why: "the image tells its own configuration"},
}

// Of returns the options of the features, or all if there are none.
func Of(features []string) []Option {
	return slices.DeleteFunc(slices.Clone(Options), func(o Option) bool {
		return len(features) > 0 && !slices.Contains(features, o.Feature)
	})
}

// Has returns the value of an option in a configuration: "y", "m" (a module) or "n".
func (c Config) Has(o Option) string {
	v := c.Value(o.Symbol)
	if v == "" && o.before != "" {
		v = c.Value(o.before)
	}
	if v != "y" && v != "m" {
		return "n"
	}
	return v
}

// ModuleBefore returns the name that a module of Options had in older kernels, or "".
func ModuleBefore(module string) string {
	for _, o := range Options {
		if o.Module == module {
			return strings.ToLower(o.before)
		}
	}
	return ""
}

// Fragment returns options as a fragment for scripts/kconfig/merge_config.sh, all built in.
func Fragment(options []Option) string {
	var b strings.Builder
	seen := map[string]bool{}
	for _, o := range options {
		need := "recommended"
		if o.Required {
			need = "required"
		}
		fmt.Fprintf(&b, "# %s, %s: %s\n", o.Feature, need, o.Why)
		for _, symbol := range append(strings.Fields(o.needs), o.Symbol) {
			if !seen[symbol] {
				fmt.Fprintf(&b, "CONFIG_%s=y\n", symbol)
			}
			seen[symbol] = true
		}
	}
	return b.String()
}

// Missing describes the required options of the features that a configuration lacks, or has as
// modules if it has no initramfs of its own and builtIn is set; "" if none, or if the configuration
// is unknown.
func (c Config) Missing(features []string, builtIn bool) string {
	if c.Text == nil {
		return ""
	}
	builtIn = builtIn && strings.Trim(c.Value("INITRAMFS_SOURCE"), `"`) == ""
	var lacks, modules []string
	for _, o := range Of(features) {
		switch v := c.Has(o); {
		case !o.Required:
		case v == "n":
			lacks = append(lacks, fmt.Sprintf("CONFIG_%s (%s)", o.Symbol, o.Why))
		case v == "m" && builtIn:
			modules = append(modules, "CONFIG_"+o.Symbol)
		}
	}
	var parts []string
	if lacks != nil {
		parts = append(parts, "lacks "+strings.Join(lacks, ", "))
	}
	if modules != nil {
		parts = append(parts, "has only as modules, which need an initrd: "+strings.Join(modules, ", "))
	}
	return strings.Join(parts, "; ")
}
