package linux

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"gvm/guest-tests/conformance"
	"gvm/guest-tests/lab"
)

// conformanceSuites are all suites of the program.
var conformanceSuites = strings.Fields(`
	SCSI.CompareAndWrite SCSI.ExtendedCopy SCSI.GetLBAStatus SCSI.Inquiry SCSI.Mandatory SCSI.ModeSense6
	SCSI.NoMedia SCSI.Prefetch10 SCSI.Prefetch16 SCSI.PreventAllow SCSI.ReadCapacity10
	SCSI.ReadCapacity16 SCSI.ReadDefectData10 SCSI.ReadDefectData12 SCSI.ReadOnly
	SCSI.ReceiveCopyResults SCSI.ReportSupportedOpcodes SCSI.Sanitize SCSI.StartStopUnit
	SCSI.TestUnitReady SCSI.MultipathIO iSCSI SCSI.PrinReadKeys SCSI.PrinServiceactionRange
	SCSI.PrinReportCapabilities SCSI.ProutRegister SCSI.ProutReserve SCSI.ProutClear SCSI.ProutPreempt
	SCSI.Reserve6 SCSI.OrWrite SCSI.Read6 SCSI.Read10 SCSI.Read12 SCSI.Read16 SCSI.Unmap SCSI.Verify10
	SCSI.Verify12 SCSI.Verify16 SCSI.Write10 SCSI.Write12 SCSI.Write16 SCSI.WriteAtomic16
	SCSI.WriteSame10 SCSI.WriteSame16 SCSI.WriteVerify10 SCSI.WriteVerify12 SCSI.WriteVerify16`)

// verdicts runs the suites on /dev/sg0 in guests, and returns the verdicts on its disk. The lab
// seldom keeps a guest that is as busy as these for long: another guest runs the suites that one
// did not finish.
func verdicts(t testing.TB, destroy bool, run func(guest) result) conformance.Verdicts {
	t.Helper()
	flags, left := conformance.Flags, conformanceSuites
	if destroy {
		flags += " " + conformance.DestroyFlag
		left = append(slices.Clone(left), conformance.Sanitize...)
	}
	all := conformance.Verdicts{}
	for losses, stuck := 0, 0; len(left) > 0; {
		part := left[:min(len(left), 16)]
		g := guest{kernel: theLab(t).Debian, modules: []string{"sg"}, programs: []string{"usr/bin/iscsi-test-cu"}, script: `
wait_for /dev/sg0
# Larger elements: else 8 MiB in one command have more pieces than a disk takes.
echo 131072 >/sys/module/sg/parameters/scatter_elem_sz
for suite in ` + strings.Join(part, " ") + `; do
	sanitize=
	case $suite in *.Sanitize.*) sanitize=` + conformance.SanitizeFlag + ` ;; esac
	iscsi-test-cu ` + flags + ` $sanitize -t $suite /dev/sg0 >/tmp/out 2>&1 </dev/null
	status=$?
	echo Suite:
	# Some tests fail a thousand times, and two of each kind of line are enough.
	grep -E '` + conformance.Lines + `' /tmp/out | awk '/Suite:|Test:/ { failed = asserted = 0; print; next }
		/^ *[0-9]+\. / { if (asserted++ < 2) print; next } failed++ < 4'
	[ $status -le 1 ] || say $suite ended with $status
	say finished $suite
done
say done
`, cmdline: benchCmdline}
		r := run(g)
		if strings.Contains(r.console, "ended with") {
			r.fatalf(t, "a suite did not end as it should")
		}
		maps.Copy(all, conformance.Parse(r.console))
		n := strings.Count(r.console, "= finished ")
		left = left[n:]
		if n == len(part) {
			stuck = 0
			continue
		}
		if stuck++; n > 0 {
			stuck = 1
		}
		t.Logf("a guest was lost at %s", part[n])
		if losses++; losses > 20 || os.Getenv(lab.InLabEnv) != "1" {
			r.fatalf(t, "too many guests are lost")
		}
		if stuck == 3 {
			all[part[n]] = "FAIL no guest comes to its end"
			left, stuck = left[1:], 0
		}
	}
	return all
}

// BenchmarkConformance counts the tests of the suite that each target passes, skips and fails:
// gvm's own with three kinds of disk, the kernel's through gvm, and QEMU's. A read-only disk gets
// only the tests that destroy nothing.
func BenchmarkConformance(b *testing.B) {
	l := theLab(b)
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		b.Fatal(err)
	}
	type way struct {
		name    string
		destroy bool
		run     func(b *testing.B, g guest, file string) result
	}
	gvmDisk := func(options string) func(*testing.B, guest, string) result {
		return func(b *testing.B, g guest, file string) result {
			return start(b, nil, append(g.build(b), "--disk", file+options)...).end()
		}
	}
	ways := []way{
		{"gvm", true, gvmDisk("")},
		{"gvm-vhost", true, gvmDisk(",backend=vhost")},
		{"qemu", true, func(b *testing.B, g guest, file string) result {
			return startProgram(b, qemu, nil, cacheHome, append(qemuArgs("q35", l.Debian.BZImage, g.initramfs(b)), "-device",
				"virtio-scsi-pci",
				"-drive", "if=none,id=d,format=raw,cache=writeback,discard=unmap,file="+
					file, "-device", "scsi-hd,drive=d")...).end()
		}},
		{"gvm-4096", true, gvmDisk(",block_size=4096")},
		{"gvm-readonly", false, gvmDisk(",readonly")},
	}
	table := &strings.Builder{}
	for _, w := range ways {
		b.Run(w.name, func(b *testing.B) {
			for b.Loop() {
				v := verdicts(b, w.destroy, func(g guest) result {
					return w.run(b, g, diskFile(b, make([]byte, conformance.Size)))
				})
				for _, name := range slices.Concat(v.With("FAIL"), v.With("SKIP")) {
					b.Logf("%s: %s", name, v[name])
				}
				n := v.Count()
				b.ReportMetric(float64(n["PASS"]), "pass")
				b.ReportMetric(float64(n["SKIP"]), "skip")
				b.ReportMetric(float64(n["FAIL"]), "fail")
				fmt.Fprintf(table, "%-14s%6d%6d%6d\n", w.name, n["PASS"], n["SKIP"], n["FAIL"])
			}
		})
	}
	fmt.Printf("\n%-14s%6s%6s%6s\n%s", "target", "pass", "skip", "fail", table)
}
