package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	stdnet "net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio/net"
	"gvm/jail"
	"gvm/machine"
	"gvm/panics"
	"gvm/text"
)

// userConfig is a parsed --net user with its --publish.
type userConfig struct {
	index   int // in the networks of the machine
	hostOff bool
	publish []publication
}

// publication is a parsed --publish.
type publication struct {
	word  string
	udp   bool
	addr  netip.AddrPort // of this host
	guest uint16
}

// parsePublish reads [ADDR:]HOSTPORT:GUESTPORT[/udp].
func parsePublish(s string) (p publication, err error) {
	p.word = s
	words, protocol, given := strings.Cut(s, "/")
	p.udp = protocol == "udp"
	near := ""
	if !p.udp {
		near = text.Suggest(protocol, []string{"udp"})
	}
	host, guest, ok := cutLast(words)
	addr, port, named := cutLast(host)
	if !named {
		addr, port = "127.0.0.1", host
	}
	a, addrErr := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]"))
	from, fromErr := strconv.ParseUint(port, 10, 16)
	to, toErr := strconv.ParseUint(guest, 10, 16)
	if !ok || given && !p.udp && protocol != "tcp" || addrErr != nil || fromErr != nil || toErr != nil || to == 0 {
		return p, fmt.Errorf("--publish %s: want [ADDR:]HOSTPORT:GUESTPORT, or that and /udp, such as 8080:80%s",
			text.Word(s), near)
	}
	p.addr, p.guest = netip.AddrPortFrom(a, uint16(from)), uint16(to)
	return p, nil
}

// completePublish continues a value of --publish: an address of this host, or the protocol.
func completePublish(s string) []string {
	if p, err := parsePublish(s); err == nil && !strings.Contains(p.word, "/") {
		return []string{s + "/tcp", s + "/udp"}
	}
	return []string{"0.0.0.0:", "127.0.0.1:", "[::1]:", "[::]:"}
}

// cutLast cuts s around its last colon.
func cutLast(s string) (before, after string, found bool) {
	if i := strings.LastIndexByte(s, ':'); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return s, "", false
}

// parsePublishes gives a user-mode network its ports.
func (u *userConfig) parsePublishes(values []string) error {
	if u == nil && len(values) > 0 {
		return errors.New("--publish needs --net user")
	}
	for _, s := range values {
		p, err := parsePublish(s)
		if err != nil {
			return err
		}
		u.publish = append(u.publish, p)
	}
	return nil
}

// listen opens the port, and returns its socket as a file for gvm-net.
func (p publication) listen(note func(string)) (*os.File, error) {
	network := "tcp"
	if p.udp {
		network = "udp"
	}
	var socket interface {
		File() (*os.File, error)
		Close() error
	}
	var addr stdnet.Addr
	if p.udp {
		c, err := stdnet.ListenUDP(network, stdnet.UDPAddrFromAddrPort(p.addr))
		if err != nil {
			return nil, p.fault(err)
		}
		socket, addr = c, c.LocalAddr()
	} else {
		l, err := stdnet.ListenTCP(network, stdnet.TCPAddrFromAddrPort(p.addr))
		if err != nil {
			return nil, p.fault(err)
		}
		socket, addr = l, l.Addr()
	}
	defer socket.Close()
	f, err := socket.File()
	if err != nil {
		return nil, p.fault(err)
	}
	if p.addr.Port() == 0 {
		note(fmt.Sprintf("port %d/%s of the guest is at %s", p.guest, network, addr))
	}
	return f, nil
}

// fault says why the port cannot be opened.
func (p publication) fault(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		err = errno // without the address once more
	}
	return configError{fmt.Errorf("--publish %s: %s: %w; choose another port", p.word, p.addr, err)}
}

// userNet is a running gvm-net.
type userNet struct {
	c      *exec.Cmd
	device int // the device's end of the socket
	errs   firstLine
	ending atomic.Bool
	ended  chan struct{}
}

// firstLine keeps the first line that is written to it.
type firstLine struct{ line []byte }

func (f *firstLine) Write(b []byte) (int, error) {
	const most = 400
	if !bytes.Contains(f.line, []byte("\n")) && len(f.line) < most {
		f.line = append(f.line, b[:min(len(b), most)]...)
	}
	return len(b), nil
}

func (f *firstLine) String() string {
	line, _, _ := strings.Cut(string(f.line), "\n")
	return text.Printable(line)
}

const netName = "gvm-net"

// netProgram returns the path of gvm-net.
func netProgram() (string, error) {
	path, beside := besideProgram(netName)
	if path == "" {
		return "", configError{fmt.Errorf("--net user: the program of the network is missing: put %s, "+
			"which make build makes beside gvm, at %s or into $PATH", netName, beside)}
	}
	return path, nil
}

// startUserNet opens the ports of --publish and starts gvm-net for the device of --net user. nil:
// there is none.
func (rc *runConfig) startUserNet(note func(string)) (_ *userNet, err error) {
	if rc.user == nil {
		return nil, nil
	}
	in, path := jail.Here(), netName
	if in == nil {
		if path, err = netProgram(); err != nil {
			return nil, err
		}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("--net user: make a socket: %w", err)
	}
	u := &userNet{c: &exec.Cmd{Path: path, Args: []string{path}}, device: fds[0], ended: make(chan struct{})}
	u.c.ExtraFiles = []*os.File{os.NewFile(uintptr(fds[1]), netName)}
	defer func() {
		for _, f := range u.c.ExtraFiles {
			f.Close()
		}
		if err != nil {
			unix.Close(u.device)
		}
	}()
	for _, fd := range fds { // more than two frames of 64 KiB at a time; the kernel's limit is less
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20)
	}
	if err := unix.SetNonblock(u.device, true); err != nil {
		return nil, fmt.Errorf("--net user: %w", err)
	}
	if rc.user.hostOff {
		u.c.Args = append(u.c.Args, "host=off")
	}
	for _, p := range rc.user.publish {
		f, err := p.listen(note)
		if err != nil {
			return nil, err
		}
		u.c.ExtraFiles = append(u.c.ExtraFiles, f)
		protocol := "tcp"
		if p.udp {
			protocol = "udp"
		}
		u.c.Args = append(u.c.Args, fmt.Sprintf("%s=%d", protocol, p.guest))
	}
	if in != nil { // behind all others, so that none of them takes its number in the child
		u.c.ExtraFiles = append(u.c.ExtraFiles, os.NewFile(uintptr(in.Program), netName))
		u.c.Path = fmt.Sprintf("/proc/self/fd/%d", 2+len(u.c.ExtraFiles))
	}
	u.c.Stderr = &u.errs
	u.c.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true,         // keys of the terminal are gvm's
		Pdeathsig: unix.SIGKILL, // also for a stopped one, when gvm is killed
	}
	started := make(chan error)
	panics.Go(func() { // ends after gvm-net
		runtime.LockOSThread() // its end would be the death of the parent
		defer runtime.UnlockOSThread()
		err := u.c.Start()
		started <- err
		if err == nil {
			u.wait(note)
		}
	})
	if err := <-started; err != nil {
		return nil, fmt.Errorf("--net user: start %s: %w", netName, err)
	}
	rc.spec.Nets = slices.Clone(rc.spec.Nets)
	u.connect(&rc.spec.Nets[rc.user.index])
	return u, nil
}

// connect makes gvm-net the other end of a device.
func (u *userNet) connect(n *machine.Net) {
	d := &n.Device
	d.Queues = []int{u.device}
	d.Offloads = net.CSum | net.GuestCSum | net.GuestTSO4 | net.GuestTSO6 | net.HostTSO4 | net.HostTSO6 | net.HostECN
	d.SetOffloads = u.setOffloads
	if d.MAC == [6]byte{} {
		d.MAC = [6]byte{2, 0, 10, 0, 2, 15} // no other machine is on this network
	}
}

// setOffloads tells gvm-net which offloads the driver takes, in the encoding of TUNSETOFFLOAD.
func (u *userNet) setOffloads(features uint64) error {
	var offloads uint32
	for _, o := range []struct {
		feature uint64
		flag    uint32
	}{
		{net.GuestCSum, unix.TUN_F_CSUM}, {net.GuestTSO4, unix.TUN_F_TSO4}, {net.GuestTSO6, unix.TUN_F_TSO6},
	} {
		if features&o.feature != 0 {
			offloads |= o.flag
		}
	}
	message := binary.LittleEndian.AppendUint32(nil, offloads)
	for {
		_, err := unix.Write(u.device, message)
		switch err {
		case unix.EAGAIN: // frames of the last driver
			const most = 1000 // milliseconds
			if n, err := unix.Poll([]unix.PollFd{{Fd: int32(u.device), Events: unix.POLLOUT}}, most); n == 0 && err == nil {
				return errors.New("gvm-net does not read")
			}
		case unix.EINTR:
		default:
			return nil // gvm-net has ended: the device says so
		}
	}
}

// wait waits for the end of gvm-net, and says so if the machine has not ended.
func (u *userNet) wait(note func(string)) {
	defer close(u.ended)
	err := u.c.Wait()
	if u.ending.Load() {
		return
	}
	reason := u.errs.String()
	if err != nil {
		reason = cmp.Or(reason, "gvm-net: "+err.Error())
	}
	note("the guest's network is down: " + cmp.Or(reason, "gvm-net has ended"))
}

// close ends gvm-net, after the machine. nil is none.
func (u *userNet) close() {
	if u == nil {
		return
	}
	u.ending.Store(true)
	unix.Close(u.device)
	const grace = 500 * time.Millisecond
	select {
	case <-u.ended:
	case <-time.After(grace): // it was stopped, or hangs
		u.c.Process.Kill()
		<-u.ended
	}
}
