package linux

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gvm/guest-tests/lab"
)

// TestExec: beside the command of gvm test others run in its guest, by gvm exec and gvm shell, gvm cp
// copies files into it and out of it, also of /proc and /sys, and gvm dump
// finds VMCOREINFO and the kernel's text in its memory.
func TestExec(t *testing.T) {
	k, bb := theLab(t).Cloud, busybox(t)
	run := t.TempDir()
	gvm := func(args ...string) *exec.Cmd {
		c := exec.CommandContext(t.Context(), lab.Program("gvm"), args...)
		c.Env = append(os.Environ(), "XDG_CACHE_HOME="+cacheHome, "XDG_RUNTIME_DIR="+run)
		c.Stderr = new(bytes.Buffer)
		return c
	}
	test := gvm("test", "-k", k.BZImage, "--memory", "256M", "--timeout", "3m", "--", bb, "sh", "-c", "echo up; cat")
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
			"gvm: machine " + name + ": /no/such: no such file or directory\n"},
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
	b, err := os.ReadFile(filepath.Join(run, "version"))
	if err != nil || !strings.HasPrefix(string(b), "Linux version "+k.Release) {
		t.Errorf("the guest's /proc/version: %q, %v", b, err)
	}
	e, err := elf.Open(filepath.Join(run, "core"))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	image := e.Progs[1]
	if len(e.Progs) != 3 || image.Vaddr < 0xffffffff_80000000 {
		t.Errorf("%d segments; the kernel's is %+v", len(e.Progs), image.ProgHeader)
	}
	banner := make([]byte, image.Filesz)
	if _, err := image.ReadAt(banner, 0); err != nil || !bytes.Contains(banner, []byte("Linux version "+k.Release)) {
		t.Errorf("the kernel's image has no linux_banner: %v", err)
	}
	in.Close()
	if err := test.Wait(); err != nil {
		t.Errorf("gvm test: %v: %s", err, test.Stderr)
	}
}
