package main

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	if os.Args[0] == "gvm-net" {
		main()
		return
	}
	os.Exit(m.Run())
}

// program returns gvm-net with files from descriptor 3 on.
func program(t testing.TB, args []string, files ...*os.File) (*exec.Cmd, *bytes.Buffer) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	c := &exec.Cmd{Path: exe, Args: append([]string{"gvm-net"}, args...), Stderr: &errs, ExtraFiles: files}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill() })
	return c, &errs
}

func pair(t testing.TB) (device, gateway *os.File) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "device"), os.NewFile(uintptr(fds[1]), "gateway")
}

// TestEnd: gvm-net ends without an error when gvm does, and by SIGTERM.
func TestEnd(t *testing.T) {
	for _, by := range []string{"socket", "SIGTERM"} {
		t.Run(by, func(t *testing.T) {
			l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			tcp, err := l.File()
			if err != nil {
				t.Fatal(err)
			}
			u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			udp, err := u.File()
			if err != nil {
				t.Fatal(err)
			}
			device, gateway := pair(t)
			c, errs := program(t, []string{"host=off", "tcp=80", "udp=53"}, gateway, tcp, udp)
			for _, f := range []interface{ Close() error }{l, tcp, u, udp, gateway} {
				f.Close()
			}
			// A router solicitation: the answer says that the network is there.
			m := make([]byte, 12+14+40+8)
			copy(m[24:], "\x86\xdd\x60\x00\x00\x00\x00\x08\x3a\xff")
			m[12+14+40] = 133
			if _, err := device.Write(m); err != nil {
				t.Fatal(err)
			}
			if n, err := device.Read(make([]byte, 1000)); n < len(m) || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
			if by == "socket" {
				device.Close()
			} else {
				c.Process.Signal(syscall.SIGTERM)
			}
			if err := c.Wait(); err != nil || errs.Len() > 0 {
				t.Errorf("%v: %s", err, errs)
			}
			if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
				t.Error("the published port is still there")
			}
			device.Close()
		})
	}
}

func TestBadCalls(t *testing.T) {
	for args, want := range map[string]string{
		"":            "", // the other end is closed
		"host=on":     `"host=on": want host=off, tcp=PORT or udp=PORT`,
		"tcp=0":       `"tcp=0": want host=off, tcp=PORT or udp=PORT`,
		"udp=70000":   `"udp=70000": want host=off, tcp=PORT or udp=PORT`,
		"tcp=80":      "tcp=80: descriptor 4 is no socket of tcp that listens",
		"host=off x=": `"x=": want host=off, tcp=PORT or udp=PORT`,
	} {
		device, gateway := pair(t)
		c, errs := program(t, strings.Fields(args), gateway)
		gateway.Close()
		device.Close()
		c.Wait()
		if got := strings.TrimSuffix(strings.TrimPrefix(errs.String(), "gvm-net: "), "\n"); got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
	c, errs := program(t, nil)
	c.Wait()
	const want = "gvm-net: descriptor 3 is no socket of a network device: gvm run --net user starts gvm-net\n"
	if errs.String() != want || c.ProcessState.ExitCode() != 1 {
		t.Errorf("exit status %d: %q, want %q", c.ProcessState.ExitCode(), errs, want)
	}
}
