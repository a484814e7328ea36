//go:build built

package linux

import (
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"gvm/guest-tests/lab"
)

func init() { labCPUs = 2 }

// builtKernel returns the kernel built by ./dev kernel.
func builtKernel(t *testing.T) *lab.Kernel {
	t.Helper()
	k, err := theLab(t).Built()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// noNetwork is a warning of a kernel without a network.
const noNetwork = "ACPI: Failed to create genetlink family for ACPI event$"

// withTime gives the built kernel's log the format of the others.
const withTime = "printk.time=1"

// rootInit is /sbin/init of a root file system with busybox: it prints the file system's name and
// the value of root=, and writes to it.
const rootInit = `#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
` + lab.DrainedEnds + prologue + `
say root $(cat /name)
say word $(sed 's/.* root=//; s/ .*//' /proc/cmdline)
say disks $(ls -d /sys/block/sd* | wc -l)
mount -o remount,rw / && seq 1 5000 >/written && mount -o remount,ro / || say not written
klog
poweroff -f
`

// rootPartition returns an ext4 file system of 4 MiB that prints a name as the root.
func rootPartition(t *testing.T, name string) []byte {
	t.Helper()
	busybox := hostProgram(t, "busybox", "busybox-static")
	tree, image := t.TempDir(), filepath.Join(t.TempDir(), "ext4")
	for _, d := range []string{"bin", "sbin", "proc", "sys", "dev"} {
		must(t, os.Mkdir(filepath.Join(tree, d), 0o755))
	}
	b, err := os.ReadFile(busybox)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(tree, "bin/busybox"), b, 0o755))
	for _, applet := range strings.Fields("sh cat dmesg grep ls mount sed seq stty wc") {
		must(t, os.Symlink("busybox", filepath.Join(tree, "bin", applet)))
	}
	must(t, os.WriteFile(filepath.Join(tree, "sbin/init"), []byte(rootInit), 0o755))
	must(t, os.WriteFile(filepath.Join(tree, "name"), []byte(name), 0o644))
	mke2fs := exec.Command("/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, image, "4M")
	if out, err := mke2fs.CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	b, err = os.ReadFile(image)
	must(t, err)
	return b
}

// TestBuiltRoot: a kernel without an initrd mounts the partition of root=, gvm's or the user's,
// although other disks have roots too.
func TestBuiltRoot(t *testing.T) {
	k := builtKernel(t)
	const blocks = 4 << 20 / 512
	inMBR, whole := mbr(0x00c0ffee, blocks), rootPartition(t, "whole")
	copy(inMBR[rootStart*512:], rootPartition(t, "mbr"))
	disks := map[string][]byte{"mbr": inMBR, "whole": whole}
	var uuids []string
	for i := range 3 {
		name := fmt.Sprint("gpt", i)
		disks[name] = gpt(byte(i), blocks)
		copy(disks[name][rootStart*512:], rootPartition(t, name))
		g := disks[name][2*512+128+16:] // of the second entry
		le := binary.LittleEndian
		uuids = append(uuids, fmt.Sprintf("PARTUUID=%08x-%04x-%04x-%x-%x", le.Uint32(g), le.Uint16(g[4:]), le.Uint16(g[6:]),
			g[8:10], g[10:16]))
	}
	for _, c := range []struct {
		name, cmdline string
		disks         []string // of disks, with options
		root, word    string
	}{
		{"gvm's word for a GPT", "", []string{"gpt0", "gpt1", "mbr", "gpt2"}, "gpt0", uuids[0]},
		{"gvm's word for an MBR", "", []string{"mbr", "gpt1", "gpt0", "gpt2"}, "mbr", "PARTUUID=00c0ffee-02"},
		{"gvm's word for a disk alone", "", []string{"whole"}, "whole", "/dev/sda"},
		{"gvm's word for the kernel's disk", "", []string{"gpt1,backend=vhost", "gpt2", "gpt0,backend=vhost", "mbr"},
			"gpt1", uuids[1]},
		{"the user's word", "root=" + uuids[2], []string{"gpt0", "gpt1", "gpt2", "mbr"}, "gpt2", uuids[2]},
		{"the user's word for an MBR", "root=PARTUUID=00c0ffee-02", []string{"gpt0", "gpt1", "gpt2", "mbr"}, "mbr",
			"PARTUUID=00c0ffee-02"},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := []string{"run", "--kernel", k.BZImage, "--cmdline", "quiet " + withTime + " " + c.cmdline}
			files := map[string]string{}
			for _, d := range c.disks {
				name, options, _ := strings.Cut(d, ",")
				files[name] = diskFile(t, disks[name])
				args = append(args, "--disk", strings.TrimSuffix(files[name]+","+options, ","))
			}
			r := gvm(t, args...)
			r.wantStatus(t, 0)
			r.want(t, map[string]string{"root": c.root, "word": c.word, "disks": strconv.Itoa(len(c.disks))})
			r.kernelLog(t, 1, lunsChanged, noNetwork)
			for name, file := range files {
				if name != c.root {
					wantFile(t, file, 0, disks[name])
					continue
				}
				if name != "whole" {
					file += fmt.Sprint("?offset=", rootStart*512)
				}
				fsck(t, file)
				if got := debugfs(t, file, "cat /written"); sum(got) != sum(numbers(1, 5000)) {
					t.Errorf("/written in the image has %d bytes that differ from the guest's", len(got))
				}
			}
		})
	}
}

// TestBuiltManyCPUs: a guest has dozens of CPUs, and each runs programs.
func TestBuiltManyCPUs(t *testing.T) {
	const n = 48
	data := content(t.Name(), 1<<20)
	r := guest{kernel: builtKernel(t), cmdline: withTime, script: `
say cpus $(nproc)
say last $(grep '^apicid' /proc/cpuinfo | tail -n 1 | sed 's/.*: //')
n=0
for c in $(seq 0 ` + fmt.Sprint(n-1) + `); do
	[ "$(taskset -c $c cut -d' ' -f39 /proc/self/stat)" = $c ] && n=$((n+1))
done
say ran $n
say sum $(sum /dev/sda)
klog`}.run(t, "--cpus", strconv.Itoa(n), "--disk", diskFile(t, data))
	r.wantStatus(t, 0)
	r.want(t, map[string]string{
		"cpus": strconv.Itoa(n), "last": strconv.Itoa(n - 1), "ran": strconv.Itoa(n), "sum": sum(data),
	})
	r.kernelLog(t, 1, noNetwork)
}

// TestBuiltX2APIC: Linux finds 260 CPUs in the MADT, of which those with an APIC ID above 254 have
// entries of their own kind. It brings up the first two and then the last, which runs programs and
// gets the interrupts of a disk's queue.
func TestBuiltX2APIC(t *testing.T) {
	data := content(t.Name(), 1<<20)
	r := guest{kernel: builtKernel(t), cmdline: withTime + " maxcpus=2", script: `
say present $(cat /sys/devices/system/cpu/present) $(cat /sys/devices/system/cpu/online)
wait_for /dev/sda
echo 1 >/sys/devices/system/cpu/cpu259/online
say online $(cat /sys/devices/system/cpu/online)
say last $(grep '^apicid' /proc/cpuinfo | tail -n 1 | sed 's/.*: //')
say ran $(taskset -c 259 cut -d' ' -f39 /proc/self/stat)
interrupts() { awk '/virtio.*-request/ { n += $4 } END { print n+0 }' /proc/interrupts; } # of the third CPU
before=$(interrupts)
say sum $(taskset -c 259 dd if=/dev/sda bs=64k iflag=direct 2>/dev/null | sum)
say interrupts $(($(interrupts)-before >= 16))
klog`}.run(t, "--cpus=260", "--queues=4", "--memory=1G", "--disk", diskFile(t, data))
	r.wantStatus(t, 0)
	r.want(t, map[string]string{
		"present": "0-259 0-1", "online": "0-1,259", "last": "259", "ran": "259", "sum": sum(data), "interrupts": "1",
	})
	r.kernelLog(t, 1, noNetwork)
}

// debugger speaks gdb's remote protocol on a guest's console.
type debugger struct {
	t    *testing.T
	p    *process
	out  io.Writer
	read int // of the console
}

var packet = regexp.MustCompile(`\$([^#$]*)#([0-9a-f]{2})`)

func checksum(s string) (sum byte) {
	for i := range len(s) {
		sum += s[i]
	}
	return sum
}

// send sends a packet, which the guest acknowledges.
func (d *debugger) send(command string) {
	d.t.Helper()
	fmt.Fprintf(d.out, "$%s#%02x", command, checksum(command))
}

// receive waits for a packet.
func (d *debugger) receive() string {
	d.t.Helper()
	d.p.mu.Lock()
	defer d.p.mu.Unlock()
	for {
		rest := d.p.console.Bytes()[d.read:]
		if m := packet.FindSubmatchIndex(rest); m != nil {
			d.read += m[1]
			data := string(rest[m[2]:m[3]])
			if want := fmt.Sprintf("%02x", checksum(data)); want != string(rest[m[4]:m[5]]) {
				d.t.Fatalf("packet %q has the sum %s, want %s", data, rest[m[4]:m[5]], want)
			}
			fmt.Fprint(d.out, "+")
			return data
		}
		if d.p.ended {
			d.t.Fatalf("gvm ended and the debugger waits; console:\n%s\nstandard error:\n%s",
				d.p.console.String(), d.p.errs.String())
		}
		d.p.changed.Wait()
	}
}

func (d *debugger) ask(command string) string {
	d.t.Helper()
	d.send(command)
	return d.receive()
}

// ok sends a command whose only answer is OK.
func (d *debugger) ok(command string) {
	d.t.Helper()
	if got := d.ask(command); got != "OK" {
		d.t.Fatalf("%s is answered by %q, want OK", command, got)
	}
}

// stopped fails the test unless the guest reports a stop with SIGTRAP.
func (d *debugger) stopped(answer string) {
	d.t.Helper()
	if !strings.HasPrefix(answer, "T05") && !strings.HasPrefix(answer, "S05") {
		d.t.Fatalf("the guest answers %q, want that it has stopped", answer)
	}
}

// rip returns the register's value, which follows 16 others.
func (d *debugger) rip() uint64 {
	d.t.Helper()
	b, err := hex.DecodeString(d.ask("g"))
	if err != nil || len(b) < 17*8 {
		d.t.Fatalf("%d bytes of registers: %v", len(b), err)
	}
	return binary.LittleEndian.Uint64(b[16*8:])
}

func (d *debugger) memory(at uint64, n int) []byte {
	d.t.Helper()
	b, err := hex.DecodeString(d.ask(fmt.Sprintf("m%x,%x", at, n)))
	if err == nil && len(b) != n {
		err = errors.New("not so many")
	}
	if err != nil {
		d.t.Fatalf("%d bytes of memory at %#x: %v", n, at, err)
	}
	return b
}

// over removes the breakpoint at which the guest stands, and steps over two instructions.
func (d *debugger) over(at uint64) {
	d.t.Helper()
	if rip := d.rip(); rip != at+1 { // after INT3
		d.t.Fatalf("RIP is %#x at a breakpoint at %#x", rip, at)
	}
	d.ok(fmt.Sprintf("z0,%x,1", at))
	if b := d.memory(at, 1)[0]; b == 0xcc {
		d.t.Fatalf("INT3 is still at %#x", at)
	}
	d.ok("P10=" + hex.EncodeToString(binary.LittleEndian.AppendUint64(nil, at)))
	last := at
	for range 2 {
		d.stopped(d.ask("s"))
		rip := d.rip()
		if rip == last {
			d.t.Errorf("RIP is %#x still after a step", rip)
		}
		last = rip
	}
}

// TestBuiltKGDB debugs a kernel over its console, from its start and again after a break.
func TestBuiltKGDB(t *testing.T) {
	k := builtKernel(t)
	f, err := elf.Open(k.VMLinux)
	must(t, err)
	defer f.Close()
	symbols, err := f.Symbols()
	must(t, err)
	address := map[string]uint64{}
	for _, s := range symbols {
		address[s.Name] = s.Value
	}
	g := guest{kernel: k, cmdline: withTime + " kgdboc=ttyS0 kgdbwait", script: `
echo ready
read line
say typed $line
read line
/bin/busybox true
echo # behind the debugger's last answer
say typed-next $line
klog`}
	p, out := startOnTerminal(t, append(g.build(t), "--cpus", "2")...)
	d := &debugger{t: t, p: p, out: out}
	p.waitForText("Waiting for connection from remote gdb")
	d.stopped(d.ask("?"))
	if got := d.ask("qSupported:swbreak+"); got != "" && !strings.Contains(got, "=") {
		t.Errorf("qSupported is answered by %q", got)
	}
	if rip := d.rip(); rip < address["_stext"] || rip >= address["_end"] {
		t.Errorf("RIP is %#x, which is not in the kernel", rip)
	}
	got, want := string(d.memory(address["linux_banner"], 30)), "Linux version "+k.Release
	if !strings.HasPrefix(got, want) {
		t.Errorf("linux_banner is %q, want %q", got, want)
	}
	// The command line sets panic= to -1; another value is written, read and restored.
	timeout := address["panic_timeout"]
	if got := int32(binary.LittleEndian.Uint32(d.memory(timeout, 4))); got != -1 {
		t.Errorf("panic_timeout is %d, want -1", got)
	}
	d.ok(fmt.Sprintf("M%x,4:07000000", timeout))
	if got := d.memory(timeout, 4)[0]; got != 7 {
		t.Errorf("panic_timeout is %d after 7 was written", got)
	}
	d.ok(fmt.Sprintf("M%x,4:ffffffff", timeout))

	// Before the kernel write-protects itself: a breakpoint set now cannot be removed later.
	d.ok(fmt.Sprintf("Z0,%x,1", address["wait_for_initramfs"]))
	d.stopped(d.ask("c"))
	d.over(address["wait_for_initramfs"])
	d.send("c")
	p.waitForText("ready\n") // after an acknowledgment
	fmt.Fprint(out, "one\r")
	p.waitForText("= typed one\n")

	// A break returns control to the debugger, which then lets the guest go for good.
	fmt.Fprint(out, "\x01bg")
	d.stopped(d.receive())
	if got, want := string(d.memory(address["linux_banner"], 13)), "Linux version"; got != want {
		t.Errorf("linux_banner is %q after a break, want %q", got, want)
	}
	d.ok(fmt.Sprintf("Z0,%x,1", address["begin_new_exec"]))
	d.send("c")
	fmt.Fprint(out, "two\r")
	d.stopped(d.receive())
	d.over(address["begin_new_exec"])
	d.ok("D")
	r := p.wait()
	r.wantStatus(t, 0)
	r.want(t, map[string]string{"typed": "one", "typed-next": "two"})
	r.kernelLog(t, 1, noNetwork, `\] KGDB: Waiting for connection`)
}
