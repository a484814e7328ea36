package sandbox

import "golang.org/x/sys/unix"

// Call is a row of the table of system calls: one that is allowed, or answered with an error. Of
// several rows with one number the first that applies counts. The comment at its end gives its use.
type Call struct {
	Args   []Arg // all must match; nil: any
	Number uint16
	Use    Use    // a process without any of these uses has not got the row; 0: each has it
	Errno  uint16 // the answer; 0: it is allowed
}

// Arg is a condition for an argument: after the mask its lower half, or with High the upper one, is
// one of the values. The kernel takes no more than the lower half of those that the table compares,
// except of pointers.
type Arg struct {
	Values []uint32
	Mask   uint32 // 0: all bits
	Index  uint8
	High   bool
	Own    bool // the value is this process's ID
	Groups bool // the values are the process groups of Policy.Groups, negative
}

// calls returns the rows for a process.
func calls(p *Policy, pid int) (list []Call) {
	for _, c := range table {
		if c.Use != 0 && c.Use&p.Uses == 0 {
			continue
		}
		if len(c.Args) > 0 && c.Args[0].Own {
			c.Args = []Arg{{Values: []uint32{uint32(pid)}}}
		}
		if len(c.Args) > 0 && c.Args[0].Groups {
			var groups Arg
			for _, g := range p.Groups {
				groups.Values = append(groups.Values, uint32(-g))
			}
			c.Args = []Arg{groups}
		}
		list = append(list, c)
	}
	requests := Arg{Index: 1}
	for _, r := range ioctls {
		if r.Use == 0 || r.Use&p.Uses != 0 {
			requests.Values = append(requests.Values, r.Request)
		}
	}
	return append(list, Call{Number: unix.SYS_IOCTL, Args: []Arg{requests}})
}

// Flags of clone: those that every thread of Go and of the C library has, and those that one may
// have.
const (
	threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD
	moreFlags   = unix.CLONE_SYSVSEM | unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID |
		unix.CLONE_CHILD_SETTID | unix.CLONE_DETACHED
)

const prSetVMA = 0x53564d41 // PR_SET_VMA (linux/prctl.h)

// table has the system calls of a machine that runs, and of its end. ioctl is not here: see ioctls.
var table = []Call{
	// Files and sockets that are open.
	{Number: unix.SYS_READ},            // the console, eventfds, the control socket
	{Number: unix.SYS_WRITE},           // the same
	{Number: unix.SYS_READV},           // network frames
	{Number: unix.SYS_WRITEV},          // network frames, answers of the control socket
	{Number: unix.SYS_PREAD64},         // files of disks and beside them; KVM's statistics
	{Number: unix.SYS_PWRITE64},        // files of disks and beside them
	{Number: unix.SYS_PREADV},          // disks
	{Number: unix.SYS_PWRITEV},         // disks
	{Number: unix.SYS_PREADV2},         // disks (RWF_NOWAIT), eventfds
	{Number: unix.SYS_PWRITEV2},        // disks (RWF_DSYNC)
	{Number: unix.SYS_LSEEK},           // holes of disks, directories
	{Number: unix.SYS_FSTAT},           // sizes of disks
	{Number: unix.SYS_FSTATFS},         // the kind of file system of an image
	{Number: unix.SYS_FSYNC},           // flushes
	{Number: unix.SYS_FDATASYNC},       // flushes
	{Number: unix.SYS_SYNC_FILE_RANGE}, // writing back at the end
	{Number: unix.SYS_FALLOCATE},       // UNMAP, WRITE SAME
	{Number: unix.SYS_FTRUNCATE},       // gvm disk resize
	{Number: unix.SYS_COPY_FILE_RANGE}, // POPULATE TOKEN, EXTENDED COPY
	{Number: unix.SYS_SENDFILE},        // Go's io.Copy of a file to a socket
	{Number: unix.SYS_SPLICE},          // Go's io.Copy between sockets
	{Number: unix.SYS_PIPE2},           // Go's splice
	{Number: unix.SYS_CLOSE},           // every end
	{Number: unix.SYS_FCNTL, Args: []Arg{{Index: 1, Values: []uint32{unix.F_GETFD, unix.F_SETFD, unix.F_GETFL,
		unix.F_SETFL, unix.F_DUPFD_CLOEXEC, unix.F_OFD_SETLK, unix.F_OFD_GETLK, unix.F_SETLK, unix.F_GETLK,
		unix.F_GET_SEALS,
	}}}}, // locks of images and of the machine's name, flags of descriptors; none that sends signals
	{Number: unix.SYS_FLOCK},        // the lock of the machine's name
	{Number: unix.SYS_PPOLL},        // doorbells, the console's input
	{Number: unix.SYS_POLL},         // the same, in a build with cgo
	{Number: unix.SYS_EPOLL_CTL},    // Go's poller
	{Number: unix.SYS_EPOLL_PWAIT},  // Go's poller
	{Number: unix.SYS_EPOLL_WAIT},   // Go's poller
	{Number: unix.SYS_EVENTFD2},     // doorbells and interrupts of a driver's queues
	{Number: unix.SYS_MEMFD_CREATE}, // guest RAM of --shared-memory after a reset; gvm disk add mem:

	// Files by name: which, is Landlock's.
	{Number: unix.SYS_OPENAT},                               // reservations, cached kernels after a reset
	{Number: unix.SYS_NEWFSTATAT},                           // the socket that is removed at the end: is it still gvm's?
	{Number: unix.SYS_READLINKAT},                           // absolute paths of disks
	{Number: unix.SYS_GETCWD},                               // absolute paths of disks
	{Number: unix.SYS_GETDENTS64},                           // shared directories, those of gvm replay
	{Number: unix.SYS_UNLINKAT},                             // the machine's directory at the end
	{Number: unix.SYS_MKDIRAT},                              // the guest makes directories; a lost cache of kernels
	{Number: unix.SYS_RENAMEAT},                             // reservations are replaced whole
	{Number: unix.SYS_UTIMENSAT, Use: Shares},               // the guest sets times
	{Number: unix.SYS_UTIMENSAT, Errno: uint16(unix.EPERM)}, // the use of a cached kernel; gvm goes on
	{Number: unix.SYS_STATX, Use: Shares},                   // attributes of shared files
	{Number: unix.SYS_FACCESSAT, Use: Shares},               // a shared directory
	{Number: unix.SYS_FACCESSAT2, Use: Shares},              // a shared directory
	{Number: unix.SYS_FCHMODAT, Use: Shares},                // the guest sets modes
	{Number: unix.SYS_FCHOWNAT, Use: Shares},                // the guest sets owners
	{Number: unix.SYS_LINKAT, Use: Shares},                  // the guest makes links
	{Number: unix.SYS_SYMLINKAT, Use: Shares},               // the guest makes links
	{Number: unix.SYS_MKNODAT, Use: Shares, Args: []Arg{
		{Index: 2, Mask: unix.S_IFMT,
			Values: []uint32{0, unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK}},
	}}, // the guest makes files that are no devices
	{Number: unix.SYS_RENAMEAT2, Use: Shares},   // the guest renames files
	{Number: unix.SYS_GETXATTR, Use: Shares},    // extended attributes of shared files
	{Number: unix.SYS_SETXATTR, Use: Shares},    // extended attributes of shared files
	{Number: unix.SYS_LISTXATTR, Use: Shares},   // extended attributes of shared files
	{Number: unix.SYS_REMOVEXATTR, Use: Shares}, // extended attributes of shared files
	{Number: unix.SYS_SYNCFS, Use: Shares},      // the guest flushes its file system

	// Sockets that are open. There is no socket(2), and no bind(2).
	{Number: unix.SYS_ACCEPT4},     // clients of the control socket, gdb
	{Number: unix.SYS_GETSOCKNAME}, // Go's package net, for each client
	{Number: unix.SYS_GETPEERNAME}, // Go's package net, for each client
	{Number: unix.SYS_GETSOCKOPT},  // the user of a client
	{Number: unix.SYS_SETSOCKOPT},  // Go's package net, for each client
	{Number: unix.SYS_SHUTDOWN},    // the end of one direction
	{Number: unix.SYS_RECVMSG},     // descriptors from the broker
	{Number: unix.SYS_SENDMSG},     // requests to the broker
	{Number: unix.SYS_RECVFROM},    // Go's package net
	{Number: unix.SYS_SENDTO},      // Go's package net
	{Number: unix.SYS_SOCKET, Use: Connect, Args: []Arg{
		{Index: 0, Values: []uint32{unix.AF_UNIX}},
	}}, // --vsock unix: the guest's connections to this host
	{Number: unix.SYS_CONNECT, Use: Connect}, // --vsock unix

	// Memory. None of it becomes code.
	{Number: unix.SYS_MMAP, Args: []Arg{
		{Index: 2, Mask: unix.PROT_EXEC, Values: []uint32{0}},
	}}, // Go's heap, guest RAM and vCPUs after a reset; never executable
	{Number: unix.SYS_MPROTECT, Args: []Arg{
		{Index: 2, Mask: unix.PROT_EXEC, Values: []uint32{0}},
	}}, // Go's heap; never executable
	{Number: unix.SYS_MUNMAP},  // Go's heap, the end of the machine
	{Number: unix.SYS_MADVISE}, // Go's heap, the balloon
	{Number: unix.SYS_MINCORE}, // resident guest memory in gvm inspect
	{Number: unix.SYS_BRK},     // the C library's heap, in a build with cgo

	// Threads, time, signals.
	{Number: unix.SYS_CLONE, Args: []Arg{
		{Index: 0, Mask: ^uint32(moreFlags), Values: []uint32{threadFlags}},
	}}, // threads of Go; no process
	{Number: unix.SYS_CLONE3, Errno: uint16(unix.ENOSYS)}, // its flags are in memory; the C library falls back on clone
	{Number: unix.SYS_FUTEX},                              // Go's locks
	{Number: unix.SYS_SCHED_YIELD},                        // Go's scheduler
	{Number: unix.SYS_SCHED_GETAFFINITY},                  // Go's scheduler looks for the number of CPUs
	{Number: unix.SYS_SCHED_SETAFFINITY, Args: []Arg{
		{Index: 0, Values: []uint32{0}},
	}}, // a queue's thread moves to another core (devices/virtio/placement.go)
	{Number: unix.SYS_GETCPU},          // the core that a queue's thread leaves
	{Number: unix.SYS_NANOSLEEP},       // Go's scheduler
	{Number: unix.SYS_CLOCK_NANOSLEEP}, // sleeps, in a build with cgo
	{Number: unix.SYS_CLOCK_GETTIME},   // clocks, where the vDSO has none
	{Number: unix.SYS_GETTIMEOFDAY},    // clocks, where the vDSO has none
	{Number: unix.SYS_RESTART_SYSCALL}, // the kernel goes on with a sleep after SIGCONT
	{Number: unix.SYS_RT_SIGPROCMASK},  // Go's signals, threads
	{Number: unix.SYS_RT_SIGACTION},    // Go's signals
	{Number: unix.SYS_RT_SIGRETURN},    // Go's signals
	{Number: unix.SYS_SIGALTSTACK},     // Go's threads
	{Number: unix.SYS_TGKILL, Args: []Arg{
		{Own: true},
	}}, // preemption, kicks of vCPUs, SIGSTOP: to this process alone
	{Number: unix.SYS_GETTID},          // Go's signals
	{Number: unix.SYS_SET_ROBUST_LIST}, // the C library's threads, in a build with cgo
	{Number: unix.SYS_RSEQ},            // the C library's threads, in a build with cgo
	{Number: unix.SYS_PRCTL, Args: []Arg{
		{Index: 0, Values: []uint32{prSetVMA}},
	}}, // Go names its memory
	{Number: unix.SYS_GETRANDOM},  // the entropy device, Go's maps
	{Number: unix.SYS_EXIT},       // threads
	{Number: unix.SYS_EXIT_GROUP}, // the end

	// Facts about the process itself.
	{Number: unix.SYS_GETPID},    // kicks of vCPUs
	{Number: unix.SYS_GETPPID},   // job control
	{Number: unix.SYS_GETPGID},   // job control
	{Number: unix.SYS_GETPGRP},   // job control
	{Number: unix.SYS_GETSID},    // job control
	{Number: unix.SYS_GETUID},    // Go's package os
	{Number: unix.SYS_GETEUID},   // the user of a client
	{Number: unix.SYS_GETGID},    // Go's package os
	{Number: unix.SYS_GETEGID},   // Go's package os
	{Number: unix.SYS_GETRUSAGE}, // a queue's thread looks whether it has lost its CPU
	{Number: unix.SYS_SYSINFO},   // the host's memory, for gvm disk add
	{Number: unix.SYS_UNAME},     // the kernel's release
	{Number: unix.SYS_PRLIMIT64, Args: []Arg{
		{Index: 0, Values: []uint32{0}}, {Index: 2, Values: []uint32{0}},
		{Index: 2, High: true, Values: []uint32{0}},
	}}, // limits of this process, which it does not set

	// A child.
	{Number: unix.SYS_WAITID, Use: Child | Broker},   // ends of gvm-net, the broker, the script that decodes call traces
	{Number: unix.SYS_WAIT4, Use: Child | Broker},    // the same
	{Number: unix.SYS_PIDFD_SEND_SIGNAL, Use: Child}, // ends a child: there are descriptors of no other process
	{Number: unix.SYS_KILL, Use: Child, Args: []Arg{
		{Groups: true},
	}}, // ends the script and its programs
}

// Ioctl is a row of the table of requests of ioctl(2). The comment at its end is its name.
type Ioctl struct {
	Request uint32
	Use     Use
}

// ioctls are the requests to devices that are open, those of linux/kvm.h first: a guest's exit is
// one.
var ioctls = []Ioctl{
	{0xae80, 0},     // KVM_RUN
	{0x4008ae61, 0}, // KVM_IRQ_LINE
	{0x4020aea5, 0}, // KVM_SIGNAL_MSI
	{0x4020ae76, 0}, // KVM_IRQFD
	{0x4040ae79, 0}, // KVM_IOEVENTFD
	{0x4008ae6a, 0}, // KVM_SET_GSI_ROUTING
	{0x8090ae81, 0}, // KVM_GET_REGS
	{0x4090ae82, 0}, // KVM_SET_REGS
	{0x8138ae83, 0}, // KVM_GET_SREGS
	{0x4138ae84, 0}, // KVM_SET_SREGS
	{0xc018ae85, 0}, // KVM_TRANSLATE
	{0xc008ae88, 0}, // KVM_GET_MSRS
	{0x4008ae89, 0}, // KVM_SET_MSRS
	{0x81a0ae8c, 0}, // KVM_GET_FPU
	{0x41a0ae8d, 0}, // KVM_SET_FPU
	{0x8400ae8e, 0}, // KVM_GET_LAPIC
	{0x4400ae8f, 0}, // KVM_SET_LAPIC
	{0x4008ae90, 0}, // KVM_SET_CPUID2
	{0x8004ae98, 0}, // KVM_GET_MP_STATE
	{0x4004ae99, 0}, // KVM_SET_MP_STATE
	{0xae9a, 0},     // KVM_NMI
	{0x4048ae9b, 0}, // KVM_SET_GUEST_DEBUG
	{0x8080aea1, 0}, // KVM_GET_DEBUGREGS
	{0x4080aea2, 0}, // KVM_SET_DEBUGREGS
	{0xaea3, 0},     // KVM_GET_TSC_KHZ
	{0xaead, 0},     // KVM_KVMCLOCK_CTRL
	{0xc208ae62, 0}, // KVM_GET_IRQCHIP
	{0xaece, 0},     // KVM_GET_STATS_FD
	// A reset makes the virtual machine anew.
	{0xae01, 0},     // KVM_CREATE_VM
	{0xae03, 0},     // KVM_CHECK_EXTENSION
	{0xae04, 0},     // KVM_GET_VCPU_MMAP_SIZE
	{0xc008ae05, 0}, // KVM_GET_SUPPORTED_CPUID
	{0xae41, 0},     // KVM_CREATE_VCPU
	{0x4020ae46, 0}, // KVM_SET_USER_MEMORY_REGION
	{0xae47, 0},     // KVM_SET_TSS_ADDR
	{0x4008ae48, 0}, // KVM_SET_IDENTITY_MAP_ADDR
	{0xae60, 0},     // KVM_CREATE_IRQCHIP
	{0x8208ae63, 0}, // KVM_SET_IRQCHIP
	{0x4040ae77, 0}, // KVM_CREATE_PIT2
	{0xae78, 0},     // KVM_SET_BOOT_CPU_ID
	{0x4068aea3, 0}, // KVM_ENABLE_CAP
	// The terminal. TIOCSTI, which types for the user, is not here.
	{unix.TCGETS, 0},     // TCGETS
	{unix.TCSETS, 0},     // TCSETS
	{unix.TIOCGPGRP, 0},  // TIOCGPGRP
	{unix.TIOCGWINSZ, 0}, // TIOCGWINSZ
	// The filter's own notices. SECCOMP_IOCTL_NOTIF_SEND, which could let a call through, is not here.
	{unix.SECCOMP_IOCTL_NOTIF_RECV, 0}, // SECCOMP_IOCTL_NOTIF_RECV
	// A block device that is added.
	{unix.BLKROGET, 0},  // BLKROGET
	{unix.BLKSSZGET, 0}, // BLKSSZGET
	// linux/vhost.h: a driver starts and stops its device.
	{0x8008af00, Vhost}, // VHOST_GET_FEATURES
	{0x4008af00, Vhost}, // VHOST_SET_FEATURES
	{0xaf01, Vhost},     // VHOST_SET_OWNER
	{0x4008af03, Vhost}, // VHOST_SET_MEM_TABLE
	{0x8004af08, Vhost}, // VHOST_NEW_WORKER
	{0x4004af09, Vhost}, // VHOST_FREE_WORKER
	{0x4008af10, Vhost}, // VHOST_SET_VRING_NUM
	{0x4028af11, Vhost}, // VHOST_SET_VRING_ADDR
	{0x4008af12, Vhost}, // VHOST_SET_VRING_BASE
	{0xc008af12, Vhost}, // VHOST_GET_VRING_BASE
	{0x4008af15, Vhost}, // VHOST_ATTACH_VRING_WORKER
	{0xc008af16, Vhost}, // VHOST_GET_VRING_WORKER
	{0x4008af20, Vhost}, // VHOST_SET_VRING_KICK
	{0x4008af21, Vhost}, // VHOST_SET_VRING_CALL
	{0x4008af22, Vhost}, // VHOST_SET_VRING_ERR
	{0x4008af25, Vhost}, // VHOST_SET_BACKEND_FEATURES
	{0x8008af26, Vhost}, // VHOST_GET_BACKEND_FEATURES
	{0x40e8af40, Vhost}, // VHOST_SCSI_SET_ENDPOINT
	{0x40e8af41, Vhost}, // VHOST_SCSI_CLEAR_ENDPOINT
	{0x4004af42, Vhost}, // VHOST_SCSI_GET_ABI_VERSION
	{0x4004af43, Vhost}, // VHOST_SCSI_SET_EVENTS_MISSED
	{0x4004af44, Vhost}, // VHOST_SCSI_GET_EVENTS_MISSED
	{0x4008af30, Vhost}, // VHOST_NET_SET_BACKEND
	{0x4008af60, Vhost}, // VHOST_VSOCK_SET_GUEST_CID
	{0x4004af61, Vhost}, // VHOST_VSOCK_SET_RUNNING
	// linux/if_tun.h: a driver takes offloads and queues.
	{unix.TUNSETOFFLOAD, Tap}, // TUNSETOFFLOAD
	{unix.TUNSETQUEUE, Tap},   // TUNSETQUEUE
}
