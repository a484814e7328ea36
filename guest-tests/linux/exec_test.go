package linux

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest-tests/lab"
)

// TestExec: beside the command of gvm test others run in its guest, by gvm exec and gvm shell, gvm
// cp copies files into it and out of it, also of /proc and /sys, and gvm dump finds VMCOREINFO and
// the kernel's text in its memory, which gdb opens.
func TestExec(t *testing.T) {
	k, bb := theLab(t).Cloud, busybox(t)
	run := t.TempDir()
	gvm := func(args ...string) *exec.Cmd {
		c := exec.CommandContext(t.Context(), lab.Program("gvm"), args...)
		c.Env = append(os.Environ(), "XDG_CACHE_HOME="+cacheHome, "XDG_RUNTIME_DIR="+run)
		c.Stderr = new(bytes.Buffer)
		return c
	}
	test := gvm("test", "-k", k.BZImage, "-a", "quiet", "--memory", "256M", "--timeout", "3m", "--", bb, "sh", "-c",
		"echo up; cat")
	in, err := test.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := test.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := test.Start(); err != nil {
		t.Fatal(err)
	}
	up := make([]byte, 3)
	if _, err := io.ReadFull(out, up); err != nil {
		in.Close()
		t.Fatalf("%v, %v: %s", err, test.Wait(), test.Stderr)
	}
	name := fmt.Sprint("gvm-", test.Process.Pid)
	data := content(t.Name(), 256<<10)
	for _, c := range []struct {
		args   []string
		status int
		out    string
		errs   string
	}{
		{[]string{"exec", name, "--", bb, "sh", "-c", "cat; echo errors >&2; exit 7"}, 7, string(data), "errors\n"},
		{[]string{"exec", name, "uname", "-r"}, 0, k.Release + "\n", ""},
		{[]string{"exec", name, "--", "/no/such"}, 127, "", "gvm: run /no/such: no such file or directory\n"},
		{[]string{"exec", name, "--", "sh", "-c", "kill -9 $$"}, 137, "", ""},
		{[]string{"shell", name}, 2, "", "sh: "},
		{[]string{"cp", "-", name + ":/tmp/in"}, 0, "", ""},
		{[]string{"cp", name + ":/tmp/in", "-"}, 0, string(data), ""},
		{[]string{"cp", "-r", name + ":/sys/module/kernel", "."}, 2, "",
			"gvm: machine " + name + ": /sys/module/kernel/uevent: permission denied; files left out: 1\n"},
		{[]string{"cp", "-r", "kernel", name + ":/tmp/copy"}, 0, "", ""},
		{[]string{"exec", name, "--", "find", "/tmp/copy/parameters", "-name", "pani[c]"}, 0,
			"/tmp/copy/parameters/panic\n", ""},
		{[]string{"cp", name + ":/proc/version", "version"}, 0, "", ""},
		{[]string{"cp", name + ":/no/such", "."}, 2, "",
			"gvm: machine " + name + ": /no/such: no such file or directory; there is no directory /no: check the path\n"},
		{[]string{"cp", "version", name + ":/proc/no/"}, 2, "", "gvm: machine " + name + ": /proc/no/: there is no such"},
		{[]string{"dump", name, "core"}, 0, "", "gvm: dumped " + name + ", Linux " + k.Release + "\n"},
	} {
		cmd := gvm(c.args...)
		cmd.Dir = run
		var out bytes.Buffer
		cmd.Stdin, cmd.Stdout = bytes.NewReader(data), &out
		if c.args[0] == "shell" {
			cmd.Stdin = strings.NewReader("(")
		}
		_ = cmd.Run()
		errs := cmd.Stderr.(*bytes.Buffer).String()
		if cmd.ProcessState.ExitCode() != c.status || out.String() != c.out || !strings.HasPrefix(errs, c.errs) {
			t.Errorf("gvm %q: status %d, %d bytes, %q", c.args, cmd.ProcessState.ExitCode(), out.Len(), errs)
		}
	}
	shellOnTerminal(t, gvm("shell", name))
	b, err := os.ReadFile(filepath.Join(run, "version"))
	if err != nil || !strings.HasPrefix(string(b), "Linux version "+k.Release) {
		t.Errorf("the guest's /proc/version: %q, %v", b, err)
	}
	e, err := elf.Open(filepath.Join(run, "core"))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if len(e.Progs) < 3 {
		t.Fatalf("%d segments", len(e.Progs))
	}
	image, ram := e.Progs[1], e.Progs[2]
	if image.Vaddr < 0xffffffff_80000000 || ram.Vaddr != 0xffff8880_00000000 || ram.Paddr != 0 {
		t.Errorf("the kernel's segment is %+v, that of RAM %+v", image.ProgHeader, ram.ProgHeader)
	}
	banner := make([]byte, image.Filesz)
	if _, err := image.ReadAt(banner, 0); err != nil || !bytes.Contains(banner, []byte("Linux version "+k.Release)) {
		t.Errorf("the kernel's image has no linux_banner: %v", err)
	}
	gdbOpens(t, filepath.Join(run, "core"), e, k.Release)
	in.Close()
	if err := test.Wait(); err != nil {
		t.Errorf("gvm test: %v: %s", err, test.Stderr)
	}
}

// gdbOpens has Debian's gdb open a core without the kernel's symbols: the CPU is in the kernel or
// in user space, and the release is where VMCOREINFO says.
func gdbOpens(t *testing.T, path string, core *elf.File, release string) {
	t.Helper()
	notes, err := io.ReadAll(core.Progs[0].Open())
	must(t, err)
	const utsname = 65 // bytes of a field of struct new_utsname, of which release is the third
	value := func(pattern string, base int) uint64 {
		m := regexp.MustCompile(pattern).FindSubmatch(notes)
		if m == nil {
			t.Fatalf("VMCOREINFO has no %s", pattern)
		}
		n, err := strconv.ParseUint(string(m[1]), base, 64)
		must(t, err)
		return n
	}
	at := value(`SYMBOL\(init_uts_ns\)=([0-9a-f]+)`, 16) + value(`OFFSET\(uts_namespace\.name\)=(\d+)`, 10) + 2*utsname
	out, err := exec.CommandContext(t.Context(), hostProgram(t, "gdb", "gdb"), "-q", "-nx", "-batch", "-c", path,
		"-ex", "info threads", "-ex", "info registers rip", "-ex", fmt.Sprintf("x/s %#x", at)).CombinedOutput()
	if err != nil || !regexp.MustCompile(`(?s)\* 1 .*rip +0x[0-9a-f]+.*0x[0-9a-f]+:\s+"`+regexp.QuoteMeta(release)+`"`).
		Match(out) {
		t.Errorf("gdb: %v\n%s", err, out)
	}
}

// shellOnTerminal uses gvm shell on a terminal: its size, also a new one, Ctrl-C, Ctrl-Z and jobs
// are those of the shell in the guest.
func shellOnTerminal(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	useTerminal(t, cmd, 5, [][2]string{
		{"", "# "},
		{"tty; stty size; echo $((6*7))\r", "\n/dev/pts/0\n40 100\n42\n"},
		{"size", ""},
		{`until [ "$(stty size)" = "50 132" ]; do sleep 0.1; done; echo siz$((1))` + "\r", "\nsiz1\n"},
		{"sh -c 'echo in fron$((1)); exec sleep 1000'\r", "\nin fron1\n"},
		{"\x03echo after $?\r", "\nafter 130\n"},
		{"sh -c 'echo in fron$((2)); exec sleep 1000'\r", "\nin fron2\n"},
		{"\x1a", "Stopped"},
		{"jobs | grep -c Stopped; echo job$((3))\r", "\n1\njob3\n"},
		{"bg; kill %1; wait %1; echo waited $?\r", "\nwaited 143\n"},
		{"exit 5\r", ""},
	})
}

// useTerminal runs a command on a terminal of 40 rows and 100 columns to its end with a status, and
// leaves the terminal as it was. Each step is typed, and waits for text in the output, without
// carriage returns; the step "size" makes the terminal one of 50 rows and 132 columns. Each text is
// computed, so that the echo of the input has none.
func useTerminal(t *testing.T, cmd *exec.Cmd, status int, steps [][2]string) {
	t.Helper()
	master, slave := terminal(t, 40, 100)
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	must(t, err)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	cmd.Env = append(cmd.Env, "TERM=dumb")
	must(t, cmd.Start())
	more, all := make(chan []byte), ""
	go func() {
		defer close(more)
		for {
			b := make([]byte, 4096)
			n, err := master.Read(b)
			if n > 0 {
				more <- b[:n]
			}
			if err != nil {
				return
			}
		}
	}()
	late := time.AfterFunc(patience, func() { _ = cmd.Process.Kill(); slave.Close() })
	for _, step := range steps {
		if step[0] == "size" {
			must(t, unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 132}))
			continue
		}
		_, err := io.WriteString(master, step[0])
		must(t, err)
		for !strings.Contains(all, step[1]) {
			b, ok := <-more
			if !ok {
				t.Fatalf("the terminal ended after %q without %q: %q", step[0], step[1], all)
			}
			all += strings.ReplaceAll(string(b), "\r", "")
		}
	}
	go func() { // the rest
		for range more {
		}
	}()
	_ = cmd.Wait()
	late.Stop()
	after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	must(t, err)
	if cmd.ProcessState.ExitCode() != status || *after != *before {
		t.Errorf("status %d, settings %+v, were %+v: %q", cmd.ProcessState.ExitCode(), after, before, all)
	}
}

// terminal opens a pseudoterminal of a size (pty(7)).
func terminal(t *testing.T, rows, columns uint16) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	must(t, err)
	master = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { master.Close() })
	must(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	must(t, err)
	slave, err = os.OpenFile(fmt.Sprint("/dev/pts/", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	must(t, err)
	t.Cleanup(func() { slave.Close() })
	must(t, unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}))
	return master, slave
}
