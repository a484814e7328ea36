// Package sandbox gives up rights of this process that it no longer needs, so that a guest that has
// taken it over has little: the system calls of a table (seccomp), the files of a list (Landlock),
// no new privileges, few capabilities, no descriptors that it inherited, and no debugger.
//
// Prepare and Enter are for a program that has everything open. There is no way back.
package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"gvm/panics"
)

// Mode says whether a process gives up rights.
type Mode int

// Modes.
const (
	Off    Mode = iota
	On          // as far as the kernel can take them
	Strict      // all, or Enter fails
)

// ModeNames are the names of the modes.
var ModeNames = [...]string{"off", "on", "strict"}

func (m Mode) String() string { return ModeNames[m] }

// ParseMode returns the mode of a name.
func ParseMode(name string) (m Mode, ok bool) {
	i := slices.Index(ModeNames[:], name)
	return Mode(max(i, 0)), i >= 0
}

// Right is a set of rights to files.
type Right uint8

// Rights to a file, or to all files below a directory.
const (
	Read      Right = 1 << iota // read files and directories
	Write                       // change files
	Make                        // make files, directories and links
	Remove                      // remove files, and replace them by a rename
	RemoveDir                   // remove empty directories
)

// Path is a file or directory with the rights to it and to all below it.
type Path struct {
	Name   string
	Rights Right
	Own    bool // this user's, who needs no capability for them
}

// Use is a set of things for which a process needs more system calls.
type Use uint16

// Uses.
const (
	Shares  Use = 1 << iota // serves directories of the host to the guest
	Vhost                   // has the kernel serve devices
	Tap                     // serves TAP interfaces
	Connect                 // connects to unix sockets
	Child                   // waits for and ends a child
	Broker                  // waits for the broker, a child that ends by itself
)

// Policy is the rights that a process keeps.
type Policy struct {
	Mode  Mode
	Paths []Path // those that the process cannot open, such as one that does not exist, are left out
	Uses  Use
	// Groups are process groups that it may signal.
	Groups []int
	// Refused is called, once, if a system call is refused. The call never returns. nil ends the
	// process with status 1.
	Refused func(Refusal)
}

// Report tells of the sandbox that a process is in.
type Report struct {
	Landlock     int      // version of Landlock's interface; 0: files are not confined
	Calls        int      // number of system calls that are allowed
	Notify       bool     // a refused call is handed to Policy.Refused, and else is a SIGSYS
	Capabilities []string // those that are left
	Missing      []string // the features that the kernel or the program lacks, and the effect
}

// The kernel: variables, for tests of older ones.
var (
	kernelABI = landlockVersion
	install   = loadFilter
)

// Check reports the sandbox that this kernel allows, without entering it.
func Check() Report {
	r := Report{Landlock: kernelABI()}
	if r.Landlock == 0 {
		r.lack("this kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, and landlock in lsm=): files are not confined")
	}
	if err := haveSeccomp(); err != nil {
		r.lack("this kernel has no seccomp filters (%v): system calls are not confined", err)
	}
	return r
}

func (r *Report) lack(format string, args ...any) {
	r.Missing = append(r.Missing, fmt.Sprintf(format, args...))
}

// entered is set by the first Prepare.
var entered atomic.Bool

// Prepared is the part of Enter that can be made earlier.
type Prepared struct {
	policy  Policy
	report  Report
	rules   int // of Landlock; -1: none
	program []unix.SockFilter
	err     error
}

// Prepare begins to give up rights: it closes the descriptors that the process has from its parent,
// and opens the paths of p. It may run beside the rest of the start; Enter returns its error.
func Prepare(p Policy) *Prepared {
	s := &Prepared{policy: p, rules: -1}
	if p.Mode == Off {
		return s
	}
	if entered.Swap(true) {
		s.err = errors.New("the process has entered one")
		return s
	}
	s.report = Check()
	if p.Mode == Strict && len(s.report.Missing) > 0 {
		s.err = s.report.strictError()
		return s
	}
	closeInherited()
	if s.report.Landlock > 0 {
		attr := ruleset(s.report.Landlock, p.Uses)
		if s.rules, s.err = createRuleset(&attr); s.err != nil {
			return s
		}
		for _, path := range p.Paths {
			if s.err = addRule(s.rules, path, attr.Handled_access_fs); s.err != nil {
				return s
			}
		}
	}
	list := calls(&p, os.Getpid())
	s.report.Calls, s.program = len(list), compile(list, unix.SECCOMP_RET_USER_NOTIF)
	return s
}

// Allow adds a path, of a file that Prepare may not have found yet, before Enter, which returns its
// error.
func (s *Prepared) Allow(p Path) {
	s.policy.Paths = append(s.policy.Paths, p)
	if s.rules >= 0 && s.err == nil {
		s.err = addRule(s.rules, p, handledFS(s.report.Landlock))
	}
}

// Enter gives up all rights but those of the policy, in all threads. After an error some of them
// may be gone; it is for the caller to end. A process may enter once.
func (s *Prepared) Enter() (Report, error) {
	if s.policy.Mode == Off {
		return Report{}, nil
	}
	if s.rules >= 0 {
		defer unix.Close(s.rules)
	}
	if s.err != nil {
		return s.report, fmt.Errorf("sandbox: %w (--sandbox=off runs without)", s.err)
	}
	runtime.LockOSThread() // no_new_privs is the thread's until seccomp has it in all
	defer runtime.UnlockOSThread()
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"PR_SET_DUMPABLE", undump},
		{"Landlock", s.enterLandlock},
		{"capabilities", s.dropCapabilities},
		{"seccomp", s.enterSeccomp},
	} {
		if err := step.do(); err != nil {
			return s.report, fmt.Errorf("sandbox: %s: %w (--sandbox=off runs without)", step.name, err)
		}
	}
	if s.policy.Mode == Strict && len(s.report.Missing) > 0 {
		return s.report, s.report.strictError()
	}
	return s.report, nil
}

func (r *Report) strictError() error {
	return fmt.Errorf("--sandbox=strict: %s; --sandbox=on runs without", strings.Join(r.Missing, "; "))
}

// closeInherited closes descriptors that the process has from its parent: its own have the flag
// close-on-exec, which none had that came through an exec.
func closeInherited() {
	names, err := os.ReadDir("/proc/self/fd")
	var fds []int
	for _, n := range names {
		if fd, err := strconv.Atoi(n.Name()); err == nil {
			fds = append(fds, fd)
		}
	}
	if err != nil { // no /proc
		for fd := range 256 {
			fds = append(fds, fd)
		}
	}
	for _, fd := range fds {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); fd > 2 && err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd)
		}
	}
}

// undump keeps other processes of the user from reading this one's memory, which a core would have.
func undump() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }

// landlockRights are Landlock's rights for each of Right, and the rest of those that a version of
// its interface knows.
var landlockRights = []struct {
	right Right
	files uint64 // rights that a file can have too
	dirs  uint64
}{
	{Read, unix.LANDLOCK_ACCESS_FS_READ_FILE, unix.LANDLOCK_ACCESS_FS_READ_DIR},
	{Write, unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE, 0},
	{Make, 0, unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_SYM |
		unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_REFER},
	{Remove, 0, unix.LANDLOCK_ACCESS_FS_REMOVE_FILE},
	{RemoveDir, 0, unix.LANDLOCK_ACCESS_FS_REMOVE_DIR},
}

// handledFS returns the rights to files that a version of Landlock can take.
func handledFS(abi int) uint64 {
	all := uint64(unix.LANDLOCK_ACCESS_FS_REFER - 1)
	for _, later := range []struct {
		abi   int
		right uint64
	}{{2, unix.LANDLOCK_ACCESS_FS_REFER}, {3, unix.LANDLOCK_ACCESS_FS_TRUNCATE}, {5, unix.LANDLOCK_ACCESS_FS_IOCTL_DEV}} {
		if abi >= later.abi {
			all |= later.right
		}
	}
	return all
}

// ruleset returns the rights that Landlock takes from a process with the uses.
func ruleset(abi int, uses Use) (a unix.LandlockRulesetAttr) {
	a.Handled_access_fs = handledFS(abi)
	if abi >= 4 {
		a.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	}
	if abi >= 6 {
		a.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
		if uses&Child == 0 { // which is outside
			a.Scoped |= unix.LANDLOCK_SCOPE_SIGNAL
		}
	}
	return a
}

// enterLandlock confines the process to the files of the policy.
func (s *Prepared) enterLandlock() error {
	if s.rules < 0 {
		return nil
	}
	// CAP_SYS_ADMIN does as well, and seccomp sets it in all threads later.
	have, err := capget()
	if err == nil && have.effective>>unix.CAP_SYS_ADMIN&1 == 0 {
		err = allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0)
	}
	if err == nil {
		err = allThreads(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(s.rules), 0, 0)
	}
	if errors.Is(err, unix.ENOTSUP) {
		s.report.Landlock = 0
		s.report.lack("a gvm that is built with cgo cannot confine all of its threads: files are not confined")
		return nil
	}
	return err
}

// allThreads makes a system call in each thread.
func allThreads(trap, a1, a2, a3 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, a3, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// addRule gives the rights to a path, unless the process cannot open it: then it has none to keep.
// handled are the rights that Landlock knows.
func addRule(rules int, p Path, handled uint64) error {
	fd, err := unix.Open(p.Name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil { // FUSE, of another user
		return nil
	}
	var access uint64
	for _, row := range landlockRights {
		if p.Rights&row.right != 0 {
			if access |= row.files; st.Mode&unix.S_IFMT == unix.S_IFDIR {
				access |= row.dirs
			}
		}
	}
	if access &= handled; access == 0 {
		return nil
	}
	if err := addPathRule(rules, fd, access); err != nil {
		return &fs.PathError{Op: "landlock_add_rule", Path: p.Name, Err: err}
	}
	return nil
}

// capabilities are those that a process with the rights to paths, or with the uses, keeps if it has
// them: they let it have files of other users.
var capabilities = []struct {
	name   string
	number int
	paths  bool // with paths that it changes, else with Shares alone
}{
	{"chown", unix.CAP_CHOWN, false},
	{"dac_override", unix.CAP_DAC_OVERRIDE, true},
	{"fowner", unix.CAP_FOWNER, false},
	{"fsetid", unix.CAP_FSETID, false},
}

// dropCapabilities drops all capabilities but those of the table.
func (s *Prepared) dropCapabilities() error {
	p, r := &s.policy, &s.report
	have, err := capget()
	if err != nil {
		return err
	}
	changes := false
	for _, path := range p.Paths {
		changes = changes || !path.Own && path.Rights&^Read != 0
	}
	var keep uint64
	for _, c := range capabilities {
		if have.permitted>>c.number&1 != 0 && (p.Uses&Shares != 0 || c.paths && changes) {
			keep |= 1 << c.number
			r.Capabilities = append(r.Capabilities, c.name)
		}
	}
	if have.permitted|have.effective|have.inheritable == 0 {
		return nil
	}
	err = capset(keep)
	if errors.Is(err, unix.ENOTSUP) {
		r.Capabilities = nil
		r.lack("a gvm that is built with cgo cannot drop the capabilities of all its threads: they are kept")
		return nil
	}
	return err
}

// enterSeccomp installs the filter of the table in all threads.
func (s *Prepared) enterSeccomp() error {
	if haveSeccomp() != nil {
		return nil
	}
	r := &s.report
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	// The listener takes the calls that are refused, and cannot let them through: the ioctl for that
	// is not in the table.
	fd, err := install(s.program, unix.SECCOMP_FILTER_FLAG_TSYNC|
		unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH|unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EBUSY) {
		// Before Linux 5.7, or below another listener. Go ends the process at the signal SIGSYS.
		r.lack("this kernel gives no notice of a refused system call (Linux 5.7 does, unless a container's manager has " +
			"it): it ends gvm with a dump")
		_, err = install(compile(calls(&s.policy, os.Getpid()), unix.SECCOMP_RET_TRAP), unix.SECCOMP_FILTER_FLAG_TSYNC)
		return err
	}
	if err != nil {
		return err
	}
	r.Notify = true
	return watch(fd, s.policy.Refused)
}

// Refusal is a system call that the filter refused.
type Refusal struct {
	Name   string
	Number int
	Args   [6]uint64
	Arch   uint32 // AUDIT_ARCH_X86_64, or another of a call by int 0x80
}

// String is the message for the user, on one line.
func (c Refusal) String() string {
	if c.Arch != unix.AUDIT_ARCH_X86_64 {
		return fmt.Sprintf("the sandbox refused a 32-bit system call (%d)%s", c.Number, askReport)
	}
	return fmt.Sprintf("the sandbox refused the system call %s (%d), arguments %#x %#x %#x%s", c.Name, c.Number, c.Args[0],
		c.Args[1], c.Args[2], askReport)
}

const askReport = ": this is a bug in gvm, or an attack by the guest; please report it with this line " +
	"(--sandbox=off runs without)"

// watch hands the first refused call to refused, and ends the process.
//
// The call waits for an answer that never comes. If Go's runtime does not know that it may wait
// (syscall.RawSyscall), that can hold up the runtime and refused with it: the garbage collector
// waits for the call's goroutine. So the listener's thread, which needs nothing of the runtime,
// closes the listener a little later, by which the call returns with ENOSYS.
func watch(fd int, refused func(Refusal)) error {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return err
	}
	file, n := os.NewFile(uintptr(wake), "eventfd"), new(notification)
	end := sync.OnceFunc(func() {
		if refused != nil {
			refused(n.refusal())
		}
		os.Exit(1)
	})
	panics.Go(func() {
		if listen(fd, wake, n) == 0 {
			end()
		}
	})
	panics.Go(func() {
		if _, err := file.Read(make([]byte, 8)); err == nil {
			end()
		}
	})
	return nil
}
