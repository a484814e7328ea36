package linux

import (
	"errors"
	"strings"
	"testing"
	"time"

	"gvm/guestmem"
	"gvm/machine"
)

// TestFreePageReporting: memory that the guest frees is the host's again, to within a tenth of what
// the guest uses.
func TestFreePageReporting(t *testing.T) {
	const memory, file = 1 << 30, 200 << 20
	var m *machine.Machine
	// resident returns the memory that the host holds for the guest.
	resident := func() (size uint64) {
		n, err := m.Inspect(t.Context(), "memory")
		if err != nil {
			t.Error(err)
		}
		for path, v := range n.Values("") {
			if part, ok := v.(uint64); ok && strings.HasSuffix(path, "resident") {
				size += part
			}
		}
		return size
	}
	started, freed := make(chan struct{}), make(chan struct{})
	var full uint64
	console := &watcher{when: func(words string) {
		switch words {
		case "filled":
			<-started
			full = resident()
		case "freed":
			close(freed)
		}
	}}
	m = guest{kernel: kernel(t, "cloud"), modules: []string{"virtio_balloon"}, script: `
mkdir /tmp && mount -t tmpfs none /tmp
dd if=/dev/zero of=/tmp/kept bs=1M count=200 && dd if=/dev/zero of=/tmp/freed bs=1M count=200 && say filled
sleep 1
rm /tmp/freed && say freed
sleep 600
`}.launch(t, machine.Spec{Memory: guestmem.Config{Size: memory}, Console: machine.Output(console), Balloon: true})
	close(started)
	select {
	case <-freed:
	case <-m.Ended():
		t.Fatalf("the guest has ended: %s", &console.all)
	}
	if full < 2*file {
		t.Errorf("%d MiB are resident with two files of %d", full>>20, file>>20)
	}
	for {
		b, err := m.Balloon(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		free, known := b.Stats.Get("memfree").(uint64)
		have, used := resident(), memory-free
		if known && used > file && have <= used+used/10 {
			t.Logf("%d MiB are resident, %d were, and the guest uses %d", have>>20, full>>20, used>>20)
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	m.Stop(errors.New("the test is over"), 0)
	if _, err := m.Wait(); err != nil {
		t.Error(err)
	}
}
