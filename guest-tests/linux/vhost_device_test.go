package linux

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"gvm/devices/scsi"
	"gvm/devices/scsi/backend"
	"gvm/devices/scsi/lio"
	"gvm/devices/virtio"
	"gvm/devices/virtio/vhostscsi"
	"gvm/guest-tests/lab"
	"gvm/kvmapi"
	"gvm/kvmapi/vhost"
	"gvm/vmm"
	"gvm/vmm/boot"
	"gvm/vmm/guestmem"
)

// TestVhostDevice: a guest of three lives with disks that the kernel serves. In
// each, driver and device part and come together again, and every disk stays
// itself.
func TestVhostDevice(t *testing.T) {
	if dev, err := vhost.OpenSCSI(); err == nil {
		dev.Close()
	} else if os.Getenv(lab.InLabEnv) == "1" {
		t.Fatal(err)
	} else {
		t.Skip(err)
	}
	contents := map[int][]byte{0: content("vhost 0", 4<<20), 1: content("vhost 1", 4<<20), 300: content("vhost 300", 4<<20)}
	files := make(map[int]string)
	var units []lio.Unit
	for lun, b := range contents {
		files[lun] = diskFile(t, b)
		f, err := backend.Open(files[lun], backend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		units = append(units, lio.Unit{LUN: lun, UnitConfig: scsi.UnitConfig{Backend: f, Serial: fmt.Sprint("unit", lun)}})
	}
	target, err := lio.Provision(lio.Config{Units: units})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := target.Close(); err != nil {
			t.Error(err)
		}
	})
	d, err := vhostscsi.New(vhostscsi.Config{WWPN: target.WWN, MaxTarget: uint8(target.TPGT), Queues: 2, Note: func(s string) { t.Log(s) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	// LUN 1 begins with the number of the life; LUN 300 is only read.
	copy(contents[1], "1 ")
	f, err := os.OpenFile(files[1], os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("1 "), 0)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	g := guest{kernel: theLab(t).Cloud, script: `
disk() { ls -d /sys/bus/scsi/devices/0:0:0:$1/block/* | sed 's,.*/,/dev/,'; }
there() { wait_for $(disk 0); wait_for $(disk 1); wait_for $(disk 300); }
driver=/sys/bus/virtio/drivers/virtio_scsi
virtio=$(basename $driver/virtio*)
there
life=$(head -c1 $(disk 1))
for i in 1 2; do
	echo $virtio >$driver/unbind
	echo $virtio >$driver/bind
	while [ -z "$(disk 300 2>/dev/null)" ]; do sleep 0.1; done
	there
	seq $((life*10000+i*1000)) $((life*10000+i*1000+999)) >/tmp/numbers
	dd if=/tmp/numbers of=$(disk 0) bs=64k seek=$((life*4+i)) conv=fsync,notrunc 2>/dev/null || say write failed
done
echo 3 >/proc/sys/vm/drop_caches
say life-$life $(sum <$(disk 0)) $(tail -c +513 $(disk 1) | sum) $(sum <$(disk 300))
say host-$life $(ls -d /sys/bus/scsi/devices/*:*:*:* | sed 's,.*/,,' | sort)
say queues-$life $(ls -d /sys/block/sda/mq/* | wc -l)
echo -n $((life+1)) | dd of=$(disk 1) conv=fsync,notrunc 2>/dev/null
klog
[ $life = 3 ] || reboot -f
`}
	want := make(map[string]string)
	for life := 1; life <= 3; life++ {
		for i := 1; i <= 2; i++ {
			n := life*10000 + i*1000
			copy(contents[0][(life*4+i)<<16:], numbers(n, n+999))
		}
		want[fmt.Sprint("life-", life)] = strings.Join([]string{sum(contents[0]), sum(contents[1][512:]), sum(contents[300])}, " ")
		want[fmt.Sprint("host-", life)] = "0:0:0:0 0:0:0:1 0:0:0:300"
		want[fmt.Sprint("queues-", life)] = "2"
	}
	initrd, err := boot.OpenFile(g.initramfs(t))
	if err != nil {
		t.Fatal(err)
	}
	defer initrd.Close()
	image, err := boot.Open(g.kernel.BZImage)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	sys, err := kvmapi.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer sys.Close()
	ctx, stop := context.WithTimeout(t.Context(), 3*patience) // three lives
	defer stop()
	console := &textConsole{}
	begin := time.Now()
	out, err := vmm.Run(ctx, sys, vmm.Config{
		Memory: guestmem.Config{Size: 256 << 20}, CPUs: 2, Kernel: image, Initrds: []*boot.File{initrd},
		CmdLine: "quiet console=ttyS0 panic=-1", Rebooting: true, PanicText: true,
		Devices: []virtio.Device{d}, Console: console, Note: func(s string) { t.Log(s) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("three lives took %v", time.Since(begin))
	r := result{console: console.String()}
	if out.Ending != vmm.PoweredOff {
		r.fatalf(t, "%v: %v", out.Ending, out.Err)
	}
	r.want(t, want)
	// LIO tells an initiator that was there first of every further LUN
	// (REPORTED LUNS DATA HAS CHANGED); the clock's line is for a slow lab.
	r.kernelLog(t, 3, `LUN assignments on this target have changed`, `hrtimer: interrupt took`)
	wantFile(t, files[0], 0, contents[0])
	wantFile(t, files[1], 0, append([]byte("4"), contents[1][1:]...))
	wantFile(t, files[300], 0, contents[300])
}

// textConsole keeps what the guest sends, without carriage returns.
type textConsole struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (*textConsole) Connect(io.Writer) {}

func (c *textConsole) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.Write(p)
}

func (c *textConsole) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.ReplaceAll(c.b.String(), "\r", "")
}
