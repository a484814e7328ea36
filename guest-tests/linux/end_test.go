package linux

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"gvm/guest-tests/lab"
	"gvm/guest/bootinit"
)

// TestEndings: gvm's exit status tells how the guest ended, which faults its kernel reported and
// how its tests went. A record of a program counts as the kernel's where the console does not tell
// them apart. TestCrashKernel has a panic told on the console alone, and TestBoot a kernel without
// a fault.
func TestEndings(t *testing.T) {
	t.Parallel()
	l := theLab(t)
	const fault = "echo '<3>BUG: made up' >/dev/kmsg; "
	for _, c := range []struct {
		name   string
		guest  guest
		args   string
		status int
		stderr []string
		bare   string // the whole command line
	}{
		{"panic told by pvpanic", guest{modules: []string{"pvpanic_mmio"}, script: "echo c >/proc/sysrq-trigger"}, "", 5,
			[]string{"guest panic: "}, "quiet"},
		{"panic with log levels and callers", guest{cmdline: "console_msg_format=syslog printk.time=1",
			script: "echo -n 'on this line: '; echo c >/proc/sysrq-trigger"}, "", 5,
			[]string{"guest panic: Kernel panic - not syncing: sysrq triggered crash; the guest then reset"}, ""},
		{"panic of a kernel that stays", guest{cmdline: "console_msg_format=syslog panic=0",
			script: "echo c >/proc/sysrq-trigger"}, "", 5,
			[]string{"guest panic: Kernel panic - not syncing: sysrq triggered crash; its console was then silent for 1s"}, ""},
		{"init exits after a fault", guest{script: fault + "exit 3"}, "--oops=fail", 5,
			[]string{"guest panic: Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300",
				"the guest's kernel reported bug: BUG: made up\n"}, ""},
		{"reset after texts of a panic and of a halt", guest{
			script: "echo 'Kernel panic - not syncing: no'; echo 'reboot: System halted'; sleep 3; reboot -f"}, "", 6,
			[]string{"the guest asked for a reset"}, ""},
		{"reset by triple fault", guest{script: "reboot -f", cmdline: "reboot=t"}, "", 4, []string{"triple fault"}, ""},
		{"halt after a fault that does not count", guest{script: fault + "halt -f"}, "--oops=ignore", 0, nil, ""},
		{"halt of two CPUs after a program's record", guest{cmdline: "console_msg_format=syslog", script: fault + "halt -f"},
			"--oops=fail --cpus=2", 0, nil, ""},
		{"power-off after a fault", guest{script: fault}, "--oops=fail", 7,
			[]string{"the guest's kernel reported bug: BUG: made up (fingerprint "}, ""},
		{"tests", guest{script: "echo 'TAP version 13'; echo '1..2'; echo 'ok 1 a'; echo 'not ok 2 b'"},
			"--junit=/dev/null", 1, []string{"tests failed: 1 passed, 1 failed, 0 crashed, 0 skipped"}, ""},
		{"a test that crashed", guest{script: "echo '<3>KTAP version 1' >/dev/kmsg; echo '<3>1..1' >/dev/kmsg"},
			"--junit=/dev/null", 1, []string{"tests failed: 0 passed, 0 failed, 1 crashed, 0 skipped"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.guest.kernel = l.Cloud
			args := append(c.guest.build(t), "--disk", diskFile(t, content(t.Name(), 1<<20)))
			if c.bare != "" {
				args = append(args, "--bare-cmdline", "--cmdline", c.bare)
			}
			r := gvm(t, append(args, strings.Fields(c.args)...)...)
			r.wantStatus(t, c.status)
			for _, want := range c.stderr {
				if !strings.Contains(r.stderr, want) {
					r.fatalf(t, "standard error lacks %q", want)
				}
			}
		})
	}
}

// TestPowerButton: gvm stop, and SIGTERM with --grace, press the power button. A guest that listens
// to it ends by itself; one that does not is stopped.
func TestPowerButton(t *testing.T) {
	t.Parallel()
	g := guest{kernel: theLab(t).Debian, modules: []string{"button", "evdev"}, script: `
for e in /dev/input/event*; do (dd if=$e of=/dev/null bs=24 count=1 2>/dev/null; echo pressed; poweroff -f) & done
sleep 1
echo listening
sleep 1000
`}
	p := start(t, nil, append(g.build(t), "--name", "button")...)
	p.waitFor("listening")
	gvm(t, "stop", "button", "--grace", "1m").wantStatus(t, 0)
	p.wait().wantStatus(t, 0)
	p = start(t, nil, append(g.build(t), "--grace", "1m")...)
	p.waitFor("listening")
	p.signal(syscall.SIGTERM)
	p.wait().wantStatus(t, 0)
	g.script = "echo deaf; sleep 1000"
	p = start(t, nil, append(g.build(t), "--grace", "100ms")...)
	p.waitFor("deaf")
	p.signal(syscall.SIGTERM)
	p.wait().wantStatus(t, 143)
}

// TestPanicPrint: a kernel whose pvpanic driver reports the panic prints everything that
// panic_print= asks for.
func TestPanicPrint(t *testing.T) {
	t.Parallel()
	r := guest{kernel: theLab(t).Cloud, modules: []string{"pvpanic_mmio"}, cmdline: "panic_print=0x2",
		script: "echo c >/proc/sysrq-trigger"}.run(t)
	r.wantStatus(t, 5)
	const want = "guest panic: Kernel panic - not syncing: sysrq triggered crash; the guest then reset\n"
	if !strings.Contains(r.stderr, want) {
		r.fatalf(t, "standard error lacks %q", want)
	}
	_, more, _ := strings.Cut(r.console, "Kernel panic - not syncing")
	for _, want := range []string{"Kernel Offset: ", "Mem-Info:", "pages reserved"} {
		if !strings.Contains(more, want) {
			r.fatalf(t, "the console lacks %q after the panic", want)
		}
	}
}

// TestCrashKernel: the crash kernel of a guest that panicked runs to its own end, and the run ends
// as a panic.
func TestCrashKernel(t *testing.T) {
	t.Parallel()
	l := theLab(t)
	for _, c := range []struct {
		name, cmdline, end string
		modules            []string
		stderr             string
	}{
		{"told by pvpanic", "crash_kexec_post_notifiers", "poweroff -f", []string{"pvpanic_mmio"},
			"sysrq triggered crash; the guest then powered off\n"},
		{"seen on the console", "", "reboot -f", nil, "sysrq triggered crash; the guest then reset\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			second := guest{kernel: l.Cloud, script: "echo the crash kernel runs\nsleep 6\n" + c.end}
			r := guest{
				kernel:   l.Cloud,
				modules:  c.modules,
				programs: []string{"usr/sbin/kexec"},
				files:    map[string]string{"kernel": l.Cloud.BZImage, "second": second.initramfs(t)},
				cmdline:  "crashkernel=192M " + c.cmdline,
				script: `kexec -p /kernel --initrd=/second --command-line="console=ttyS0 panic=-1 quiet nr_cpus=1" ||
	say kexec cannot load
echo c >/proc/sysrq-trigger`,
			}.run(t)
			r.wantStatus(t, 5)
			if !strings.Contains(r.stderr, c.stderr) || !strings.Contains(r.console, "\nthe crash kernel runs\n") {
				r.fatalf(t, "standard error lacks %q, or the crash kernel did not run", c.stderr)
			}
		})
	}
}

// TestMemoryCgroup: a guest with more memory than a nested memory cgroup allows is refused.
func TestMemoryCgroup(t *testing.T) {
	t.Parallel()
	needsRoot(t, "a control group")
	root := t.TempDir()
	if err := syscall.Mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Unmount(root, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	outer := filepath.Join(root, "gvm-test-outer")
	inner := filepath.Join(outer, "inner")
	if err := os.MkdirAll(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(outer)
	defer os.Remove(inner)
	for _, w := range [][2]string{{root + "/cgroup.subtree_control", "+memory"}, {outer + "/memory.max", "128M"}} {
		if err := os.WriteFile(w[0], []byte(w[1]), 0); err != nil {
			t.Fatal(err)
		}
	}
	r := startProgram(t, "/bin/sh", nil, cacheHome, "-c", `echo $$ >"$1"/cgroup.procs && exec "$0" run --memory 2G`,
		lab.Program("gvm"), inner).wait()
	r.wantStatus(t, 2)
	const want = "memory.max of cgroup /gvm-test-outer is 128 MiB, which leaves a guest 111 MiB; --overcommit allows more"
	if !strings.Contains(r.stderr, want) {
		r.fatalf(t, "standard error lacks %q", want)
	}
}

// TestBootInit: the init of measured boots reports that it runs, on the console and by port 0x80;
// gvm bench boot uses it for a kernel without an initrd.
func TestBootInit(t *testing.T) {
	t.Parallel()
	kernel := theLab(t).Debian.VMLinux // the cloud kernel has no CONFIG_DEVPORT
	archive, err := bootinit.Initramfs()
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, nil, "run", "--timing", "--kernel", kernel, "--initrd", diskFile(t, archive), "--cmdline", "quiet")
	p.waitFor(bootinit.Line)
	p.signal(syscall.SIGTERM)
	if r := p.wait(); !strings.Contains(r.stderr, "  guest stamp 0x41\n") {
		r.fatalf(t, "no stamp of init's")
	}
	r := gvm(t, "bench", "boot", "--kernel", kernel, "--cmdline", "quiet", "--rounds", "1", "--qemu", "none")
	r.wantStatus(t, 0)
	if row := regexp.MustCompile(`(?m)^ *gvm( +\d+\.\d){4} `); !row.MatchString(r.console) {
		r.fatalf(t, "no row of gvm's")
	}
}

// TestEmbeddedEndings does the same for the embedded guest.
func TestEmbeddedEndings(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		args   []string
		status int
		stderr string
	}{
		{"power off", []string{"--cpus", "8"}, 0, ""},
		// The lab's processor is AMD's. Hosts before 5.19 keep the general registers.
		{"triple fault", []string{"--guest-arg", "crash=triple"}, 4,
			": on AMD, KVM resets a CPU that had a triple fault\n"},
		{"panic", []string{"--guest-arg", "crash=panic"}, 5, "guest panic"},
		{"reset", []string{"--guest-arg", "crash=reset"}, 6, "reset"},
		{"timeout of a halted guest", []string{"--guest-arg", "hang", "--timeout", "2s"}, 124, "--timeout 2s elapsed"},
		{"timeout of a busy guest", []string{"--guest-arg", "spin", "--timeout", "2s"}, 124, "--timeout 2s elapsed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := diskFile(t, content(t.Name(), 1<<20))
			r := gvm(t, append([]string{"run", "--disk", disk}, c.args...)...)
			r.wantStatus(t, c.status)
			if !strings.Contains(r.stderr, c.stderr) {
				r.fatalf(t, "standard error lacks %q", c.stderr)
			}
			wantFile(t, disk, 0, content(t.Name(), 1<<20))
		})
	}
}

// TestSignals: a signal ends a Linux guest and gvm, which cleans up.
func TestSignals(t *testing.T) {
	t.Parallel()
	l := theLab(t)
	args := guest{kernel: l.Cloud, script: "echo ready; while :; do :; done"}.build(t)
	p := start(t, nil, args...)
	p.waitFor("ready")
	p.signal(syscall.SIGTERM)
	p.wait().wantStatus(t, 143)
	for signal, status := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGHUP: 129} {
		p := start(t, nil, "run", "--guest-arg", "echo")
		p.waitFor("ready")
		p.signal(signal)
		p.wait().wantStatus(t, status)
	}
}

// TestConsole: a guest's shell works with a pipe as with a terminal, and no byte of its console is
// lost in either direction. It gets the terminal's size from the command line, where gvm puts it if
// it runs on a terminal. At the end the output of a script that ends is whole.
func TestConsole(t *testing.T) {
	t.Parallel()
	input := "echo $((6*7))\nstty -echo\necho size $LINES $COLUMNS\n" +
		strings.Repeat("count=$((count+1)) # a line that is longer than the FIFO of a 16550\n", 20) +
		"echo counted $count\necho begin; seq 1 2000 | tr '\\n' ' '; echo; echo end\nexit\n"
	r := start(t, strings.NewReader(input), append(guest{
		// Without the kernel's messages, such as of an RCU stall where the lab is slow, within the
		// output.
		kernel: kernel(t, "7.3"), cmdline: "loglevel=1 LINES=50 COLUMNS=132",
		script: "sh\nnumbers=$(seq -s ' ' 1 1000)\necho $numbers over",
	}.build(t), "--cpus=3")...).wait()
	r.wantStatus(t, 0)
	last := strings.ReplaceAll(string(numbers(1, 1000)), "\n", " ") + "over\n"
	for _, line := range []string{"\n42\n", "size 50 132\n", "counted 20\n", last} {
		if !strings.Contains(r.console, line) {
			r.fatalf(t, "the console lacks %q", line)
		}
	}
	_, out, _ := strings.Cut(r.console, "begin\n")
	out, _, _ = strings.Cut(out, "\nend\n")
	want := strings.ReplaceAll(string(numbers(1, 2000)), "\n", " ")
	if out != want {
		i := 0
		for i < len(out) && i < len(want) && out[i] == want[i] {
			i++
		}
		r.fatalf(t, "of %d bytes of output %d came, the first wrong one at %d", len(want), len(out), i)
	}
}
