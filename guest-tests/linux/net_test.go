package linux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/guestmem"
	"gvm/machine"
	"gvm/vmm"
)

// setLink brings an interface up, with address 10.99.N.1/24 and an MTU.
func setLink(t testing.TB, name string, n byte, mtu uint32) {
	t.Helper()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(name)
	must(t, err)
	must(t, ifr.SetInet4Addr([]byte{10, 99, n, 1}))
	must(t, unix.IoctlIfreq(s, unix.SIOCSIFADDR, ifr))
	must(t, ifr.SetInet4Addr([]byte{255, 255, 255, 0}))
	must(t, unix.IoctlIfreq(s, unix.SIOCSIFNETMASK, ifr))
	ifr.SetUint32(mtu)
	must(t, unix.IoctlIfreq(s, unix.SIOCSIFMTU, ifr))
	ifr.SetUint16(unix.IFF_UP)
	must(t, unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr))
}

// TestNet: a guest pings the host and moves data both ways, also over a pause of the machine, by
// gvm's own service and by vhost-net. The interfaces go with the machine.
func TestNet(t *testing.T) {
	needsRoot(t, "a network interface")
	const size = 2 << 20
	nets := []machine.Net{{Tap: "gvmtest0", Pairs: 2, Vhost: machine.VhostOff},
		{Tap: "gvmtest1", Pairs: 2, Vhost: machine.VhostOn}}
	out, in := content("out", size), content("in", size)
	file := diskFile(t, out)
	g := guest{
		kernel:  kernel(t, "cloud"),
		modules: []string{"virtio_net"},
		files:   map[string]string{"data": file},
		script: fmt.Sprintf(`
for n in $(seq 0 %d); do
	ip addr add 10.99.$n.2/24 dev eth$n && ip link set eth$n up && say up$n
	say queues$n $(echo /sys/class/net/eth$n/queues/rx-*)
	ping -c 2 -W 20 10.99.$n.1 >/dev/null && say ping$n ok
	ip link set eth$n promisc on && say promiscuous$n
	say in$n $(nc 10.99.$n.1 5000 </data | sum)
	ip link set eth$n down && ip link set eth$n up && ping -c 1 -W 20 10.99.$n.1 >/dev/null && say again$n ok
done
klog
`, len(nets)-1),
	}
	var console bytes.Buffer
	m := g.launch(t, machine.Spec{Memory: guestmem.Config{Size: 256 << 20}, Console: machine.Output(&console), Nets: nets})
	for i, n := range nets {
		setLink(t, n.Tap, byte(i), 1500)
	}
	l, err := net.Listen("tcp4", "0.0.0.0:5000")
	must(t, err)
	defer l.Close()
	go func() {
		<-m.Ended()
		l.Close()
	}()
	for i := range nets {
		c, err := l.Accept()
		if err != nil {
			break // the guest has ended
		}
		if err := errors.Join(m.Pause(t.Context()), m.Resume()); err != nil {
			t.Error(err)
		}
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, out) {
			t.Errorf("network %d: %d of %d bytes came from the guest, or others: %v", i, len(got), size, err)
		}
		_, err = c.Write(in)
		state, err2 := m.Inspect(t.Context(), "pci")
		if err := errors.Join(err, err2, c.Close()); err != nil {
			t.Error(err)
		}
		sent := map[string]uint64{} // by the guest, by all queues
		for path, v := range state.Values("") {
			if n, ok := v.(uint64); ok && strings.Contains(path, "/pair/") {
				sent[path[strings.LastIndex(path, "/")+1:]] += n
			}
		}
		if i == 0 && sent["tx_bytes"] < size {
			t.Errorf("the guest sent %d bytes in %d frames", sent["tx_bytes"], sent["tx_frames"])
		}
	}
	end, err := m.Wait()
	r := result{console: strings.ReplaceAll(console.String(), "\r", "")}
	if err != nil || end.Ending != vmm.PoweredOff {
		r.fatalf(t, "%v, %v, %v", end.Ending, end.Err, err)
	}
	for i, n := range nets {
		r.want(t, map[string]string{fmt.Sprint("up", i): "", fmt.Sprint("ping", i): "ok", fmt.Sprint("again", i): "ok",
			fmt.Sprint("promiscuous", i): "", fmt.Sprint("in", i): sum(in),
			fmt.Sprint("queues", i): fmt.Sprintf("/sys/class/net/eth%d/queues/rx-0 /sys/class/net/eth%[1]d/queues/rx-1", i)})
		if _, err := net.InterfaceByName(n.Tap); err == nil {
			t.Errorf("interface %s is left", n.Tap)
		}
	}
	r.kernelLog(t, 1)
}
