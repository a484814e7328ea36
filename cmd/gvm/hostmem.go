package main

import (
	"fmt"
	"math"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/devices/scsi"
	"gvm/devices/virtio/fs"
	"gvm/guestmem"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/text"
)

// ownMemory is a generous estimate of gvm's own memory beside guest RAM. Page tables add a 256th.
const ownMemory = 16 << 20

// memoryLimit is the memory that one of the host's limits leaves for a guest. gvm doctor prints the
// limits and gvm run enforces them; both get them from memoryLimits.
type memoryLimit struct {
	bytes uint64 // or threads
	what  string // names the setting and its value
	mend  string // besides less memory
	// firm: the host refuses memory over the limit at once. Otherwise the kernel kills gvm when the
	// guest has touched too much, which --overcommit allows.
	firm bool
}

// hostLimits reads the limits of the host below root, which is "/" except in tests.
type hostLimits struct {
	root   string
	ram    uint64
	rlimit func(resource int) uint64 // math.MaxUint64: unlimited
	own    map[string]string         // cached files of /proc/self
	buffer []byte                    // for reading files, most of which fit
}

var thisHost = func() hostLimits {
	return hostLimits{"/", hostMemory(), func(resource int) uint64 {
		var r unix.Rlimit
		if err := unix.Prlimit(0, resource, nil, &r); err != nil { // the call that the sandbox allows
			return math.MaxUint64
		}
		return r.Cur
	}, map[string]string{}, make([]byte, 0, 4<<10)}
}

// hostMemory returns the host's RAM in bytes, or 0 if it is unknown.
func hostMemory() uint64 {
	var si syscall.Sysinfo_t
	if err := syscall.Sysinfo(&si); err != nil {
		return 0
	}
	return uint64(si.Totalram) * uint64(si.Unit)
}

// checkMemory refuses more memory than the host can give a guest. With overcommit it returns a note
// about limits on the memory that the guest may touch.
func checkMemory(c guestmem.Config, overcommit bool, h hostLimits) (note string, err error) {
	unit := uint64(4 << 10)
	if c.Hugepages {
		unit = 2 << 20
	}
	switch {
	case c.Size < guestmem.MinSize:
		return "", fmt.Errorf("a guest needs %s or more", text.FormatSize(guestmem.MinSize))
	case c.Size > guestmem.MaxSize:
		return "", fmt.Errorf("a guest has %s at most", text.FormatSize(guestmem.MaxSize))
	case c.Size%unit != 0:
		return "", fmt.Errorf("want a multiple of %s", text.FormatSize(unit))
	}
	for _, l := range h.memoryLimits(c) {
		switch {
		case c.Size <= l.bytes:
		case l.firm:
			return "", fmt.Errorf("%s; %s", l, l.mend)
		case !overcommit:
			return "", fmt.Errorf("%s; --overcommit allows more than that", l)
		case note == "":
			note = fmt.Sprintf("--overcommit: %s: the kernel kills gvm if the guest touches more", l)
		}
	}
	return note, nil
}

// checkDiskMemory does the same for the guest's memory and its disks in memory (mem:), which take
// memory as they are written. A disk may stay partly unwritten, so that a limit that is not firm
// only gives a note.
func checkDiskMemory(c guestmem.Config, disks uint64, h hostLimits) (note string, err error) {
	if disks == 0 {
		return "", nil
	}
	total := disks
	if !c.Hugepages {
		total += c.Size
	}
	for _, l := range h.memoryLimits(guestmem.Config{}) {
		switch {
		case total <= l.bytes:
		case l.firm:
			return "", fmt.Errorf("the guest's memory and its disks in memory have %s: %s; %s",
				text.FormatSize(total>>20<<20), l, l.mend)
		case note == "":
			note = fmt.Sprintf("the guest's memory and its disks in memory have %s: %s: "+
				"the kernel kills gvm if the guest touches more", text.FormatSize(total>>20<<20), l)
		}
	}
	return note, nil
}

// checkAddedMemory is checkDiskMemory for a disk that is added to a machine, which has others.
func checkAddedMemory(c guestmem.Config, has []control.Disk, d *disk.Spec, h hostLimits) (note string, err error) {
	if d.Storage != disk.Memory {
		return "", nil
	}
	total := uint64(d.Size)
	for _, o := range has {
		if o.Storage == "mem" {
			total += uint64(o.Size)
		}
	}
	if total > text.MaxSize {
		return "", fmt.Errorf("the disks in memory would have more than %s", text.SizeWord(text.MaxSize))
	}
	return checkDiskMemory(c, total, h)
}

// ownThreads returns the number of gvm's threads besides those of CPUs and request queues, and
// besides those that wait for storage: mostly the Go runtime's.
func ownThreads() int { return 8 + runtime.GOMAXPROCS(0) + spareProcs }

// Threads of a disk or share. It has them only while storage is slow, so a host that lacks them
// gets fewer requests at a time.
const (
	leastWaits   = 4 // requests that wait: one that waits for a lock of another must not be alone
	besidesWaits = 3 // a disk's flush of answered commands, SANITIZE, and saved reservations
)

// checkThreads refuses more CPUs, queues, disks and shares than the host has threads for, in a
// number of machines. The Go runtime crashes if it cannot create a thread. Where disks and shares
// cannot have all threads that slow storage could keep, it bounds their requests, and returns a
// note.
func checkThreads(spec *machine.Spec, machines int, h hostLimits) (note string, err error) {
	cpus, queues := machines*spec.CPUs, machines*spec.RequestQueues()
	nets := 0
	for _, n := range spec.Nets {
		nets += machines * (2*max(n.Pairs, 1) + 1)
	}
	what := fmt.Sprintf("%d CPUs and %d request queues take", cpus, queues)
	var disks []*disk.Spec
	for i := range spec.Disks {
		if d := &spec.Disks[i]; d.Waits() {
			disks = append(disks, d)
		}
	}
	if stores := machines * (len(disks) + len(spec.Shares)); stores > 0 {
		what = fmt.Sprintf("%d CPUs, %d request queues, and %d disks and shares take", cpus, queues, stores)
	}
	return boundWaits(what, cpus+queues+nets+ownThreads(), machines, disks, spec.Shares, h)
}

// boundWaits is checkThreads for base threads besides those of disks and shares.
func boundWaits(what string, base, machines int, disks []*disk.Spec, shares []fs.Share, h hostLimits) (string, error) {
	stores := machines * (len(disks) + len(shares))
	need := uint64(base + stores*(leastWaits+besidesWaits))
	all := uint64(base + machines*(len(disks)*(scsi.MaxWaiting+besidesWaits)+len(shares)*(fs.MaxRequests+besidesWaits)))
	note, least := "", all
	for _, l := range h.threadLimits(all) {
		switch {
		case need > l.bytes:
			return "", fmt.Errorf("%s some %d threads: %s leaves %d; raise it, or give fewer", what, need, l.what, l.bytes)
		case l.bytes < least:
			least = l.bytes
			each := (int(least)-base)/stores - besidesWaits
			for _, d := range disks {
				d.Waiting = min(each, scsi.MaxWaiting)
			}
			for i := range shares {
				shares[i].Requests = min(each, fs.MaxRequests)
			}
			note = fmt.Sprintf("%s leaves %d threads: a disk or share waits for slow storage with %d at a time; "+
				"raise it for up to %d", l.what, l.bytes, each, scsi.MaxWaiting)
		}
	}
	return note, nil
}

// threadLimits returns the limits for this process's threads. One that leaves need or more may
// leave more than it says.
func (h hostLimits) threadLimits(need uint64) (all []memoryLimit) {
	for _, g := range h.cgroupLimits("pids", []string{"pids.max"}, []string{"pids.max"}) {
		used, _ := h.number(filepath.Join(g.dir, "pids.current"))
		all = append(all, memoryLimit{bytes: less(g.bytes, used),
			what: fmt.Sprintf("pids.max of cgroup %s, which is %d,", g.group, g.bytes)})
	}
	total := h.allThreads()
	for _, name := range []string{"threads-max", "pid_max"} {
		if n, ok := h.number("proc/sys/kernel/" + name); ok {
			all = append(all, memoryLimit{bytes: less(n, total),
				what: fmt.Sprintf("kernel.%s, which is %d,", name, n)})
		}
	}
	if n := h.rlimit(unix.RLIMIT_NPROC); !h.anyThreads() {
		left := less(n, total)
		if left < need { // counting the user's takes longer
			left = less(n, h.userThreads())
		}
		all = append(all, memoryLimit{bytes: left,
			what: fmt.Sprintf("RLIMIT_NPROC (ulimit -u), which is %d,", n)})
	}
	return all
}

// anyThreads reports whether RLIMIT_NPROC does not apply: to root and with two capabilities, all of
// the initial user namespace (copy_process in the kernel's kernel/fork.c).
func (h hostLimits) anyThreads() bool {
	status := h.text("proc/self/status")
	uid, _ := fieldOf(status, "Uid:")
	word, _ := fieldOf(status, "CapEff:")
	capabilities, _ := strconv.ParseUint(word, 16, 64)
	return strings.Join(strings.Fields(h.text("proc/self/uid_map")), " ") == "0 0 4294967295" &&
		(uid == "0" || capabilities&(1<<unix.CAP_SYS_RESOURCE|1<<unix.CAP_SYS_ADMIN) != 0)
}

// allThreads returns the number of the host's threads (proc_loadavg(5)).
func (h hostLimits) allThreads() uint64 {
	if f := strings.Fields(h.text("proc/loadavg")); len(f) > 3 {
		_, all, _ := strings.Cut(f[3], "/")
		n, _ := strconv.ParseUint(all, 10, 64)
		return n
	}
	return 0
}

// userThreads returns the number of threads in processes with this process's real user ID.
func (h hostLimits) userThreads() (n uint64) {
	own, _ := fieldOf(h.text("proc/self/status"), "Uid:")
	processes, _ := filepath.Glob(filepath.Join(h.root, "proc/[0-9]*"))
	for _, p := range processes {
		status := h.text(filepath.Join("proc", filepath.Base(p), "status"))
		if uid, _ := fieldOf(status, "Uid:"); uid == own {
			word, _ := fieldOf(status, "Threads:")
			threads, _ := strconv.ParseUint(word, 10, 64)
			n += threads
		}
	}
	return n
}

func (l memoryLimit) String() string {
	return fmt.Sprintf("%s, which leaves a guest %s", l.what, text.FormatSize(l.bytes>>20<<20))
}

// memoryLimits returns the limits for a guest's memory of c's kind, the lowest first. Swap is not
// counted: a guest in swap is too slow to use.
func (h hostLimits) memoryLimits(c guestmem.Config) []memoryLimit {
	var all []memoryLimit
	add := func(bytes uint64, firm bool, mend, format string, args ...any) {
		all = append(all, memoryLimit{bytes, fmt.Sprintf(format, args...), mend, firm})
	}
	// The process's own limits are those of setrlimit(2).
	for _, r := range []struct {
		resource int
		name     string
		used     string // the line in /proc/self/status
		applies  bool
	}{
		{unix.RLIMIT_AS, "RLIMIT_AS (ulimit -v)", "VmSize:", true},
		{unix.RLIMIT_DATA, "RLIMIT_DATA (ulimit -d)", "VmData:", !c.Shared},
		{unix.RLIMIT_FSIZE, "RLIMIT_FSIZE (ulimit -f)", "", c.Shared}, // a memfd is a file
	} {
		if n := h.rlimit(r.resource); r.applies && n < math.MaxInt64 {
			if r.used != "" {
				n = less(n, h.kibibytes("proc/self/status", r.used)+ownMemory)
			}
			add(n, true, "raise it", "%s is %s", r.name, text.FormatSize(h.rlimit(r.resource)))
		}
	}
	if c.Hugepages {
		all = append(all, h.hugepagePool(c.Size))
		for _, g := range h.cgroupLimits("hugetlb", []string{"hugetlb.2MB.limit_in_bytes"},
			[]string{"hugetlb.2MB.max"}) {
			add(g.bytes, true, "raise it", "%s of cgroup %s is %s", g.file, g.group, text.FormatSize(g.bytes))
		}
	} else {
		if h.ram > 0 {
			add(h.ram, false, "", "this host has %s", text.FormatSize(h.ram>>20<<20))
		}
		// memory.high does not kill a process, but nearly stops one that has no memory to release.
		for _, g := range h.cgroupLimits("memory", []string{"memory.limit_in_bytes", "memory.stat"},
			[]string{"memory.max", "memory.high"}) {
			add(less(g.bytes, ownMemory+g.bytes/256), false, "", "%s of cgroup %s is %s", g.file, g.group,
				text.FormatSize(g.bytes))
		}
		if mode, _ := h.number("proc/sys/vm/overcommit_memory"); mode == 2 {
			limit, used := h.kibibytes("proc/meminfo", "CommitLimit:"), h.kibibytes("proc/meminfo", "Committed_AS:")
			add(less(limit, used+ownMemory), true, "raise vm.overcommit_ratio, or set vm.overcommit_memory=0",
				"vm.overcommit_memory is 2, and of CommitLimit %s are left", text.FormatSize(less(limit, used)>>20<<20))
		}
	}
	sort.SliceStable(all, func(i, j int) bool { return all[i].bytes < all[j].bytes })
	return all
}

// hugepagePool returns the limit of the host's pool of 2 MiB pages, and how to enlarge the pool for
// a size.
func (h hostLimits) hugepagePool(size uint64) memoryLimit {
	const page = 2 << 20
	n := func(name string) uint64 {
		v, _ := h.number("sys/kernel/mm/hugepages/hugepages-2048kB/" + name)
		return v
	}
	free := less(n("free_hugepages"), n("resv_hugepages")) + less(n("nr_overcommit_hugepages"), n("surplus_hugepages"))
	return memoryLimit{
		bytes: free * page,
		what:  fmt.Sprintf("the host's pool has %d free 2 MiB pages", free),
		mend:  fmt.Sprintf("add pages: sysctl vm.nr_hugepages=%d", size/page),
		firm:  true,
	}
}

// less returns a-b, or 0 if b is larger.
func less(a, b uint64) uint64 { return a - min(a, b) }

// cgroupLimit is a limit of one control group.
type cgroupLimit struct {
	bytes            uint64
	file, group, dir string
}

// cgroupLimits reads the limits of a controller for this process's control group and all visible
// groups above it, since all of them apply. Both versions may be mounted, with different
// controllers (cgroups(7)) and different files.
func (h hostLimits) cgroupLimits(controller string, v1, v2 []string) (all []cgroupLimit) {
	paths := make(map[string]string) // by file system type
	for line := range strings.Lines(h.text("proc/self/cgroup")) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		switch {
		case len(f) != 3:
		case f[0] == "0": // version 2
			paths["cgroup2"] = f[2]
		case slices.Contains(strings.Split(f[1], ","), controller):
			paths["cgroup"] = f[2]
		}
	}
	for line := range strings.Lines(h.text("proc/self/mountinfo")) {
		before, after, _ := strings.Cut(line, " - ")
		f, fs := strings.Fields(before), strings.Fields(after)
		if len(f) < 5 || len(fs) < 3 || fs[0] == "cgroup" && !slices.Contains(strings.Split(fs[2], ","), controller) {
			continue
		}
		path, ok := paths[fs[0]]
		if !ok {
			continue
		}
		files := v1
		if fs[0] == "cgroup2" {
			files = v2
		}
		// The mount's root may be a group below the top, such as a container's own.
		mounted := strings.TrimSuffix(f[3], "/")
		rel, below := strings.CutPrefix(path, mounted)
		if !below || rel != "" && rel[0] != '/' {
			rel = ""
		}
		mountPoint := filepath.Clean(unescapeMount.Replace(f[4]))
		for group := filepath.Clean("/" + rel); ; group = filepath.Dir(group) {
			for _, file := range files {
				if file == "memory.stat" && group != filepath.Clean("/"+rel) {
					continue // it covers the groups above, too
				}
				dir := filepath.Join(mountPoint, group)
				if n, ok := h.limit(filepath.Join(dir, file)); ok {
					all = append(all, cgroupLimit{n, file, group, dir})
				}
			}
			if group == "/" {
				break
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(g cgroupLimit) bool {
		return g.file == "memory.stat" &&
			slices.ContainsFunc(all, func(o cgroupLimit) bool { return o.file != g.file && o.bytes <= g.bytes })
	})
}

// unescapeMount decodes the escapes of /proc/self/mountinfo (proc_pid_mountinfo(5)).
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// limit reads a control group's limit. In memory.stat this is the least limit of the group and all
// above, visible or not. Version 1 writes a huge number for no limit.
func (h hostLimits) limit(name string) (uint64, bool) {
	if filepath.Base(name) != "memory.stat" {
		n, ok := h.number(name)
		return n, ok && n < 1<<60
	}
	s, _ := fieldOf(h.text(name), "hierarchical_memory_limit")
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil && n < 1<<60
}

// text returns the contents of a file, or "" if it cannot be read. Package os would register each
// of these files with the poller, which takes longer than reading it.
func (h hostLimits) text(name string) string {
	if text, ok := h.own[name]; ok {
		return text
	}
	fd, err := unix.Open(filepath.Join(h.root, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	b := h.buffer[:0]
	for {
		b = slices.Grow(b, 1<<10)
		n, err := unix.Read(fd, b[len(b):cap(b)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return ""
		}
		if n == 0 {
			break
		}
		b = b[:len(b)+n]
	}
	if h.own != nil && strings.HasPrefix(name, "proc/self/") {
		h.own[name] = string(b)
	}
	return string(b)
}

func (h hostLimits) number(name string) (uint64, bool) {
	n, err := strconv.ParseUint(strings.TrimSpace(h.text(name)), 10, 64)
	return n, err == nil
}

// kibibytes returns the number of a line in bytes, or 0 if the line is missing.
func (h hostLimits) kibibytes(name, line string) uint64 {
	s, _ := fieldOf(h.text(name), line)
	n, _ := strconv.ParseUint(s, 10, 64)
	return n << 10
}

// fieldOf returns the second word of the line whose first word is first.
func fieldOf(text, first string) (string, bool) {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == first {
			return f[1], true
		}
	}
	return "", false
}
