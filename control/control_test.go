package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/inspect"
	"gvm/text"
)

// fake is a machine with a list of disks.
type fake struct {
	mu      sync.Mutex
	disks   map[string]Disk // by path
	state   State
	balloon uint64
	console io.ReadWriteCloser
	size    TerminalSize  // of the virtio console; zero: none
	core    io.ReadCloser // nil: refused
	breaks  int
	adding  chan struct{} // AddDisk sends to it and waits for a reply; nil: it does not
}

func newFake() *fake { return &fake{disks: map[string]Disk{}, state: Running} }

func (f *fake) Info() Info {
	f.mu.Lock()
	defer f.mu.Unlock()
	return Info{Name: "vm", PID: 4711, GVM: "1.2.3", Kernel: "/boot/bzImage", CPUs: 2, Memory: 1 << 30, State: f.state}
}

func (f *fake) set(from, to State) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state != from {
		return Errorf(http.StatusConflict, "the machine is %s", f.state)
	}
	f.state = to
	return nil
}

func (f *fake) Pause(context.Context) error { return f.set(Running, Paused) }
func (f *fake) Resume() error               { return f.set(Paused, Running) }

func (f *fake) Stop(s Stop) (Stopped, error) {
	return Stopped{Asked: s.GraceMS > 0}, f.set(Running, "stopped")
}

func (f *fake) Reset() error { return f.set(Running, Running) }

func (f *fake) Balloon(context.Context) (Balloon, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return Balloon{Size: f.balloon, Actual: 4096,
		Stats: inspect.Group("stats", inspect.Int("memfree", uint64(1<<63))), Guest: Told}, nil
}

func (f *fake) ResizeBalloon(r ResizeBalloon) (Balloon, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Size > 1<<30 {
		return Balloon{}, Errorf(http.StatusBadRequest, "too much")
	}
	f.balloon = r.Size
	return Balloon{Size: f.balloon, Guest: Absent}, nil
}

func (f *fake) NMI(context.Context) error { return f.set(Running, Running) }

func (f *fake) SysRq(_ context.Context, key byte) error {
	if key == '~' {
		return Errorf(http.StatusGatewayTimeout, "not read")
	}
	return f.set(Running, Running)
}

func (f *fake) Break() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.breaks++
}

func (f *fake) Core(context.Context) (io.ReadCloser, error) {
	if f.core == nil {
		return nil, Errorf(http.StatusConflict, "a dump is under way")
	}
	return f.core, nil
}

func (f *fake) Agent(context.Context) (io.ReadWriteCloser, error) {
	if f.console == nil {
		return nil, Errorf(http.StatusNotFound, "no agent")
	}
	return f.console, nil
}

func (f *fake) Console() io.ReadWriteCloser { return f.console }

func (f *fake) HVC() (io.ReadWriteCloser, error) {
	if f.console == nil {
		return nil, Errorf(http.StatusNotFound, "no virtio console")
	}
	return f.console, nil
}

func (f *fake) ResizeHVC(s TerminalSize) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.Columns == 0 {
		return Errorf(http.StatusBadRequest, "no columns")
	}
	f.size = s
	return nil
}

func (f *fake) Disks() (list []Disk) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range f.disks {
		list = append(list, d)
	}
	slices.SortFunc(list, func(a, b Disk) int { return cmp.Compare(a.Path, b.Path) })
	return list
}

func (f *fake) AddDisk(_ context.Context, a AddDisk) (Change, error) {
	path := string(a.Disk)
	if f.adding != nil {
		f.adding <- struct{}{}
		<-f.adding
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case path == "bug":
		panic("no such disk")
	case path == "host":
		return Change{}, errors.New("no storage")
	case f.disks[path].Path != "":
		return Change{}, Errorf(http.StatusConflict, "%s is there", path)
	}
	d := Disk{Path: a.Disk, LUN: len(f.disks), Serial: a.Dir, Size: 512, BlockSize: 512, Cache: "writeback",
		Backend: "process", Options: map[string]text.Name{"serial": a.Disk}}
	f.disks[path] = d
	return Change{d, Told}, nil
}

func (f *fake) RemoveDisk(_ context.Context, id string) (Change, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, ok := f.disks[id]
	if !ok {
		return Change{}, Errorf(http.StatusNotFound, "no disk %s", id)
	}
	delete(f.disks, id)
	return Change{d, Missed}, nil
}

func (f *fake) ResizeDisk(_ context.Context, id string, r ResizeDisk) (Change, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, ok := f.disks[id]
	if !ok {
		return Change{}, Errorf(http.StatusNotFound, "no disk %s", id)
	}
	if r.Size < d.Size && !r.Shrink {
		return Change{}, Errorf(http.StatusConflict, "shrinking")
	}
	d.Size = r.Size
	f.disks[id] = d
	return Change{d, Unchanged}, nil
}

func (f *fake) Inspect(ctx context.Context, path string) (inspect.Node, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	disks := inspect.Group("disk")
	for _, d := range f.disks {
		disks.Nodes = append(disks.Nodes, inspect.Group(strconv.Itoa(d.LUN), inspect.Text("path", string(d.Path)),
			inspect.Bits("tag", uint64(1)<<63), inspect.Int("size", d.Size)))
	}
	return inspect.Group("", disks, inspect.Group("..", inspect.Bool("up", true)),
		inspect.Node{Name: "rtc", Value: inspect.Busy}).Read(ctx, path)
}

// testDir is a directory whose path is longer than a socket's address.
func testDir(t *testing.T) Directory {
	return In(filepath.Join(t.TempDir(), "gvm-"+strings.Repeat("x", 120)))
}

// serve starts a server for m, and checks at the end that it leaves nothing behind.
func serve(t *testing.T, m Machine) (Directory, *Client) {
	t.Helper()
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	s.Serve(m)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(d.path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the directory is left: %v", err)
		}
	})
	return d, NewClient(d, "vm")
}

func wantError(t *testing.T, err error, status int, text string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Status != status || e.Text != text {
		t.Errorf("error %v, want %d %q", err, status, text)
	}
}

func TestClient(t *testing.T) {
	_, c := serve(t, newFake())
	ctx := t.Context()
	info, err := c.Info(ctx)
	if want := (Info{"vm", 4711, "1.2.3", "/boot/bzImage", 2, 1 << 30, Running}); err != nil || info != want {
		t.Errorf("%+v, %v, want %+v", info, err, want)
	}
	if list, err := c.Disks(ctx); err != nil || list == nil || len(list) > 0 {
		t.Errorf("%+v, %v, want an empty list", list, err)
	}
	for _, path := range []string{"/a b/c%2F?d#e", ".", "..", "7", "ü", "<&>", "\xff\xe4.img"} {
		want := Disk{Path: text.Name(path), Serial: "/home", Size: 512, BlockSize: 512, Cache: "writeback",
			Backend: "process", Options: map[string]text.Name{"serial": text.Name(path)}}
		if ch, err := c.AddDisk(ctx, AddDisk{Disk: text.Name(path), Dir: "/home"}); err != nil ||
			!reflect.DeepEqual(ch, Change{want, Told}) {
			t.Errorf("added %+v, %v", ch, err)
		}
		_, err := c.AddDisk(ctx, AddDisk{Disk: text.Name(path)})
		wantError(t, err, http.StatusConflict, path+" is there")
		if list, err := c.Disks(ctx); err != nil || !reflect.DeepEqual(list, []Disk{want}) {
			t.Errorf("%+v, %v", list, err)
		}
		_, err = c.ResizeDisk(ctx, path, ResizeDisk{Size: 100})
		wantError(t, err, http.StatusConflict, "shrinking")
		want.Size = 100
		if ch, err := c.ResizeDisk(ctx, path, ResizeDisk{Size: 100, Shrink: true}); err != nil ||
			!reflect.DeepEqual(ch, Change{want, Unchanged}) {
			t.Errorf("resized %+v, %v", ch, err)
		}
		if ch, err := c.RemoveDisk(ctx, path); err != nil ||
			!reflect.DeepEqual(ch, Change{want, Missed}) {
			t.Errorf("removed %+v, %v", ch, err)
		}
		_, err = c.RemoveDisk(ctx, path)
		wantError(t, err, http.StatusNotFound, "no disk "+path)
	}
	_, err = c.AddDisk(ctx, AddDisk{Disk: "bug"})
	wantError(t, err, http.StatusInternalServerError, "a bug in gvm, please report it: no such disk")
	_, err = c.AddDisk(ctx, AddDisk{Disk: "host"})
	wantError(t, err, http.StatusInternalServerError, "no storage")
	for range 2 {
		if err := c.Pause(ctx); err != nil {
			t.Error(err)
		}
		wantError(t, c.Pause(ctx), http.StatusConflict, "the machine is paused")
		if info, err := c.Info(ctx); err != nil || info.State != Paused {
			t.Errorf("%+v, %v", info, err)
		}
		if err := c.Resume(ctx); err != nil {
			t.Error(err)
		}
		wantError(t, c.Resume(ctx), http.StatusConflict, "the machine is running")
	}
}

// TestInspect: a tree keeps its paths, values and order on its way to a client.
func TestInspect(t *testing.T) {
	f := newFake()
	f.disks["a"] = Disk{Path: "/\xff\n", LUN: 3, Size: 1 << 40}
	_, c := serve(t, f)
	const disk = `{"path":"/\udcff\n","tag":"0x8000000000000000","size":1099511627776}`
	for _, tt := range []struct{ path, want string }{
		{"", `{"disk":{"3":` + disk + `},"..":{"up":true},"rtc":"busy"}`},
		{"/disk/3/", disk},
		{"disk/3/path", `"/\udcff\n"`},
		{"../up", "true"},
		{"rtc/time", `"busy"`},
	} {
		n, err := c.Inspect(t.Context(), tt.path)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := json.Marshal(n); err != nil || string(b) != tt.want {
			t.Errorf("%s: %s, %v", tt.path, b, err)
		}
	}
	if n, err := c.Inspect(t.Context(), "disk/3"); err != nil || n.Get("path") != "/\xff\n" ||
		n.Get("size") != json.Number("1099511627776") {
		t.Errorf("%+v, %v", n, err)
	}
	for path, want := range map[string]string{
		"disk/1":      `no "1" in disk, which has 3`,
		"dsk":         `no "dsk" in the machine; did you mean disk?`,
		"disk/a%2Fb?": `no "a%2Fb?" in disk, which has 3`,
	} {
		_, err := c.Inspect(t.Context(), path)
		wantError(t, err, http.StatusNotFound, want)
	}
}

// exchange sends raw text over the socket and returns the answer.
func exchange(t *testing.T, d Directory, text string) (status int, header http.Header, body string) {
	t.Helper()
	dir, err := os.Open(d.path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	conn, err := net.Dial("unix", socketPath(dir, "vm/sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() { _, _ = io.WriteString(conn, text) }() // the server may stop reading
	raw, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Fatal(err)
	}
	head, body, _ := strings.Cut(string(raw), "\r\n\r\n")
	header = http.Header{}
	for i, line := range strings.Split(head, "\r\n") {
		if i == 0 {
			status, _ = strconv.Atoi(strings.Fields(line + " 0 0")[1])
			continue
		}
		key, value, _ := strings.Cut(line, ": ")
		header.Set(key, value)
	}
	return status, header, body
}

// wantListed: the row of a request has the status of its error.
func wantListed(t *testing.T, method, path string, status int) {
	t.Helper()
	mux, rows := http.NewServeMux(), map[string]route{}
	for _, row := range routes(newFake()) {
		mux.HandleFunc(row.method+" "+row.path, http.NotFound)
		rows[row.method+" "+row.path] = row
	}
	r, err := http.NewRequest(method, path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, pattern := mux.Handler(r); pattern != "" && !slices.Contains(slices.Concat(anyRequest, rows[pattern].refuses),
		status) {
		t.Errorf("%s answers %d, which its row does not have", pattern, status)
	}
}

func TestBadRequests(t *testing.T) {
	f := newFake()
	d, _ := serve(t, f)
	const bad = "the body does not fit this request: "
	for _, tt := range []struct {
		method, path, body string
		status             int
		want               string // the error
		allow              string
	}{
		{"POST", "/v1/disks", "", 400, bad + "EOF", ""},
		{"POST", "/v1/disks", "{", 400, bad + "unexpected EOF", ""},
		{"POST", "/v1/disks", "disk", 400, bad + "invalid character 'd' looking for beginning of value", ""},
		{"POST", "/v1/disks", "[]", 400, bad + "json: cannot unmarshal array into Go value of type control.AddDisk", ""},
		{"POST", "/v1/disks", `{"disk": 1}`, 400,
			bad + "json: cannot unmarshal number into Go struct field AddDisk.disk of type string", ""},
		{"POST", "/v1/disks", `{"disk": "a", "lun": 1}`, 400, bad + `json: unknown field "lun"`, ""},
		{"POST", "/v1/disks", `{"disk": "a"} {}`, 400, bad + "more than one JSON value", ""},
		{"POST", "/v1/disks", `{"disk": "a"} ]`, 400, bad + "invalid character ']' looking for beginning of value", ""},
		{"POST", "/v1/disks", `{"disk": "` + strings.Repeat("x", maxBody) + `"}`, 413,
			"the body has more than 65536 bytes", ""},
		{"POST", "/v1/disks/0/resize", `{"size": 1.5}`, 400,
			bad + "json: cannot unmarshal number 1.5 into Go struct field ResizeDisk.size of type int64", ""},
		{"POST", "/v1/disks/0/resize", `{"size": 99999999999999999999}`, 400,
			bad + "json: cannot unmarshal number 99999999999999999999 into Go struct field ResizeDisk.size of type int64", ""},
		{"POST", "/v1/disks/0/resize", `{}`, 404, "no disk 0", ""},
		{"DELETE", "/v1/disks/0", `{"force": true}`, 400, bad + `json: unknown field "force"`, ""},
		{"DELETE", "/v1/disks/0", `{}`, 404, "no disk 0", ""},
		{"POST", "/v1/balloon", `{"size": -1}`, 400,
			bad + "json: cannot unmarshal number -1 into Go struct field ResizeBalloon.size of type uint64", ""},
		{"POST", "/v1/balloon", `{"size": 2000000000}`, 400, "too much", ""},
		{"POST", "/v1/machine/pause", `{"why": 1}`, 400, bad + `json: unknown field "why"`, ""},
		{"POST", "/v1/machine/resume", `1`, 400, bad + "json: cannot unmarshal number into Go value of type struct {}", ""},
		{"POST", "/v1/machine/sysrq", `{"key": "~"}`, 504, "not read", ""},
		{"POST", "/v1/machine/sysrq", `{}`, 400, `key "": want one letter, digit or mark`, ""},
		{"POST", "/v1/machine/sysrq", `{"key": "lw"}`, 400, `key "lw": want one letter, digit or mark`, ""},
		{"POST", "/v1/machine/sysrq", `{"key": "\n"}`, 400, `key "\n": want one letter, digit or mark`, ""},
		{"POST", "/v1/machine/nmi", `{"cpu": 1}`, 400, bad + `json: unknown field "cpu"`, ""},
		{"PUT", "/v1/machine", "", 405, "PUT of /v1/machine: want GET", "GET"},
		{"DELETE", "/v1/disks", "", 405, "DELETE of /v1/disks: want GET or POST", "GET, POST"},
		{"GET", "/v1/disks/0", "", 405, "GET of /v1/disks/0: want DELETE", "DELETE"},
		{"GET", "/v1/disks/0/resize", "", 405, "GET of /v1/disks/0/resize: want POST", "POST"},
		{"GET", "/", "", 404, "no / in version 1 of the protocol", ""},
		{"GET", "/v2/machine", "", 404, "no /v2/machine in version 1 of the protocol", ""},
		{"GET", "/v1/disks/", "", 404, "no /v1/disks/ in version 1 of the protocol", ""},
		{"DELETE", "/v1/disks/0/resize/1", "", 404, "no /v1/disks/0/resize/1 in version 1 of the protocol", ""},
	} {
		status, header, body := exchange(t, d, fmt.Sprintf("%s %s HTTP/1.1\r\nHost: gvm\r\nContent-Length: %d\r\n\r\n%s",
			tt.method, tt.path, len(tt.body), tt.body))
		if status != http.StatusMethodNotAllowed {
			wantListed(t, tt.method, tt.path, status)
		}
		want := fmt.Sprintf("{\"error\":%s}\n", strconv.Quote(tt.want))
		if status != tt.status || body != want || header.Get("Allow") != tt.allow ||
			header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %s %.40s: %d %v %q, want %d %q", tt.method, tt.path, tt.body, status, header, body, tt.status, want)
		}
	}
	for text, want := range map[string]int{
		"hello\r\n\r\n":                    400,
		"GET /v1/machine HTTP/1.1\r\n\r\n": 400, // no host
		"GET /v1/machine HTTP/1.1\r\nHost: gvm\r\nX: " + strings.Repeat("x", 2*maxHeader) + "\r\n\r\n": 431,
	} {
		status, header, body := exchange(t, d, text)
		if status != want || !strings.HasPrefix(body, `{"error":"`) || header.Get("Date") == "" {
			t.Errorf("%.40q: %d %v %q, want %d", text, status, header, body, want)
		}
	}
	if list := f.Disks(); len(list) > 0 {
		t.Errorf("a request that was refused added %+v", list)
	}
}

// TestConcurrent has clients add and remove disks at the same time: each add and each remove
// happens once.
func TestConcurrent(t *testing.T) {
	f := newFake()
	_, c := serve(t, f)
	var clients sync.WaitGroup
	counts := make([][2]int, 8)
	for i := range counts {
		clients.Go(func() {
			for n := range 20 {
				id := fmt.Sprint("disk", n%3)
				var e *Error
				if _, err := c.AddDisk(t.Context(), AddDisk{Disk: text.Name(id)}); err == nil {
					counts[i][0]++
				} else if !errors.As(err, &e) || e.Status != http.StatusConflict {
					t.Error(err)
				}
				if _, err := c.Disks(t.Context()); err != nil {
					t.Error(err)
				}
				if _, err := c.RemoveDisk(t.Context(), id); err == nil {
					counts[i][1]++
				} else if !errors.As(err, &e) || e.Status != http.StatusNotFound {
					t.Error(err)
				}
			}
		})
	}
	clients.Wait()
	added, removed := 0, 0
	for _, n := range counts {
		added, removed = added+n[0], removed+n[1]
	}
	if left := len(f.Disks()); added == 0 || added-removed != left {
		t.Errorf("%d added, %d removed, %d left", added, removed, left)
	}
}

// TestCloseWaits: an answer in progress arrives, and later requests are not served.
func TestCloseWaits(t *testing.T) {
	f := newFake()
	f.adding = make(chan struct{})
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	s.closeTimeout = time.Hour // for a busy host
	s.Serve(f)
	c := NewClient(d, "vm")
	answered := make(chan error, 1)
	go func() {
		_, err := c.AddDisk(context.Background(), AddDisk{Disk: "a"})
		answered <- err
	}()
	<-f.adding
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	f.adding <- struct{}{}
	if err := <-answered; err != nil {
		t.Error(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := c.Info(t.Context()); !errors.Is(err, ErrNoSocket) {
		t.Errorf("a request after Close: %v", err)
	}
	if _, err := s.guarded(func(*http.Request) (any, error) { return 1, nil }, nil); err != ErrEnded {
		t.Errorf("a request that was read before Close and came after: %v", err)
	}
}

// TestCloseDoesNotWaitForClients: Close does not wait for clients that send nothing, or nothing
// more.
func TestCloseDoesNotWaitForClients(t *testing.T) {
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	s.readTimeout, s.closeTimeout = time.Hour, time.Hour // of which nothing is used
	s.Serve(newFake())
	dir, err := os.Open(d.path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, text := range []string{"", "G", "POST /v1/disks HTTP/1.1\r\nHost: gvm\r\nContent-Length: 10\r\n\r\n{"} {
		conn, err := net.Dial("unix", socketPath(dir, "vm/sock"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := NewClient(d, "vm").Info(t.Context()); err != nil { // the server has accepted them, too
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestClientNoListener: nothing listens on the socket, as after the death of a machine's broker, or
// it has been removed, as by a machine that ends.
func TestClientNoListener(t *testing.T) {
	d := testDir(t)
	lock, l, err := d.claim("vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.release("vm", lock) })
	l.Close()
	c := NewClient(d, "vm")
	for _, want := range []error{ErrNoListener, ErrNoSocket} {
		_, asked := c.Info(t.Context())
		_, added := c.AddDisk(t.Context(), AddDisk{Disk: "mem:1M"})
		_, console := c.Console(t.Context())
		for name, err := range map[string]error{"info": asked, "disk add": added, "console": console} {
			if !errors.Is(err, want) || err.Error() != "machine vm does not answer: "+want.Error() {
				t.Errorf("%s: %v, want %v", name, err, want)
			}
		}
		if err := os.Remove(d.file("vm", inside, socketFile)); (err == nil) != (want == ErrNoListener) {
			t.Error(err)
		}
	}
}

// TestStoppedBroker: a client does not wait for a machine whose broker is stopped, and names it.
func TestStoppedBroker(t *testing.T) {
	d := testDir(t)
	lock, l, err := d.claim("vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(l.Close(), d.release("vm", lock)) })
	broker := exec.Cmd{Path: "/bin/sleep", Args: []string{BrokerArg0, "600"}}
	if err := broker.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(broker.Process.Kill(), broker.Wait()) })
	if err := broker.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	c := NewClient(d, "vm")
	want := fmt.Sprintf("machine vm: no answer: its broker is stopped: kill -CONT %d", broker.Process.Pid)
	_, asked := c.Info(t.Context())
	_, stopped := c.Stop(t.Context(), Stop{})
	_, console := c.Console(t.Context())
	_, _, core := c.Core(t.Context(), nil)
	for name, err := range map[string]error{"info": asked, "stop": stopped, "console": console, "core": core} {
		if !errors.Is(err, ErrNoAnswer) || err.Error() != want {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

// TestClientOddAnswers has a server that is not a machine.
func TestClientOddAnswers(t *testing.T) {
	d := testDir(t)
	dir, err := d.lock(unix.LOCK_EX, true, lockTimeout)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(d.path, "vm"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := listen(dir, "vm/sock")
	if err != nil {
		t.Fatal(err)
	}
	d.unlock(dir)
	t.Cleanup(func() { l.Close(); os.RemoveAll(d.path) })
	const cut = "machine vm does not answer: it closed the connection, as it ends just now or has too many clients"
	for answer, want := range map[string]string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]": "machine vm sends an answer that this gvm " +
			"does not understand: ",
		"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]": cut,
		"HTTP/1.1 200 O": cut,
		"HTTP/1.1 418 Short\r\nContent-Length: 2\r\n\r\n[]":             "418 Short",
		"HTTP/1.1 301 Gone\r\nLocation: /\r\nContent-Length: 0\r\n\r\n": "301 Gone",
		"220 mail\r\n\r\n": "machine vm does not answer: ",
		"":                 cut,
		"reset":            cut,
	} {
		c := NewClient(d, "vm")
		for name, ask := range map[string]func() error{
			"info":    func() error { _, err := c.Info(t.Context()); return err },
			"console": func() error { _, err := c.Console(t.Context()); return err },
		} {
			go func() {
				conn, err := l.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				if answer == "reset" { // by input that is not read
					_, _ = conn.Read(make([]byte, 1))
					return
				}
				_, _ = conn.Read(make([]byte, 4096))
				_, _ = io.WriteString(conn, answer)
			}()
			if err := ask(); err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%s: %q: %v, want %q", name, answer, err, want)
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := NewClient(d, "vm").Info(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a machine that does not answer: %v", err)
	}
}
