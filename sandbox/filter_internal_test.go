package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// call is a system call as a filter sees it.
type call struct {
	nr   int
	arch uint32
	args [6]uint64
}

// word returns 32 bits of struct seccomp_data.
func (c *call) word(off uint32) uint32 {
	switch {
	case off == offsetNumber:
		return uint32(c.nr)
	case off == offsetArch:
		return c.arch
	}
	arg := c.args[(off-offsetArgs)/8]
	return uint32(arg >> (8 * (off & 4)))
}

// run runs a program, and returns its answer and the number of steps.
func run(program []unix.SockFilter, c call) (answered uint32, steps int) {
	var a uint32
	for pc := 0; ; pc++ {
		steps++
		switch i := program[pc]; i.Code {
		case load:
			a = c.word(i.K)
		case and:
			a &= i.K
		case jump:
			pc += int(i.K)
		case jumpEqual, jumpAtLeast:
			if i.Code == jumpEqual && a == i.K || i.Code == jumpAtLeast && a >= i.K {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		case answer:
			return i.K, steps
		default:
			panic(fmt.Sprintf("instruction %#x", i.Code))
		}
	}
}

const (
	allUses = Shares | Vhost | Tap | Connect | Child | Broker
	testPID = 4711
	refused = unix.SECCOMP_RET_USER_NOTIF
)

// TestFilter runs the filter on every system call: those of the table, as the rows allow them, and
// all others, which it refuses.
func TestFilter(t *testing.T) {
	rows := calls(&Policy{Uses: allUses, Groups: []int{815}}, testPID)
	program := compile(rows, refused)
	check := func(what string, c call, want uint32) {
		t.Helper()
		if c.arch == 0 {
			c.arch = unix.AUDIT_ARCH_X86_64
		}
		if got, steps := run(program, c); got != want || steps > 120 {
			t.Errorf("%s: %#x in %d steps, want %#x", what, got, steps, want)
		}
	}
	known := map[int]bool{}
	for _, row := range rows {
		known[int(row.Number)] = true
		c := call{nr: int(row.Number)}
		for _, a := range row.Args {
			shift := 0
			if a.High {
				shift = 32
			}
			c.args[a.Index] |= uint64(a.Values[len(a.Values)-1]) << shift
		}
		want := uint32(unix.SECCOMP_RET_ALLOW)
		first := slices.IndexFunc(rows, func(r Call) bool { return r.Number == row.Number })
		if row.Errno != 0 && first >= 0 && rows[first].Errno != 0 {
			want = unix.SECCOMP_RET_ERRNO | uint32(row.Errno)
		}
		check(callName(c.nr), c, want)
	}
	for nr := -1; nr < 600; nr++ {
		if !known[nr] {
			check(callName(nr), call{nr: nr}, refused)
		}
	}
	const x32 = 0x40000000
	for _, c := range []struct {
		what string
		call
		allowed bool
	}{
		{"a call of i386", call{nr: unix.SYS_READ, arch: unix.AUDIT_ARCH_I386}, false},
		{"a call of x32", call{nr: x32 | unix.SYS_READ}, false},
		{"code", call{nr: unix.SYS_MMAP, args: [6]uint64{2: unix.PROT_READ | unix.PROT_EXEC}}, false},
		{"data", call{nr: unix.SYS_MMAP, args: [6]uint64{2: unix.PROT_READ | unix.PROT_WRITE}}, true},
		{"code by mprotect", call{nr: unix.SYS_MPROTECT, args: [6]uint64{2: unix.PROT_EXEC}}, false},
		{"a thread of Go", call{nr: unix.SYS_CLONE, args: [6]uint64{0xd0f00}}, true},
		{"a thread of the C library", call{nr: unix.SYS_CLONE, args: [6]uint64{0x3d0f00}}, true},
		{"fork", call{nr: unix.SYS_CLONE, args: [6]uint64{uint64(unix.SIGCHLD)}}, false},
		{"a thread with a namespace", call{nr: unix.SYS_CLONE, args: [6]uint64{0x50f00 | unix.CLONE_NEWNS}}, false},
		{"a signal to itself", call{nr: unix.SYS_TGKILL, args: [6]uint64{testPID, 4712, 23}}, true},
		{"a signal to another", call{nr: unix.SYS_TGKILL, args: [6]uint64{1, 1, 23}}, false},
		{"the end of its group", call{nr: unix.SYS_KILL, args: [6]uint64{-815 & (1<<64 - 1), 9}}, true},
		{"another group", call{nr: unix.SYS_KILL, args: [6]uint64{-816 & (1<<64 - 1), 9}}, false},
		{"a socket of the Internet", call{nr: unix.SYS_SOCKET, args: [6]uint64{unix.AF_INET}}, false},
		{"a socket of netlink", call{nr: unix.SYS_SOCKET, args: [6]uint64{unix.AF_NETLINK}}, false},
		{"own limits", call{nr: unix.SYS_PRLIMIT64, args: [6]uint64{3: 0x7fff12345678}}, true},
		{"limits of another", call{nr: unix.SYS_PRLIMIT64, args: [6]uint64{0: 1}}, false},
		{"new limits", call{nr: unix.SYS_PRLIMIT64, args: [6]uint64{2: 0x7fff00000000}}, false},
		{"typing for the user", call{nr: unix.SYS_IOCTL, args: [6]uint64{1: unix.TIOCSTI}}, false},
		{"letting a call through", call{nr: unix.SYS_IOCTL, args: [6]uint64{1: unix.SECCOMP_IOCTL_NOTIF_SEND}}, false},
		{"more bits than the kernel takes", call{nr: unix.SYS_IOCTL, args: [6]uint64{1: 1<<32 | 0xae80}}, true},
		{"a device", call{nr: unix.SYS_MKNODAT, args: [6]uint64{2: unix.S_IFCHR | 0o600}}, false},
		{"a FIFO", call{nr: unix.SYS_MKNODAT, args: [6]uint64{2: unix.S_IFIFO | 0o600}}, true},
		{"signals by fcntl", call{nr: unix.SYS_FCNTL, args: [6]uint64{1: unix.F_SETOWN}}, false},
	} {
		want := uint32(refused)
		if c.allowed {
			want = unix.SECCOMP_RET_ALLOW
		}
		check(c.what, c.call, want)
	}
	if n := len(program); n > unix.BPF_MAXINSNS/2 {
		t.Errorf("%d instructions", n)
	}
	kvmRun := call{nr: unix.SYS_IOCTL, arch: unix.AUDIT_ARCH_X86_64, args: [6]uint64{1: 0xae80}}
	if _, steps := run(program, kvmRun); steps > 40 {
		t.Errorf("KVM_RUN takes %d steps", steps)
	}
}

// TestUses: a machine without a device has not got the calls of that.
func TestUses(t *testing.T) {
	for use, c := range map[Use]call{
		Shares:  {nr: unix.SYS_FCHOWNAT},
		Vhost:   {nr: unix.SYS_IOCTL, args: [6]uint64{1: 0xaf01}},
		Tap:     {nr: unix.SYS_IOCTL, args: [6]uint64{1: unix.TUNSETQUEUE}},
		Connect: {nr: unix.SYS_SOCKET, args: [6]uint64{unix.AF_UNIX}},
		Child:   {nr: unix.SYS_PIDFD_SEND_SIGNAL},
	} {
		c.arch = unix.AUDIT_ARCH_X86_64
		if got, _ := run(compile(calls(&Policy{Uses: use}, testPID), refused), c); got != unix.SECCOMP_RET_ALLOW {
			t.Errorf("%s with its use: %#x", callName(c.nr), got)
		}
		if got, _ := run(compile(calls(&Policy{Uses: allUses &^ (use | Shares)}, testPID), refused), c); got != refused {
			t.Errorf("%s without its use: %#x", callName(c.nr), got)
		}
	}
}

// TestRequests compares the requests of ioctl with the numbers that C programs printed.
func TestRequests(t *testing.T) {
	numbers := map[string]uint32{}
	for _, dir := range []string{"../kvmapi", "../kvmapi/vhost"} {
		b, err := os.ReadFile(filepath.Join(dir, "testdata/abi.golden"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "value" {
				n, err := strconv.ParseUint(f[2], 10, 32)
				if err == nil {
					numbers[f[1]] = uint32(n)
				}
			}
		}
	}
	for i, name := range rowComments(t, "ioctls") {
		got := ioctls[i].Request
		want, ok := numbers[name]
		if kernel := strings.HasPrefix(name, "KVM_") || strings.HasPrefix(name, "VHOST_"); kernel && (!ok || want != got) {
			t.Errorf("%s is %#x, want %#x", name, got, want)
		}
		delete(numbers, name)
	}
	for name, n := range numbers { // those that gvm uses before the sandbox
		if n>>8&0xff == 0xaf || n>>8&0xff == 0xae && n>>30 != 0 {
			t.Errorf("%s is not in the table", name)
		}
	}
}

// TestNames: names of system calls are at their numbers.
func TestNames(t *testing.T) {
	for nr, want := range map[int]string{0: "read", unix.SYS_EXECVE: "execve", unix.SYS_CONNECT: "connect",
		unix.SYS_STATX: "statx", unix.SYS_IO_URING_SETUP: "io_uring_setup", unix.SYS_CLONE3: "clone3",
		unix.SYS_LANDLOCK_CREATE_RULESET: "landlock_create_ruleset", 400: "of number 400", -1: "of number -1"} {
		if got := callName(nr); got != want {
			t.Errorf("%d is %s, want %s", nr, got, want)
		}
	}
}

// TestRights: a version of Landlock gets no rights that it does not know.
func TestRights(t *testing.T) {
	for abi, want := range map[int]uint64{1: 0x1fff, 2: 0x3fff, 3: 0x7fff, 4: 0x7fff, 5: 0xffff, 7: 0xffff} {
		if got := handledFS(abi); got != want {
			t.Errorf("version %d: %#x, want %#x", abi, got, want)
		}
		a := ruleset(abi, 0)
		if net := a.Handled_access_net != 0; net != (abi >= 4) {
			t.Errorf("version %d: network %v", abi, net)
		}
		if scoped := a.Scoped != 0; scoped != (abi >= 6) {
			t.Errorf("version %d: scope %v", abi, scoped)
		}
	}
	if ruleset(7, Child).Scoped&unix.LANDLOCK_SCOPE_SIGNAL != 0 {
		t.Error("no signal reaches a child")
	}
}
