package linux

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/lio"
	"gvm/guest-tests/lab"
	"gvm/guest/bootinit"
)

// benchCmdline keeps a kernel from work that a test guest does not need.
const benchCmdline = "quiet mitigations=off cryptomgr.notests"

// qemuArgs returns arguments that make QEMU as similar to gvm run as possible, without disks.
func qemuArgs(machine, kernel, initrd string) []string {
	return slices.Concat(qemuKVM, qemuMachine(machine, kernel, initrd))
}

// qemuKVM is a processor of QEMU's guests. QEMU takes the first -accel that this machine has.
var qemuKVM = []string{"-accel", "kvm", "-cpu", "host"}

// qemuMachine returns qemuArgs without the processor.
func qemuMachine(machine, kernel, initrd string) []string {
	return []string{"-machine", machine, "-m", "512", "-nodefaults", "-no-user-config", "-display", "none",
		"-serial", "stdio", "-no-reboot", "-kernel", kernel, "-initrd", initrd, "-append",
		"console=ttyS0 panic=-1 " + benchCmdline,
		"-device", "virtio-rng-pci"}
}

// qemu is a QEMU to compare with, by the name of its rows.
type qemu struct {
	name string
	lab.QEMU
}

// qemus returns the system's QEMU and the lab's.
func qemus(b *testing.B, l *lab.Lab) (all []qemu) {
	found, err := l.QEMUs(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	for _, q := range found {
		all = append(all, qemu{fmt.Sprintf("qemu-%d.%d", q.Major, q.Minor), q})
	}
	return all
}

// disk returns arguments for a virtio-scsi disk with an iothread: from QEMU 10 on by io_uring and
// iothread-vq-mapping.
func (q qemu) disk(file string) []string {
	drive := "if=none,id=d,format=raw,cache=writeback,file=" + file
	args := []string{"-object", "iothread,id=t"}
	if q.Major < 10 {
		return append(args, "-drive", drive, "-device", "virtio-scsi-pci,iothread=t", "-device", "scsi-hd,drive=d")
	}
	return append(args, "-drive", drive+",aio=io_uring",
		"-device", `{"driver":"virtio-scsi-pci","id":"s","iothread-vq-mapping":[{"iothread":"t"}]}`,
		"-device", `{"driver":"scsi-hd","bus":"s.0","drive":"d"}`)
}

// vhostDisk has the kernel's target serve a file until done. It returns QEMU's arguments for it.
func vhostDisk(b *testing.B, file string) (args []string, done func()) {
	f, err := block.Open(file, block.Options{})
	if err != nil {
		b.Fatal(err)
	}
	target, err := lio.Provision(lio.Config{Units: []lio.Unit{{UnitConfig: scsi.UnitConfig{Backend: f}}}})
	if err != nil {
		b.Fatal(err)
	}
	return []string{"-device", "vhost-scsi-pci,wwpn=" + target.WWN}, func() {
		if err := errors.Join(target.Close(), f.Close()); err != nil {
			b.Error(err)
		}
	}
}

// cleanMemory makes the kernel clear the memory that the next guest will get. An emulated processor
// (the lab's) is slow to store to memory with translated code of an earlier guest; no other
// processor is.
func cleanMemory(b *testing.B) {
	if os.Getenv(lab.InLabEnv) != "1" {
		return
	}
	memory, err := unix.Mmap(-1, 0, 1<<30, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err == nil {
		err = unix.Munmap(memory)
	}
	if err != nil {
		b.Fatal(err)
	}
}

// figure is a benchmark's measurements of one way, one for each iteration.
type figure struct {
	What   string    `json:"what"` // and its unit
	Way    string    `json:"way"`
	Values []float64 `json:"values"`
	// Ratios are those of the values to another way's, by that way.
	Ratios map[string][]float64 `json:"ratios,omitempty"`
}

// of computes f's ratios to peer's values in the same iterations.
func (f *figure) of(peer figure) {
	if f.Ratios == nil {
		f.Ratios = map[string][]float64{}
	}
	for i, v := range f.Values {
		f.Ratios[peer.Way] = append(f.Ratios[peer.Way], v/peer.Values[i])
	}
}

// report prints figures as a table of medians, with the lowest and the highest, and writes them to
// name.json in go test's -outputdir.
func report(b *testing.B, name string, figures []figure) {
	b.Helper()
	spread := func(v []float64, format string) string {
		s := slices.Sorted(slices.Values(v))
		return fmt.Sprintf(format+" ("+format+"–"+format+")", s[len(s)/2], s[0], s[len(s)-1])
	}
	var out strings.Builder
	t := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	for _, f := range figures {
		var ratios []string
		for _, peer := range slices.Sorted(maps.Keys(f.Ratios)) {
			ratios = append(ratios, spread(f.Ratios[peer], "%.2f")+" of "+peer)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", f.What, f.Way, spread(f.Values, "%.4g"), strings.Join(ratios, ", "))
	}
	t.Flush()
	b.Logf("medians of %d (lowest–highest):\n%s", len(figures[0].Values), out.String())
	dir := flag.Lookup("test.outputdir").Value.String()
	if dir == "" {
		return
	}
	text, err := json.MarshalIndent(figures, "", "\t")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, name+".json"), append(text, '\n'), 0o666)
	}
	if err != nil {
		b.Error(err)
	}
}

// BenchmarkBoot measures from the start of a VMM to the first output of init (bootinit's), with
// Debian's xz-compressed bzImage or the vmlinux in it, and benchCmdline. Each iteration boots once
// in every way, one after the other, because a lab's speed changes over time.
func BenchmarkBoot(b *testing.B) {
	l := theLab(b)
	initramfs, err := bootinit.Initramfs()
	if err != nil {
		b.Fatal(err)
	}
	initrd := filepath.Join(b.TempDir(), "initrd")
	if err := os.WriteFile(initrd, initramfs, 0o600); err != nil {
		b.Fatal(err)
	}
	args := []string{"run", "--kernel", l.Debian.BZImage, "--initrd", initrd, "--cmdline", benchCmdline}
	vmlinux := slices.Clone(args)
	vmlinux[2] = l.Debian.VMLinux
	type way struct {
		name    string
		program string
		cold    bool // the cache has no kernel
		args    []string
		peer    string
	}
	ways := []way{
		{"gvm-warm", lab.Program("gvm"), false, args, ""},
		{"gvm-cold", lab.Program("gvm"), true, args, "gvm-warm"},
		{"gvm-bzimage", lab.Program("gvm"), false, append(args[:len(args):len(args)], "--boot", "bzimage"), "gvm-warm"},
		{"gvm-vmlinux", lab.Program("gvm"), false, vmlinux, "gvm-warm"},
	}
	for _, q := range qemus(b, l) {
		add := func(name, machine, kernel, peer string) {
			ways = append(ways, way{q.name + name, q.Path, false,
				append(qemuArgs(machine, kernel, initrd), "-device", "virtio-scsi-pci"), peer})
		}
		add("-q35", "q35", l.Debian.BZImage, "gvm-warm")
		add("-pc", "pc", l.Debian.BZImage, "gvm-warm")
		add("-pc-vmlinux", "pc", l.Debian.VMLinux, "gvm-vmlinux")
	}
	boot := func(i int) float64 {
		w, cache := ways[i], cacheHome
		if w.cold {
			cache = b.TempDir()
		}
		cleanMemory(b)
		begin := time.Now()
		p := startProgram(b, w.program, nil, cache, w.args...)
		p.waitFor(bootinit.Line)
		d := time.Since(begin).Seconds()
		p.signal(syscall.SIGTERM)
		p.wait()
		return d
	}
	boot(0) // fills the page cache with files, and gvm's cache with the kernel
	figures := make([]figure, len(ways))
	for i, w := range ways {
		figures[i].What, figures[i].Way = "until init runs, s", w.name
	}
	for b.Loop() {
		for i := range ways {
			figures[i].Values = append(figures[i].Values, boot(i))
		}
	}
	for i, w := range ways {
		for _, peer := range figures {
			if peer.Way == w.peer {
				figures[i].of(peer)
			}
		}
	}
	report(b, "linux-boot", figures)
}

// BenchmarkTestTrue measures gvm test -- true, from its start to its end, with a kernel compressed
// by xz and one by zstd. Beside it are QEMUs, with the same kernel and words for it, and an
// initramfs of busybox that runs true and powers off. PATH may have a virtme-ng, vng: beside it is
// a guest of the second kernel with the host's root. Each iteration boots once in every way, one
// after the other.
func BenchmarkTestTrue(b *testing.B) {
	l := theLab(b)
	initrd := filepath.Join(b.TempDir(), "initrd")
	if err := (lab.Initramfs{Init: "true; echo status $?\n"}).Build(initrd); err != nil {
		b.Fatal(err)
	}
	type way struct {
		name, says string // of a guest that has run true
		args       []string
	}
	// took returns the seconds of a run. The output goes to a file: a pipe would have to be read.
	took := func(b *testing.B, w way) float64 {
		for tries := 1; ; tries++ {
			cleanMemory(b)
			out, err := os.Create(filepath.Join(b.TempDir(), "out"))
			if err != nil {
				b.Fatal(err)
			}
			ctx, stop := context.WithTimeout(b.Context(), patience)
			cmd := exec.CommandContext(ctx, w.args[0], w.args[1:]...)
			cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+cacheHome)
			cmd.Stdout, cmd.Stderr = out, out
			// virtme-ng has a QEMU.
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
			begin := time.Now()
			err = cmd.Run()
			d := time.Since(begin).Seconds()
			late := ctx.Err()
			stop()
			text, readErr := os.ReadFile(out.Name())
			out.Close()
			switch {
			case err == nil && readErr == nil && strings.Contains(string(text), w.says):
				return d
			case tries == 4 || late == nil && !lost.Match(text):
				b.Fatalf("%s: %v, %v\n%s", w.name, err, readErr, text)
			}
			b.Logf("%s, try %d: the lab lost a guest", w.name, tries)
		}
	}
	for _, name := range []string{"debian", "6.12"} {
		b.Run(name, func(b *testing.B) {
			k := kernel(b, name)
			gvm := []string{lab.Program("gvm"), "test", "-k", k.BZImage, "--memory", "512M", "--cmdline", benchCmdline}
			ways := []way{{"gvm", "", append(gvm[:len(gvm):len(gvm)], "--", "true")}}
			for _, q := range qemus(b, l) {
				for _, machine := range []string{"q35", "pc"} {
					args := qemuArgs(machine, k.BZImage, initrd)
					ways = append(ways, way{q.name + "-" + machine, "status 0", append([]string{q.Path}, args...)})
				}
			}
			if vng, err := exec.LookPath("vng"); err == nil && name == "6.12" {
				ways = append(ways, way{"gvm-root", "", append(gvm[:len(gvm):len(gvm)], "--root", "/", "--", "true")},
					way{"virtme-ng", "", []string{vng, "-r", k.BZImage, "--cpus", "1", "--memory", "512M", "--", "true"}})
			}
			took(b, ways[0]) // fills the page cache with files, and gvm's cache with the kernel
			figures := make([]figure, len(ways))
			for i, w := range ways {
				figures[i].What, figures[i].Way = "until the end, s", w.name
			}
			for b.Loop() {
				for i, w := range ways {
					figures[i].Values = append(figures[i].Values, took(b, w))
				}
			}
			for i := 1; i < len(ways); i++ {
				figures[0].of(figures[i])
				if ways[i-1].name == "gvm-root" {
					figures[i-1].of(figures[i])
				}
			}
			report(b, "linux-test-"+name, figures)
		})
	}
}

// BenchmarkDisk has fio, in a Linux guest, read and write blocks of 4 KiB at random places of the
// same file, served by gvm's target and the kernel's, in gvm and in each QEMU. Each iteration boots
// a guest of each, one after the other.
func BenchmarkDisk(b *testing.B) {
	l := theLab(b)
	loads := []string{"read-1", "read-32", "write-1", "write-32"}
	script := "wait_for /dev/sda\n"
	// Fields of fio's terse output, version 3: IOPS and the mean latency in µs.
	fields := map[string]string{"read": "$8, $40", "write": "$49, $81"}
	for _, load := range loads {
		rw, depth, _ := strings.Cut(load, "-")
		script += fmt.Sprintf(`say %s $(fio --name=x --filename=/dev/sda --direct=1 --ioengine=libaio --rw=rand%s --bs=4k \
	--iodepth=%s --time_based --runtime=5 --norandommap --disable_slat=1 --disable_clat=1 --eta=never \
	--output-format=terse --terse-version=3 2>&1 | awk -F';' '$1 == 3 && $5 == 0 { print %s }')
`, load, rw, depth, fields[rw])
	}
	args := guest{kernel: l.Debian, hostPrograms: []string{hostProgram(b, "fio", "fio")}, script: script,
		cmdline: benchCmdline}.build(b)
	initrd := args[4]
	file := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(file, content("disk", 64<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	gvmWith := func(backend string) func() (string, []string, func()) {
		return func() (string, []string, func()) {
			return lab.Program("gvm"), append(args[:len(args):len(args)], "--disk", file+",backend="+backend), func() {}
		}
	}
	type way struct {
		name string
		gvm  int // the row of gvm to compare with this one, or -1
		make func() (program string, args []string, done func())
	}
	ways := []way{{"gvm", -1, gvmWith("process")}, {"gvm-vhost", -1, gvmWith("vhost")}}
	for _, q := range qemus(b, l) {
		machine := qemuArgs("q35", l.Debian.BZImage, initrd)
		ways = append(ways, way{q.name, 0, func() (string, []string, func()) {
			return q.Path, append(machine[:len(machine):len(machine)], q.disk(file)...), func() {}
		}}, way{q.name + "-vhost", 1, func() (string, []string, func()) {
			device, done := vhostDisk(b, file)
			return q.Path, append(machine[:len(machine):len(machine)], device...), done
		}})
	}
	iops, latency := make([]figure, len(loads)*len(ways)), make([]figure, len(loads)*len(ways))
	for b.Loop() {
		for i, w := range ways {
			ended := func(r result) bool { return r.status == 0 }
			r := again(b, ended, func() result {
				program, args, done := w.make()
				defer done()
				return startProgram(b, program, nil, cacheHome, args...).wait()
			})
			for j, load := range loads {
				var n, us float64
				if _, err := fmt.Sscan(r.said(b, load), &n, &us); err != nil {
					r.fatalf(b, "%s: %v", w.name, err)
				}
				k := j*len(ways) + i
				iops[k].What, iops[k].Way, iops[k].Values = load+", IOPS", w.name, append(iops[k].Values, n)
				latency[k].What, latency[k].Way, latency[k].Values = load+
					", mean latency, µs", w.name, append(latency[k].Values, us)
			}
		}
	}
	for k := range iops {
		if gvm := ways[k%len(ways)].gvm; gvm >= 0 {
			gvm += k - k%len(ways)
			iops[gvm].of(iops[k])
			latency[gvm].of(latency[k])
		}
	}
	report(b, "linux-disk", append(iops, latency...))
}

// virtiofsd returns the path of this machine's virtiofsd, which is QEMU's own or the newer one, or
// "".
func virtiofsd() string {
	for _, path := range []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// A speedWay runs a guest that says a speed for each load.
type speedWay struct {
	name string
	gvm  string // the way of gvm to compare with this one, or ""
	run  func(b *testing.B) result
}

// measureSpeeds runs a guest of each way in each iteration, one after the other, and reports the
// speeds that they say.
func measureSpeeds(b *testing.B, name, unit string, loads []string, ways []speedWay) {
	figures := make([]figure, len(loads)*len(ways))
	for b.Loop() {
		for i, w := range ways {
			cleanMemory(b)
			r := again(b, func(r result) bool { return r.status == 0 }, func() result { return w.run(b) })
			for j, load := range loads {
				var speed float64
				if _, err := fmt.Sscan(r.said(b, load), &speed); err != nil {
					r.fatalf(b, "%s: %v", w.name, err)
				}
				f := &figures[j*len(ways)+i]
				f.What, f.Way, f.Values = load+", "+unit, w.name, append(f.Values, speed)
			}
		}
	}
	for i, peer := range figures {
		for k := range figures {
			if f := &figures[k]; f.What == peer.What && f.Way == ways[i%len(ways)].gvm {
				f.of(peer)
			}
		}
	}
	report(b, name, figures)
}

// startDaemon starts a program and waits for its socket.
func startDaemon(b *testing.B, socket, program string, args ...string) *process {
	d := startProgram(b, program, nil, cacheHome, args...)
	for _, err := os.Stat(socket); err != nil && !d.printed("the end"); _, err = os.Stat(socket) {
		time.Sleep(10 * time.Millisecond)
	}
	return d
}

// BenchmarkShare writes and reads a file of 256 MiB in a directory that the guest shares with the
// host by virtio-fs: gvm's, and each QEMU's with a virtiofsd if this machine has one. The guest
// drops its caches before it reads; the host's has the file. Each iteration boots a guest of each,
// one after the other.
func BenchmarkShare(b *testing.B) {
	l := theLab(b)
	args := guest{kernel: l.Debian, modules: []string{"virtiofs"}, cmdline: benchCmdline, script: `
mount -t virtiofs share /mnt
speed() {
	read start rest </proc/uptime
	"$@" 2>/dev/null || return
	read end rest </proc/uptime
	awk "BEGIN { print 268.435456 / ($end - $start) }"
}
say write $(speed dd if=/dev/zero of=/mnt/file bs=1M count=256 conv=fsync)
umount /mnt
mount -t virtiofs share /mnt
echo 3 >/proc/sys/vm/drop_caches
say read $(speed dd if=/mnt/file of=/dev/null bs=1M)
umount /mnt
`}.build(b)
	dir := b.TempDir()
	ways := []speedWay{{"gvm", "", func(b *testing.B) result {
		return gvm(b, append(slices.Clone(args), "--share", "share="+dir)...)
	}}}
	if daemon := virtiofsd(); daemon != "" {
		for _, q := range qemus(b, l) {
			ways = append(ways, speedWay{q.name + "-virtiofsd", "gvm", func(b *testing.B) result {
				socket := filepath.Join(b.TempDir(), "socket")
				d := startDaemon(b, socket, daemon, "--socket-path="+socket, "-o", "source="+dir, "-o", "sandbox=chroot",
					"-o", "cache=auto")
				r := startProgram(b, q.Path, nil, cacheHome, append(qemuArgs("q35", l.Debian.BZImage, args[4]),
					"-object", "memory-backend-memfd,id=memory,size=512M,share=on", "-numa", "node,memdev=memory",
					"-chardev", "socket,id=share,path="+socket,
					"-device", "vhost-user-fs-pci,chardev=share,tag=share")...).wait()
				d.wait() // it ends with its connection
				return r
			}})
		}
	}
	measureSpeeds(b, "linux-share", "MB/s", []string{"write", "read"}, ways)
}

// BenchmarkNet has iperf3, in a Linux guest, send to a server of the host and receive from it, over
// one TCP connection. A speed is the best of three runs of 3 s. The network is a TAP interface,
// served by the kernel (vhost-net) and by the VMM, or one in user mode: gvm's, and each QEMU's with
// libslirp, and with passt if this machine has it. Each iteration boots a guest of each, one after
// the other.
func BenchmarkNet(b *testing.B) {
	const tap = "gvmbench"
	l := theLab(b)
	iperf, busybox := hostProgram(b, "iperf3", "iperf3"), hostProgram(b, "busybox", "busybox-static")
	tunctl := func(option string) {
		if out, err := exec.Command(busybox, "tunctl", option, tap).CombinedOutput(); err != nil {
			b.Fatalf("tunctl %s %s: %v\n%s", option, tap, err, out)
		}
	}
	tunctl("-t")
	defer tunctl("-d")
	setLink(b, tap, 0, 1500)
	args := guest{kernel: l.Debian, modules: []string{"virtio_net"}, hostPrograms: []string{iperf}, script: `
ip link set lo up
ip addr add $address/24 dev eth0
ip link set eth0 up mtu $mtu
speed() {
	for n in 1 2 3; do
		iperf3 -c $server -t 3 -f m "$@" | awk '$NF == "receiver" { print $7 }'
	done | sort -n | tail -n 1
}
say send $(speed)
say receive $(speed -R)
`}.build(b)
	// The kernel gives words that it does not know to init, as variables.
	const (
		tapWords   = benchCmdline + " address=10.99.0.2 server=10.99.0.1 mtu=1500"
		userWords  = benchCmdline + " address=10.0.2.15 server=10.0.2.2 mtu=1500"
		passtWords = benchCmdline + " address=10.0.2.15 server=10.0.2.2 mtu=65520" // the MTU that its DHCP offers
	)
	served := func(program string, args ...string) func(*testing.B) result {
		return func(b *testing.B) result {
			server := exec.Command(iperf, "-s")
			must(b, server.Start())
			defer func() {
				server.Process.Kill()
				server.Wait()
			}()
			return startProgram(b, program, nil, cacheHome, args...).wait()
		}
	}
	onGVM := func(words, network string) func(*testing.B) result {
		return served(lab.Program("gvm"), append(args[:len(args)-1:len(args)-1], words, "--net", network)...)
	}
	onQEMU := func(q qemu, words, network string) func(*testing.B) result {
		return served(q.Path, append(qemuArgs("q35", l.Debian.BZImage, args[4]),
			"-append", "console=ttyS0 panic=-1 "+words, "-netdev", network+",id=n",
			"-device", "virtio-net-pci,netdev=n,romfile=")...)
	}
	kinds := map[string][]speedWay{
		"vhost": {{"gvm", "", onGVM(tapWords, "tap="+tap+",vhost=on")}},
		"tap":   {{"gvm", "", onGVM(tapWords, "tap="+tap+",vhost=off")}},
		"user":  {{"gvm", "", onGVM(userWords, "user")}},
	}
	passt, noPasst := exec.LookPath("passt")
	for _, q := range qemus(b, l) {
		add := func(kind, name string, run func(*testing.B) result) {
			kinds[kind] = append(kinds[kind], speedWay{q.name + name, "gvm", run})
		}
		onTap := "tap,ifname=" + tap + ",script=no,downscript=no,vhost="
		add("vhost", "", onQEMU(q, tapWords, onTap+"on"))
		add("tap", "", onQEMU(q, tapWords, onTap+"off"))
		add("user", "-slirp", onQEMU(q, userWords, "user"))
		if noPasst == nil {
			add("user", "-passt", func(b *testing.B) result {
				socket := filepath.Join(b.TempDir(), "socket")
				d := startDaemon(b, socket, passt, "--foreground", "--one-off", "--runas", "0", "--ipv4-only", "--socket", socket,
					"--interface", tap, "--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2")
				r := onQEMU(q, passtWords, "stream,server=off,addr.type=unix,addr.path="+socket)(b)
				d.wait() // it ends with its connection
				return r
			})
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		b.Run(kind, func(b *testing.B) {
			measureSpeeds(b, "linux-net-"+kind, "Mbit/s", []string{"send", "receive"}, kinds[kind])
		})
	}
}
