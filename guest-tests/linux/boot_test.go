package linux

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// verifiedIO reads a disk, writes to it and reads back, past the page cache.
const verifiedIO = `
say kernel $(uname -r)
say cpus $(nproc)
say kaslr $(($(hexdump -s 0x211 -n 1 -e '1/1 "%d"' /sys/kernel/boot_params/data) >> 1 & 1))
total=0
for m in /sys/firmware/memmap/*; do
	[ "$(cat $m/type)" = "System RAM" ] && total=$((total + $(cat $m/end) - $(cat $m/start) + 1))
done
say ram $total
say whole $(sum /dev/sda)
seq 1 30000 >/tmp/numbers
dd if=/tmp/numbers of=/dev/sda bs=4k seek=512 conv=fsync,notrunc 2>/dev/null || say write failed
echo 3 >/proc/sys/vm/drop_caches
say written $(dd if=/dev/sda iflag=direct bs=4k skip=512 count=42 2>/dev/null | head -c 168894 | sum)
`

// lowRAM is the part of a guest's RAM that its memory map lacks: the area of ROMs and tables that
// ends at 1 MiB, and the last KiB below 640 KiB.
const lowRAM = 1<<20 - 639<<10

// TestBoot boots kernels in every way, and each reads and writes a disk. TestSMP does the same with
// a bzImage of the cloud kernel.
func TestBoot(t *testing.T) {
	t.Parallel()
	l := theLab(t)
	for _, c := range []struct {
		name string
		guest
		cpus int
		args []string
	}{
		{"debian", guest{kernel: l.Debian}, 1, []string{"--strict"}},
		{"debian vmlinux pvh", guest{kernel: l.Debian, image: l.Debian.VMLinux}, 4, []string{"--entry", "pvh"}},
		{"cloud vmlinux 64", guest{kernel: l.Cloud, image: l.Cloud.VMLinux}, 4, []string{"--entry", "64"}},
		{"cloud decompressed in the guest", guest{kernel: l.Cloud}, 1, []string{"--boot", "bzimage"}},
		{"5.10", guest{kernel: kernel(t, "5.10")}, 1, nil},
		{"6.12", guest{kernel: kernel(t, "6.12")}, 4, nil},
		{"7.3", guest{kernel: kernel(t, "7.3")}, 2, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			data := content(t.Name(), 8<<20)
			disk := diskFile(t, data)
			c.script = verifiedIO + "klog"
			kaslr := "0" // loadflags, bit 1
			if slices.Contains(c.args, "bzimage") {
				kaslr = "1"
			}
			r := c.run(t, append(c.args, "--disk", disk, "--memory", "256M", "--cpus", fmt.Sprint(c.cpus))...)
			r.wantStatus(t, 0)
			r.want(t, map[string]string{
				"kernel":  c.kernel.Release,
				"kaslr":   kaslr,
				"cpus":    strconv.Itoa(c.cpus),
				"ram":     strconv.Itoa(256<<20 - lowRAM),
				"whole":   sum(data),
				"written": sum(numbers(1, 30000)),
			})
			r.kernelLog(t, 1)
			copy(data[2<<20:], numbers(1, 30000))
			wantFile(t, disk, 0, data)
		})
	}
}

// TestSMP checks the hardware of a guest with more CPUs than any machine here has, and memory above
// 4 GiB. It is not parallel, so that it runs first: after some fifty other guests one of 8 CPUs has
// hung in the lab, which takes three minutes.
func TestSMP(t *testing.T) {
	l := theLab(t)
	data := content(t.Name(), 48<<20)
	disk := diskFile(t, data)
	g := guest{
		kernel:  l.Cloud,
		modules: []string{"virtio_rng"},
		script: verifiedIO + `
cpuinfo() { grep "^$1" /proc/cpuinfo | sed 's/.*: //' | sort -u | xargs; }
say sockets $(cpuinfo 'physical id')
say core-ids $(cpuinfo 'core id')
say cores $(cpuinfo 'cpu cores')
say siblings $(cpuinfo 'siblings')
say apicids $(cpuinfo 'apicid')
say threads $(cat /sys/devices/system/cpu/cpu*/topology/thread_siblings_list)
for f in x2apic tsc_deadline_timer hypervisor constant_tsc; do grep -q " $f " /proc/cpuinfo && say flag-$f yes; done
say clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
say timers $(cat /sys/devices/system/clockevents/clockevent[0-7]/current_device)
dmesg | grep -q 'x2apic enabled\|routing to .* x2apic' && say x2apic in use
say rng $(cat /sys/class/misc/hw_random/rng_current)
say random $(dd if=/dev/hwrng bs=64 count=4 2>/dev/null | hexdump -v -e '16/1 "%02x" "\n"' | sort -u | wc -l)

free_pages() { awk '/zone +Normal/ {n=1} n && /nr_free_pages/ {print $2; exit}' /proc/zoneinfo; }
before=$(free_pages)
cp /dev/sda /tmp/all
say above $(( (before - $(free_pages)) / 256 > 36 ))
say copied $(sum /tmp/all)
rm /tmp/all

for c in $(seq 0 7); do
	echo 3 >/proc/sys/vm/drop_caches
	taskset -c $c dd if=/dev/sda of=/dev/null iflag=direct bs=4k count=32 2>/dev/null
done
# Lines are IRQ: a count for each CPU, the chip, the vector, the name.
awk '$NF ~ /^virtio0-/ {n=0; for (i=2; i<=9; i++) n+=$i; if (n>0) print "= irq-" $NF, $10}' /proc/interrupts
klog
`}
	r := again(t, func(r result) bool { return r.status == 0 }, func() result {
		must(t, os.WriteFile(disk, data, 0o600))
		return g.run(t, "--disk", disk, "--memory", "6G", "--cpus", "8")
	})
	r.wantStatus(t, 0)
	after := slices.Clone(data)
	copy(after[2<<20:], numbers(1, 30000))
	r.want(t, map[string]string{
		"kernel": l.Cloud.Release, "kaslr": "0", "whole": sum(data), "written": sum(numbers(1, 30000)),
		"cpus": "8", "ram": strconv.Itoa(6<<30 - lowRAM),
		"sockets": "0", "core-ids": "0 1 2 3 4 5 6 7", "cores": "8", "siblings": "8", "apicids": "0 1 2 3 4 5 6 7",
		"threads":     "0 1 2 3 4 5 6 7",
		"flag-x2apic": "yes", "flag-tsc_deadline_timer": "yes", "flag-hypervisor": "yes",
		"clocksource": "kvm-clock", "timers": strings.TrimSpace(strings.Repeat("lapic-deadline ", 8)),
		"x2apic": "in use",
		"rng":    "virtio_rng.0", "random": "16",
		"above": "1", "copied": sum(after),
		"irq-virtio0-request": "PCI-MSI",
	})
	if n := strings.Count(r.console, "= irq-virtio0-request "); n != 8 {
		r.fatalf(t, "%d request queues had interrupts, want 8", n)
	}
	r.kernelLog(t, 1)
	wantFile(t, disk, 0, after)
}

// TestHighAPICIDs: Linux uses CPUs whose APIC IDs have gaps and exceed 254. Interrupts reach them:
// those of a disk's queues as messages, and that of the serial port through the I/O APIC.
func TestHighAPICIDs(t *testing.T) {
	t.Parallel()
	r := guest{kernel: theLab(t).Cloud, script: `
say cpus $(nproc)
say apicids $(grep '^apicid' /proc/cpuinfo | sed 's/.*: //')
say sockets $(grep '^physical id' /proc/cpuinfo | sed 's/.*: //' | sort -u)
say ignored $(dmesg | grep -c 'x2apic entry ignored')
taskset 8 dd if=/dev/sda of=/dev/null iflag=direct bs=4k count=32 2>/dev/null
# Lines are IRQ: a count for each CPU, the chip, the pin or vector, the name.
awk '$NF ~ /^virtio0-request/ && $5 > 0 {print "= disk reached"}' /proc/interrupts
irq=$(awk '$NF == "ttyS0" {sub(":", "", $1); print $1}' /proc/interrupts)
echo 3 >/proc/irq/$irq/smp_affinity_list
before=$(awk '$NF == "ttyS0" {print $5}' /proc/interrupts)
n=0
until [ $(awk '$NF == "ttyS0" {print $5}' /proc/interrupts) -gt $before ] || [ $n = 100 ]; do
	seq 1 200
	sleep 0.1
	n=$((n+1))
done
[ $n -lt 100 ] && say serial reached
klog
`}.run(t, "--disk", diskFile(t, content(t.Name(), 1<<20)), "--apic-ids", "0,2,255,300")
	r.wantStatus(t, 0)
	r.want(t, map[string]string{
		"cpus": "4", "apicids": "0 2 255 300", "sockets": "0", "ignored": "0", "disk": "reached", "serial": "reached",
	})
	r.kernelLog(t, 1)
}

// TestInitrdAbove4GiB: an initrd that does not fit below 4 GiB lies above, and Linux finds it
// intact. Its first entry is a directory of the size that does not fit, which Linux skips.
func TestInitrdAbove4GiB(t *testing.T) {
	t.Parallel()
	g := guest{kernel: theLab(t).Cloud, script: `
set -- $(dmesg | sed -n 's/.*RAMDISK: \[mem 0x\([0-9a-f]*\)-0x\([0-9a-f]*\)\]/\1 \2/p')
say above $((0x$1 >= 1 << 32)) $((0x$2 - 0x$1 + 1))
klog`}
	archive, err := os.ReadFile(g.initramfs(t))
	if err != nil {
		t.Fatal(err)
	}
	const hole = 13 << 28 // 3.25 GiB
	var first []byte
	// The fields of a newc header: inode, mode, links, owners, time, size, numbers, length of the
	// name, sum.
	for _, v := range []int{1, 0o40755, 2, 0, 0, 0, hole, 0, 0, 0, 0, len("hole\x00"), 0} {
		first = fmt.Appendf(first, "%08x", v)
	}
	first = slices.Concat([]byte("070701"), first, []byte("hole\x00"))
	first = append(first, make([]byte, -len(first)&3)...)
	large := diskFile(t, first)
	f, err := os.OpenFile(large, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := int64(len(first)) + hole + int64(len(archive))
	if _, err := f.WriteAt(archive, size-int64(len(archive))); err != nil {
		t.Fatal(err)
	}
	// The guest touches only the initrd's data, and gvm's memory is the lab's.
	r := gvm(t, "run", "--kernel", g.kernel.BZImage, "--initrd", large, "--memory", "12G", "--overcommit",
		"--cmdline", "quiet")
	r.wantStatus(t, 0)
	r.want(t, map[string]string{"above": fmt.Sprint("1 ", (size+4095)&^4095)})
	r.kernelLog(t, 1)
}
