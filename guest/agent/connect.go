package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/statusport"
	"gvm/guest/agent/wire"
	"gvm/kvmapi/nowait"
	"gvm/panics"
)

const (
	// dialPatience bounds the wait for the host's answer to a hello: a busy host may stop the guest
	// for seconds, and a lesser way has no output.
	dialPatience = 20 * time.Second
	// portPatience bounds the wait for the name of a virtio-console port, which the driver learns
	// after it has found the device.
	portPatience = time.Second
)

// end is the agent's way to the host.
type end struct {
	streams streams
	log     func(line string)
	exit    func(wire.Exit)
}

// rung is a transport. open returns errAbsent if the kernel or the machine does not have it.
type rung struct {
	name string
	open func() (io.ReadWriteCloser, error)
}

var errAbsent = errors.New("the kernel has no driver for it, or the machine no device")

// rungs are the transports of streams, best first.
var rungs = []rung{
	{"vsock", openVsock},
	{"virtio-console port", openPort},
	{"second serial port", openSerial},
}

// connect finds the host. Without any stream only the exit status reaches it.
func (g *guest) connect() end {
	build, err := wire.BuildID("/proc/self/exe")
	if err != nil {
		build, err = wire.BuildID(os.Args[0])
	}
	if err != nil {
		g.logf("%v", err)
	}
	for i, r := range rungs {
		if i > 0 {
			g.load(g.later)
			g.later = nil
		}
		rw, err := r.open()
		if err == nil {
			g.wire, err = dial(rw, wire.AgentConfig{Hello: wire.Hello{Build: build, Rung: r.name},
				Signal: g.job.signal, Winsize: g.job.winsize})
		}
		if err == nil {
			g.build, g.sessions = build, r.name == rungs[0].name
			return g.streamEnd()
		}
		g.logf("no %s: %v", r.name, err)
	}
	return statusEnd()
}

func (g *guest) streamEnd() end {
	w := g.wire
	panics.Go(func() { // without a host the command has no purpose
		<-w.Gone()
		powerOff()
	})
	return end{
		streams: streams{w.Stdin, w.Stdout, w.Stderr, w.Started},
		log:     func(line string) { w.Log(line) },
		exit: func(e wire.Exit) {
			w.Stdout.Close()
			w.Stderr.Close()
			w.Exit(e, byePatience)
		},
	}
}

// dial says hello on rw, and gives up a host that does not answer.
func dial(rw io.ReadWriteCloser, cfg wire.AgentConfig) (*wire.Agent, error) {
	type result struct {
		a   *wire.Agent
		err error
	}
	c := make(chan result, 1)
	panics.Go(func() {
		a, err := wire.Dial(rw, cfg)
		c <- result{a, err}
	})
	select {
	case r := <-c:
		if r.err != nil {
			rw.Close()
		}
		return r.a, r.err
	case <-time.After(dialPatience):
		rw.Close()
		return nil, fmt.Errorf("the host does not answer in %v", dialPatience)
	}
}

// statusEnd reports by the status port.
func statusEnd() end {
	e := end{
		log:  func(line string) { fmt.Fprintln(os.Stderr, "gvm-agent:", line) },
		exit: func(wire.Exit) {},
	}
	report, err := openStatusPort()
	if err != nil {
		e.log(fmt.Sprintf("no status port: %v", err))
		return e
	}
	alive := func() { report(statusport.Alive, wire.Version) }
	alive() // before any end

	panics.Go(func() { // ends with the machine
		for range time.Tick(wire.AlivePeriod) {
			alive()
		}
	})
	e.exit = func(x wire.Exit) {
		switch {
		case x.Err != "" && x.Status == 127:
			report(statusport.Failed, byte(unix.ENOENT))
		case x.Err != "" && x.Status == 126:
			report(statusport.Failed, byte(unix.EACCES))
		case x.Err != "":
			report(statusport.Failed, byte(unix.EIO))
		case x.Signal != 0:
			report(statusport.Signaled, byte(x.Signal))
		default:
			report(statusport.Exited, byte(x.Status))
		}
		if x.Err != "" {
			e.log(x.Err)
		}
	}
	return e
}

// descriptor is a stream of raw, blocking reads and writes. Go's poller is not for virtio-console
// ports: that driver loses wake-ups when a port is polled while another thread writes to it.
type descriptor struct {
	fd     int
	socket bool
	once   sync.Once
}

func (d *descriptor) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(d.fd, p)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (d *descriptor) Write(p []byte) (written int, _ error) {
	for written < len(p) {
		n, err := unix.Write(d.fd, p[written:])
		if err != nil && err != unix.EINTR {
			return written, err
		}
		written += max(n, 0)
	}
	return written, nil
}

// Close ends a socket's reads and writes. The number stays taken: another thread may be in a read
// of it, which no close ends.
func (d *descriptor) Close() error {
	if !d.socket {
		return nil
	}
	var err error
	d.once.Do(func() { err = unix.Shutdown(d.fd, unix.SHUT_RDWR) })
	return err
}

func openVsock() (io.ReadWriteCloser, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == unix.EAFNOSUPPORT {
		return nil, errAbsent
	}
	if err != nil {
		return nil, err
	}
	if err = nowait.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: wire.VsockPort}); err != nil {
		unix.Close(fd)
		if err == unix.ENODEV {
			err = errAbsent
		}
		return nil, err
	}
	return &descriptor{fd: fd, socket: true}, nil
}

// openPort opens the virtio-console port of the agent.
func openPort() (io.ReadWriteCloser, error) {
	for deadline := time.Now().Add(portPatience); ; time.Sleep(time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, file := range names {
			if name, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(name)) != wire.PortName {
				continue
			}
			return openDevice(path.Base(path.Dir(file)), path.Join(path.Dir(file), "dev"))
		}
		if !consoleBound() {
			return nil, errAbsent
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no port of the console is named %s", wire.PortName)
		}
	}
}

// consoleBound reports whether a virtio console has its driver.
func consoleBound() bool {
	drivers, _ := filepath.Glob("/sys/bus/virtio/drivers/virtio_console/virtio*")
	return len(drivers) > 0
}

// openDevice opens a character device of /dev, which it makes if only sysfs has it.
func openDevice(name, devFile string) (io.ReadWriteCloser, error) {
	node := path.Join("/dev", name)
	if _, err := os.Stat(node); err != nil {
		var major, minor uint32
		b, err := os.ReadFile(devFile)
		if err == nil {
			_, err = fmt.Sscanf(string(b), "%d:%d", &major, &minor)
		}
		if err == nil {
			err = unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor)))
		}
		if err != nil {
			return nil, fmt.Errorf("make %s: %w", node, err)
		}
	}
	fd, err := unix.Open(node, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", node, err)
	}
	return &descriptor{fd: fd}, nil
}

// openSerial opens COM2 as a line of bytes.
func openSerial() (io.ReadWriteCloser, error) {
	fd, err := unix.Open("/dev/ttyS1", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, errAbsent
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS) // EIO if there is no UART
	if err != nil {
		unix.Close(fd)
		return nil, errAbsent
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err = unix.IoctlSetTermios(fd, unix.TCSETS, t); err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set up /dev/ttyS1: %w", err)
	}
	return &descriptor{fd: fd}, nil
}
