package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvm/guest/embedded"
	"gvm/guest/kernel"
	"gvm/machine"
	"gvm/vmm/boot"
)

// debugger speaks GDB's Remote Serial Protocol.
type debugger struct {
	t *testing.T
	io.ReadWriteCloser
	r *bufio.Reader
}

// dialGDB connects to the socket of gvm --gdb, once gvm listens. The file is there a little
// earlier.
func dialGDB(t *testing.T, socket string) *debugger { return dialGDBAt(t, "unix", socket) }

func dialGDBAt(t *testing.T, network, address string) *debugger {
	t.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial(network, address)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			return &debugger{t, c, bufio.NewReader(c)}
		}
		early := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
		if !early || time.Since(start) > tooLong {
			t.Fatal(err)
		}
	}
}

// Close shuts the connection down first: a process that another test starts has the descriptor too
// until its exec, and the connection is open as long.
func (d *debugger) Close() error {
	if c, ok := d.ReadWriteCloser.(*net.UnixConn); ok {
		_, _ = c.CloseWrite(), c.CloseRead()
	}
	return d.ReadWriteCloser.Close()
}

func (d *debugger) send(body string) {
	d.t.Helper()
	sum := byte(0)
	for i := range len(body) {
		sum += body[i]
	}
	if _, err := fmt.Fprintf(d, "$%s#%02x", body, sum); err != nil {
		d.t.Fatal(err)
	}
}

// want reads a packet.
func (d *debugger) want(body string) {
	d.t.Helper()
	text, err := d.r.ReadString('#')
	if err == nil {
		_, err = d.r.Discard(2)
	}
	if got := strings.TrimLeft(text, "+"); got != "$"+body+"#" {
		d.t.Fatalf("%q, %v; want %q", got, err, body)
	}
}

// TestGDB: a machine waits for its debugger, at a socket of its user's, and runs on when that
// detaches.
func TestGDB(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "a gdb")
	p := startGVM(t, "", "run", "--gdb", "unix:"+socket, "-S", "--cpus", "2", "--memory", "64M")
	d := dialGDB(t, socket)
	if st, err := os.Lstat(socket); err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket: %+v, %v", st, err)
	}
	d.send("?")
	d.want("T05thread:1;")
	second := dialGDB(t, socket)
	if _, err := second.r.ReadByte(); err == nil {
		t.Error("a second debugger is served")
	}
	d.send("qfThreadInfo")
	d.want("m1,2")
	for range 20 { // target remote of a debugger that is connected
		d.Close()
		d = dialGDB(t, socket)
		d.send("?")
		d.want("T05thread:1;")
	}
	d.send("D")
	d.want("OK")
	p.expect("PASS")
	if r := p.wait(); r.status != 0 {
		t.Errorf("status %d: %s", r.status, r.errs)
	}
	want := "gvm: to debug the guest: gdb -ex 'target remote " + socket + "'"
	if got := p.errs.String(); !strings.Contains(got, want) {
		t.Errorf("standard error %q; want %q", got, want)
	}
	if _, err := os.Lstat(socket); err == nil {
		t.Error("the socket is left")
	}
}

// TestGDBStaleSocket: a socket that a gvm left which was killed is replaced, and one at which a
// program listens is not.
func TestGDBStaleSocket(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "gdb")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"run", "--gdb", "unix:" + socket, "--memory", "64M"}
	wantBad(t, ask(t, "", args...), "--gdb unix:"+socket+": it exists and a program listens there|name another file")
	l.SetUnlinkOnClose(false)
	l.Close()
	if r := ask(t, "", args...); r.status != 0 {
		t.Errorf("status %d: %s", r.status, r.errs)
	}
	if _, err := os.Lstat(socket); err == nil {
		t.Error("the socket is left")
	}
}

// TestGDBPlaces: a debugger connects to a port of this host, or has gvm's standard input and
// output; the guest's console is on standard error then.
func TestGDBPlaces(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	for _, place := range []string{address, "stdio"} {
		c := command(t, "run", "--gdb", place, "-S", "--memory", "64M")
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var errs bytes.Buffer
		c.Stderr = &errs
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Kill() })
		var d *debugger
		if place == "stdio" {
			d = &debugger{t, struct {
				io.Reader
				io.WriteCloser
			}{out, in}, bufio.NewReader(out)}
		} else {
			d = dialGDBAt(t, "tcp", place)
		}
		d.send("?")
		d.want("T05thread:1;")
		d.send("D")
		d.want("OK")
		console, err := io.ReadAll(d.r) // to the end of the connection
		if err != nil {
			t.Error(err)
		}
		if place != "stdio" {
			console, err = io.ReadAll(out)
		}
		if err := errors.Join(err, c.Wait()); err != nil {
			t.Errorf("%s: %v: %s", place, err, &errs)
		}
		text := string(console)
		if place == "stdio" {
			if text != "" && text != "+" {
				t.Errorf("the debugger gets %q", text)
			}
			text = errs.String()
		}
		if !strings.Contains(text, "PASS") {
			t.Errorf("%s: the console is %q", place, text)
		}
	}
}

// TestSecondDebugger: a debugger that comes while one is connected is refused soon, and served if
// that one has just closed its connection.
func TestSecondDebugger(t *testing.T) {
	for _, address := range []gdbAddress{{"tcp", "127.0.0.1:0"}, {"unix", filepath.Join(t.TempDir(), "gdb")}} {
		s, err := address.listen(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		dial := func() net.Conn {
			c, err := net.Dial(address.network, s.listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return c
		}
		leave := make(chan struct{}, 1)
		const never = 1000 * time.Hour
		s.serving.Go(func() {
			s.accept(nil, never, func(c net.Conn) {
				defer c.Close()
				_, _ = c.Write([]byte("+"))
				_, _ = io.Copy(io.Discard, c)
				<-leave
			})
		})
		b := make([]byte, 1)
		for i := range 10 {
			first := dial()
			if i > 0 {
				leave <- struct{}{} // the end of the one before, which has closed its connection
			}
			if n, err := first.Read(b); n != 1 {
				t.Fatalf("%s: debugger %d is not served: %v", address.network, i, err)
			}
			if _, err := dial().Read(b); err == nil {
				t.Errorf("%s: a second debugger is served", address.network)
			}
			first.Close()
		}
		leave <- struct{}{}
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}
}

// fullListener is a listener of a process that has too many files at first.
type fullListener struct {
	net.Listener
	failures int
}

func (l *fullListener) Accept() (net.Conn, error) {
	if l.failures--; l.failures >= 0 {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.Listener.Accept()
}

// TestGDBManyFiles: a debugger can connect when the process has a free descriptor again.
func TestGDBManyFiles(t *testing.T) {
	s, err := (&gdbAddress{"tcp", "127.0.0.1:0"}).listen(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	address := s.listener.Addr().String()
	s.listener = &fullListener{s.listener, 2}
	s.serving.Go(func() { s.accept(nil, time.Hour, func(c net.Conn) { c.Close() }) })
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	served := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 1)); served <- err }()
	ended := make(chan struct{})
	go func() { s.serving.Wait(); close(ended) }()
	select {
	case err := <-served:
		if err != io.EOF {
			t.Error(err)
		}
	case <-ended:
		t.Error("no debugger is accepted any more")
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
}

// TestGDBEnds: a debugger hears of the machine's end, ends it, or hangs, which delays nothing.
func TestGDBEnds(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		args   []string
		client func(p *proc, d *debugger)
		status int
	}{
		{"power-off", nil, func(_ *proc, d *debugger) {
			d.send("vCont;c")
			d.want("W00")
		}, 0},
		{"kill", nil, func(_ *proc, d *debugger) { d.send("k") }, exitQuit},
		{"hang", []string{"--grace", "1h"}, func(p *proc, d *debugger) {
			fmt.Fprint(d, "$m0,")
			_ = p.cmd.Process.Signal(os.Interrupt)
		}, exitQuit},
		{"crash", []string{"--guest-arg", "crash=triple"}, func(_ *proc, d *debugger) {
			d.send("vCont;c")
			d.want("W00")
		}, exitCrash},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "gdb")
			p := startGVM(t, "", append([]string{"run", "--gdb", "unix:" + socket, "-S", "--memory", "64M"}, c.args...)...)
			d := dialGDB(t, socket)
			d.send("?")
			d.want("T05thread:1;")
			c.client(p, d)
			if r := p.wait(); r.status != c.status {
				t.Errorf("status %d, want %d: %s", r.status, c.status, r.errs)
			}
			if _, err := os.Lstat(socket); err == nil {
				t.Error("the socket is left")
			}
		})
	}
}

// TestParseGDB reads addresses; those without a host are this host's alone.
func TestParseGDB(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]gdbAddress{
		":1234": {"tcp", "localhost:1234"}, "1234": {"tcp", "localhost:1234"}, "tcp::1234": {"tcp", "localhost:1234"},
		"0.0.0.0:1": {"tcp", "0.0.0.0:1"}, "[::1]:1": {"tcp", "[::1]:1"}, "stdio": {"stdio", ""},
		"unix:a b": {"unix", "a b"},
	} {
		if got, err := parseGDB(s); err != nil || *got != want {
			t.Errorf("%s: %v, %v; want %v", s, got, err, want)
		}
	}
}

// TestGDBCommand: gvm names lx-symbols where the symbols fit with it, which reads them without the
// kernel's offset.
func TestGDBCommand(t *testing.T) {
	tree := t.TempDir()
	for name, b := range map[string][]byte{"vmlinux": embedded.Image, "vmlinux-gdb.py": nil} {
		if err := os.WriteFile(filepath.Join(tree, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k, err := kernel.Finder{}.Find(t.Context(), filepath.Join(tree, "vmlinux"))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	for _, c := range []struct {
		spec      machine.Spec
		lxSymbols bool
	}{
		{machine.Spec{}, true},
		{machine.Spec{StartStopped: true}, false}, // no modules are known yet
		{machine.Spec{CmdLine: "kaslr"}, true},    // gvm enters the kernel at its link address
		{machine.Spec{BootMode: boot.BzImage}, true},
		{machine.Spec{BootMode: boot.BzImage, CmdLine: "quiet nokaslr"}, true},
		{machine.Spec{BootMode: boot.BzImage, CmdLine: "kaslr"}, false},
		{machine.Spec{BootMode: boot.BzImage, BareCmdLine: true}, false},
		{machine.Spec{BootMode: boot.BzImage, BareCmdLine: true, CmdLine: "nokaslr"}, true},
	} {
		c.spec.Debug = true
		want := "gdb -iex 'add-auto-load-safe-path " + tree + "' -ex 'target remote localhost:1' "
		if c.lxSymbols {
			want += "-ex lx-symbols "
		}
		want += tree + "/vmlinux"
		if got := (&gdbServer{to: "localhost:1"}).command(k, &c.spec); got != want {
			t.Errorf("boot=%v bare=%v -S=%v %q:\n%s\nwant\n%s", c.spec.BootMode, c.spec.BareCmdLine, c.spec.StartStopped,
				c.spec.CmdLine, got, want)
		}
	}
}

func TestShellWord(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{"a/b-c.d": "a/b-c.d", "a b": "'a b'", "": "''", "it's": `'it'\''s'`} {
		if got := shellWord(s); got != want {
			t.Errorf("%q: %s; want %s", s, got, want)
		}
	}
}
