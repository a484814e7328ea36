package agent

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/guest/agent/archive"
	"gvm/guest/agent/wire"
	"gvm/text"
)

// sessionPair returns the ends of a session: the host's, and the agent's as a file.
func sessionPair(t *testing.T) (net.Conn, *os.File) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	own := os.NewFile(uintptr(pair[0]), "host")
	defer own.Close()
	conn, err := net.FileConn(own)
	if err != nil {
		t.Fatal(err)
	}
	return conn, os.NewFile(uintptr(pair[1]), "agent")
}

// TestSessions: commands of several sessions run beside the guest's own, with its directory and
// environment, their own streams and ends.
func TestSessions(t *testing.T) {
	const sessions = 5
	var conns []net.Conn
	var files []*os.File
	for range sessions {
		conn, file := sessionPair(t)
		conns, files = append(conns, conn), append(files, file)
	}
	own := sh("echo $MARK; cat")
	own.Env = append(own.Env, "MARK=of the test")
	main := run(t, own, files...)
	for _, f := range files {
		f.Close()
	}
	if got := main.expect(t, "of the test\n"); got != "of the test\n" {
		t.Errorf("the guest's own command: %q", got)
	}
	var hosts []*wire.Host
	for i, c := range []wire.Command{
		{Args: []text.Name{"sh", "-c", "echo $MARK $X; pwd; cat; echo errors >&2; exit 7"}, Env: []text.Name{"X=x"}},
		{Args: []text.Name{"sh", "-c", "stty size; [ -t 0 ] && echo terminal"},
			Terminal: &wire.Terminal{Rows: 11, Columns: 22}},
		{Args: []text.Name{"no-such-command"}},
		{Args: []text.Name{"sh", "-c", "echo on; sleep 1000"}},
		{Args: []text.Name{"sh", "-c", "echo on; sleep 1000"}},
	} {
		h, err := wire.Accept(conns[i], wire.HostConfig{Builds: noBuild})
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		if err := h.Command(&c); err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, h)
	}
	read := func(r io.Reader) string {
		b, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	on := make([]byte, 3)
	for _, h := range hosts[3:] {
		if _, err := io.ReadFull(h.Stdout, on); err != nil || string(on) != "on\n" {
			t.Errorf("%q, %v", on, err)
		}
	}
	io.WriteString(hosts[0].Stdin, "in\xff\x00put\n")
	hosts[0].Stdin.Close()
	if out, errs := read(hosts[0].Stdout), read(hosts[0].Stderr); !strings.HasPrefix(out, "of the test x\n/") ||
		!strings.HasSuffix(out, "\nin\xff\x00put\n") || errs != "errors\n" {
		t.Errorf("%q, %q", out, errs)
	}
	if out := read(hosts[1].Stdout); out != "11 22\r\nterminal\r\n" {
		t.Errorf("the terminal: %q", out)
	}
	hosts[3].Signal(15)
	for i, want := range []wire.Exit{{Status: 7}, {},
		{Status: 127, Err: "run no-such-command: there is no such command in PATH"}, {Signal: 15}} {
		if exit, err := hosts[i].Wait(); err != nil || exit != want {
			t.Errorf("session %d: %+v, %v", i, exit, err)
		}
		hosts[i].Bye()
	}
	hosts[4].Close()
	if out, _, exit := main.end(t); out != "" || exit != (wire.Exit{}) {
		t.Errorf("the guest's own command: %q, %+v", out, exit)
	}
}

// TestCopies: files are copied in the directory of the guest's own command and as its user, into
// the guest and out of it; a copy whose host is gone leaves nothing.
func TestCopies(t *testing.T) {
	conns, files := make([]net.Conn, 4), make([]*os.File, 4)
	for i := range conns {
		conns[i], files[i] = sessionPair(t)
	}
	dir := t.TempDir()
	own := sh("echo up; cat")
	own.Dir = text.Name(dir)
	if os.Getuid() == 0 {
		if own.UID = 1234; os.Chown(dir, 1234, 0) != nil || os.Chmod(filepath.Dir(dir), 0o755) != nil {
			t.Fatal("cannot give the directory to another user")
		}
	}
	main := run(t, own, files...)
	for _, f := range files {
		f.Close()
	}
	main.expect(t, "up\n")
	open := func(i int, c wire.Copy) *wire.Host {
		t.Helper()
		h, err := wire.Accept(conns[i], wire.HostConfig{Builds: noBuild})
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Command(&wire.Command{Args: []text.Name{"cp"}, Copy: &c}); err != nil {
			t.Fatal(err)
		}
		return h
	}
	end := func(h *wire.Host, status int, reason string) {
		t.Helper()
		errs, err := io.ReadAll(h.Stderr)
		exit, werr := h.Wait()
		if err != nil || werr != nil || exit != (wire.Exit{Status: status}) || string(errs) != reason {
			t.Errorf("%+v, %v, %v, %q", exit, err, werr, errs)
		}
		h.Bye()
		h.Close()
	}
	cut := open(3, wire.Copy{Path: "cut", Into: true})
	var part strings.Builder
	data := strings.Repeat("data", 1<<20)
	if err := archive.PackStream(&part, strings.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(cut.Stdin, part.String()[:3<<20]); err != nil {
		t.Fatal(err)
	}
	cut.Close()

	h := open(0, wire.Copy{Path: "new", Into: true})
	if err := archive.PackStream(h.Stdin, strings.NewReader(data)); err != nil {
		t.Error(err)
	}
	h.Stdin.Close()
	end(h, 0, "")
	h = open(1, wire.Copy{Path: "new"})
	var got strings.Builder
	if err := archive.UnpackStream(h.Stdout, &got); err != nil || got.String() != data {
		t.Errorf("%d bytes, %v", got.Len(), err)
	}
	end(h, 0, "")
	end(open(2, wire.Copy{Path: "none"}), wire.CopyRefused, "none: no such file or directory; check the path\n")

	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "new"), &st); err != nil || st.Uid != own.UID && os.Getuid() == 0 {
		t.Errorf("the file is user %d's: %v", st.Uid, err)
	}
	for { // until the agent has seen the end of the cut one
		if names, err := filepath.Glob(dir + "/.*"); err != nil || len(names) == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, _, exit := main.end(t); exit != (wire.Exit{}) {
		t.Errorf("the guest's own command: %+v", exit)
	}
	if names, err := filepath.Glob(dir + "/*"); err != nil || len(names) != 1 {
		t.Errorf("%v, %v", names, err)
	}
}
