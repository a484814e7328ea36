package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio"
	"gvm/devices/virtio/net"
	"gvm/devices/virtio/virtqtest"
	"gvm/guestmem"
)

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"tap0": true, "a-b_c.d": true, "ü": true, "fifteen-bytes-x": true, "a,b": true,
		"": false, ".": false, "..": false, "sixteen-bytes-xy": false, "a/b": false, "a b": false, "a:b": false,
		"tap%d": false, "a\x00b": false, "a\xa0b": false, "a\nb": false,
	} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// ownNet gives the test's thread a network namespace, or skips.
func ownNet(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // to the end of the thread, which goes with the namespace
	err := unix.Unshare(unix.CLONE_NEWNET)
	if errors.Is(err, unix.EPERM) {
		t.Skip("a network namespace needs CAP_SYS_ADMIN")
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(device); err != nil {
		t.Skip("the host has no TAP interfaces: ", err)
	}
}

// set makes an ioctl with the interface's name and a value.
func set(t *testing.T, name string, request uint, value uint16) {
	t.Helper()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(value)
	if err := unix.IoctlIfreq(s, request, ifr); err != nil {
		t.Fatal(err)
	}
}

// persist makes an interface that stays, as ip tuntap add does.
func persist(t *testing.T, name string, flags uint16) {
	t.Helper()
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(flags | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, name string, queues int) *Tap {
	t.Helper()
	tap, err := Open(name, queues)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	return tap
}

// TestOpen: interfaces with one queue and with several, made here and before; an interface that
// Open made goes with its Close.
func TestOpen(t *testing.T) {
	ownNet(t)
	persist(t, "one", unix.IFF_TAP)
	persist(t, "many", unix.IFF_TAP|unix.IFF_MULTI_QUEUE)
	persist(t, "tun", unix.IFF_TUN)
	for _, tt := range []struct {
		name   string
		queues int
		err    string
	}{
		{"new", 1, ""}, {"new", 4, ""}, {"one", 1, ""}, {"many", 1, ""}, {"many", 3, ""},
		{"one", 2, "interface one was made with one queue: make it with ip tuntap add one mode tap multi_queue"},
		{"tun", 1, "interface tun is not a TAP interface"},
		{"tun", 2, "interface tun is not a TAP interface"},
		{"lo", 1, "interface lo is not a TAP interface"},
		{"a/b", 1, `interface name "a/b"`},
	} {
		tap, err := Open(tt.name, tt.queues)
		if tt.err != "" {
			if err == nil || !strings.HasPrefix(err.Error(), tt.err) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v, want %s", tt.name, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s with %d queues: %v", tt.name, tt.queues, err)
			continue
		}
		if len(tap.Queues()) != tt.queues {
			t.Errorf("%d queues, want %d", len(tap.Queues()), tt.queues)
		}
		for _, n := range []int{tt.queues, 1, tt.queues} {
			if err := tap.SetPairs(n); err != nil {
				t.Error(err)
			}
		}
		for _, f := range []uint64{0, Offloads, net.GuestCSum | net.GuestTSO6, net.GuestCSum | net.GuestECN} {
			if err := tap.SetOffloads(f); err != nil {
				t.Errorf("offloads %#x: %v", f, err)
			}
		}
		if err := tap.Close(); err != nil {
			t.Error(err)
		}
		if _, err := tap.MTU(); (err == nil) != (tt.name != "new") {
			t.Errorf("after the end of %s: %v", tt.name, err)
		}
	}
}

// TestInUse: another program has the interface.
func TestInUse(t *testing.T) {
	ownNet(t)
	open(t, "busy", 1)
	if _, err := Open("busy", 1); err == nil || !strings.HasPrefix(err.Error(), "interface busy is in use") {
		t.Error(err)
	}
}

// TestNoRight: without CAP_NET_ADMIN there are only the user's interfaces.
func TestNoRight(t *testing.T) {
	ownNet(t)
	persist(t, "own", unix.IFF_TAP)
	persist(t, "other", unix.IFF_TAP)
	owned, err := Open("other", 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.IoctlSetInt(owned.fds[0], unix.TUNSETOWNER, 1), owned.Close()); err != nil {
		t.Fatal(err)
	}
	var none [2]unix.CapUserData
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"other": "interface other is another user's: use one of your own (sudo ip tuntap add NAME mode tap user $USER), or",
		"new":   "there is no interface new, and only CAP_NET_ADMIN may make one: sudo ip tuntap add new mode tap user",
	} {
		if _, err := Open(name, 1); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	open(t, "own", 1) // which has no owner, and so is every user's
}

// TestFrames: frames pass between the descriptor and the interface; the kernel refuses headers
// without sense.
func TestFrames(t *testing.T) {
	ownNet(t)
	tap := open(t, "frames", 1)
	if up, err := tap.Up(); up || err != nil {
		t.Errorf("up: %t, %v", up, err)
	}
	set(t, "frames", unix.SIOCSIFMTU, 9000)
	set(t, "frames", unix.SIOCSIFFLAGS, unix.IFF_UP)
	if up, err := tap.Up(); !up || err != nil {
		t.Errorf("up: %t, %v", up, err)
	}
	if mtu, err := tap.MTU(); mtu != 9000 || err != nil {
		t.Errorf("MTU %d, %v", mtu, err)
	}
	const protocol = 0x88b5 // for experiments (IEEE 802)
	swapped := uint16(protocol>>8 | protocol&0xff<<8)
	s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(swapped))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	ifr, err := tap.link(unix.SIOCGIFINDEX)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(s, &unix.SockaddrLinklayer{Protocol: swapped, Ifindex: int(ifr.Uint32())}); err != nil {
		t.Fatal(err)
	}
	frame := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5"),
		bytes.Repeat([]byte("gvm"), 100)...)
	b := make([]byte, 1000)
	write := func(header ...byte) error {
		header = append(header, make([]byte, net.HeaderLen-len(header))...)
		_, err := unix.Write(tap.Queues()[0], append(header, frame...))
		return err
	}
	if err := write(); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Read(s, b); err != nil || !bytes.Equal(b[:n], frame) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	for _, header := range [][]byte{
		{0, 77, 0, 0, 1},             // gso_type that there is not
		{0, 1, 0xff, 0xff, 1},        // hdr_len
		{1, 0, 0, 0, 0, 0, 0xff, 40}, // csum_start
	} {
		if err := write(header...); !errors.Is(err, unix.EINVAL) {
			t.Errorf("header % x: %v", header, err)
		}
	}
	frame[0] = 2 // for the other side alone
	if _, err := unix.Write(s, frame); err != nil {
		t.Fatal(err)
	}
	for {
		p := []unix.PollFd{{Fd: int32(tap.Queues()[0]), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		n, err := unix.Read(tap.Queues()[0], b)
		if err == nil && n > net.HeaderLen && bytes.Equal(b[net.HeaderLen:n], frame) {
			break // others are the kernel's own, such as router solicitations
		}
		if err != nil && err != unix.EAGAIN {
			t.Fatal(fmt.Errorf("read: %w", err))
		}
	}
}

// TestDeleted: the guest's link goes down when its interface is deleted.
func TestDeleted(t *testing.T) {
	ownNet(t)
	tap := open(t, "deleted", 1)
	failed := make(chan error, 1)
	dev, err := net.New(net.Config{MAC: [6]byte{2}, Queues: tap.Queues(), Offloads: Offloads,
		SetOffloads: tap.SetOffloads, SetPairs: tap.SetPairs, Failed: func(err error) { failed <- err }})
	if err != nil {
		t.Fatal(err)
	}
	a := virtio.Activation{Mem: guestmem.Heap(0, 3<<20), Features: Offloads,
		Broken: func(err error) { t.Error(err) }, ConfigChanged: func() {}}
	for i, size := range dev.QueueSizes() {
		d, err := virtqtest.New(a.Mem, uint64(i)<<20, size, a.Features)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		a.Queues = append(a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
		if i == 0 {
			d.Add(virtqtest.Seg{Addr: d.Alloc(2000), Len: 2000, Write: true})
			if _, err := d.Publish(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := dev.Activate(a); err != nil {
		t.Fatal(err)
	}
	ifr, err := tap.link(unix.SIOCGIFINDEX)
	if err != nil {
		t.Fatal(err)
	}
	request := make([]byte, unix.SizeofNlMsghdr+unix.SizeofIfInfomsg)
	binary.LittleEndian.PutUint32(request, uint32(len(request)))
	binary.LittleEndian.PutUint16(request[4:], unix.RTM_DELLINK)
	binary.LittleEndian.PutUint16(request[6:], unix.NLM_F_REQUEST)
	binary.LittleEndian.PutUint32(request[unix.SizeofNlMsghdr+4:], ifr.Uint32())
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if err := unix.Sendto(s, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errors.Is(err, unix.EBADFD) {
		t.Error(err)
	}
	if status := dev.Config()[6]; status != 0 {
		t.Errorf("status %d", status)
	}
	if err := dev.Reset(); err != nil {
		t.Error(err)
	}
}
