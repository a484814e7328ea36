package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/machine"
)

// userNetOf starts gvm-net for a machine that has no other device, and returns its device's
// configuration.
func userNetOf(t *testing.T, u *userConfig, note func(string)) (*userNet, machine.Net) {
	t.Helper()
	rc := runConfig{user: u, spec: machine.Spec{Nets: []machine.Net{{}}}}
	n, err := rc.startUserNet(note)
	if err != nil {
		t.Fatal(err)
	}
	return n, rc.spec.Nets[0]
}

// frame reads a frame from gvm-net, which answers a router solicitation.
func frame(t *testing.T, n *userNet) (int, error) {
	t.Helper()
	m := make([]byte, 12+14+40+8)
	copy(m[24:], "\x86\xdd\x60\x00\x00\x00\x00\x08\x3a\xff")
	m[12+14+40] = 133
	if _, err := unix.Write(n.device, m); err != nil {
		return 0, err
	}
	await(t, n.device)
	return unix.Read(n.device, m)
}

// TestUserNet: gvm-net serves the device and the ports, and is gone after close, even if it was
// stopped.
func TestUserNet(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		var said []string
		n, device := userNetOf(t, &userConfig{publish: []publication{
			must(parsePublish("0:80")), must(parsePublish("[::1]:0:53/udp"))}}, func(s string) { said = append(said, s) })
		if size, err := frame(t, n); size < 74 || err != nil {
			t.Fatalf("%d, %v: %s", size, err, &n.errs)
		}
		if err := device.Device.SetOffloads(0); err != nil {
			t.Error(err)
		}
		if size, err := frame(t, n); size < 74 || err != nil {
			t.Fatalf("after offloads: %d, %v", size, err)
		}
		if len(said) != 2 || !strings.HasPrefix(said[0], "port 80/tcp of the guest is at 127.0.0.1:") ||
			!strings.HasPrefix(said[1], "port 53/udp of the guest is at [::1]:") {
			t.Errorf("gvm says %q", said)
		}
		if stopped {
			n.c.Process.Signal(syscall.SIGSTOP)
		}
		n.close()
		if n.c.ProcessState == nil || !stopped && !n.c.ProcessState.Success() {
			t.Errorf("gvm-net ended with %v: %s", n.c.ProcessState, &n.errs)
		}
	}
}

func must(p publication, err error) publication {
	if err != nil {
		panic(err)
	}
	return p
}

// TestUserNetDies: the device reads the end of its socket, and gvm says why.
func TestUserNetDies(t *testing.T) {
	said := make(chan string, 1)
	n, device := userNetOf(t, new(userConfig), func(s string) { said <- s })
	frame(t, n)
	n.c.Process.Kill()
	<-n.ended
	if s := <-said; s != "the guest's network is down: gvm-net: signal: killed" {
		t.Errorf("gvm says %q", s)
	}
	if err := device.Device.SetOffloads(0); err != nil {
		t.Errorf("a driver that begins: %v", err)
	}
	if size, err := unix.Read(n.device, make([]byte, 1)); size != 0 || err != nil {
		t.Errorf("the device reads %d, %v", size, err)
	}
	n.close()
}

// netEnv makes the test binary a process that starts gvm-net, prints its PID, and waits to be
// killed.
const netEnv = "GVM_TEST_NET"

func startNet() {
	rc := runConfig{user: new(userConfig), spec: machine.Spec{Nets: []machine.Net{{}}}}
	n, err := rc.startUserNet(func(s string) { fmt.Println(s) })
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(n.c.Process.Pid)
	select {}
}

// TestUserNetOrphan: a gvm-net that is stopped ends with a gvm that is killed, also if the reaper
// of orphans is in its session, as in a container: else its process group is orphaned, and the
// kernel sends it SIGHUP and SIGCONT.
func TestUserNetOrphan(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	c := command(t)
	c.Env = append(c.Env, netEnv+"=1")
	out, err := c.StdoutPipe()
	if err := errors.Join(err, c.Start()); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err := errors.Join(err, unix.Kill(pid, unix.SIGSTOP)); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	_ = errors.Join(c.Process.Kill(), c.Wait())
	if await(t, fd) == 0 {
		t.Errorf("gvm-net %d runs on", pid)
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, 0, nil); err != nil || status.Signal() != unix.SIGKILL {
		t.Errorf("%v, %v", status.Signal(), err)
	}
}

func TestUserNetFaults(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr := l.Addr().String()
	rc := runConfig{user: &userConfig{publish: []publication{must(parsePublish("0:1")), must(parsePublish(addr + ":80"))}},
		spec: machine.Spec{Nets: []machine.Net{{}}}}
	_, err = rc.startUserNet(func(string) {})
	want := "--publish " + addr + ":80: " + addr + ": address already in use; choose another port"
	if err == nil || err.Error() != want || !errors.As(err, new(configError)) {
		t.Errorf("%v, want %s", err, want)
	}
	t.Setenv("PATH", t.TempDir())
	_, err = rc.startUserNet(func(string) {})
	want = "--net user: the program of the network is missing: put gvm-net, which make build makes beside gvm, at " +
		filepath.Join(filepath.Dir(self(t)), "gvm-net") + " or into $PATH"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// TestFirstLine: of a panic of gvm-net gvm says the first line.
func TestFirstLine(t *testing.T) {
	var f firstLine
	io.WriteString(&f, "panic: ")
	io.WriteString(&f, "x\n\ngoroutine 1")
	io.WriteString(&f, strings.Repeat("y", 10_000))
	if f.String() != "panic: x" || len(f.line) > 1000 {
		t.Errorf("%q of %d bytes", &f, len(f.line))
	}
}
