package linux

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gvm/guest-tests/lab"
)

// TestINTx: kernels without MSI have their disks, on both backends, by the IOAPIC and by only the
// PICs, which take the lines as level-triggered before Linux asks for it. Devices that share a line
// work at the same time: a disk of each backend, two of the kernel's, and one of the kernel's and
// the entropy device. Disks come and go.
func TestINTx(t *testing.T) {
	l := theLab(t)
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	const byHand = "by hand" // a separate target, which has its own slot
	const script = `
say lines $(awk '/virtio/ {sub(/^ *[0-9]+:( +[0-9]+)+ +/, ""); print}' /proc/interrupts)
say elcr $(dmesg | sed -n 's/.*setting ELCR to .*(from \(.*\))/\1/p')
part() { # DISK: reads it all, writes a part and reads that back, past the page cache
	say $1 $(dd if=/dev/$1 iflag=direct bs=4k 2>/dev/null | sum)
	seq 1 30000 | dd of=/dev/$1 bs=4k seek=16 conv=fsync,notrunc 2>/dev/null || say $1-write failed
	echo 3 >/proc/sys/vm/drop_caches
	say $1-written $(dd if=/dev/$1 iflag=direct bs=4k skip=16 count=42 2>/dev/null | head -c 168894 | sum)
}
parts() {
	dd if=/dev/hwrng of=/tmp/random bs=64 count=64 iflag=fullblock 2>/dev/null &
	for d in /sys/block/sd*; do part ${d##*/} & done
	wait
	say random $(hexdump -v -e '16/1 "%02x" "\n"' /tmp/random | sort -u | wc -l)
}
`
	for _, c := range []struct {
		name, cmdline string
		cpus          string
		disks         []string // options
		elcr          string   // as Linux found it, if it changed it
		lines         string
	}{
		{"both", "pci=nomsi", "2", []string{"", "", byHand, byHand, byHand, ",backend=vhost"}, "",
			"IO-APIC 5-fasteoi virtio2, virtio5 IO-APIC 10-fasteoi virtio0, virtio3 IO-APIC 11-fasteoi virtio1, virtio4"},
		{"no IOAPIC", "pci=nomsi noapic", "1", []string{""}, "0e20", "XT-PIC virtio0 XT-PIC virtio1"},
		{"the interrupt line registers alone", "pci=nomsi acpi=noirq", "1", []string{"", byHand, byHand, byHand}, "",
			"XT-PIC virtio2 XT-PIC virtio0, virtio3 XT-PIC virtio1, virtio4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if slices.Contains(c.disks, byHand) {
				needsTarget(t)
			}
			lioUnchanged(t)
			var args, files []string
			var contents [][]byte
			want := map[string]string{"elcr": c.elcr, "lines": c.lines, "random": "256"}
			for i, options := range c.disks {
				name := "sd" + string(rune('a'+i))
				contents = append(contents, content(name, 1<<20))
				if options == byHand {
					m := makeByHand(t, i, contents[i])
					files = append(files, m.files[0])
					args = append(args, "--disk", "wwn="+m.wwn+",backend=vhost")
					continue
				}
				files = append(files, diskFile(t, contents[i]))
				args = append(args, "--disk", files[i]+options)
			}
			comes, stay := content("comes and goes", 2<<20), [][]byte{}
			for _, b := range contents {
				b = slices.Clone(b)
				copy(b[64<<10:], numbers(1, 30000))
				stay = append(stay, b)
			}
			plugged(want, "own", comes, stay...)
			file := diskFile(t, comes)
			g := guest{kernel: l.Cloud, modules: []string{"virtio_rng"}, cmdline: c.cmdline,
				script: script + "parts" + plugging + "echo ready; lives own; klog"}
			p := start(t, nil, append(append(g.build(t), "--name=intx", "--cpus="+c.cpus), args...)...)
			disk := func(args ...string) { gvm(t, append([]string{"disk"}, args...)...).wantStatus(t, 0) }
			p.waitFor("ready")
			plug(p.waitFor, "own", func() { disk("add", file) }, func() { disk("remove", "intx", file) })
			r := p.wait()
			r.wantStatus(t, 0)
			// Disks may get their names in any order.
			sums := map[string]int{}
			for i := range c.disks {
				sums[r.said(t, "sd"+string(rune('a'+i)))]++
				want["sd"+string(rune('a'+i))+"-written"] = sum(numbers(1, 30000))
				copy(contents[i][64<<10:], numbers(1, 30000))
				wantFile(t, files[i], 0, contents[i])
			}
			for i := range c.disks {
				if n := sums[sum(content("sd"+string(rune('a'+i)), 1<<20))]; n != 1 {
					t.Errorf("disk %d was read %d times, want once", i, n)
				}
			}
			r.want(t, want)
			r.kernelLog(t, 1, lunsChanged,
				// Lines caused by noapic and acpi=noirq.
				`\] ACPI: (setting ELCR to|MPS support code is not built-in)`, `\] smpboot: weird, boot CPU`,
				`\] PMU not available`, `\] AMD PMU driver`)
		})
	}
}

// TestINTxDevices: kernels without MSI have a share and a network as well.
func TestINTxDevices(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := content(t.Name(), 1<<20)
	writeFile(t, filepath.Join(dir, "file"), string(file))
	r := guest{kernel: theLab(t).Cloud, modules: []string{"virtiofs", "virtio_net"}, cmdline: "pci=nomsi", script: `
say msi $(grep -c MSI /proc/interrupts)
mkdir -p /mnt
mount -t virtiofs src /mnt && say share $(sum /mnt/file)
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ping -c 2 -W 20 10.0.2.2 >/dev/null && say ping ok
klog
`}.run(t, "--share", "src="+dir, "--net", "user")
	r.wantStatus(t, 0)
	r.want(t, map[string]string{"msi": "0", "share": sum(file), "ping": "ok"})
	r.kernelLog(t, 1)
}

// TestBreak: Ctrl-a b and a key on the terminal are SysRq.
func TestBreak(t *testing.T) {
	t.Parallel()
	g := guest{kernel: theLab(t).Cloud, script: `
echo 1 >/proc/sys/kernel/sysrq
dmesg -n 7
echo ready
read line
say typed $line
`}
	p, out := startOnTerminal(t, g.build(t)...)
	p.waitFor("ready")
	fmt.Fprint(out, "\x01bh")
	p.waitForText("sysrq: HELP : ")
	fmt.Fprint(out, "plain\r")
	r := p.wait()
	r.wantStatus(t, 0)
	r.want(t, map[string]string{"typed": "plain"})
}

// startOnPipe starts gvm with a pipe as its input. A pipe of the system's, and no io.Pipe, as
// exec.Cmd's Wait would wait for that even after gvm's end.
func startOnPipe(t *testing.T, args ...string) (*process, io.Writer) {
	t.Helper()
	in, out, err := os.Pipe()
	must(t, err)
	t.Cleanup(func() { in.Close(); out.Close() })
	return start(t, in, args...), out
}

// startOnTerminal starts gvm on a terminal. Writes to the second result are typed on it.
func startOnTerminal(t *testing.T, args ...string) (*process, io.Writer) {
	t.Helper()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); out.Close() })
	command := []string{lab.Program("gvm")}
	for _, a := range args {
		command = append(command, "'"+a+"'")
	}
	// script(1) is the terminal.
	return startProgram(t, "/usr/bin/script", in, cacheHome, "-qec", strings.Join(command, " "), "/dev/null"), out
}
