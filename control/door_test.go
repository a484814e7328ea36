package control

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// throughDoor returns a Door on a socket in a directory, and its refusals.
func throughDoor(t *testing.T, machine int) (d *Door, in Directory, refused chan error) {
	t.Helper()
	in = In(filepath.Join(t.TempDir(), "run"))
	s, err := Claim(in, "vm")
	if err != nil {
		t.Fatal(err)
	}
	socket, lock, err := s.HandOver(nil, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	refused = make(chan error, 1)
	if d, err = NewDoor(in, "vm", socket, lock, machine, func(err error) { refused <- err }); err != nil {
		t.Fatal(err)
	}
	return d, in, refused
}

// TestDoor: the Door knows the requests that add a disk, and passes all on with their bytes.
func TestDoor(t *testing.T) {
	d, in, _ := throughDoor(t, 0)
	type passed struct {
		head string
		add  *AddDisk
	}
	all := make(chan passed, 1)
	d.Serve(func(conn *net.UnixConn, head []byte, add *AddDisk) error {
		all <- passed{string(head), add}
		_, err := io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
		return err
	})
	post := func(path, body string) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: gvm\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
	}
	const disk = `{"disk":"a.img","dir":"/tmp"}`
	for _, v := range []struct {
		request string
		adds    bool
	}{
		{"GET /v1/machine HTTP/1.1\r\nHost: gvm\r\n\r\n", false},
		{"GET /v1/disks HTTP/1.1\r\nHost: gvm\r\n\r\n", false},
		{post("/v1/disks", disk), true},
		{post("/v1/disks?x", disk), true},
		{post("http://gvm/v1/disks", disk), true},
		{post("/v1/%64isks", disk), true},
		{"POST /v1/disks HTTP/1.1\r\nHost: gvm\r\nTransfer-Encoding: chunked\r\n\r\n1d\r\n" + disk + "\r\n0\r\n\r\n", true},
		{post("/v1/disks", disk) + post("/v1/disks", disk), true},
		{post("/v1/disks", disk+disk), false},
		{post("/v1/disks", `{"disk":"a.img","path":"b.img"}`), false},
		{post("/v1/disks", `{"disk":1}`), false},
		{post("/v1/disks/", disk), false},
		{post("/v1/disks/0/resize", disk), false},
		{post("/v1/machine/pause", disk), false},
		{post("/metrics", "") + post("/v1/disks", disk), false},
		{post("/v1/disks", `{"disk":"`+strings.Repeat("x", maxBody)+`"}`), false},
		{"any text\r\n\r\n", false},
	} {
		if status, _, _ := exchange(t, in, v.request); status != 204 {
			t.Errorf("%.60q: %d", v.request, status)
		}
		p := <-all
		if !strings.HasPrefix(v.request, p.head) {
			t.Errorf("%.60q: passed on as %.60q", v.request, p.head)
		}
		if (p.add != nil) != v.adds || v.adds && *p.add != (AddDisk{Disk: "a.img", Dir: "/tmp"}) {
			t.Errorf("%.60q adds %v", v.request, p.add)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(in.path + "*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestDoorRefuses a request of the machine's process, and closes a client that sends none.
func TestDoorRefuses(t *testing.T) {
	pass := func(*net.UnixConn, []byte, *AddDisk) error {
		t.Error("passed on")
		return nil
	}
	d, in, refused := throughDoor(t, os.Getpid())
	d.Serve(pass)
	exchange(t, in, "GET /v1/machine HTTP/1.1\r\nHost: gvm\r\n\r\n")
	if err := <-refused; err == nil || err.Error() != "control socket: a request of the machine itself is refused" {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	for _, request := range []string{"", "POST /v1/disks HTTP/1.1\r\nHost: gvm\r\nContent-Length: 9\r\n\r\n{"} {
		d, in, _ := throughDoor(t, 0)
		d.wait = 20 * time.Millisecond
		d.Serve(pass)
		exchange(t, in, request)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// FuzzRequest: only a request that posts adds a disk, and one with an error adds none.
func FuzzRequest(f *testing.F) {
	for _, request := range []string{
		"GET /v1/machine HTTP/1.1\r\nHost: gvm\r\n\r\n",
		"POST /v1/disks HTTP/1.1\r\nHost: gvm\r\nContent-Length: 16\r\n\r\n" + `{"disk":"a.img"}`,
		"POST /v1/disks HTTP/1.1\r\nHost: gvm\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n" +
			`{"disk":"a.img"}` + "\r\n0\r\n\r\n",
	} {
		f.Add([]byte(request))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		add, err := readRequest(bytes.NewReader(b))
		if add != nil && (err != nil || !bytes.HasPrefix(bytes.TrimLeft(b, "\r\n"), []byte("POST "))) {
			t.Errorf("%q adds %+v, %v", b, add, err)
		}
	})
}

// TestReleasedTwice: a machine that took its slow Door for dead has given up the name itself. Then
// the Door's end is no error, and a new machine of the name keeps its files.
func TestReleasedTwice(t *testing.T) {
	for _, again := range []bool{false, true} {
		in := In(filepath.Join(t.TempDir(), "run"))
		s, err := Claim(in, "vm")
		if err != nil {
			t.Fatal(err)
		}
		socket, lock, err := s.HandOver(nil, func() error { return errors.New("the broker does not end") })
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Dup(int(lock.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		d, err := NewDoor(in, "vm", socket, os.NewFile(uintptr(fd), "lock"), 0, func(error) {})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Release(); err != nil {
			t.Fatal(err)
		}
		if again {
			if s, err = Claim(in, "vm"); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Errorf("the Door's end: %v", err)
		}
		if list, err := in.List(); err != nil || (len(list) == 1) != again {
			t.Errorf("a new machine %v: %v, %v", again, list, err)
		}
		if again {
			if err := s.Release(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestReleasedAtOnce: while one process of a machine gives up its name, another leaves that to it,
// so that it cannot remove the files of a new machine of the name.
func TestReleasedAtOnce(t *testing.T) {
	const env = "GVM_TEST_RELEASES"
	if dir := os.Getenv(env); dir != "" {
		lock := os.NewFile(3, "lock")
		if err := unix.FcntlFlock(3, unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
			t.Fatal(err)
		}
		_, _ = os.Stdout.WriteString("ready\n")
		_, _ = os.Stdin.Read(make([]byte, 1))
		if err := In(dir).release("vm", lock); err != nil {
			t.Fatal(err)
		}
		return
	}
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	other := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestReleasedAtOnce$")
	other.Env = append(os.Environ(), env+"="+d.path)
	other.ExtraFiles = []*os.File{s.lock}
	in, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(d.path + "/vm/*"); err != nil || len(left) != 2 {
		t.Errorf("files beside the other: %v, %v", left, err)
	}
	if _, err := Claim(d, "vm"); !errors.Is(err, ErrInUse) {
		t.Errorf("claimed beside the other: %v", err)
	}
	in.Close()
	if err := other.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(d.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}
