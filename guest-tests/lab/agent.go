package lab

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// job is the agent's instructions: the file /lab.json in L1's initramfs.
type job struct {
	Args    []string
	Env     []string
	Dir     string
	User    int // UID and GID of the commands
	Mounts  []share
	Closed  []string // host directories that User cannot enter, which a tmpfs covers, as it does /tmp
	Visible []string // host paths that stay visible below a tmpfs
	Stdin   bool
	TTY     bool
	Merge   bool // stdout and stderr are one stream
	Huge    bool // see hugePages
	Rows    uint16
	Cols    uint16
}

// share is a directory of the host that L1 mounts writable at the same path.
type share struct{ Tag, Path string }

const (
	agentEnv   = "gvm_lab" // the kernel passes unknown key=value parameters to init
	enterName  = "gvm-lab-enter"
	portName   = "gvm.lab"
	hostRoot   = "/h"      // mount point of the host's root
	hiddenRoot = "/hidden" // has the host's directories that a tmpfs covers
	beatPeriod = 2 * time.Second
)

// The program that starts a lab is also the lab's init: its own executable goes into L1's
// initramfs, so that host side and agent are always the same build, and nothing has to be compiled
// or found. This hook runs the agent only in L1: as process 1 with the parameter on the kernel
// command line, or as process 1's child under a special name.
func init() {
	switch {
	case os.Getpid() == 1 && os.Getenv(agentEnv) == "1":
		agentMain()
	case os.Getppid() == 1 && os.Args[0] == enterName:
		fmt.Fprintln(os.Stderr, enter(os.Args[1:]))
		os.Exit(127)
	}
}

func agentMain() {
	a := new(agent)
	err := a.run()
	if a.port == nil {
		// Only the console is left, and an end that the host detects.
		fmt.Fprintln(os.Stderr, "lab agent:", err)
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	a.out.send(frameFail, []byte(err.Error()))
	// The host ends QEMU as soon as it has the frame. Process 1 must not return before: the
	// kernel would panic.
	select {}
}

type agent struct {
	job   job
	port  *os.File
	out   frameWriter
	stdin io.WriteCloser
	pty   *os.File
	next  chan []string // arguments of the next command
}

// run does the commands of the host, and returns the error that ends that.
func (a *agent) run() error {
	for _, m := range []mountPoint{
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"devtmpfs", "/dev", "devtmpfs", 0, ""},
		{"devpts", "/dev/pts", "devpts", 0, "ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", 0, ""},
	} {
		if err := m.mount(); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		if err := os.Symlink("/proc/self/fd"+target, "/dev/"+name); err != nil {
			return err
		}
	}
	// SYSLOG_ACTION_CONSOLE_LEVEL 1: LIO logs every rejected CDB, and each line on an emulated UART
	// takes milliseconds.
	if _, err := unix.Klogctl(unix.SYSLOG_ACTION_CONSOLE_LEVEL, make([]byte, 1)); err != nil {
		return fmt.Errorf("console log level: %w", err)
	}
	text, err := os.ReadFile("/lab.json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &a.job); err != nil {
		return fmt.Errorf("/lab.json: %w", err)
	}
	// LIO uses /etc/target for its database if it exists when target_core_mod loads, and without pr
	// PERSISTENT RESERVE OUT fails. Kernel threads see the initramfs as their root, whichever root
	// commands have.
	for _, d := range []string{"/etc/target/pr", "/etc/target/alua"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	if a.job.Huge {
		if err := hugePages(); err != nil {
			return err
		}
	}
	if err := onlineCPUs(); err != nil {
		return err
	}
	if a.port, err = openPort(); err != nil {
		return err
	}
	a.out.w = a.port
	go func() {
		for {
			a.out.send(frameBeat, nil)
			time.Sleep(beatPeriod)
		}
	}()
	if err := a.mounts(); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if a.job.User != 0 {
		if err := giveDevices(a.job.User); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte("lab")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	for {
		if err := a.command(); err != nil {
			return err
		}
		a.job.Args = <-a.next
		// A process that the last command left behind may be in the way of the next one: process 1
		// sends the signal to all others.
		if err := unix.Kill(-1, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill the last command's processes: %w", err)
		}
	}
}

type mountPoint struct {
	source, target, fs string
	flags              uintptr
	data               string
}

func (m mountPoint) mount() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.source, m.target, m.fs, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.source, m.target, err)
	}
	return nil
}

func (a *agent) mounts() error {
	const p9 = "trans=virtio,version=9p2000.L,msize=524288"
	h := func(p string) string { return filepath.Join(hostRoot, p) }
	ms := []mountPoint{
		{"configfs", "/sys/kernel/config", "configfs", 0, ""},
		{"tracefs", "/sys/kernel/tracing", "tracefs", 0, ""},
		// cache=loose: the host's root does not change during a short run.
		{"root", hostRoot, "9p", unix.MS_RDONLY | unix.MS_NOATIME, p9 + ",cache=loose"},
		{h("/tmp"), hiddenRoot + "/tmp", "", unix.MS_BIND, ""},
		{"tmpfs", h("/tmp"), "tmpfs", 0, "size=80%,mode=1777"},
		{"/dev", h("/dev"), "", unix.MS_BIND | unix.MS_REC, ""},
		{"/proc", h("/proc"), "", unix.MS_BIND, ""},
		{"/sys", h("/sys"), "", unix.MS_BIND | unix.MS_REC, ""},
		{"tmpfs", h("/run"), "tmpfs", 0, "mode=0755"},
	}
	for _, d := range a.job.Closed {
		ms = append(ms, mountPoint{h(d), hiddenRoot + d, "", unix.MS_BIND, ""},
			mountPoint{"tmpfs", h(d), "tmpfs", 0, "mode=0755"})
	}
	for _, m := range ms {
		if err := m.mount(); err != nil {
			return err
		}
	}
	for _, p := range a.job.Visible {
		from := filepath.Join(hiddenRoot, p)
		st, err := os.Stat(from)
		if err != nil {
			return fmt.Errorf("path to be visible: %w", err)
		}
		if !st.IsDir() {
			if err := os.MkdirAll(filepath.Dir(h(p)), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(h(p), nil, 0o600); err != nil {
				return err
			}
			if err := unix.Mount(from, h(p), "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("bind %s: %w", p, err)
			}
			continue
		}
		if err := (mountPoint{from, h(p), "", unix.MS_BIND, ""}).mount(); err != nil {
			return err
		}
	}
	for _, m := range a.job.Mounts {
		// cache=mmap: writes go to the host at once, and mmap of files works.
		if err := (mountPoint{m.Tag, h(m.Path), "9p", 0, p9 + ",cache=mmap"}).mount(); err != nil {
			return err
		}
	}
	return nil
}

// loadModules inserts the modules of the initramfs.
func loadModules() error {
	paths, err := filepath.Glob("/modules/*.ko") // sorted
	if err != nil {
		return err
	}
	for _, path := range paths {
		if strings.HasSuffix(path, "-kvm.ko") {
			if err := calibratedTSC(); err != nil {
				return err
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := unix.InitModule(b, ""); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load module %s: %w", path, err)
		}
		os.Remove(path)
	}
	return nil
}

// calibratedTSC waits until the kernel has measured the frequency of its TSC a second time, a
// second after the first, and has left the clock source tsc-early.
//
// KVM keeps the frequency of its load for guests. Where the second measurement differs from it by
// more than tsc_tolerance_ppm, 250, KVM fails to set each vCPU's frequency, as QEMU's processor
// has no TSC scaling (set_tsc_khz of arch/x86/kvm/x86.c: "user requested TSC rate below hardware
// speed"). It ignores the failure and reads the guest's TSC as 0 from then on. Each deadline timer
// is then late by the time that the guest has run, and its kernel hangs as it first waits for one.
// 4 of 70 labs had it.
func calibratedTSC() error {
	const file = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		name, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("clock source: %w", err)
		}
		if string(name) != "tsc-early\n" {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("the kernel has not calibrated its TSC within 20 s of loading modules")
		}
	}
}

// onlineCPUs starts the processors that the kernel's command line held back. Loading a module
// patches code, most of all in kvm's, and each patch interrupts all processors: a single processor
// loads the modules in a third of the time, and boots faster too.
func onlineCPUs() error {
	cpus, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/online")
	if err != nil {
		return err
	}
	for _, c := range cpus {
		if err := os.WriteFile(c, []byte("1"), 0); err != nil {
			return fmt.Errorf("start processor: %w", err)
		}
	}
	return nil
}

// hugePages makes L1 give huge pages to programs that ask for them (MADV_HUGEPAGE), when they first
// touch the memory and a huge page is free, and never later. A guest then exits to its hypervisor
// once for 2 MiB instead of 4 KiB, and boots in two thirds of the time.
//
// While the kernel moves pages of L2 to form a huge page, L2 can read its own page tables as empty,
// and dies of a triple fault; L1 crashes of it too. Of guests with a busy console three in ten did
// with khugepaged at work, and none without huge pages; with huge pages as set up here, one of some
// fifty guests hung. Command.Fast turns them on.
func hugePages() error {
	const dir = "/sys/kernel/mm/transparent_hugepage/"
	for _, s := range []struct{ file, value string }{
		{"khugepaged/scan_sleep_millisecs", "4294967295"}, // seven weeks
		{"khugepaged/alloc_sleep_millisecs", "4294967295"},
		{"khugepaged/defrag", "0"},
		{"defrag", "never"}, // never compact memory for a huge page
		{"enabled", "madvise"},
	} {
		if err := os.WriteFile(dir+s.file, []byte(s.value), 0); err != nil {
			return fmt.Errorf("transparent huge pages: %w", err)
		}
	}
	return os.WriteFile("/proc/sys/vm/compaction_proactiveness", []byte("0"), 0)
}

// openPort opens the virtio-serial port to the host. Its device node appears after the host's side
// of the port protocol has run, a moment after the driver is loaded.
func openPort() (*os.File, error) {
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if b, err := os.ReadFile(n); err != nil || strings.TrimSpace(string(b)) != portName {
				continue
			}
			f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			return f, err
		}
	}
	return nil, fmt.Errorf("no virtio-serial port %s", portName)
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket for lo: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// giveDevices gives the devices to a group that udev gives to the group kvm, and that of network
// interfaces, as udev does, to all users.
func giveDevices(group int) error {
	for path, mode := range map[string]os.FileMode{
		"/dev/kvm": 0o660, "/dev/vhost-net": 0o660, "/dev/vhost-vsock": 0o660, "/dev/net/tun": 0o666,
	} {
		err := errors.Join(os.Chown(path, 0, group), os.Chmod(path, mode))
		if err != nil && !errors.Is(err, os.ErrNotExist) { // its module is not loaded
			return err
		}
	}
	return nil
}

// command runs the job and reports how it ended.
func (a *agent) command() error {
	files, pumps, err := a.stdio()
	if err != nil {
		return err
	}
	if a.next == nil { // the first one
		a.next = make(chan []string, 1)
		a.out.send(frameHello, nil)
		go a.receive()
	}
	args := append([]string{enterName, a.job.Dir, strconv.Itoa(a.job.User)}, a.job.Args...)
	p, err := os.StartProcess("/proc/self/exe", args, &os.ProcAttr{
		Env:   a.job.Env,
		Dir:   "/",
		Files: files,
		Sys: &syscall.SysProcAttr{
			Setsid:  true,
			Setctty: a.job.TTY,
			// With its own mount namespace the command has the host's root as its root without a
			// chroot, which would forbid user namespaces, while kernel threads still see the
			// initramfs.
			Cloneflags: unix.CLONE_NEWNS,
		},
	})
	if err != nil {
		return fmt.Errorf("start the command: %w", err)
	}
	for _, f := range files {
		f.Close()
	}
	status := reap(p.Pid)
	// A surviving child may hold the output open: bound the wait for it.
	drained := make(chan struct{})
	go func() { pumps.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(time.Second):
	}
	for _, m := range a.job.Mounts {
		if err := syncDir(filepath.Join(hostRoot, m.Path)); err != nil {
			return err
		}
	}
	code := status.ExitStatus()
	if status.Signaled() {
		code = 128 + int(status.Signal())
	}
	return a.out.send(frameExit, []byte{byte(code)})
}

// syncDir writes out one file system, because QEMU is about to be killed. Writing out all of them
// could wait for a disk that a test has broken.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// reap waits for pid, and collects every orphan that process 1 inherits meanwhile, so that no
// zombie looks like a running process.
func reap(pid int) unix.WaitStatus {
	for {
		var st unix.WaitStatus
		got, err := unix.Wait4(-1, &st, 0, nil)
		if err == nil && got == pid && (st.Exited() || st.Signaled()) {
			return st
		}
	}
}

// stdio makes the command's three files, and starts the goroutines that move their data.
func (a *agent) stdio() (files []*os.File, pumps *sync.WaitGroup, err error) {
	pumps = new(sync.WaitGroup)
	pump := func(kind byte, r *os.File) {
		pumps.Go(func() {
			buf := make([]byte, maxPayload/2)
			for {
				n, err := r.Read(buf)
				if n > 0 {
					a.out.send(kind, buf[:n])
				}
				if err != nil {
					return
				}
			}
		})
	}
	if a.job.TTY {
		master, slave, err := openPTY(a.job.Rows, a.job.Cols)
		if err != nil {
			return nil, nil, err
		}
		a.stdin, a.pty = master, master
		pump(frameStdout, master)
		return []*os.File{slave, slave, slave}, pumps, nil
	}
	in, err := os.Open("/dev/null")
	if err != nil {
		return nil, nil, err
	}
	if a.job.Stdin {
		if in, a.stdin, err = pipe(); err != nil {
			return nil, nil, err
		}
	}
	or, ow, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	pump(frameStdout, or)
	if a.job.Merge {
		return []*os.File{in, ow, ow}, pumps, nil
	}
	er, ew, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	pump(frameStderr, er)
	return []*os.File{in, ow, ew}, pumps, nil
}

func pipe() (*os.File, io.WriteCloser, error) {
	r, w, err := os.Pipe()
	return r, w, err
}

func openPTY(rows, cols uint16) (master, slave *os.File, err error) {
	if master, err = os.OpenFile("/dev/pts/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, fmt.Errorf("unlock pty: %w", err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		return nil, nil, fmt.Errorf("pty number: %w", err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	return master, slave, setSize(master, rows, cols)
}

func setSize(f *os.File, rows, cols uint16) error {
	if rows == 0 || cols == 0 {
		return nil
	}
	if err := unix.IoctlSetWinsize(int(f.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}); err != nil {
		return fmt.Errorf("terminal size: %w", err)
	}
	return nil
}

// receive handles the host's frames. The host sends one frameStdin at a time, so a command that
// does not read its input blocks only input.
func (a *agent) receive() {
	in := make(chan []byte, 1)
	go func() {
		for p := range in {
			if len(p) == 0 {
				if a.pty == nil {
					a.stdin.Close()
				}
				continue
			}
			a.stdin.Write(p)
			a.out.send(frameTaken, nil)
		}
	}()
	r := bufio.NewReaderSize(a.port, maxPayload)
	buf := make([]byte, maxPayload)
	for {
		kind, p, err := readFrame(r, buf)
		switch {
		case errors.Is(err, io.EOF): // the host has not connected, or has left
			time.Sleep(beatPeriod)
		case err != nil:
			return
		case kind == frameStdin && a.stdin != nil:
			in <- append([]byte(nil), p...)
		case kind == frameSize && a.pty != nil && len(p) == 4:
			setSize(a.pty, binary.LittleEndian.Uint16(p), binary.LittleEndian.Uint16(p[2:]))
		case kind == frameNext:
			var args []string
			if err := json.Unmarshal(p, &args); err == nil {
				a.next <- args
			}
		}
	}
}

// enter makes the host's root this process's root, and executes the command in the new mount
// namespace, as a user in no other group. It returns only an error.
func enter(args []string) error {
	dir, user, args := args[0], args[1], args[2:]
	if err := os.Chdir(hostRoot); err != nil {
		return err
	}
	// As in switch_root: pivot_root cannot move the first root file system.
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("lab: move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("lab: chroot: %w", err)
	}
	if err := os.Chdir(dir); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if user != "0" {
		uid, err := strconv.Atoi(user)
		if err == nil {
			err = errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid))
		}
		if err != nil {
			return fmt.Errorf("lab: become user %s: %w", user, err)
		}
	}
	return fmt.Errorf("lab: exec %s: %w", path, unix.Exec(path, args, os.Environ()))
}
