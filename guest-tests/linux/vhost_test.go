package linux

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"gvm/devices/scsi/lio"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/replay/equivalence"
	"gvm/guest-tests/lab"
)

// loopDevice puts a block device on a file until the test ends.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("/sbin/losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("/sbin/losetup", "--detach", dev).Run(); err != nil {
			t.Error(err)
		}
	})
	return dev
}

// lioState lists everything in LIO's part of configfs, and the targets of its links. Values are
// left out: they are of objects, and objects are listed.
func lioState(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(lio.DefaultRoot, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := ""
		if d.Type()&fs.ModeSymlink != 0 {
			to, err = os.Readlink(path)
		}
		fmt.Fprintln(&b, path, to)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// linuxBefore reports whether the host's kernel is older than a version.
func linuxBefore(t *testing.T, major, minor int) bool {
	t.Helper()
	var m, n int
	if _, err := fmt.Sscanf(trace.HostKernel(), "%d.%d", &m, &n); err != nil {
		t.Fatal(err)
	}
	return m < major || m == major && n < minor
}

// needsTarget skips a test of backend=vhost where gvm refuses the kernel's target (docs/limits.md).
func needsTarget(t *testing.T) {
	t.Helper()
	needsRoot(t, "the kernel's SCSI target")
	if linuxBefore(t, 5, 11) {
		t.Skip("the kernel's SCSI target is older than Linux 5.11")
	}
}

// lioUnchanged fails the test if LIO's state at its end differs from that now.
func lioUnchanged(t *testing.T) {
	t.Helper()
	before := lioState(t)
	t.Cleanup(func() {
		if after := lioState(t); after != before {
			t.Errorf("LIO holds something else than before.\nbefore:\n%s\nafter:\n%s", before, after)
		}
	})
}

// TestVhostFilesystems: file systems on a file and on a block device, which the kernel serves by
// its two kinds of backstore, with one queue, two and four, and guests of each kernel.
func TestVhostFilesystems(t *testing.T) {
	needsTarget(t)
	l := theLab(t)
	for queues, kernel := range map[int]*lab.Kernel{1: l.Cloud, 2: kernel(t, "5.10"), 4: kernel(t, "7.3")} {
		t.Run(fmt.Sprint(queues, " queues on ", kernel.Release), func(t *testing.T) {
			lioUnchanged(t)
			image, behind := diskFile(t, make([]byte, 32<<20)), diskFile(t, make([]byte, 32<<20))
			device := loopDevice(t, behind)
			r := guest{
				kernel:   kernel,
				modules:  []string{"ext4"},
				programs: []string{"usr/sbin/mkfs.ext4"},
				files:    map[string]string{"etc/mke2fs.conf": filepath.Join(l.Tree, "etc/mke2fs.conf")},
				script: `
for d in sda sdb; do
	mkfs.ext4 -q /dev/$d </dev/null || say mkfs of $d failed
	mount -t ext4 /dev/$d /mnt || say mount of $d failed
	seq 1 100000 | dd of=/mnt/numbers bs=64k conv=fsync 2>/dev/null || say write to $d failed
	umount /mnt
	echo 3 >/proc/sys/vm/drop_caches
	mount -t ext4 /dev/$d /mnt || say mount of $d failed again
	say $d $(sum /mnt/numbers)
	umount /mnt
	say $d-queues $(ls -d /sys/block/$d/mq/* | wc -l)
	say $d-cache $(cat /sys/block/$d/queue/write_cache)
done
klog
`}.run(t, "--disk", image+",backend=vhost", "--disk", device+",backend=vhost", "--cpus", fmt.Sprint(queues))
			r.wantStatus(t, 0)
			want := map[string]string{}
			for _, d := range []string{"sda", "sdb"} {
				want[d], want[d+"-queues"], want[d+"-cache"] = sum(numbers(1, 100000)), fmt.Sprint(queues), "write back"
			}
			r.want(t, want)
			r.kernelLog(t, 1, lunsChanged)
			for _, file := range []string{image, behind} {
				fsck(t, file)
				if got, want := sum(debugfs(t, file, "cat /numbers")), sum(numbers(1, 100000)); got != want {
					t.Errorf("%s: the file has SHA-256 %s, want %s", filepath.Base(file), got, want)
				}
			}
		})
	}
}

// lunsChanged: LIO reports every further LUN to an initiator that was there before (REPORTED LUNS
// DATA HAS CHANGED).
const lunsChanged = `LUN assignments on this target have changed`

// TestVhostLives: a guest of three lives with a disk of gvm's own target and three that the kernel
// serves. In each, the drivers leave the devices and come back; the last one ends in another
// kernel. No disk takes another's place. The own device also survives a PCI rescan, and error
// recovery with requests in flight.
func TestVhostLives(t *testing.T) {
	needsTarget(t)
	lioUnchanged(t)
	l := theLab(t)
	const lives = 3
	contents := map[int][]byte{0: content("vhost 0", 4<<20), 1: content("vhost 1", 4<<20),
		300: content("vhost 300", 4<<20)}
	copy(contents[1], "1 ") // the number of the life
	files := map[int]string{}
	for lun, b := range contents {
		files[lun] = diskFile(t, b)
	}
	own := content("own", 8<<20)
	ownFile := diskFile(t, own)
	// part N writes numbers from N*10000 to the own disk's Nth MiB, and reads back that and the rest
	// of the disk's first MiB.
	const common = `
disk() { ls -d /sys/bus/scsi/devices/$1/block/* | sed 's,.*/,/dev/,'; }
there() {
	for d in 0:0:0:0 1:0:0:0 1:0:0:1 1:0:0:300; do
		until [ "$(disk $d 2>/dev/null)" ]; do sleep 0.1; done
		wait_for $(disk $d)
	done
}
see() { say life-$1 $(sum <$(disk 1:0:0:0)) $(tail -c +513 $(disk 1:0:0:1) | sum) $(sum <$(disk 1:0:0:300)); }
part() {
	d=$(disk 0:0:0:0)
	seq $(($1*10000)) $(($1*10000+9999)) >/tmp/numbers
	dd if=/tmp/numbers of=$d bs=1M seek=$1 conv=fsync,notrunc 2>/dev/null || say part-$1 write failed
	echo 3 >/proc/sys/vm/drop_caches
	say part-$1 $(dd if=$d bs=1M skip=$1 count=1 iflag=direct 2>/dev/null | head -c $(wc -c </tmp/numbers) | sum) \
		$(dd if=$d bs=1M count=1 2>/dev/null | sum)
}
`
	second := guest{kernel: l.Cloud, script: common + `there
say second-cmdline $(cat /proc/cmdline)
see 4
part 6
klog`}
	r := guest{
		kernel:   l.Cloud,
		modules:  []string{"sg"},
		programs: []string{"usr/sbin/kexec", "usr/bin/sg_reset"},
		files:    map[string]string{"kernel": l.Cloud.BZImage, "second": second.initramfs(t)},
		script: common + `
driver=/sys/bus/virtio/drivers/virtio_scsi
virtio=$(cd $driver; echo virtio*)
rebind() {
	for v in $virtio; do echo $v >$driver/unbind; done
	ls /sys/block/sd* >/dev/null 2>&1 && say unbind a disk is still there
	for v in $virtio; do echo $v >$driver/bind; done
	there
}
there
life=$(head -c1 $(disk 1:0:0:1))
rebind
case $life in
1)
	part 1
	rebind
	part 2
	rebind
	part 3
	;;
2)
	own=$(disk 0:0:0:0)
	pci=$(readlink -f /sys/bus/scsi/devices/host0 | sed 's,/virtio.*,,; s,.*/,,')
	echo 1 >/sys/bus/pci/devices/$pci/remove
	[ -e $own ] && say remove the disk is still there
	echo 1 >/sys/bus/pci/rescan
	there
	part 4
	;;
3)
	own=$(disk 0:0:0:0)
	(n=0; while [ $n -lt 30 ]; do
		n=$((n+1))
		dd if=$own of=/dev/null iflag=direct bs=256k 2>/dev/null || say read failed
	done; touch /tmp/reads-done) &
	n=0
	while [ $n -lt 5 ]; do
		n=$((n+1))
		/bin/sg_reset -d $own >/tmp/reset 2>&1 || say reset-$n failed: $(cat /tmp/reset)
	done
	[ -e /tmp/reads-done ] && say overlap none || say overlap some
	wait
	part 5
	;;
esac
seq $((life*10000)) $((life*10000+999)) >/tmp/numbers
dd if=/tmp/numbers of=$(disk 1:0:0:0) bs=64k seek=$life conv=fsync,notrunc 2>/dev/null || say write failed
echo 3 >/proc/sys/vm/drop_caches
see $life
say host-$life $(ls -d /sys/bus/scsi/devices/*:*:*:* | sed 's,.*/,,' | sort)
say readonly-$life $(cat /sys/block/$(basename $(disk 1:0:0:300))/ro)
say serial-$life $(tail -c +5 /sys/bus/scsi/devices/1:0:0:1/vpd_pg80 | tr -d '\0')
echo -n $((life+1)) | dd of=$(disk 1:0:0:1) conv=fsync,notrunc 2>/dev/null
klog
[ $life = 3 ] || reboot -f
kexec -l /kernel --initrd=/second --command-line="console=ttyS0 panic=-1 quiet second" || say kexec cannot load
drain
kexec -e
say kexec cannot start
`}.run(t, "--cpus", "2", "--on-reset", "reboot",
		"--disk", ownFile,
		"--disk", files[0]+",backend=vhost",
		"--disk", files[1]+",backend=vhost,serial=unit-1",
		"--disk", files[300]+",backend=vhost,lun=300,readonly")
	r.wantStatus(t, 0)
	want := map[string]string{"second-cmdline": "console=ttyS0 panic=-1 quiet second", "overlap": "some"}
	for life := 1; life <= lives+1; life++ {
		if life <= lives {
			copy(contents[0][life<<16:], numbers(life*10000, life*10000+999))
			want[fmt.Sprint("host-", life)] = "0:0:0:0 1:0:0:0 1:0:0:1 1:0:0:300"
			want[fmt.Sprint("readonly-", life)] = "1"
			want[fmt.Sprint("serial-", life)] = "unit-1"
		}
		want[fmt.Sprint("life-", life)] = strings.Join([]string{sum(contents[0]), sum(contents[1][512:]),
			sum(contents[300])}, " ")
	}
	for i := 1; i <= 6; i++ {
		b := numbers(i*10000, i*10000+9999)
		want[fmt.Sprint("part-", i)] = sum(b) + " " + sum(own[:1<<20])
		copy(own[i<<20:], b)
	}
	r.want(t, want)
	if m := regexp.MustCompile(`(?m)^= (.* failed|unbind |remove |kexec ).*`).FindString(r.console); m != "" {
		r.fatalf(t, "the guest says %q", m)
	}
	// The first kernel's timer is still running when the second one starts.
	r.kernelLog(t, lives+1, lunsChanged, `\] Spurious LAPIC timer interrupt on cpu \d+$`)
	wantFile(t, files[0], 0, contents[0])
	wantFile(t, files[1], 0, append([]byte("4"), contents[1][1:]...))
	wantFile(t, files[300], 0, contents[300])
	wantFile(t, ownFile, 0, own)
}

// TestVhostEndings: after any end of gvm, LIO is in its earlier state.
func TestVhostEndings(t *testing.T) {
	needsTarget(t)
	for _, c := range []struct {
		name   string
		args   []string
		signal syscall.Signal // sent once the guest runs
		status int
		stderr string
	}{
		{"power off", nil, 0, 0, ""},
		{"triple fault", []string{"--guest-arg", "crash=triple"}, 0, 4, "triple fault"},
		{"panic", []string{"--guest-arg", "crash=panic"}, 0, 5, "guest panic"},
		{"reset", []string{"--guest-arg", "crash=reset"}, 0, 6, "reset"},
		{"timeout", []string{"--guest-arg", "hang", "--timeout", "2s"}, 0, 124, "--timeout 2s elapsed"},
		{"SIGTERM", []string{"--guest-arg", "echo"}, syscall.SIGTERM, 143, "SIGTERM"},
		{"SIGINT", []string{"--guest-arg", "echo"}, syscall.SIGINT, 130, "SIGINT"},
		{"SIGHUP", []string{"--guest-arg", "echo"}, syscall.SIGHUP, 129, "SIGHUP"},
		{"no such image", []string{"--disk", "/none,backend=vhost"}, 0, 2, "/none"},
		{"too many CPUs", []string{"--cpus", "100000"}, 0, 2, "CPUs"},
		{"no such target", []string{"--disk", "wwn=naa.5001405ffffffff0,backend=vhost"}, 0, 3,
			"gvm: --disk naa.5001405ffffffff0: no such target"},
		{"a trace that cannot be", []string{"--trace", "/none/trace"}, 0, 2, "trace"},
	} {
		t.Run(c.name, func(t *testing.T) {
			lioUnchanged(t)
			disk := diskFile(t, content(t.Name(), 1<<20))
			p := start(t, nil, append([]string{"run", "--disk", disk + ",backend=vhost"}, c.args...)...)
			if c.signal != 0 {
				p.waitFor("ready")
				p.signal(c.signal)
			}
			r := p.wait()
			r.wantStatus(t, c.status)
			if !strings.Contains(r.stderr, c.stderr) {
				r.fatalf(t, "standard error lacks %q", c.stderr)
			}
			wantFile(t, disk, 0, content(t.Name(), 1<<20))
		})
	}
	killed := func(t *testing.T) string {
		lioUnchanged(t)
		disk := diskFile(t, content(t.Name(), 1<<20))
		p := start(t, nil, "run", "--sandbox=off", "--guest-arg", "echo", "--disk", disk+",backend=vhost", "--trace",
			filepath.Join(t.TempDir(), "trace")) // the broker of a sandbox would remove the targets
		p.waitFor("ready")
		p.signal(syscall.SIGKILL)
		p.wait().wantStatus(t, -1)
		if list := gvm(t, "lio", "list"); !strings.Contains(list.console, fmt.Sprintf("gvm %d (dead)", p.cmd.Process.Pid)) {
			list.fatalf(t, "the list does not show the targets of the dead gvm")
		}
		return disk
	}
	t.Run("SIGKILL then gc", func(t *testing.T) {
		killed(t)
		gvm(t, "lio", "gc").wantStatus(t, 0)
		noTraces(t)
	})
	t.Run("SIGKILL then the next run", func(t *testing.T) {
		gvm(t, "run", "--disk", killed(t)+",backend=vhost").wantStatus(t, 0)
	})
}

// TestVhostTold: if the kernel cannot serve a disk, gvm prints one line with the remedy and ends
// with status 3, before the guest starts.
func TestVhostTold(t *testing.T) {
	needsTarget(t)
	lioUnchanged(t)
	disk, other := diskFile(t, content("told", 1<<20)), diskFile(t, content("other", 1<<20))
	p := start(t, nil, "run", "--guest-arg", "echo", "--disk", disk+",backend=vhost")
	p.waitFor("ready")
	list := gvm(t, "lio", "list")
	claimed, behind := loopDevice(t, diskFile(t, content("claimed", 1<<20))), diskFile(t, content("behind", 1<<20))
	claim, err := os.OpenFile(claimed, os.O_RDONLY|syscall.O_EXCL, 0) // as a mount does
	if err != nil {
		t.Fatal(err)
	}
	defer claim.Close()
	loop := loopDevice(t, behind)
	_, wwn, _ := strings.Cut(list.console, " vhost/")
	wwn, _, _ = strings.Cut(wwn, " ")
	for _, c := range []struct {
		name, stderr string
		args         []string
		status       int
	}{
		{"image in use by a gvm", fmt.Sprintf("in use by process %d", p.cmd.Process.Pid),
			[]string{"--disk", disk + ",backend=vhost"}, 2},
		{"block device in use", fmt.Sprintf("in use by process %d", os.Getpid()),
			[]string{"--disk", claimed + ",backend=vhost"}, 2},
		{"image behind a loop device", "losetup --detach " + loop, []string{"--disk", behind + ",backend=vhost"}, 2},
		{"target in use", fmt.Sprintf("belongs to gvm %d", p.cmd.Process.Pid),
			[]string{"--disk", "wwn=" + wwn + ",backend=vhost"}, 3},
		{"a newer interface is pinned", "this kernel speaks version 1 of its interface, and version 2 is asked for",
			[]string{"--disk", other + ",backend=vhost", "--vhost-abi", "2"}, 3},
		{"workers where the kernel has none, or fewer queues", "",
			[]string{"--disk", other + ",backend=vhost,workers=1"}, -1},
		{"options that LIO cannot serve", "LIO drops spaces at either end",
			[]string{"--disk", other + ",backend=vhost,serial= x"}, 2},
	} {
		r := gvm(t, append([]string{"run"}, c.args...)...)
		if c.status >= 0 {
			r.wantStatus(t, c.status)
		}
		if !strings.Contains(r.stderr, c.stderr) || c.status > 0 && strings.Count(r.stderr, "\n") != 1 {
			r.fatalf(t, "%s: standard error is not one line with %q", c.name, c.stderr)
		}
	}
	// A disk that the kernel cannot serve is served in-process, with a note.
	r := gvm(t, "run", "--disk", other+",backend=auto,serial= x")
	if r.wantStatus(t, 0); !strings.Contains(r.stderr, "backend=auto: served in-process: --disk "+other) ||
		strings.Count(r.stderr, "\n") != 1 {
		r.fatalf(t, "standard error does not say why the disk is served in-process")
	}
	r = gvm(t, "run", "--disk", other+",backend=auto")
	if r.wantStatus(t, 0); r.stderr != "gvm: backend=auto: served by the kernel: vhost-scsi and LIO are there\n" {
		r.fatalf(t, "backend=auto does not take the kernel")
	}
	// The kernel's memory for many request queues is told, unless the user chose their number.
	for queues, want := range map[string]string{
		"": "gvm: the kernel takes some 21 MiB for each of 5 request queues, one a CPU: 105 MiB of its memory; " +
			"--queues N bounds that\n",
		"--queues=5": "",
	} {
		r := gvm(t, append([]string{"run", "--cpus=5", "--disk", other + ",backend=vhost"}, strings.Fields(queues)...)...)
		if r.wantStatus(t, 0); r.stderr != want {
			r.fatalf(t, "%q: standard error is not %q", queues, want)
		}
	}
	p.signal(syscall.SIGTERM)
	p.wait()
}

// TestVhostEquivalence replays the corpus at both backends: each difference is on the list, and
// each row of the list is used.
func TestVhostEquivalence(t *testing.T) {
	needsTarget(t)
	lioUnchanged(t)
	used := replayBoth(t, "--corpus")
	doc, err := os.ReadFile("../../docs/backends.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range equivalence.Rows(string(doc)) {
		if used[row] == 0 {
			t.Errorf("nothing in the corpus is answered as the row %s of docs/backends.md says", row)
		}
	}
}

// TestVhostTools has a Linux guest's tools and disk driver send commands to each backend. The
// requests and their results are recorded in the same form by both, and replayed at both.
func TestVhostTools(t *testing.T) {
	needsTarget(t)
	lioUnchanged(t)
	l := theLab(t)
	programs, err := filepath.Glob(l.Tree + "/usr/bin/sg_*")
	if err != nil || len(programs) < 50 {
		t.Fatalf("%d tools, %v", len(programs), err)
	}
	for i, p := range programs {
		programs[i] = strings.TrimPrefix(p, l.Tree+"/")
	}
	dir := t.TempDir()
	for _, b := range []string{"process", "vhost"} {
		file := filepath.Join(dir, b)
		r := guest{kernel: l.Debian, modules: []string{"sg"}, programs: programs, script: `
seq 1 30000 | dd of=/dev/sda bs=4k seek=16 conv=fsync,notrunc 2>/dev/null || say write failed
d=/dev/sda; p=/bin/sg_
{
	${p}inq $d; ${p}inq -e -p 0x83 $d; ${p}inq -A $d
	for page in 0 0x80 0x83 0x86 0xb0 0xb1 0xb2 0xb3 0xb6 0x89; do ${p}vpd -p $page $d; done
	${p}readcap $d; ${p}readcap -l $d; ${p}luns $d; ${p}luns -s 1 $d; ${p}luns -s 2 $d; ${p}turs -n 3 $d
	${p}requests $d; ${p}requests -d $d; ${p}modes -a $d; ${p}modes -6 -a $d
	${p}modes -c 1 -p 8 $d; ${p}modes -p 0x3f,0xff $d
	${p}opcodes $d; ${p}opcodes -o 0x28 $d; ${p}opcodes -t $d; ${p}logs -a $d; ${p}persist -k $d; ${p}persist -c $d
	${p}sync $d; ${p}sync --16 $d; ${p}verify -l 0 -c 8 $d; ${p}verify -l 0 -c 8 --16 $d
	${p}write_same -l 8 -n 8 --xferlen=512 $d; ${p}write_same -U -l 16 -n 8 --xferlen=512 $d
	${p}write_same -S -l 8 -n 8 --xferlen=512 $d
	${p}unmap --force -l 16 -n 8 $d; ${p}get_lba_status -l 0 $d; ${p}start 1 $d
	${p}start --immed 1 $d; ${p}prevent --allow $d
	${p}dd if=$d of=/dev/null bs=512 count=64 blk_sgio=1; ${p}dd if=/dev/zero of=$d bs=512 count=64 seek=64 blk_sgio=1
	${p}raw -r 64 $d 12 01 83 00 40 00; ${p}raw -r 512 $d 5e 00 00 00 00 00 00 02 00 00; ${p}raw $d c0 00 00 00 00 00
	${p}senddiag -t $d; ${p}sat_identify $d; ${p}rtpg $d; ${p}wr_mode -p 8 -c 8,12,4 $d; ${p}reset -d $d
} >/tmp/out 2>&1 </dev/null
say read $(dd if=/dev/sda iflag=direct bs=4k skip=16 count=42 2>/dev/null | head -c 168894 | sum)
for tool in /bin/sg_*; do timeout 3 $tool $d; done >>/tmp/out 2>&1 </dev/null # some write
say lines $(wc -l </tmp/out)
`}.run(t, "--disk", diskFile(t, make([]byte, 8<<20))+",serial=TOOLS,backend="+b, "--trace", file)
		r.wantStatus(t, 0)
		r.want(t, map[string]string{"read": sum(numbers(1, 30000))})
		show := gvm(t, "trace", "show", file)
		show.wantStatus(t, 0)
		for _, want := range []string{"serial TOOLS, 8 MiB in blocks of 512", "WRITE(10) ", "READ(10) ",
			"SYNCHRONIZE CACHE(10)", "INQUIRY"} {
			if !strings.Contains(show.console, want) {
				show.fatalf(t, "the trace of backend %s lacks %q", b, want)
			}
		}
		if n := strings.Count(show.console, "READ(10)"); n < 42 {
			show.fatalf(t, "the trace of backend %s has %d reads, and there were 42 and more", b, n)
		}
		replayBoth(t, file)
	}
	diff := gvm(t, "trace", "diff", filepath.Join(dir, "process"), filepath.Join(dir, "vhost"))
	if diff.status != 0 && diff.status != 1 {
		diff.fatalf(t, "the traces cannot be compared")
	}
	t.Logf("%d lines tell how the backends differ", strings.Count(diff.console, "\n"))
	noTraces(t)
}

// replayBoth replays requests at both backends, fails the test for each difference that
// docs/backends.md does not list, and returns how often each of its rows was used.
func replayBoth(t *testing.T, what string) map[string]int {
	t.Helper()
	r := gvm(t, "replay", "--backend", "both", "--json", what)
	if r.status != 0 && r.status != 1 {
		r.fatalf(t, "gvm replay: status %d", r.status)
	}
	used := map[string]int{}
	n, unlisted := 0, 0
	for line := range strings.Lines(r.console) {
		var d struct{ Known, Unknown []string }
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		n++
		for _, row := range d.Known {
			used[row]++
		}
		if len(d.Unknown) > 0 {
			unlisted++
			t.Errorf("not listed: %q in %s", d.Unknown, line)
		}
	}
	if (r.status == 0) != (unlisted == 0) {
		t.Errorf("status %d with %d differences that are not listed", r.status, unlisted)
	}
	t.Logf("%d requests are answered differently: %s", n, r.stderr)
	return used
}

func noTraces(t *testing.T) {
	t.Helper()
	if instances, err := os.ReadDir("/sys/kernel/tracing/instances"); err != nil || len(instances) > 0 {
		t.Errorf("gvm left %v in tracefs, %v", instances, err)
	}
}
