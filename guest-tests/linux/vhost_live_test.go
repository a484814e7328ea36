package linux

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi/lio"
	"gvm/devices/scsi/trace"
	"gvm/guest-tests/lab"
)

// plugging has a shell function for guests in which one more disk comes and goes, twice, while the
// others stay.
const plugging = `
old=$(echo $(ls -d /sys/block/sd* | sed 's,.*/,,'))
lives() { # NAME of it
	for life in 1 2; do
		new=
		until [ "$new" ]; do
			sleep 0.1
			for d in /sys/block/sd*; do
				case " $old " in *" ${d##*/} "*) ;; *) new=/dev/${d##*/} ;; esac
			done
		done
		wait_for $new
		say $1-added-$life $(sum <$new)
		echo $1 added $life
		while [ -e $new ]; do sleep 0.1; done
		say $1-removed-$life $(for d in $old; do sum </dev/$d; done | sort)
		echo $1 removed $life
	done
}
`

// plug adds and removes the disk with the name as a guest's script expects.
func plug(waitFor func(string), name string, add, remove func()) {
	for n := 1; n <= 2; n++ {
		add()
		waitFor(fmt.Sprint(name, " added ", n))
		remove()
		waitFor(fmt.Sprint(name, " removed ", n))
	}
}

// plugged adds the guest's output for it to said.
func plugged(said map[string]string, name string, comes []byte, stay ...[]byte) {
	var sums []string
	for _, b := range stay {
		sums = append(sums, sum(b))
	}
	slices.Sort(sums)
	for _, life := range []string{"1", "2"} {
		said[name+"-added-"+life], said[name+"-removed-"+life] = sum(comes), strings.Join(sums, " ")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// handMade is a target of the kernel's made in configfs, as by targetcli.
type handMade struct {
	wwn   string
	files []string // of the LUNs 0, 1 and so on
	// plugIn adds a LUN to the target, unplug removes it. The target has the first one.
	plugIn, unplug func(lun int)
}

// makeByHand makes target number n with a file for each of contents. The test's end removes it.
func makeByHand(t *testing.T, n int, contents ...[]byte) (m handMade) {
	t.Helper()
	m.wwn = fmt.Sprintf("naa.5001405bbbbbbb%d1", n)
	tpg := lio.DefaultRoot + "/vhost/" + m.wwn + "/tpgt_1"
	hba := fmt.Sprintf(lio.DefaultRoot+"/core/fileio_471%d", n)
	mkdir := func(dir string) {
		t.Helper()
		must(t, os.Mkdir(dir, 0o755))
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
	}
	write := func(file, text string) { t.Helper(); must(t, os.WriteFile(file, []byte(text), 0)) }
	if _, err := os.Stat(lio.DefaultRoot + "/vhost"); err != nil {
		mkdir(lio.DefaultRoot + "/vhost")
	}
	mkdir(filepath.Dir(tpg))
	mkdir(tpg)
	write(tpg+"/nexus", fmt.Sprintf("naa.5001405bbbbbbb%d2", n))
	t.Cleanup(func() { write(tpg+"/nexus", "NULL") })
	mkdir(hba)
	link := func(lun int) string { return fmt.Sprintf("%s/lun/lun_%d/disk", tpg, lun) }
	m.plugIn = func(lun int) { t.Helper(); must(t, os.Symlink(fmt.Sprintf("%s/disk%d", hba, lun), link(lun))) }
	m.unplug = func(lun int) { t.Helper(); must(t, os.Remove(link(lun))) }
	for lun, b := range contents {
		store := fmt.Sprintf("%s/disk%d", hba, lun)
		mkdir(store)
		m.files = append(m.files, diskFile(t, b))
		write(store+"/control", fmt.Sprintf("fd_dev_name=%s,fd_dev_size=%d,fd_buffered_io=1", m.files[lun], len(b)))
		write(store+"/enable", "1")
		mkdir(filepath.Dir(link(lun)))
		t.Cleanup(func() { os.Remove(link(lun)) })
	}
	m.plugIn(0)
	return m
}

// TestVhostPlug: the guest sees without a rescan that disks come and go, while it reads from
// others: those that gvm disk adds and removes, of its own target and of the kernel's, and LUNs
// that are added to a target in configfs and removed from it, as by targetcli. It sees gvm disk
// resize one as well. gvm has let go of an image that it removed. The guest panics at the end, and
// the log of its crash record has these changes, and those of the devices that the kernel serves.
func TestVhostPlug(t *testing.T) {
	needsTarget(t)
	lioUnchanged(t)
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	stay := [][]byte{content("stays", 1<<20), content("stays with the kernel", 1<<20), content("by hand 0", 1<<20)}
	second, byHand := content("comes and goes", 2<<20), content("by hand 1", 2<<20)
	m := makeByHand(t, 0, stay[2], byHand)
	comes, crashes := diskFile(t, second), t.TempDir()
	p := start(t, nil, append(guest{kernel: theLab(t).Debian, script: `
wait_for /dev/sda; wait_for /dev/sdb; wait_for /dev/sdc` + plugging + `
( while :; do for d in $old; do
	dd if=/dev/$d of=/dev/null bs=64k iflag=direct 2>/dev/null || say reads failed
done; done ) &
reader=$!
echo ready
lives own
lives kernel
lives hand
echo grow
grown() { for d in $old; do [ $(cat /sys/block/$d/size) = 2048 ] || echo $d; done; }
until [ "$(grown)" ]; do sleep 0.1; done
say grown $(cat /sys/block/$(grown)/size) $(head -c 1048576 /dev/$(grown) | sum)
kill $reader
echo c >/proc/sysrq-trigger
`}.build(t), "--name=plug", "--crash-dir", crashes, "--disk", diskFile(t, stay[0])+",serial=STAYS",
		"--disk", diskFile(t, stay[1])+",backend=vhost", "--disk", "wwn="+m.wwn+",backend=vhost")...)
	disk := func(want string, args ...string) {
		t.Helper()
		r := gvm(t, append([]string{"disk"}, args...)...)
		r.wantStatus(t, 0)
		if !strings.HasPrefix(r.console, want) || strings.Contains(r.console, ";") { // the guest is told
			t.Errorf("gvm disk %q: %q", args, r.console)
		}
	}
	remove := func() {
		disk("removed LUN 1, "+comes, "remove", "plug", comes)
		f, err := block.Open(comes, block.Options{})
		must(t, err)
		must(t, f.Close())
	}
	p.waitFor("ready")
	plug(p.waitFor, "own", func() { disk("added LUN 1, "+comes, "add", comes) }, remove)
	plug(p.waitFor, "kernel", func() { disk("added LUN 1, "+comes, "add", comes+",backend=vhost") }, remove)
	plug(p.waitFor, "hand", func() { m.plugIn(1) }, func() { m.unplug(1) })
	p.waitFor("grow")
	disk("", "resize", "STAYS", "4M")
	r := p.wait()
	r.wantStatus(t, 5)
	wantVhostLog(t, crashes, comes)
	want := map[string]string{"grown": "8192 " + sum(stay[0])}
	plugged(want, "own", second, stay...)
	plugged(want, "kernel", second, stay...)
	plugged(want, "hand", byHand, stay...)
	r.want(t, want)
	if strings.Contains(r.console, "= reads failed") {
		r.fatalf(t, "a disk that stayed could not be read")
	}
	wantFile(t, comes, 0, second)
	if left, err := filepath.Glob(os.Getenv("XDG_RUNTIME_DIR") + "/*"); len(left) > 0 {
		t.Errorf("gvm has left %v, %v", left, err)
	}
}

// wantVhostLog checks the log of a crash record of TestVhostPlug's guest.
func wantVhostLog(t *testing.T, crashes, comes string) {
	t.Helper()
	logs, err := filepath.Glob(crashes + "/*/log")
	if err != nil || len(logs) != 1 {
		t.Fatalf("crash records %q, %v", logs, err)
	}
	log, err := os.ReadFile(logs[0])
	must(t, err)
	comes = regexp.QuoteMeta(comes)
	for _, want := range []string{
		`(?s)Z pci/\S+ scsi: FEATURES_OK, driver_feature 0x1\S+\n.*Z pci/\S+ scsi: DRIVER_OK, queues_enabled 3\n` +
			`.*Z pci/\S+ scsi: active\n.*Z disk    adding `,
		`(?s)Z disk    adding ` + comes + `\n.*Z disk    adding ` + comes +
			` is over, lun 1, backend vhost, size 2097152, guest told\n.*Z disk    removing ` + comes +
			` is over, lun 1, backend vhost, size 2097152, guest told\n.*Z disk    resizing \S+ is over, ` +
			`lun 0, backend process, size 4194304, guest told\n.*Z gvm     guest panic`,
		`Z lio/naa\.\S+/0 the kernel serves this disk: gvm does not see its commands\n`,
	} {
		if !regexp.MustCompile(want).Match(log) {
			t.Errorf("the log has no %s:\n%s", want, log)
		}
	}
	for _, e := range regexp.MustCompile(`(?m)^.*Z pci/.*$`).FindAll(log, -1) {
		t.Logf("%s", e)
	}
}

// effort is the work of a process's threads other than vCPUs.
type effort struct {
	switches int // context switches
	ticks    int // of CPU time
}

func (e effort) since(before effort) effort {
	return effort{e.switches - before.switches, e.ticks - before.ticks}
}

// effortOf adds up the values in /proc (proc(5)). A thread that has spent time in a guest is a
// vCPU's. The kernel's workers, which since Linux 6.4 look like threads of their device's owner, do
// not count.
func effortOf(t *testing.T, pid int) (e effort) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	must(t, err)
	vcpus := 0
	for _, task := range tasks {
		stat, err := os.ReadFile(task + "/stat")
		if err != nil {
			continue // it has ended
		}
		status, err := os.ReadFile(task + "/status")
		if err != nil {
			continue
		}
		name, rest, _ := strings.Cut(string(stat), ") ")
		if strings.Contains(name, "(vhost-") {
			continue
		}
		field := func(n int) int { // numbered as in proc(5), from 1
			v, err := strconv.Atoi(strings.Fields(rest)[n-3])
			must(t, err)
			return v
		}
		utime, stime, guestTime := field(14), field(15), field(43)
		if guestTime > 0 {
			vcpus++ // its time outside of the guest is unknown: utime is scaled, and the guest's time is not
			continue
		}
		e.ticks += utime + stime
		for line := range strings.Lines(string(status)) {
			if name, n, _ := strings.Cut(line, ":"); strings.HasSuffix(name, "ctxt_switches") {
				v, err := strconv.Atoi(strings.TrimSpace(n))
				must(t, err)
				e.switches += v
			}
		}
	}
	if vcpus != 1 {
		t.Fatalf("process %d has %d threads that spent time in a guest", pid, vcpus)
	}
	return e
}

// TestVhostIdle: while a guest keeps a disk of the kernel's busy, gvm's own threads sleep. The same
// with gvm's own target proves that the test would see their work.
func TestVhostIdle(t *testing.T) {
	needsTarget(t)
	lioUnchanged(t)
	l := theLab(t)
	files := map[string]string{"bin/diskload": lab.Program("diskload")}
	p := start(t, nil, append(guest{kernel: l.Debian, files: files, script: `
wait_for /dev/sda; wait_for /dev/sdb
for b in process vhost; do
	d=$(grep -l $b /sys/block/sd*/device/vpd_pg80 | cut -d/ -f4)
	diskload -file /dev/$d -depth 8 -count 100 # of work that is done but once
	echo begin $b
	for write in true false; do diskload -file /dev/$d -depth 8 -write=$write -count 2000 || say failed; done
	echo end $b
	set -- $(cat /sys/block/$d/stat); say requests-$b $(($1+$5))
done
`}.build(t), "--disk", diskFile(t, make([]byte, 64<<20))+",serial=process",
		"--disk", diskFile(t, make([]byte, 64<<20))+",backend=vhost,serial=vhost")...)
	did := map[string]effort{}
	for _, b := range []string{"process", "vhost"} {
		p.waitFor("begin " + b)
		before := effortOf(t, p.cmd.Process.Pid)
		p.waitFor("end " + b)
		did[b] = effortOf(t, p.cmd.Process.Pid).since(before)
	}
	r := p.wait()
	r.wantStatus(t, 0)
	process := did["process"]
	for b, did := range did {
		requests, _ := strconv.Atoi(r.said(t, "requests-"+b))
		t.Logf("backend=%s: %d requests, %d context switches, %d ticks of CPU time of gvm's own",
			b, requests, did.switches, did.ticks)
		switch {
		case requests < 4000:
			r.fatalf(t, "the guest made %d requests", requests)
		case b == "process":
			if did.switches < requests/8 {
				t.Errorf("the threads of gvm's target switched %d times for %d requests: the test sees too little",
					did.switches, requests)
			}
		case did.switches > requests/20 || did.ticks*4 > process.ticks: // the Go runtime's own threads wake now and then
			t.Errorf("gvm was not idle: %d context switches and %d ticks of CPU time for %d requests, %d ticks with "+
				"its own target", did.switches, did.ticks, requests, process.ticks)
		}
	}
}

// TestVhostABI: gvm abi reports the known facts of this kernel, and its diff finds features that
// another kernel has and this one lacks.
func TestVhostABI(t *testing.T) {
	needsRoot(t, "/dev/vhost-scsi")
	r := gvm(t, "abi", "--json")
	r.wantStatus(t, 0)
	var f struct {
		Kernel string
		KVM    struct {
			APIVersion   int `json:"api_version"`
			Capabilities map[string]int
		}
		Vhost struct {
			ABIVersion int `json:"abi_version"`
			Features   map[string]bool
			Workers    string
			MaxIOVQs   int `json:"max_io_vqs"`
		} `json:"vhost_scsi"`
	}
	must(t, json.Unmarshal([]byte(r.console), &f))
	v, maxIOVQs := f.Vhost, 128
	if _, err := os.Stat("/sys/module/vhost_scsi/parameters/max_io_vqs"); err != nil { // Linux 5.10 has no parameter
		maxIOVQs = 0
	}
	if f.Kernel != trace.HostKernel() || f.KVM.APIVersion != 12 || f.KVM.Capabilities["KVM_CAP_IRQFD"] != 1 ||
		v.ABIVersion != 1 || v.MaxIOVQs != maxIOVQs {
		r.fatalf(t, "these are not the facts: %+v", f)
	}
	for _, name := range []string{"VIRTIO_SCSI_F_HOTPLUG", "VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_EVENT_IDX",
		"VIRTIO_F_VERSION_1"} {
		if !v.Features[name] {
			t.Errorf("no %s in %v", name, v.Features)
		}
	}
	workers := "one for each queue if asked"
	if linuxBefore(t, 6, 5) {
		workers = "none"
	}
	if v.Workers != workers {
		t.Errorf("workers: %q, want %q on %s", v.Workers, workers, f.Kernel)
	}
	dir := t.TempDir()
	this, other := filepath.Join(dir, "this.json"), filepath.Join(dir, "other.json")
	must(t, os.WriteFile(this, []byte(r.console), 0o600))
	must(t, os.WriteFile(other, []byte(strings.Replace(r.console, `"`+workers+`"`, `"one"`, 1)), 0o600))
	if r := gvm(t, "abi", "diff", this, this); r.status != 0 || r.console != "" {
		r.fatalf(t, "this kernel differs from itself")
	}
	if r := gvm(t, "abi", "diff", this, other); r.status != 1 || r.console != "~ vhost_scsi.workers: "+workers+
		" -> one\n" {
		r.fatalf(t, "the difference is not the one that was made")
	}
}
