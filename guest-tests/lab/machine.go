package lab

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// machine is one QEMU that runs L1.
type machine struct {
	cmd     *exec.Cmd
	port    net.Conn      // the other end of L1's virtio-serial port
	monitor net.Conn      // QEMU's human monitor
	in      *bufio.Reader // from port
	up      bool          // the agent has given a sign of life
	console tail
	exited  chan struct{} // closed when QEMU has ended and its output is read
}

// processor is QEMU's "max", an AMD processor with SVM, nested paging and vGIF, without XSAVE and
// the features that depend on it. QEMU does not intercept XSETBV in SVM: L1's KVM would not learn
// which XCR0 its guest sets, and would enter the guest with another one. A processor with AVX and
// without XSAVE does not exist: Linux enables AVX code by the AVX bit alone, and would die of #UD
// in it.
const processor = "max,-xsave,-xsaveerptr,-avx,-avx2,-fma,-f16c,-vaes,-vpclmulqdq,-pku,-mpx"

// qemuArgs returns QEMU's command line; port, monitor and initrd are its descriptors of those
// names.
func qemuArgs(c *Command, j *job, port, monitor, initrd int) []string {
	memory, cpus := cmp.Or(c.Memory, defaultMemory), cmp.Or(c.CPUs, 2)
	cpu := processor
	if c.Fast {
		// Without ERMS and FSRM kernels copy and clear memory by plain moves, which are translated:
		// REP MOVSB, fast in hardware, takes three to four times as long here. Without SSE4.2 Go
		// makes no tables by the CRC32 instruction, which is a call here. They took a third of each
		// start of gvm.
		cpu += ",-erms,-fsrm,-sse4.2"
	}
	args := []string{
		"-accel", "tcg,thread=multi,tb-size=512", "-cpu", cpu,
		"-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d", monitor), "-mon", "chardev=monitor",
		"-device", "virtio-serial-pci",
		"-chardev", fmt.Sprintf("socket,id=port,fd=%d", port), "-device", "virtserialport,chardev=port,name=" + portName,
		"-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
		"-device", "virtio-9p-pci,fsdev=root,mount_tag=root",
	}
	for _, s := range j.Mounts {
		args = append(args,
			"-fsdev", "local,id="+s.Tag+",path="+escape(s.Path)+",security_model=none,multidevs=remap",
			"-device", "virtio-9p-pci,fsdev="+s.Tag+",mount_tag="+s.Tag)
	}
	return append(args,
		"-kernel", c.Kernel.VMLinux, "-initrd", fmt.Sprintf("/proc/self/fd/%d", initrd),
		// One processor until the modules are loaded: see onlineCPUs. No transparent huge pages, or
		// not with the kernel's defaults: see hugePages.
		"-append", "console=ttyS0 maxcpus=1 transparent_hugepage=never panic=-1 quiet mitigations=off tsc=reliable "+
			"no_timer_check nokaslr cryptomgr.notests "+
			"random.trust_cpu=on apparmor=0 audit=0 rcupdate.rcu_expedited=1 init_on_alloc=0 "+agentEnv+"=1")
}

// escape doubles commas, which separate QEMU's suboptions.
func escape(s string) string { return string(bytes.ReplaceAll([]byte(s), []byte(","), []byte(",,"))) }

func startMachine(qemu string, c *Command, j *job, initrd *os.File) (*machine, error) {
	m := &machine{exited: make(chan struct{}), console: tail{also: c.Console}}
	var theirs [2]*os.File
	var err error
	for i, conn := range []*net.Conn{&m.port, &m.monitor} {
		if *conn, theirs[i], err = socketPair(); err != nil {
			m.closeConns()
			return nil, err
		}
		defer theirs[i].Close()
	}
	m.in = bufio.NewReaderSize(m.port, maxPayload)
	const first = 3 // number of the first of ExtraFiles
	m.cmd = exec.Command(qemu, qemuArgs(c, j, first, first+1, first+2)...)
	m.cmd.ExtraFiles = []*os.File{theirs[0], theirs[1], initrd}
	m.cmd.Stdout, m.cmd.Stderr = &m.console, &m.console
	// QEMU dies with this process in any case, and takes no signal from the terminal.
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	m.cmd.WaitDelay = 5 * time.Second
	started := make(chan error)
	go func() {
		// The death signal comes when the parent thread ends: keep that thread.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := m.cmd.Start()
		started <- err
		if err == nil {
			m.cmd.Wait()
			close(m.exited)
		}
	}()
	if err := <-started; err != nil {
		m.closeConns()
		return nil, fmt.Errorf("start %s: %w", qemu, err)
	}
	return m, nil
}

func (m *machine) closeConns() {
	for _, c := range []net.Conn{m.port, m.monitor} {
		if c != nil {
			c.Close()
		}
	}
}

// stop ends QEMU, and returns once it has ended.
func (m *machine) stop() {
	m.cmd.Process.Kill()
	<-m.exited
	m.closeConns()
}

// next has the agent run another command, after the end of the last one.
func (m *machine) next(args []string) error {
	text, err := json.Marshal(args)
	if err == nil && len(text) > maxPayload {
		err = fmt.Errorf("the arguments have %d bytes, more than %d", len(text), maxPayload)
	}
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	// If the lab has ended, serve reports that.
	_ = (&frameWriter{w: m.port}).send(frameNext, text)
	return nil
}

// serve passes data between the command and its caller until the command, the context or the lab
// ends.
func (m *machine) serve(ctx context.Context, c *Command) (exit int, err error) {
	start := time.Now()
	stop := context.AfterFunc(ctx, func() { m.port.Close() })
	defer stop()
	out := frameWriter{w: m.port}
	taken := make(chan struct{}, 1)
	over := make(chan struct{})
	defer close(over)
	silence := cmp.Or(c.Silence, 40*time.Second)
	buf := make([]byte, maxPayload)
	for {
		limit := silence
		if !m.up {
			limit = bootSilence
		}
		// The clock runs only here, while there is nothing to read: a caller that is slow to take
		// output does not make the lab look dead.
		m.port.SetReadDeadline(time.Now().Add(limit))
		kind, p, err := readFrame(m.in, buf)
		switch {
		case ctx.Err() != nil:
			return 0, fmt.Errorf("lab: stopped: %w", context.Cause(ctx))
		case errors.Is(err, os.ErrDeadlineExceeded):
			m.postMortem(c)
			return 0, fmt.Errorf("%w: no sign of life from L1 for %v", ErrWedged, limit)
		case err != nil:
			// QEMU's or the kernel's message about it is on its way to the console.
			select {
			case <-m.exited:
			case <-time.After(5 * time.Second):
			}
			return 0, fmt.Errorf("%w: L1 ended before the command", ErrCrashed)
		}
		m.up = true
		switch kind {
		case frameHello:
			fmt.Fprintf(c.Log, "lab: L1 is up after %.1f s, on kernel %s\n", time.Since(start).Seconds(), c.Kernel.Release)
			if c.Stdin != nil {
				go feed(&out, c.Stdin, taken, over)
			}
			if f := terminal(c); f != nil {
				go followSize(&out, f, over)
			}
		case frameStdout:
			err = write(c.Stdout, p)
		case frameStderr:
			err = write(c.Stderr, p)
		case frameTaken:
			taken <- struct{}{}
		case frameFail:
			return 0, fmt.Errorf("lab: %s", p)
		case frameExit:
			if len(p) != 1 {
				return 0, fmt.Errorf("lab: exit status of %d bytes", len(p))
			}
			return int(p[0]), nil
		}
		if err != nil {
			return 0, fmt.Errorf("lab: pass on the command's output: %w", err)
		}
	}
}

func write(w io.Writer, p []byte) error {
	if w == nil {
		return nil
	}
	_, err := w.Write(p)
	return err
}

// feed sends the command's input, a piece at a time: the next one when the agent has passed on the
// last. It ends with the input or, after the run, with the current read.
func feed(out *frameWriter, in io.Reader, taken, over chan struct{}) {
	buf := make([]byte, maxPayload/2)
	for {
		n, err := in.Read(buf)
		if n > 0 {
			if out.send(frameStdin, buf[:n]) != nil {
				return
			}
			select {
			case <-taken:
			case <-over:
				return
			}
		}
		if err != nil {
			out.send(frameStdin, nil)
			return
		}
	}
}

// postMortem asks QEMU for the state of a wedged L1's processors.
func (m *machine) postMortem(c *Command) {
	if c.Console == nil {
		return
	}
	m.monitor.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.WriteString(m.monitor, "info cpus\ninfo registers -a\n"); err != nil {
		return
	}
	said, _ := io.ReadAll(m.monitor) // ends with the deadline
	m.console.mu.Lock()
	defer m.console.mu.Unlock()
	fmt.Fprintf(c.Console, "\nlab: wedged; QEMU's report on the processors:\n%s", said)
}

// terminal returns the command's input if it is a terminal to pass on.
func terminal(c *Command) *os.File {
	if f, ok := c.Stdin.(*os.File); ok && c.TTY && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}

// rawTerminal puts the input's terminal, if there is one, into raw mode, and tells the agent its
// size.
func rawTerminal(c *Command, j *job) (restore func(), err error) {
	f := terminal(c)
	if f == nil {
		return func() {}, nil
	}
	cols, rows, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("terminal size: %w", err)
	}
	j.Rows, j.Cols = uint16(rows), uint16(cols)
	old, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("terminal to raw mode: %w", err)
	}
	return func() { term.Restore(int(f.Fd()), old) }, nil
}

// followSize passes on changes of the terminal's size.
func followSize(out *frameWriter, f *os.File, over chan struct{}) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	defer signal.Stop(changed)
	for {
		select {
		case <-over:
			return
		case <-changed:
		}
		if cols, rows, err := term.GetSize(int(f.Fd())); err == nil {
			out.send(frameSize, binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, uint16(rows)),
				uint16(cols)))
		}
	}
}

// socketPair returns two connected ends: one to use, one for QEMU.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "lab"), os.NewFile(uintptr(fds[1]), "qemu")
	defer ours.Close() // FileConn makes a copy
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn, theirs, nil
}

func memfile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// tail passes on everything written to it, and keeps the end.
type tail struct {
	mu   sync.Mutex
	also io.Writer
	b    []byte
}

const tailSize = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.also != nil {
		if _, err := t.also.Write(p); err != nil {
			return 0, err
		}
	}
	t.b = append(t.b, p...)
	if n := len(t.b) - tailSize; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

// String returns the end, with the console's line ends as \n.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.ReplaceAll(t.b, []byte("\r"), nil))
}
