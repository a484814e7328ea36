package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"gvm/guest/kernel"
)

// TestJailWords: what does not work in a jail is refused with the reason, by every user.
func TestJailWords(t *testing.T) {
	for _, tt := range []struct{ words, text string }{
		{"--uid=5", "--uid is for --jail DIR"},
		{"--jail-limit=pids=5", "--jail-limit is for --jail DIR"},
		{"--jail=/j --uid=5", "--jail needs --uid and --gid"},
		{"--jail=/j --uid=5 --gid=5 --jail-limit=cpu=1", `--jail-limit cpu: want memory, cpus, pids, nofile or fsize`},
		{"--jail=/j --uid=5 --gid=5 --disk=wwn=naa.5001405123456789,backend=vhost",
			"--disk wwn=naa.5001405123456789: backend=vhost with --jail works for"},
		{"--jail=/j --uid=5 --gid=5 --disk=/a,backend=vhost,size=1G", "--disk /a: backend=vhost with --jail works for"},
		{"--jail=/j --uid=5 --gid=5 --trace=/t --disk=/a,backend=vhost", "--disk /a: backend=vhost with --jail works for"},
		{"--jail=/j --uid=5 --gid=5 --gdb=unix:/s",
			"--gdb unix:/s: a socket of a machine in a jail is in DIR/run: give /j/run/gdb, or use a port"},
		{"--jail=/j --uid=5 --gid=5 --gdb=unix:/j/run/a/b", "--gdb unix:/j/run/a/b: a socket of a machine in a jail"},
		{"--jail=/run/j --uid=5 --gid=5 --gdb=unix:/run/j/run/s", "--gdb unix:/run/j/run/s: --jail /run/j has no place"},
		{"--jail=/j --uid=5 --gid=5 --gdb=unix:/j/run/s --vsock=path=/j/run/v", "<nil>"},
		{"--jail=/j --uid=5 --gid=5 --vsock=unix,path=/s",
			"--vsock path=/s: a socket of a machine in a jail is in DIR/run: give /j/run/vsock, or leave it out"},
		{"--jail=/j --uid=5 --gid=5 --kernel=0.0.1-none",
			"0.0.1-none does not exist, neither as a file nor as the release of an installed kernel"},
	} {
		app := app([]string{"gvm", "run"})
		var got error
		app.Commands[0].Action = func(c *cli.Context) error {
			_, got = parseRun(c)
			return nil
		}
		if err := app.Run(append([]string{"gvm", "run"}, strings.Fields(tt.words)...)); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(fmt.Sprint(got), tt.text) {
			t.Errorf("%s: %v, want %s", tt.words, got, tt.text)
		}
	}
}

// TestJailFiles: a jail has the files and devices of the command line, and makes those for results.
func TestJailFiles(t *testing.T) {
	app := app([]string{"gvm", "run"})
	var rc runConfig
	app.Commands[0].Action = func(c *cli.Context) (err error) {
		rc, err = parseRun(c)
		return err
	}
	if err := app.Run([]string{"gvm", "run", "--jail=/j", "--uid=5", "--gid=6", "--kernel=/k", "--initrd=/i",
		"--disk=/d", "--disk=/r,readonly", "--disk=/b,overlay=/o", "--disk=/c,overlay=on", "--disk=mem:1M",
		"--share=s=/s,ro", "--share=w=/w", "--share=both=/s2,ro", "--share=too=/s2/",
		"--net=tap=t,mac=02:00:00:00:00:01", "--vsock=vhost,cid=5",
		"--junit=/x", "--results=/y", "--trace=/t", "--crash-dir=/crashes"}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range rc.jail.Files {
		if f.Flag != "--net" { // of hosts with /etc/machine-id
			got = append(got, fmt.Sprintf("%s %s %v %v", f.Flag, f.Path, f.Write, f.Make))
		}
	}
	want := []string{"--kernel /k false false", "--initrd /i false false", "--disk /d true false",
		"--disk /r false false", "--disk /b false false", "--disk overlay /o true false", "--disk /c false false",
		"--share /s false false", "--share /w true false",
		"--share /s2 true false", "--share /s2/ true false", "--trace /t true true", "--crash-dir /crashes true false",
		"--junit /x true true", "--results /y true true"}
	if !slices.Equal(got, want) {
		t.Errorf("files %q\nwant %q", got, want)
	}
	want = []string{"/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/vhost-vsock"}
	if j := rc.jail; !slices.Equal(j.Devices, want) || !j.Network || j.UID != 5 || j.GID != 6 {
		t.Errorf("%+v, want devices %q and the network", j, want)
	}
}

// TestJailKernel: the release of an installed kernel is no path in a jail; the message has the
// file's.
func TestJailKernel(t *testing.T) {
	t.Chdir(t.TempDir())
	root := t.TempDir()
	image := filepath.Join(root, "boot", "vmlinuz-6.1-x")
	if err := errors.Join(os.WriteFile("file", nil, 0o600), os.Mkdir(filepath.Dir(image), 0o700),
		os.WriteFile(image, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"": "", "/none": "", "file": "", "6.1-x": "give --kernel " + image,
		kernel.Host: "give --kernel " + image, "6.2": "6.2 does not exist"} {
		err := checkKernelPath(kernel.Finder{Root: root, Running: "6.1-x"}, name)
		if (err != nil) != (want != "") || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
	}
}

// TestWithoutFlags: the program in the jail has all words of the command line but those of the
// jail.
func TestWithoutFlags(t *testing.T) {
	got := withoutFlags(runCommand(), []string{"--cpus", "2", "--jail", "/j", "--uid=5", "-gid", "6", "--name", "--uid",
		"--jail-limit", "pids=9", "", "--balloon", "--cmdline=--jail", "--", "--uid"}, jailFlagNames)
	want := []string{"--cpus", "2", "--name", "--uid", "", "--balloon", "--cmdline=--jail", "--", "--uid"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
