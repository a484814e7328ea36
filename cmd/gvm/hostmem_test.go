package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/devices/virtio/fs"
	"gvm/guestmem"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/text"
)

// fakeHost makes the files of a host with 8 GiB. A name that ends with / is a directory without a
// relevant limit.
func fakeHost(t *testing.T, rlimits map[int]uint64, files map[string]string) hostLimits {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return hostLimits{root, 8 << 30, func(resource int) uint64 {
		if n, ok := rlimits[resource]; ok {
			return n
		}
		return math.MaxUint64
	}, nil, nil}
}

const (
	mountV2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
	mountV1 = "31 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n" +
		"32 23 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
	mountTLB    = "33 23 0:30 / /sys/fs/cgroup/hugetlb rw - cgroup cgroup rw,hugetlb\n"
	noLimitV1   = "9223372036854771712"
	hugepageDir = "sys/kernel/mm/hugepages/hugepages-2048kB/"
)

// TestCheckMemory checks every limit of a host separately.
func TestCheckMemory(t *testing.T) {
	huge := guestmem.Config{Size: 2 << 30, Hugepages: true}
	shared := guestmem.Config{Size: 2 << 30, Shared: true}
	for _, tt := range []struct {
		name    string
		config  guestmem.Config // zero: 2 GiB
		rlimits map[int]uint64
		files   map[string]string
		want    string // parts of the error; "": none
		over    string // with --overcommit: parts of the error; "": a note with the parts of want
	}{
		{name: "no limit"},
		{name: "too little", config: guestmem.Config{Size: 16<<20 - 4<<10}, want: "a guest needs 16 MiB or more",
			over: "16 MiB or more"},
		{name: "least", config: guestmem.Config{Size: 16 << 20}},
		{name: "too much", config: guestmem.Config{Size: 8<<40 + 4<<10}, want: "a guest has 8 TiB at most",
			over: "8 TiB at most"},
		{name: "part of a page", config: guestmem.Config{Size: 2<<30 + 1}, want: "want a multiple of 4 KiB",
			over: "a multiple of 4 KiB"},
		{name: "part of a hugepage", config: guestmem.Config{Size: 2<<30 + 4<<10, Hugepages: true},
			want: "want a multiple of 2 MiB", over: "a multiple of 2 MiB"},
		{name: "all of the host", config: guestmem.Config{Size: 8 << 30}},
		{name: "host", config: guestmem.Config{Size: 9 << 30}, want: "this host has 8 GiB|--overcommit"},
		{name: "the lowest of several", rlimits: map[int]uint64{unix.RLIMIT_AS: 1 << 30}, files: map[string]string{
			"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/memory.max": "268435456", "sys/fs/cgroup/a/memory.high": "134217728",
		}, want: "memory.high of cgroup /a is 128 MiB|--overcommit", over: "RLIMIT_AS"},
		{name: "the lowest of several that are not firm", files: map[string]string{
			"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/memory.max": "268435456", "sys/fs/cgroup/a/memory.high": "134217728",
		}, want: "memory.high of cgroup /a is 128 MiB|overcommit"},
		{name: "version 2", files: map[string]string{
			"proc/self/cgroup": "0::/a/b", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/b/memory.max": "134217728",
		}, want: "memory.max of cgroup /a/b is 128 MiB, which leaves a guest 111 MiB|--overcommit"},
		{name: "version 2, a group above", files: map[string]string{
			"proc/self/cgroup": "0::/a/b/c", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/b/c/memory.max": "max", "sys/fs/cgroup/a/b/memory.max": "1073741824",
			"sys/fs/cgroup/a/memory.max": "134217728",
		}, want: "memory.max of cgroup /a is 128 MiB"},
		{name: "version 2, high", files: map[string]string{
			"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/memory.max": "1073741824", "sys/fs/cgroup/a/memory.high": "134217728",
		}, want: "memory.high of cgroup /a is 128 MiB"},
		{name: "version 2, a container's namespace", files: map[string]string{
			"proc/self/cgroup": "0::/", "proc/self/mountinfo": mountV2, "sys/fs/cgroup/memory.max": "134217728",
		}, want: "memory.max of cgroup / is 128 MiB"},
		{name: "version 2, outside of the namespace", files: map[string]string{
			"proc/self/cgroup": "0::/../other", "proc/self/mountinfo": mountV2, "sys/fs/cgroup/memory.max": "134217728",
		}, want: "memory.max of cgroup / is 128 MiB"},
		{name: "version 2, a mount of a part", files: map[string]string{
			"proc/self/cgroup":           "0::/docker/x/y",
			"proc/self/mountinfo":        "31 23 0:28 /docker/x /mnt/my\\040groups rw - cgroup2 cgroup2 rw",
			"mnt/my groups/y/memory.max": "134217728",
		}, want: "memory.max of cgroup /y is 128 MiB"},
		{name: "version 2, enough", files: map[string]string{
			"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2, "sys/fs/cgroup/a/memory.max": "4294967296",
		}},
		{name: "version 2, exactly as much", files: map[string]string{
			"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2, "sys/fs/cgroup/a/memory.max": "2147483648",
		}, want: "memory.max of cgroup /a is 2 GiB"},
		{name: "version 2, a mount of a group with a similar name", files: map[string]string{
			"proc/self/cgroup": "0::/docker/xy", "mnt/memory.max": "134217728", "mnt/y/memory.max": "67108864",
			"proc/self/mountinfo": "31 23 0:28 /docker/x /mnt rw - cgroup2 cgroup2 rw",
		}, want: "memory.max of cgroup / is 128 MiB"},
		{name: "version 2, a name with a tab and a backslash", files: map[string]string{
			"proc/self/cgroup": "0::/", "mnt/\t\\\n/memory.max": "134217728",
			"proc/self/mountinfo": "31 23 0:28 / /mnt/\\011\\134\\012 rw - cgroup2 cgroup2 rw",
		}, want: "memory.max of cgroup / is 128 MiB"},
		{name: "version 1", files: map[string]string{
			"proc/self/cgroup": "5:cpu:/\n4:memory:/a/b\n0::/", "proc/self/mountinfo": mountV1,
			"sys/fs/cgroup/cpu/a/b/memory.limit_in_bytes":    "4096", // of another controller
			"sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "134217728",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":     noLimitV1,
		}, want: "memory.limit_in_bytes of cgroup /a/b is 128 MiB"},
		{name: "version 1, a group above", files: map[string]string{
			"proc/self/cgroup": "4:cpu,memory:/a/b", "proc/self/mountinfo": mountV1,
			"sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": noLimitV1,
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes":   "134217728",
		}, want: "memory.limit_in_bytes of cgroup /a is 128 MiB"},
		{name: "version 1, a group above that is not seen", files: map[string]string{
			"proc/self/cgroup": "4:memory:/docker/x",
			"proc/self/mountinfo": "32 23 0:29 /docker/x /sys/fs/cgroup/memory ro - " +
				"cgroup cgroup rw,memory",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824",
			"sys/fs/cgroup/memory/memory.stat":           "cache 1\nhierarchical_memory_limit 134217728",
		}, want: "memory.stat of cgroup / is 128 MiB"},
		{name: "both versions", files: map[string]string{
			"proc/self/cgroup": "4:cpu:/x\n0::/a", "proc/self/mountinfo": mountV1 +
				"41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
			"sys/fs/cgroup/unified/a/memory.max": "134217728", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1",
		}, want: "memory.max of cgroup /a is 128 MiB"},
		{name: "broken files", files: map[string]string{
			"proc/self/cgroup":         "0::\n::\nx",
			"proc/self/mountinfo":      "1 2\n\n - cgroup2\n - cgroup2 a b\n1 2 3 / /x - cgroup\n" + mountV2,
			"sys/fs/cgroup/memory.max": "-1",
		}},
		{name: "address space", rlimits: map[int]uint64{unix.RLIMIT_AS: 2 << 30},
			files: map[string]string{"proc/self/status": "VmSize:\t 1048576 kB"},
			want:  "RLIMIT_AS (ulimit -v) is 2 GiB, which leaves a guest 1008 MiB", over: "RLIMIT_AS"},
		{name: "data", rlimits: map[int]uint64{unix.RLIMIT_DATA: 1 << 30},
			files: map[string]string{"proc/self/status": "VmSize:\t 1048576 kB\nVmData:\t 524288 kB"},
			want:  "RLIMIT_DATA (ulimit -d) is 1 GiB, which leaves a guest 496 MiB", over: "RLIMIT_DATA"},
		{name: "data, shared memory", config: shared, rlimits: map[int]uint64{unix.RLIMIT_DATA: 1 << 30}},
		{name: "file size", rlimits: map[int]uint64{unix.RLIMIT_FSIZE: 1 << 30}},
		{name: "file size, shared memory", config: shared, rlimits: map[int]uint64{unix.RLIMIT_FSIZE: 1 << 30},
			want: "RLIMIT_FSIZE (ulimit -f) is 1 GiB", over: "RLIMIT_FSIZE"},
		{name: "file size, a byte too few", config: shared, rlimits: map[int]uint64{unix.RLIMIT_FSIZE: 2<<30 - 1},
			want: "RLIMIT_FSIZE (ulimit -f) is ", over: "RLIMIT_FSIZE"},
		{name: "file size, enough", config: shared, rlimits: map[int]uint64{unix.RLIMIT_FSIZE: 2 << 30}},
		{name: "overcommit", files: map[string]string{
			"proc/sys/vm/overcommit_memory": "1",
			"proc/meminfo":                  "CommitLimit: 3145728 kB\nCommitted_AS: 2097152 kB",
		}},
		{name: "no overcommit", files: map[string]string{
			"proc/sys/vm/overcommit_memory": "2",
			"proc/meminfo":                  "MemTotal: 8388608 kB\nCommitLimit: 3145728 kB\nCommitted_AS: 2097152 kB",
		}, want: "vm.overcommit_memory is 2, and of CommitLimit 1 GiB are left, " +
			"which leaves a guest 1008 MiB|vm.overcommit_ratio", over: "vm.overcommit_memory"},
		{name: "hugepages", config: huge, files: map[string]string{
			hugepageDir + "free_hugepages": "600", hugepageDir + "resv_hugepages": "100",
			hugepageDir + "nr_overcommit_hugepages": "30", hugepageDir + "surplus_hugepages": "20",
		}, want: "the host's pool has 510 free 2 MiB pages|sysctl vm.nr_hugepages=1024", over: "vm.nr_hugepages=1024"},
		{name: "enough hugepages, in a small cgroup", config: huge, files: map[string]string{
			hugepageDir + "free_hugepages": "1024", "proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/memory.max": "134217728",
		}},
		{name: "hugetlb, version 2", config: huge, files: map[string]string{
			hugepageDir + "free_hugepages": "1024", "proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/hugetlb.2MB.max": "134217728",
		}, want: "hugetlb.2MB.max of cgroup /a is 128 MiB", over: "hugetlb.2MB.max"},
		{name: "hugetlb, version 1", config: huge, files: map[string]string{
			hugepageDir + "free_hugepages": "1024", "proc/self/cgroup": "9:hugetlb:/a", "proc/self/mountinfo": mountTLB,
			"sys/fs/cgroup/hugetlb/a/hugetlb.2MB.limit_in_bytes": "134217728",
		}, want: "hugetlb.2MB.limit_in_bytes of cgroup /a is 128 MiB", over: "hugetlb"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := fakeHost(t, tt.rlimits, tt.files)
			c := tt.config
			if c.Size == 0 {
				c.Size = 2 << 30
			}
			has := func(got, want string) {
				t.Helper()
				for part := range strings.SplitSeq(want, "|") {
					if !strings.Contains(got, part) || want == "" && got != "" {
						t.Errorf("%q, want %q", got, want)
					}
				}
			}
			text := func(err error) string {
				if err == nil {
					return ""
				}
				return err.Error()
			}
			note, err := checkMemory(c, false, h)
			has(text(err), tt.want)
			has(note, "")
			note, err = checkMemory(c, true, h)
			has(text(err), tt.over)
			if tt.over == "" {
				has(note, tt.want)
			}
		})
	}
}

// TestUnknownMemory: a host that does not tell its memory bounds no guest's.
func TestUnknownMemory(t *testing.T) {
	h := fakeHost(t, nil, nil)
	h.ram = 0
	if note, err := checkMemory(guestmem.Config{Size: 2 << 30}, false, h); note != "" || err != nil {
		t.Errorf("%q, %v", note, err)
	}
	if want := thisHost().kibibytes("proc/meminfo", "MemTotal:"); hostMemory() != want {
		t.Errorf("this host has %d bytes, want %d", hostMemory(), want)
	}
}

// TestCgroupLimits: no limit is no limit, and memory.stat counts if it is below all others.
func TestCgroupLimits(t *testing.T) {
	const stat = "cache 1\nhierarchical_memory_limit "
	for _, tt := range []struct{ limit, stat, want string }{
		{"4096", stat + "4096", "memory.limit_in_bytes"},
		{"4096", stat + "8192", "memory.limit_in_bytes"},
		{"8192", stat + "4096", "memory.limit_in_bytes memory.stat"},
		{noLimitV1, stat + noLimitV1, ""},
		{noLimitV1, stat + "x", ""},
		{noLimitV1, stat + "4096", "memory.stat"},
	} {
		h := fakeHost(t, nil, map[string]string{"proc/self/cgroup": "4:memory:/a", "proc/self/mountinfo": mountV1,
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes": tt.limit, "sys/fs/cgroup/memory/a/memory.stat": tt.stat})
		var got []string
		for _, l := range h.cgroupLimits("memory", []string{"memory.limit_in_bytes", "memory.stat"}, nil) {
			got = append(got, l.file)
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%+v: %q", tt, got)
		}
	}
}

// TestCheckDiskMemory: disks in memory count together with the guest's memory.
func TestCheckDiskMemory(t *testing.T) {
	guest := guestmem.Config{Size: 512 << 20}
	group := map[string]string{"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
		"sys/fs/cgroup/a/memory.max": "1073741824", "sys/fs/cgroup/a/memory.high": "1101004800"}
	for _, tt := range []struct {
		name       string
		config     guestmem.Config
		disks      uint64
		rlimits    map[int]uint64
		note, errs string
	}{
		{"none", guest, 0, nil, "", ""},
		{"fits", guest, (1004 - 512) << 20, nil, "", ""},
		{"too much", guest, 600 << 20, nil,
			"have 1112 MiB: memory.max of cgroup /a is 1 GiB, which leaves a guest 1004 MiB: the kernel kills gvm", ""},
		{"the guest's is in the pool", guestmem.Config{Size: 512 << 20, Hugepages: true}, 600 << 20, nil, "", ""},
		{"address space", guest, 600 << 20, map[int]uint64{unix.RLIMIT_AS: 1 << 30}, "",
			"RLIMIT_AS (ulimit -v) is 1 GiB, which leaves a guest 1008 MiB; raise it"},
	} {
		note, err := checkDiskMemory(tt.config, tt.disks, fakeHost(t, tt.rlimits, group))
		if !strings.Contains(note, tt.note) || tt.note == "" && note != "" || (err != nil) != (tt.errs != "") ||
			err != nil && !strings.Contains(err.Error(), tt.errs) {
			t.Errorf("%s: %q, %v", tt.name, note, err)
		}
	}
}

// TestCheckAddedMemory: a disk in memory that is added counts together with the guest's memory, and
// with those that the machine has.
func TestCheckAddedMemory(t *testing.T) {
	h := fakeHost(t, map[int]uint64{unix.RLIMIT_AS: 1 << 30}, map[string]string{"proc/self/cgroup": "0::/a",
		"proc/self/mountinfo": mountV2, "sys/fs/cgroup/a/memory.max": "939524096"})
	has := []control.Disk{{Path: "/a.img", Size: 1 << 40}, {Storage: "mem", Size: 300 << 20},
		{Storage: "null", Size: 1 << 40}}
	for _, tt := range []struct {
		disk, note, errs string
	}{
		{"mem:50M", "", ""},
		{"null:1T", "", ""},
		{"/b.img", "", ""},
		{"mem:100M", "have 912 MiB: memory.max of cgroup /a is 896 MiB", ""},
		{"mem:200M", "", "have 1012 MiB: RLIMIT_AS (ulimit -v) is 1 GiB"},
	} {
		d, err := disk.Added(control.AddDisk{Disk: text.Name(tt.disk)})
		if err != nil {
			t.Fatal(err)
		}
		note, err := checkAddedMemory(guestmem.Config{Size: 512 << 20}, has, &d, h)
		if !strings.Contains(note, tt.note) || tt.note == "" && note != "" || (err != nil) != (tt.errs != "") ||
			err != nil && !strings.Contains(err.Error(), tt.errs) {
			t.Errorf("%s: %q, %v", tt.disk, note, err)
		}
	}
}

// TestCheckThreads checks every limit of a host for threads separately, at the last number that it
// allows: 40.
func TestCheckThreads(t *testing.T) {
	group := map[string]string{
		"proc/self/cgroup":                "8:pids:/x/y",
		"proc/self/mountinfo":             "34 23 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids",
		"sys/fs/cgroup/pids/x/y/pids.max": "max", "sys/fs/cgroup/pids/x/pids.max": "100",
		"sys/fs/cgroup/pids/x/pids.current": "60",
	}
	loaded := func(threads int) string { return fmt.Sprintf("0.00 0.01 0.05 2/%d 4711", threads) }
	// The user 1000 has 30 threads on a host with 5000, which other users have.
	user := func(status, namespace string) map[string]string {
		return map[string]string{
			"proc/self/status": status, "proc/self/uid_map": namespace, "proc/loadavg": loaded(5000),
			"proc/1/status":   "Name:\tinit\nUid:\t0\t0\t0\t0\nThreads:\t4000",
			"proc/70/status":  "Name:\tsudo\nUid:\t1000\t0\t0\t0\nThreads:\t10",
			"proc/71/status":  "Name:\tsh\nUid:\t1000\t1000\t1000\t1000\nThreads:\t20",
			"proc/72/status":  "Name:\tsu\nUid:\t2000\t1000\t1000\t1000\nThreads:\t300",
			"proc/bus/status": "Uid:\t1000\t1000\t1000\t1000\nThreads:\t500",
		}
	}
	const (
		plain   = "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000"
		root    = "Uid:\t0\t0\t0\t0\nCapEff:\t0000000000000000"
		setuid  = "Uid:\t1000\t0\t0\t0\nCapEff:\t0000000000000001"
		admin   = "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000200000"
		limits  = "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000001000000"
		initial = "         0          0 4294967295"
		own     = "         0       1000          1"
	)
	nproc := map[int]uint64{unix.RLIMIT_NPROC: 70}
	const ulimit = "RLIMIT_NPROC (ulimit -u), which is 70,"
	for _, tt := range []struct {
		name    string
		rlimits map[int]uint64
		files   map[string]string
		want    string // the limit; "": none
	}{
		{name: "no limit"},
		{name: "control group", files: group, want: "pids.max of cgroup /x, which is 100,"},
		{name: "user", rlimits: nproc, files: user(plain, initial), want: ulimit},
		{name: "user, unlimited", files: user(plain, initial)},
		{name: "setuid program", rlimits: nproc, files: user(setuid, initial), want: ulimit},
		{name: "root", rlimits: nproc, files: user(root, initial)},
		{name: "CAP_SYS_ADMIN", rlimits: nproc, files: user(admin, initial)},
		{name: "CAP_SYS_RESOURCE", rlimits: nproc, files: user(limits, initial)},
		{name: "capabilities in a user namespace", rlimits: nproc, files: user(admin, own), want: ulimit},
		{name: "user, and all threads fit", rlimits: map[int]uint64{unix.RLIMIT_NPROC: 6000}, files: map[string]string{
			"proc/self/status": plain, "proc/self/uid_map": initial, "proc/loadavg": loaded(5000),
			"proc/1/status": plain + "\nThreads:\t7000"}},
		{name: "no /proc", rlimits: map[int]uint64{unix.RLIMIT_NPROC: 40}, want: "RLIMIT_NPROC (ulimit -u), which is 40,"},
		{name: "all threads", files: map[string]string{"proc/sys/kernel/threads-max": "540", "proc/loadavg": loaded(500)},
			want: "kernel.threads-max, which is 540,"},
		{name: "all IDs", files: map[string]string{"proc/sys/kernel/pid_max": "540", "proc/loadavg": loaded(500)},
			want: "kernel.pid_max, which is 540,"},
	} {
		h := fakeHost(t, tt.rlimits, tt.files)
		fits := 40 - ownThreads()
		if note, err := checkThreads(&machine.Spec{CPUs: fits - 1, Queues: 1}, 1, h); err != nil || note != "" {
			t.Errorf("%s: %s, %v", tt.name, note, err)
		}
		want := fmt.Sprintf("%d CPUs and 1 request queues take some 41 threads: %s leaves 40; raise it, or give fewer",
			fits, tt.want)
		switch _, err := checkThreads(&machine.Spec{CPUs: fits, Queues: 1}, 1, h); {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.want != "" && (err == nil || err.Error() != want):
			t.Errorf("%s: %v, want %s", tt.name, err, want)
		}
	}
	// root of a user namespace that has its own ID is the user outside of it.
	files := user(root, own)
	h := fakeHost(t, nproc, files)
	if _, err := checkThreads(&machine.Spec{CPUs: 100}, 1, h); err == nil || !strings.Contains(err.Error(), ulimit) {
		t.Errorf("root of a user namespace: %v, want %s", err, ulimit)
	}
}

// TestCheckThreadsOfStorage: disks and shares get as many threads for slow storage as the host has
// for them. A machine is refused only without the least.
func TestCheckThreadsOfStorage(t *testing.T) {
	own := 2 + ownThreads() // a CPU and a queue
	group := func(left int) hostLimits {
		return fakeHost(t, nil, map[string]string{"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/pids.max": strconv.Itoa(left)})
	}
	for _, tt := range []struct {
		name            string
		left            int // threads, besides own
		disks           []string
		shares, jobs    int
		waits, requests int // of a disk and of a share; 0: as many as they take
		want            string
	}{
		{"a disk", 67, []string{"a.img"}, 0, 1, 0, 0, ""},
		{"a disk with less", 66, []string{"a.img"}, 0, 1, 63, 0, "a disk or share waits for slow storage with 63 at a time"},
		{"a disk with the least", 7, []string{"a.img"}, 0, 1, 4, 0, "with 4 at a time; raise it for up to 64"},
		{"too few for a disk", 6, []string{"a.img"}, 0, 1, 0, 0,
			fmt.Sprintf("1 CPUs, 1 request queues, and 1 disks and shares take some %d threads: pids.max of "+
				"cgroup /a, which is %d, leaves %d; raise it, or give fewer", own+7, own+6, own+6)},
		{"a share", 35, nil, 1, 1, 0, 0, ""},
		{"a share with less", 34, nil, 1, 1, 0, 31, "with 31 at a time"},
		{"too few for a share", 6, nil, 1, 1, 0, 0, "1 disks and shares take"},
		{"each its part", 3 * 53, []string{"a.img", "temp:1M"}, 1, 1, 50, 32, "with 50 at a time"},
		{"the last one's part", 3*53 - 1, []string{"a.img", "temp:1M"}, 1, 1, 49, 32, "with 49 at a time"},
		{"machines", 2 + 4*9, []string{"a.img"}, 1, 2, 6, 6, "with 6 at a time"},
		{"disks that never wait", 0, []string{"mem:1M", "null:1M", "a.img,backend=vhost"}, 0, 1, 0, 0, ""},
	} {
		spec := &machine.Spec{CPUs: 1, Shares: make([]fs.Share, tt.shares)}
		for _, s := range tt.disks {
			d, err := disk.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			spec.Disks = append(spec.Disks, d)
		}
		note, err := checkThreads(spec, tt.jobs, group(own+tt.left))
		said := note + fmt.Sprint(err)
		if !strings.Contains(said, tt.want) || tt.want == "" && said != "<nil>" {
			t.Errorf("%s: %q, %v, want %q", tt.name, note, err, tt.want)
		}
		for _, d := range spec.Disks {
			if d.Waiting != tt.waits {
				t.Errorf("%s: the disk %s waits with %d, want %d", tt.name, d.Path, d.Waiting, tt.waits)
			}
		}
		for _, s := range spec.Shares {
			if s.Requests != tt.requests {
				t.Errorf("%s: a share serves %d, want %d", tt.name, s.Requests, tt.requests)
			}
		}
	}
}

// TestAddDiskAsksLimits: a disk that is added to a running machine needs threads as well.
func TestAddDiskAsksLimits(t *testing.T) {
	was := thisHost
	defer func() { thisHost = was }()
	host := fakeHost(t, nil, map[string]string{"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
		"sys/fs/cgroup/a/pids.max": "60", "sys/fs/cgroup/a/pids.current": "54"})
	thisHost = func() hostLimits { return host }
	_, err := (&remote{}).AddDisk(t.Context(), control.AddDisk{Disk: "/a.img"})
	const want = "--disk /a.img: a disk takes some 7 threads: pids.max of cgroup /a, which is 60, leaves 6; raise it, " +
		"or give fewer"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// TestUserThreads: a user whose limit leaves too few threads gets a line rather than a crash of the
// Go runtime.
func TestUserThreads(t *testing.T) {
	r := gvmRuns(t, fewThreads(t, 60, "run --cpus 80"))
	if r.status != exitUsage || strings.Count(r.errs, "\n") != 1 ||
		!strings.HasPrefix(r.errs, "gvm: 80 CPUs and 64 request queues take some ") ||
		!strings.Contains(r.errs, " threads: RLIMIT_NPROC (ulimit -u), which is 60, leaves ") {
		t.Errorf("status %d, %q", r.status, r.errs)
	}
}

// TestRunAsksLimits: gvm run asks each limit of the host before it starts a guest.
func TestRunAsksLimits(t *testing.T) {
	was := thisHost
	defer func() { thisHost = was }()
	v2 := func(file, limit string) map[string]string {
		return map[string]string{"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/a/" + file: limit}
	}
	for _, tt := range []struct {
		files map[string]string
		args  string
		want  string
	}{
		{v2("pids.max", "60"), "--cpus 80", "pids.max of cgroup /a, which is 60, leaves 60; raise it, or give fewer"},
		{v2("pids.max", "60"), "--queues 60", "pids.max of cgroup /a, which is 60, leaves 60; raise it, or give fewer"},
		{v2("pids.max", "60"), "--disk temp:1M --disk temp:1M --disk temp:1M --disk temp:1M --disk temp:1M --disk temp:1M " +
			"--disk temp:1M", "1 CPUs, 1 request queues, and 7 disks and shares take some "},
		{v2("memory.max", "134217728"), "--memory 512M", "--memory 512M: memory.max of cgroup /a is 128 MiB"},
	} {
		host := fakeHost(t, nil, tt.files)
		thisHost = func() hostLimits { return host }
		args := append([]string{"gvm", "run", "--timeout", "1ns"}, strings.Fields(tt.args)...)
		err := app(args).Run(args)
		if err == nil || !strings.Contains(err.Error(), tt.want) || exitStatus(err) != exitUsage {
			t.Errorf("gvm run %s: %v, want %s", tt.args, err, tt.want)
		}
	}
}

// TestMemoryLimitsDoctor: doctor reports the limits that the check enforces. The test can set the
// process's own limit of its address space.
func TestMemoryLimitsDoctor(t *testing.T) {
	c := command(t)
	c.Args = []string{"sh", "-c", fmt.Sprintf(`ulimit -v %d && "$0" doctor; "$0" run --memory 2000`, 3<<20), c.Path}
	c.Path = "/bin/sh"
	r := gvmRuns(t, c)
	if want := "note  RLIMIT_AS (ulimit -v) is 3 GiB, which leaves a guest "; !strings.Contains(r.out, want) {
		t.Errorf("doctor says %q, want %q", r.out, want)
	}
	if r.status != exitUsage || !strings.HasPrefix(r.errs, "gvm: --memory 2000: RLIMIT_AS") {
		t.Errorf("status %d, %q", r.status, r.errs)
	}
	c = command(t)
	c.Args = []string{"sh", "-c", fmt.Sprintf(`ulimit -v %d && exec "$0" run --disk mem:4G`, 3<<20), c.Path}
	c.Path = "/bin/sh"
	if r := gvmRuns(t, c); r.status != exitUsage ||
		!strings.Contains(r.errs, "the guest's memory and its disks in memory have 4608 MiB: RLIMIT_AS") {
		t.Errorf("disks in memory: status %d, %q", r.status, r.errs)
	}
}
