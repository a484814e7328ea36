package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const headerSize = 12 // of struct virtio_net_hdr_v1

// namespace calls f in a network namespace of its own. The thread ends with it.
func namespace(b *testing.B, f func() error) {
	errs := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			errs <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		errs <- f()
	}()
	if err := <-errs; err != nil {
		b.Fatal(err)
	}
}

// interfaceUp sets the address of the guest and the MTU of an interface, and starts it.
func interfaceUp(name string, mtu uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request := func(op uint, set func(*unix.Ifreq) error) error {
		r, err := unix.NewIfreq(name)
		return errors.Join(err, set(r), unix.IoctlIfreq(fd, op, r))
	}
	address := func(a ...byte) func(*unix.Ifreq) error {
		return func(r *unix.Ifreq) error { return r.SetInet4Addr(a) }
	}
	return errors.Join(
		request(unix.SIOCSIFADDR, address(10, 0, 2, 15)),
		request(unix.SIOCSIFNETMASK, address(255, 255, 255, 0)),
		request(unix.SIOCSIFMTU, func(r *unix.Ifreq) error { r.SetUint32(mtu); return nil }),
		request(unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error { r.SetUint16(unix.IFF_UP); return nil }))
}

// openTAP makes a TAP interface, whose frames have the header of the network device.
func openTAP() (*os.File, string, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", err
	}
	r, err := unix.NewIfreq("guest")
	if err != nil {
		return nil, "", err
	}
	r.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	err = errors.Join(unix.IoctlIfreq(fd, unix.TUNSETIFF, r),
		unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, headerSize),
		unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6))
	return os.NewFile(uintptr(fd), "tap"), r.Name(), err
}

// carry copies frames until a descriptor ends, and counts them.
func carry(dst io.Writer, src io.Reader, frames *atomic.Int64) {
	for frame := make([]byte, 1<<17); ; frames.Add(1) {
		n, err := src.Read(frame)
		if err != nil || n == 0 {
			return
		}
		dst.Write(frame[:n])
	}
}

// BenchmarkTCP is a stream of one connection between the host and a guest, for which the kernel of
// this machine stands, in another network namespace. It counts the work of gvm-net for a MiB: its
// CPU time, frames to and from the guest, reads and writes, and the times that a thread slept.
func BenchmarkTCP(b *testing.B) {
	for _, down := range []bool{true, false} {
		b.Run(fmt.Sprintf("down=%v", down), func(b *testing.B) { benchmarkTCP(b, down) })
	}
}

func benchmarkTCP(b *testing.B, down bool) {
	const size = 128 << 20
	device, gateway := pair(b)
	c, _ := program(b, nil, gateway)
	gateway.Close()
	var tap *os.File
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	var guest, host *net.TCPConn
	var toGuest, toHost atomic.Int64
	namespace(b, func() error {
		var name string
		var err error
		if tap, name, err = openTAP(); err != nil {
			return fmt.Errorf("make a TAP interface: %w", err)
		}
		if err := interfaceUp(name, 1500); err != nil {
			return fmt.Errorf("set up %s: %w", name, err)
		}
		device.Write(binary.LittleEndian.AppendUint32(nil, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6))
		go carry(tap, device, &toGuest)
		go carry(device, tap, &toHost)
		guest, err = net.DialTCP("tcp4", nil, &net.TCPAddr{IP: net.IPv4(10, 0, 2, 2),
			Port: listener.Addr().(*net.TCPAddr).Port})
		return err
	})
	if host, err = listener.AcceptTCP(); err != nil {
		b.Fatal(err)
	}
	from, to := host, guest
	if !down {
		from, to = guest, host
	}
	data, buf := make([]byte, size), make([]byte, 256<<10)
	stream := func() {
		go from.Write(data)
		for left := size; left > 0; {
			n, err := to.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			left -= n
		}
	}
	calls := func() int64 {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", c.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		var skip, r, w int64
		fmt.Sscanf(string(text), "rchar: %d\nwchar: %d\nsyscr: %d\nsyscw: %d", &skip, &skip, &r, &w)
		return r + w
	}
	stream() // the windows are open after that
	called, frames, acks := calls(), toGuest.Load(), toHost.Load()
	b.SetBytes(size)
	for b.Loop() {
		stream()
	}
	mib := float64(b.N * size >> 20)
	b.ReportMetric(float64(calls()-called)/mib, "calls/MiB")
	b.ReportMetric(float64(toGuest.Load()-frames)/mib, "frames-to-guest/MiB")
	b.ReportMetric(float64(toHost.Load()-acks)/mib, "frames-to-host/MiB")
	for _, f := range []interface{ Close() error }{guest, host, device, tap} {
		f.Close()
	}
	c.Wait()
	usage := c.ProcessState.SysUsage().(*syscall.Rusage)
	all := mib + size>>20
	b.ReportMetric(float64(c.ProcessState.UserTime()+c.ProcessState.SystemTime())/all/1e3, "µs-CPU/MiB")
	b.ReportMetric(float64(usage.Nvcsw)/all, "sleeps/MiB")
}
