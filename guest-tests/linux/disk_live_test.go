package linux

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"gvm/devices/scsi/lio"
)

// load is the script of a guest that writes and reads its disks and checks them, while it turns the
// bus mastering of their PCI functions off and on. A round is four writes of 8 KiB and four reads.
// It starts and ends at the test's word, and has done as many rounds on each disk and as many
// toggles as the test wants. Rewriting the same places, a write that came late or twice would spoil
// a later round.
const load = `
wait_for /dev/sda
wait_for /dev/sdb
work() {
	n=0
	until [ -e /tmp/over ]; do
		head -c 32768 /dev/urandom >/tmp/$1
		dd if=/tmp/$1 of=/dev/$1 bs=8k oflag=direct conv=notrunc 2>/dev/null || echo write $n >>/tmp/bad-$1
		dd if=/dev/$1 of=/tmp/$1.back bs=8k count=4 iflag=direct 2>/dev/null || echo read $n >>/tmp/bad-$1
		cmp -s /tmp/$1 /tmp/$1.back || echo data $n >>/tmp/bad-$1
		n=$((n+1))
		[ $n != ROUNDS ] || touch /tmp/enough-$1
	done
	say $1 $n $(cat /tmp/bad-$1 2>/dev/null | head -n 5)
}
for d in sda sdb; do
	function=$(readlink -f /sys/block/$d/device | sed 's,/virtio.*,,')
	configs="$configs $function/config"
	say pci/${function##*/0000:} $d
done
echo idle
read go
work sda &
work sdb &
echo loaded
(
toggles=0
until [ -e /tmp/over ]; do
	for c in $configs; do # PCI's command: memory decoding without bus mastering, and with it
		printf '\002' | dd of=$c bs=1 seek=4 conv=notrunc 2>/dev/null
		printf '\006' | dd of=$c bs=1 seek=4 conv=notrunc 2>/dev/null
	done
	toggles=$((toggles+1))
	[ $toggles -lt ROUNDS ] || [ ! -e /tmp/enough-sda ] || [ ! -e /tmp/enough-sdb ] || [ -e /tmp/told ] || {
		touch /tmp/told
		echo enough
	}
done
) &
read stop
touch /tmp/over
wait
echo over
read end
klog
`

// state is the state of a machine by gvm inspect: values by their paths.
type state map[string]string

// inspect returns a state in which no part is busy.
func inspect(t *testing.T, name string) (s state) {
	t.Helper()
	for busy := true; busy; {
		r := gvm(t, "inspect", name)
		r.wantStatus(t, 0)
		s, busy = state{}, false
		for line := range strings.Lines(r.console) {
			path, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
			s[path] = value
			busy = busy || value == "busy"
		}
	}
	return s
}

// number returns a number of the state.
func (s state) number(t *testing.T, path string) int {
	t.Helper()
	n, err := strconv.Atoi(s[path])
	must(t, err)
	return n
}

// want fails the test unless the paths below dir have these values.
func (s state) want(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	for path, v := range want {
		if s[dir+path] != v {
			t.Errorf("gvm inspect shows %s%s as %q, want %q", dir, path, s[dir+path], v)
		}
	}
}

// TestStopsUnderLoad pauses and resumes a machine while its guest turns the bus mastering of its
// disks off and on, and writes and reads them: no request is lost or done twice by either backend.
// At every pause gvm inspect shows that the queues' requests are answered, and at the end that they
// were as many as the targets count.
func TestStopsUnderLoad(t *testing.T) {
	needsTarget(t)
	l := theLab(t)
	lioUnchanged(t)
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	const rounds = 10
	mine, kernels := diskFile(t, make([]byte, 1<<20)), diskFile(t, make([]byte, 1<<20))
	script := strings.ReplaceAll(load, "ROUNDS", strconv.Itoa(rounds))
	p, typed := startOnPipe(t, append(guest{kernel: l.Debian, script: script}.build(t), "--name=stops",
		"--disk", mine, "--disk", kernels+",backend=vhost")...)
	p.waitFor("idle")
	s := inspect(t, "stops")
	functions := make([]string, 2) // of gvm's disk, and of the kernel's
	for path := range s {
		if f, ok := strings.CutSuffix(path, "/virtio/device/events_missed"); ok {
			functions[0] = f
		} else if f, ok := strings.CutSuffix(path, "/virtio/device/vhost_wwpn"); ok {
			functions[1] = f
		}
	}
	wwpn := s[functions[1]+"/virtio/device/vhost_wwpn"]
	s.want(t, functions[1], map[string]string{
		"/config/command": "0x406", "/config/bar0/mapped": "true", "/msix/enable": "true",
		"/msix/vector/3/masked": "false", "/msix/vector/3/connected": "true", "/msix/vector/3/pending": "false",
		"/virtio/device_status": "0xf", "/virtio/device_state": "active", "/virtio/queue/2/queue_enable": "true",
		"/virtio/device/endpoint": "true",
	})
	s.want(t, "lio/"+wwpn+"/0/", map[string]string{"path": kernels, "size": "1048576", "readonly": "false"})
	s.want(t, "vcpu/0/", map[string]string{"cr0": "0x80050033", "efer": "0xd01"}) // paging, and long mode
	if strings.HasPrefix(s["vcpu/0/rip"], "0xffffffff8") != (s["vcpu/0/cpl"] == "0") {
		t.Errorf("the CPU is at %s at level %s", s["vcpu/0/rip"], s["vcpu/0/cpl"])
	}
	// requests returns how many requests each disk's queue and its target have had.
	type counts struct{ queued, target int }
	requests := func(s state) (n [2]counts) {
		t.Helper()
		for i, f := range functions {
			q := f + "/virtio/queue/2/" // the one request queue
			n[i].queued = s.number(t, q+"last_avail_idx")
			s.want(t, q, map[string]string{"used_idx": s[q+"last_avail_idx"]})
		}
		b, err := os.ReadFile(lio.DefaultRoot + "/vhost/" + wwpn + "/tpgt_0/lun/lun_0/statistics/scsi_tgt_port/in_cmds")
		must(t, err)
		n[1].target, err = strconv.Atoi(strings.TrimSpace(string(b)))
		must(t, err)
		n[0].target = s.number(t, "disk/0/commands")
		return n
	}
	before := requests(s)
	fmt.Fprintln(typed, "go")
	p.waitFor("loaded")
	pauses := 0
	for ; pauses < rounds || !p.printed("enough"); pauses++ {
		gvm(t, "pause", "stops").wantStatus(t, 0)
		s := inspect(t, "stops")
		requests(s)
		for _, f := range functions {
			s.want(t, f, map[string]string{"/virtio/device_state": "stopped"})
		}
		gvm(t, "resume", "stops").wantStatus(t, 0)
	}
	fmt.Fprintln(typed, "stop")
	p.waitFor("over")
	after := requests(inspect(t, "stops"))
	fmt.Fprintln(typed, "end")
	r := p.wait()
	r.wantStatus(t, 0)
	for i, f := range functions {
		d := r.said(t, f)
		n, _ := strconv.Atoi(r.said(t, d)) // 0 if it says what failed
		t.Logf("%s: %d rounds, %d pauses", d, n, pauses)
		queued, target := after[i].queued-before[i].queued, after[i].target-before[i].target
		// After each stop the guest looks for changed LUNs of the kernel's target, whose events it may
		// have missed.
		if n < rounds || queued != target || target < 8*n || i == 0 && target != 8*n {
			r.fatalf(t, "%s after %s rounds: %d requests in the queue, %d at the target", d, r.said(t, d), queued, target)
		}
	}
	r.kernelLog(t, 1, lunsChanged)
}
