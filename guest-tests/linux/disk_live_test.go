package linux

import (
	"os"
	"path/filepath"
	"testing"
)

// TestDiskPlug: the guest sees gvm disk add, resize and remove disks without a rescan, while it
// reads from another one.
func TestDiskPlug(t *testing.T) {
	l := theLab(t)
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	first, second := content("stays", 1<<20), content("comes and goes", 2<<20)
	stays, comes := diskFile(t, first), diskFile(t, second)
	p := start(t, nil, append(guest{kernel: l.Debian, script: `
( while dd if=/dev/sda of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done; say reads failed ) &
reader=$!
` + plugging + `
echo grow
until [ $(cat /sys/block/sda/size) != 2048 ]; do sleep 0.1; done
say grown $(cat /sys/block/sda/size) $(head -c 1048576 /dev/sda | sum)
kill $reader
`}.build(t), "--name=plug", "--disk", stays+",serial=STAYS")...)
	disk := func(args ...string) {
		t.Helper()
		r := gvm(t, append([]string{"disk"}, args...)...)
		r.wantStatus(t, 0)
		t.Log(r.console)
	}
	plug(p.waitFor, func() { disk("add", comes) }, func() { disk("remove", "plug", comes) })
	p.waitFor("grow")
	disk("resize", "STAYS", "4M")
	r := p.wait()
	r.wantStatus(t, 0)
	want := plugged(first, second)
	want["grown"] = "8192 " + sum(first)
	r.want(t, want)
	wantFile(t, comes, 0, second)
	if left, err := filepath.Glob(os.Getenv("XDG_RUNTIME_DIR") + "/*"); len(left) > 0 {
		t.Errorf("gvm has left %v, %v", left, err)
	}
}
