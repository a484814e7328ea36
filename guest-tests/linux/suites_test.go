//go:build built

package linux

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gvm/guest-tests/lab"
	"gvm/vmm"
)

// suiteProcessor returns the processor of this machine. One that is emulated has one CPU unless
// $CPUS says otherwise: the lab loses guests of more under such loads.
func suiteProcessor() processor {
	inLab := os.Getenv(lab.InLabEnv) == "1"
	linux := inLab
	if !inLab {
		linux, _ = kvmRunsLinux()
	}
	return processorOf(inLab, linux, os.Getenv("CPUS"))
}

var kvmRunsLinux = sync.OnceValues(vmm.RunsLinux)

// suiteDisk is the size of each disk.
const suiteDisk = 2 << 30

// suiteWays are all ways, of which $WAYS may name some.
var suiteWays = []suiteWay{
	{"process", func(t *testing.T, k *lab.Kernel, dir string, disks int, script string,
		progress func(string)) (string, error) {
		return suiteOnGVM(k, dir, script, progress, "--scratch", fmt.Sprintf("%dx%d", disks, suiteDisk))
	}},
	{"vhost", func(t *testing.T, k *lab.Kernel, dir string, disks int, script string,
		progress func(string)) (string, error) {
		var args []string
		files := suiteFiles(t, disks)
		defer removeFiles(files)
		for _, file := range files {
			args = append(args, "--disk", file+",backend=vhost")
		}
		return suiteOnGVM(k, dir, script, progress, args...)
	}},
	{"qemu", func(t *testing.T, k *lab.Kernel, _ string, disks int, script string,
		progress func(string)) (string, error) {
		file := filepath.Join(t.TempDir(), "script")
		must(t, os.WriteFile(file, []byte(script), 0o644))
		g := guest{kernel: k, modules: []string{"9p", "9pnet_virtio", "overlay", "sg"},
			// The kernel's requests for modules, such as a file system's, are not below chroot.
			files: map[string]string{"script": file}, script: `mkdir /host /memory /system
printf '#!/bin/sh\nexec chroot /system /sbin/modprobe "$@"\n' >/request
chmod +x /request
echo /request >/proc/sys/kernel/modprobe
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro,cache=loose host /host
mount -t tmpfs memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /system
for d in proc sys dev; do mount -t tmpfs none /system/$d; mount --move /$d /system/$d; done
cp /script /system/script
chroot /system /bin/bash /script 2>&1 | cat # a terminal would get colors
exec 0</system/dev/console
mount --move /system/proc /proc
echo
echo "= ended"
`}
		q, err := theLab(t).QEMUs(t.Context())
		must(t, err)
		p := suiteProcessor()
		args := slices.Concat(p.qemu, qemuMachine("q35", k.BZImage, g.initramfs(t)), []string{"-smp", p.cpus, "-m", "2048",
			"-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
			"-device", "virtio-9p-pci,fsdev=host,mount_tag=host", "-device", "virtio-scsi-pci"})
		files := suiteFiles(t, disks)
		defer removeFiles(files)
		for i, file := range files {
			args = append(args, "-device", fmt.Sprintf("scsi-hd,drive=d%d", i), "-drive",
				fmt.Sprintf("if=none,id=d%d,format=raw,cache=unsafe,discard=unmap,file=%s", i, file))
		}
		out, err := suiteRun(q[len(q)-1].Path, progress, args...)
		out = strings.ReplaceAll(out, "\r", "")
		if err == nil && !strings.Contains(out, "\n= ended\n") {
			err = errors.New("the guest was lost")
		}
		return out, err
	}},
}

func suiteOnGVM(k *lab.Kernel, dir, script string, progress func(string), disks ...string) (string, error) {
	args := append([]string{"test", "-k", k.BZImage, "--cpus", suiteProcessor().cpus, "--memory", "2G", "--oops=ignore",
		// A test may keep an emulated CPU from the agent for long.
		"--hang", "3m", "--module", "sg", "--root", "/", "--ro", dir}, disks...)
	return suiteRun(lab.Program("gvm"), progress, append(args, "--", "bash", "-c", script)...)
}

func suiteRun(program string, progress func(string), args ...string) (string, error) {
	var out, errs bytes.Buffer
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	// A boot takes less, and a test that has no end is killed before: the guest is lost, or a process
	// in it does not die.
	silence := suiteLimit() + 2*time.Minute
	silent := time.AfterFunc(silence, func() { stop(fmt.Errorf("no output for %v", silence)) })
	defer silent.Stop()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+cacheHome)
	cmd.Cancel = func() error {
		showStacks(cmd.Process.Pid)
		return cmd.Process.Kill()
	}
	cmd.WaitDelay = 10 * time.Second // a process that it started may have its output
	// It takes long: show it at once.
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, os.Stderr, sign{func() {
		silent.Reset(silence)
		progress(out.String())
	}}), &errs
	err := cmd.Run()
	if late := context.Cause(ctx); late != nil {
		err = late
	}
	if err != nil {
		fmt.Fprint(os.Stderr, errs.String())
		lines := strings.Split(strings.TrimSpace(errs.String()), "\n")
		err = fmt.Errorf("%w: %s", err, lines[len(lines)-1])
	}
	return out.String(), err
}

// showStacks shows where the threads of a process wait in L1's kernel.
func showStacks(pid int) {
	stacks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", pid))
	for _, stack := range stacks {
		b, err := os.ReadFile(stack) // fails of a thread that has ended, and without root
		fmt.Fprintf(os.Stderr, "%s: %v\n%s", stack, err, b)
	}
}

// sign calls a function at each Write.
type sign struct{ f func() }

func (s sign) Write(p []byte) (int, error) {
	s.f()
	return len(p), nil
}

// suiteFiles makes the files of empty disks.
func suiteFiles(t *testing.T, n int) (files []string) {
	for range n {
		file := diskFile(t, nil)
		must(t, os.Truncate(file, suiteDisk))
		files = append(files, file)
	}
	return files
}

// removeFiles makes room for the disks of the next guest: the lab has them in its memory.
func removeFiles(files []string) {
	for _, file := range files {
		os.Remove(file)
	}
}

// TestBlktests runs the tests of blktests that $TESTS names, of groups and single ones, in guests
// with a disk of each backend of gvm, and with one of QEMU's.
func TestBlktests(t *testing.T) {
	status := regexp.MustCompile(`(?m) \[(passed|failed|not run)\]$`)
	noise := regexp.MustCompile(`^(runtime |--- |\+\+\+ |@@ |Running |$)|^\S+/\d+ .*\)( +\[.*\])?$`)
	suite{
		name: "blktests", env: "BLKTESTS", disks: 1,
		// TEST_DEV is of xfstests; check has a variable of that name.
		setup: "unset TEST_DEV; export TEST_DEVS=/dev/sda TIMEOUT=" + cmp.Or(os.Getenv("TIMEOUT"), "10"),
		check: "./check -o /tmp/results $t",
		list: func(dir, word string) ([]string, error) {
			if strings.Contains(word, "/") {
				return []string{word}, nil
			}
			return filepath.Glob(filepath.Join(dir, "tests", word, "[0-9][0-9][0-9]"))
		},
		outcome: func(out string) (verdict, reason string) {
			for _, m := range status.FindAllStringSubmatch(out, -1) {
				if verdict == "" || verdict == "not run" || m[1] == "failed" {
					verdict = m[1]
				}
			}
			var reasons []string
			for line := range strings.Lines(out) {
				if line = strings.TrimSpace(line); verdict != "passed" && !noise.MatchString(line) {
					reasons = append(reasons, line)
				}
			}
			return verdict, strings.Join(reasons[:min(len(reasons), 3)], "; ")
		},
	}.run(t, theLab(t).Debian, suiteWays, flag.Lookup("test.outputdir").Value.String())
}

// TestXfstests runs the tests of xfstests that $TESTS names, of groups such as quick and single
// ones, on the file system $FSTYP, in the same guests with five disks.
func TestXfstests(t *testing.T) {
	fs := os.Getenv("FSTYP")
	suite{
		name: "xfstests-" + fs, env: "XFSTESTS", disks: 5,
		setup: "export FSTYP=" + fs + ` TEST_DEV=/dev/sda SCRATCH_DEV_POOL="/dev/sdb /dev/sdc /dev/sdd" LOGWRITES_DEV=/dev/sde
export TEST_DIR=/mnt/test SCRATCH_MNT=/mnt/scratch RESULT_BASE=/tmp/results
mkdir -p $TEST_DIR $SCRATCH_MNT $RESULT_BASE
export DM_DISABLE_UDEV=1 # dmsetup makes the nodes itself
mkdir -p /usr/local/sbin
printf '#!/bin/sh\n' >/usr/local/sbin/udevadm # waits for none of a udevd, which the guest has not
chmod +x /usr/local/sbin/udevadm
id=12345
for user in fsgqa fsgqa2 123456-fsgqa; do
	id=$((id + 1))
	echo "$user:x:$id:$id::/tmp:/bin/bash" >>/etc/passwd
	echo "$user:*:20000::::::" >>/etc/shadow
	echo "$user:x:$id:" >>/etc/group
done
mkfs.$FSTYP $TEST_DEV >/dev/null 2>&1`,
		// check takes longer than most tests, 24 of 40 s in the lab. A guest has no more tests, as
		// one may leave something behind.
		check: "./check --exact-order", batch: 20,
		list: func(dir, word string) (tests []string, err error) {
			if strings.Contains(word, "/") {
				return []string{word}, nil
			}
			for _, group := range []string{"generic", "shared", fs} {
				b, err := os.ReadFile(filepath.Join(dir, "tests", group, "group.list"))
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					return nil, err
				}
				for line := range strings.Lines(string(b)) {
					if f := strings.Fields(line); len(f) > 1 && f[0] != "#" && slices.Contains(f[1:], word) {
						tests = append(tests, group+"/"+f[0])
					}
				}
			}
			return tests, nil
		},
		outcome: xfstestsOutcome,
	}.run(t, theLab(t).Debian, suiteWays, flag.Lookup("test.outputdir").Value.String())
}
