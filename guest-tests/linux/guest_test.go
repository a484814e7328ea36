package linux

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"gvm/guest-tests/lab"
	"gvm/machine"
	"gvm/vmm/boot"
)

// guest is a Linux guest whose init is a script.
type guest struct {
	kernel  *lab.Kernel
	image   string   // the file to boot; "" is the kernel's bzImage
	modules []string // besides diskModules
	// programs are paths in lab.Tree, files as in lab.Initramfs.
	programs []string
	// hostPrograms are paths of programs of this machine, instead of programs.
	hostPrograms []string
	files        map[string]string
	script       string // preceded by prologue; the guest powers off at its end
	cmdline      string // in addition to gvm's own and quiet
}

// diskModules are the modules that stock kernels need for gvm's disks.
var diskModules = []string{"virtio_pci", "virtio_scsi", "sd_mod"}

// prologue has shell functions for scripts.
//
//	say NAME VALUE   tells the test something
//	sum [FILE]       prints the SHA-256 of a file or its input
//	klog             shows the kernel's log from warnings on
//	wait_for FILE    waits for a file, and for a disk to open (its node appears a little earlier)
//	disk LUN         prints the path of a disk; Linux names the disks in any order
const prologue = `
say() { echo "= $*"; }
sum() { sha256sum "$@" | cut -c1-64; }
klog() { echo '--- kernel log'; dmesg -r | grep '^<[0-4]>'; echo '--- end of kernel log'; }
wait_for() {
	n=0
	until [ -e "$1" ] && { [ ! -b "$1" ] || true <"$1"; } 2>/dev/null; do
		sleep 0.1
		n=$((n+1))
		[ $n -lt 300 ] || { say missing "$1"; return 1; }
	done
}
disk() { set -- /sys/class/scsi_device/*:*:*:$1/device/block/*; echo /dev/${1##*/}; }
`

// build makes the guest's initramfs, and returns the arguments of gvm run for it.
func (g guest) build(t testing.TB) []string {
	t.Helper()
	image := g.image
	if image == "" {
		image = g.kernel.BZImage
	}
	return []string{"run", "--kernel", image, "--initrd", g.initramfs(t), "--cmdline",
		strings.TrimSpace("quiet " + g.cmdline)}
}

func (g guest) initramfs(t testing.TB) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "initrd")
	i := lab.Initramfs{
		Kernel:  g.kernel,
		Modules: append(slices.Clone(diskModules), g.modules...),
		Files:   g.files,
		Init:    prologue + g.script,
	}
	if len(g.programs) > 0 {
		i.Root = theLab(t).Tree
		for _, p := range g.programs {
			i.Binaries = append(i.Binaries, filepath.Join(i.Root, p))
		}
	}
	i.Binaries = append(i.Binaries, g.hostPrograms...)
	if err := i.Build(name); err != nil {
		t.Fatal(err)
	}
	return name
}

// run runs the guest with more arguments of gvm run.
func (g guest) run(t testing.TB, args ...string) result {
	t.Helper()
	return gvm(t, append(g.build(t), args...)...)
}

// launch starts the guest with 2 CPUs in a machine of this process. The machine stops at the end of
// the test, or if it has not ended by itself within patience.
func (g guest) launch(t testing.TB, s machine.Spec) *machine.Machine {
	t.Helper()
	k, err := boot.Open(t.Context(), g.kernel.BZImage)
	must(t, err)
	t.Cleanup(func() { k.Close() })
	initrd, err := boot.OpenFile(t.Context(), g.initramfs(t))
	must(t, err)
	t.Cleanup(func() { initrd.Close() })
	ctx, cancel := context.WithTimeoutCause(context.Background(), patience, errLate)
	s.CPUs, s.Kernel, s.Initrds, s.CmdLine, s.KernelCache = 2, k, []*boot.File{initrd}, "quiet", cacheHome+"/gvm/kernels"
	m, err := machine.Start(ctx, s)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		<-m.Ended()
	})
	return m
}

var errLate = fmt.Errorf("the machine did not end within %v", patience)

// kernelLog fails the test unless the guest's kernels have shown n logs, and each of their lines
// matches allowed or one of more.
func (r result) kernelLog(t testing.TB, n int, more ...string) {
	t.Helper()
	logs := kernelLogs.FindAllStringSubmatch(r.console, -1)
	if len(logs) != n {
		r.fatalf(t, "%d kernel logs on the console, want %d", len(logs), n)
	}
	ok := slices.Clone(allowed)
	for _, m := range more {
		ok = append(ok, regexp.MustCompile(m))
	}
	for _, log := range logs {
		trace := false
		for line := range strings.Lines(log[1]) {
			line = strings.TrimSpace(line)
			start := strings.Contains(line, "------------[ cut here ]------------")
			end := strings.Contains(line, "---[ end trace ")
			// The line of a trace that begins WARNING or BUG names its cause.
			if !(start || end || trace && !cause.MatchString(line)) &&
				!slices.ContainsFunc(ok, func(r *regexp.Regexp) bool { return r.MatchString(line) }) {
				t.Errorf("the kernel logged: %s", line)
			}
			trace = (trace || start) && !end
		}
	}
	if t.Failed() {
		r.fatalf(t, "unexpected warnings in the kernel log")
	}
}

var (
	kernelLogs = regexp.MustCompile(`(?s)--- kernel log\n(.*?)--- end of kernel log\n`)
	cause      = regexp.MustCompile(`\] (WARNING|BUG): `)

	// allowed matches lines of warning level that any machine here may cause.
	allowed = []*regexp.Regexp{
		// A disk's first command ends with the unit attention of power on (SAM-5 5.14.1), and the
		// kernel logs it.
		regexp.MustCompile(`\] sd \S+ Power-on or device reset occurred$`),
		// A vCPU that did not run for a while, on a busy host.
		regexp.MustCompile(`\] clocksource: Long readout interval, skipping watchdog check`),
		regexp.MustCompile(`\] clocksource: .* read-back delay of \d+ns.*, marking .*unstable$`),
		regexp.MustCompile(`\] hrtimer: interrupt took \d+ ns$`),
		// 6.12 on AMD processors, where firmware describes no frequency scaling.
		regexp.MustCompile(`\] amd_pstate: the _CPC object is not present in SBIOS or ACPI disabled$`),
	}
)

// content returns n bytes that belong to a name.
func content(name string, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8(sha256.Sum256([]byte(name))).Read(b)
	return b
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// diskFile makes an image file with the content.
func diskFile(t testing.TB, b []byte) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// wantFile fails the test unless the file holds want at offset.
func wantFile(t testing.TB, name string, offset int64, want []byte) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, offset); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s differs at %d: %q, want %q", filepath.Base(name), offset+int64(i), got[i:min(i+32, len(got))],
				want[i:min(i+32, len(want))])
		}
	}
}

// numbers returns the output of seq.
func numbers(from, to int) []byte {
	var b []byte
	for i := from; i <= to; i++ {
		b = append(strconv.AppendInt(b, int64(i), 10), '\n')
	}
	return b
}
