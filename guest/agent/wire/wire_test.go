package wire

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"gvm/text"
)

const build = "this build"

// pair returns both ends of a connection, whose transport has no buffer.
func pair(t *testing.T, host HostConfig, agent AgentConfig) (*Host, *Agent) {
	t.Helper()
	host.Builds, agent.Hello = []string{build}, Hello{build, "a pipe"}
	hs, as := net.Pipe()
	type dialed struct {
		a   *Agent
		err error
	}
	c := make(chan dialed)
	go func() {
		a, err := Dial(as, agent)
		c <- dialed{a, err}
	}()
	h, err := Accept(hs, host)
	if err != nil {
		t.Fatal(err)
	}
	d := <-c
	if d.err != nil {
		t.Fatal(d.err)
	}
	t.Cleanup(func() { h.Close(); d.a.Close() })
	if h.Hello != (Hello{build, "a pipe"}) {
		t.Fatalf("hello: %+v", h.Hello)
	}
	return h, d.a
}

// copyAll copies data through a stream and compares.
func copyAll(t *testing.T, w io.WriteCloser, r io.Reader, data []byte) {
	t.Helper()
	go func() {
		w.Write(data)
		w.Close()
	}()
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes arrived, equal: %t, %v", len(got), len(data), bytes.Equal(got, data), err)
	}
}

// TestStreams: each stream arrives as it was sent, and a stream that is not read holds up no other.
func TestStreams(t *testing.T) {
	h, a := pair(t, HostConfig{Window: 5000}, AgentConfig{Window: 1})
	data := make([]byte, 1<<20)
	rand.Read(data)
	unread := make(chan error)
	go func() {
		_, err := a.Stderr.Write(data)
		unread <- err
	}()
	copyAll(t, a.Stdout, h.Stdout, data)
	copyAll(t, h.Stdin, a.Stdin, data[:5000])
	h.Stderr.Close()
	if err := <-unread; !errors.Is(err, ErrClosed) {
		t.Errorf("write to a stream that the receiver closed: %v", err)
	}
	if _, err := h.Stdin.Write([]byte{1}); !errors.Is(err, ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
}

func TestCloseEndsAWaitingWrite(t *testing.T) {
	h, _ := pair(t, HostConfig{}, AgentConfig{Window: 1})
	wrote := make(chan error)
	go func() {
		_, err := h.Stdin.Write([]byte("more than the window"))
		wrote <- err
	}()
	h.Stdin.Close()
	if err := <-wrote; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// TestMessages: everything that is not a stream arrives, in order.
func TestMessages(t *testing.T) {
	said := make(chan any, 10)
	h, a := pair(t, HostConfig{
		Started: func(pid int) { said <- pid },
		Log:     func(line string) { said <- line },
	}, AgentConfig{
		Signal:  func(n int) { said <- n },
		Winsize: func(rows, columns uint16) { said <- [2]uint16{rows, columns} },
	})
	a.Started(70000)
	a.Log("a line")
	for _, want := range []any{70000, "a line"} {
		if got := <-said; got != want {
			t.Errorf("%v, want %v", got, want)
		}
	}
	h.Signal(15)
	h.Winsize(50, 132)
	for _, want := range []any{15, [2]uint16{50, 132}} {
		if got := <-said; got != want {
			t.Errorf("%v, want %v", got, want)
		}
	}
}

func TestAlive(t *testing.T) {
	alive := make(chan bool)
	pair(t, HostConfig{Alive: func() { alive <- true }}, AgentConfig{})
	<-alive
	<-alive
}

func TestExit(t *testing.T) {
	for _, e := range []Exit{{}, {Status: 255}, {Signal: 9}, {Status: 127, Err: "find x: no such file"}} {
		h, a := pair(t, HostConfig{}, AgentConfig{})
		done := make(chan error)
		go func() {
			a.Stdout.Write([]byte("the last words"))
			a.Stdout.Close()
			done <- a.Exit(e, time.Hour)
		}()
		got, err := h.Wait()
		if err != nil || got != e {
			t.Errorf("%+v, %v; want %+v", got, err, e)
		}
		if words, err := io.ReadAll(h.Stdout); err != nil || string(words) != "the last words" {
			t.Errorf("%q, %v", words, err)
		}
		h.Bye()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestExitWithoutBye(t *testing.T) {
	h, a := pair(t, HostConfig{}, AgentConfig{})
	if err := a.Exit(Exit{}, 1); err == nil || !strings.Contains(err.Error(), "has not taken") {
		t.Error(err)
	}
	h.Close()
	if err := a.Exit(Exit{}, time.Hour); err == nil {
		t.Error("the exit of a closed connection was taken")
	}
	<-a.Gone()
}

// TestLostConnection: nothing waits for an agent that is gone, and its absence is no end of a
// stream.
func TestLostConnection(t *testing.T) {
	h, a := pair(t, HostConfig{}, AgentConfig{})
	wrote := make(chan error)
	go func() {
		_, err := h.Stdin.Write(make([]byte, MaxWindow))
		wrote <- err
	}()
	go a.Close()
	if _, err := h.Stdout.Read(make([]byte, 1)); err != io.ErrUnexpectedEOF {
		t.Errorf("read: %v", err)
	}
	if err := <-wrote; err == nil {
		t.Error("the write succeeded")
	}
	if e, err := h.Wait(); err == nil {
		t.Errorf("exit: %+v", e)
	}
}

// peer is a transport of bytes that are there already.
type peer struct{ io.Reader }

func (peer) Write(p []byte) (int, error) { return len(p), nil }
func (peer) Close() error                { return nil }

func TestHello(t *testing.T) {
	hello := string(appendHello(nil, roleAgent, Hello{build, "ttyS1"}))
	for name, tt := range map[string]struct{ in, want string }{
		"junk before it":  {"\r\nlogin: \xf5gvm-\xf5" + hello, ""},
		"nothing":         {"", "EOF"},
		"only junk":       {strings.Repeat("x", MaxJunk+len(Magic)), "no hello in 1048576 bytes"},
		"another build":   {string(appendHello(nil, roleAgent, Hello{"x", ""})), `"this build", the other "x"; make`},
		"the host's":      {string(appendHello(nil, roleHost, Hello{build, ""})), "echoes"},
		"a damaged one":   {hello[:len(hello)-1] + "x", "damaged"},
		"a short one":     {hello[:len(hello)-1], "unexpected EOF"},
		"another frame":   {Magic + string(appendFrame(nil, frame{frameAlive, 0, nil})), "no hello frame"},
		"another version": {Magic + string(appendFrame(nil, frame{frameHello, 0, []byte{0, 9, 0}})), "version 9"},
		"a long length":   {Magic + string(appendFrame(nil, frame{frameHello, 0, []byte{0, 1, 0, 9, 0}})), "cut short"},
	} {
		h, err := Accept(peer{strings.NewReader(tt.in)}, HostConfig{Builds: []string{build}})
		if tt.want == "" {
			if err != nil || h.Hello.Rung != "ttyS1" {
				t.Errorf("%s: %v", name, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", name, err, tt.want)
		}
	}
}

// TestHostileAgent: each frame that breaks a rule ends the connection with an error that names it.
func TestHostileAgent(t *testing.T) {
	full := make([]byte, 100)
	exit := frame{frameExit, 0, Exit{}.frame()}
	most := []byte{0, 0, 16, 0}
	for name, tt := range map[string]struct {
		frames []frame
		want   string
	}{
		"more than the window":  {[]frame{{frameData, 1, full}, {frameData, 1, full[:1]}}, "there is room for 0"},
		"data after close":      {[]frame{{frameClose, 1, nil}, {frameData, 1, full[:1]}}, "1 bytes of stdout"},
		"data of stdin":         {[]frame{{frameData, 0, full}}, "wrong for stdin"},
		"a window of stdout":    {[]frame{{frameWindow, 1, full[:4]}}, "wrong for stdout"},
		"stream 3":              {[]frame{{frameData, 3, nil}}, "there are 3"},
		"a large window":        {[]frame{{frameWindow, 0, []byte{1, 0, 16, 0}}}, "the limit is 1048576"},
		"a sum of windows":      {[]frame{{frameWindow, 0, most}, {frameWindow, 0, []byte{1, 0, 0, 0}}}, "limit"},
		"an unknown frame":      {[]frame{{99, 0, nil}}, "frame 99"},
		"a frame of a host":     {[]frame{{frameBye, 0, nil}}, "wrong from an agent"},
		"started twice":         {[]frame{{frameStarted, 0, full[:4]}, {frameStarted, 0, full[:4]}}, "wrong from an agent"},
		"an exit of no kind":    {[]frame{{frameExit, 0, []byte{7, 1}}}, "exit frame 07 01"},
		"no reason for failure": {[]frame{{frameExit, 0, []byte{notStarted, 127}}}, "exit frame"},
		"failure of status 0":   {[]frame{{frameExit, 0, []byte{notStarted, 0, 'x'}}}, "exit frame"},
		"failure of status 124": {[]frame{{frameExit, 0, []byte{notStarted, 124, 'x'}}}, "exit frame"},
		"signal 65":             {[]frame{{frameExit, 0, []byte{signaled, 65}}}, "exit frame"},
		"signal 128":            {[]frame{{frameExit, 0, []byte{signaled, 128}}}, "exit frame"},
		"signal 0":              {[]frame{{frameExit, 0, []byte{signaled, 0}}}, "exit frame"},
		"exit twice":            {[]frame{exit, exit}, "wrong from an agent"},
		"an end without exit":   {nil, "unexpected EOF"},
	} {
		in := appendHello(nil, roleAgent, Hello{build, ""})
		for _, f := range tt.frames {
			in = appendFrame(in, f)
		}
		h, err := Accept(peer{bytes.NewReader(in)}, HostConfig{Builds: []string{build}, Window: 100})
		if err != nil {
			t.Fatal(err)
		}
		<-h.c.gone
		if !strings.Contains(h.c.err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", name, h.c.err, tt.want)
		}
		if _, err := h.Wait(); (err == nil) != (name == "exit twice") {
			t.Errorf("%s: wait: %v", name, err)
		}
	}
}

// TestBuilds: the host talks to each of its agents, and tells it its own build ID; not to one
// without an ID.
func TestBuilds(t *testing.T) {
	for id, want := range map[string]bool{"large": true, "small": true, "": false, "large or small": false} {
		host, agent := net.Pipe()
		dialed := make(chan error, 1)
		go func() {
			_, err := Dial(agent, AgentConfig{Hello: Hello{Build: id}})
			dialed <- err
		}()
		_, err := Accept(host, HostConfig{Builds: []string{"large", "small"}})
		if err != nil {
			host.Close()
		}
		if other := <-dialed; (err == nil) != want || (other == nil) != want {
			t.Errorf("%q: host %v, agent %v", id, err, other)
		}
		host.Close()
	}
}

func TestBuildID(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if id, err := BuildID(exe); err != nil || strings.Count(id, "/") != 3 {
		t.Errorf("%q, %v; want an ID of four parts", id, err)
	}
	if _, err := BuildID("wire_test.go"); err == nil {
		t.Error("a text has a build ID")
	}
}

// TestCommand: a command arrives unchanged, with any bytes in its names.
func TestCommand(t *testing.T) {
	want := &Command{
		Args: []text.Name{"/bin/\xff", "", "a b\n\x00"}, Env: []text.Name{"A=\xfe"}, Dir: "/tmp/\xe4",
		UID: math.MaxUint32, GID: 7, Groups: []uint32{4, 5}, Rlimits: []Rlimit{{7, 1024, math.MaxUint64}},
		Terminal: &Terminal{24, 80}, Modules: []text.Name{"/lib/a.ko"}, Later: []text.Name{"/lib/b.ko"}, Hostname: "h",
	}
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadCommand(bytes.NewReader(b))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "{}", `{"args":["x"],"foo":1}`} {
		if c, err := ReadCommand(strings.NewReader(bad)); err == nil {
			t.Errorf("%s is %+v", bad, c)
		}
	}
}

// TestSessionCommand: a command of several frames arrives, one alone, and one that is none ends the
// connection.
func TestSessionCommand(t *testing.T) {
	h, a := pair(t, HostConfig{}, AgentConfig{})
	want := &Command{Args: []text.Name{"echo", text.Name(strings.Repeat("\xff", 2*MaxPayload))}}
	go h.Command(want)
	if got, err := a.Command(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v", err)
	}
	go h.Command(want) // ends with the pipe
	<-a.Gone()
	h, a = pair(t, HostConfig{}, AgentConfig{})
	go h.Command(&Command{})
	if got, err := a.Command(); err == nil || !strings.Contains(err.Error(), "it has no command") {
		t.Errorf("%v, %v", got, err)
	}
}

// FuzzFrames: frames read out of arbitrary bytes are those bytes when they are written again.
func FuzzFrames(f *testing.F) {
	f.Add(appendFrame(appendFrame(nil, frame{frameData, 1, []byte("x")}), frame{frameClose, 1, nil}))
	f.Fuzz(func(t *testing.T, in []byte) {
		d := newFrameReader(bytes.NewReader(in))
		var again []byte
		for {
			fr, err := d.next()
			if err != nil {
				break
			}
			again = appendFrame(again, fr)
		}
		if !bytes.HasPrefix(in, again) {
			t.Errorf("% x is % x after decoding", in, again)
		}
	})
}

// FuzzHost feeds a host an agent's bytes. Each 4 bytes of in are a frame: type, stream, and the
// length and first byte of the payload, so that most frames have a right checksum. The rest is sent
// as it is.
func FuzzHost(f *testing.F) {
	f.Add([]byte{byte(frameData), 1, 30, 'x', byte(frameClose), 1, 0, 0, byte(frameExit), 0, 2, exited}, []byte(nil))
	f.Add([]byte{byte(frameStarted), 0, 4, 7, byte(frameAlive), 0, 0, 0, byte(frameWindow), 0, 4, 1}, []byte("\x02"))
	f.Add([]byte{byte(frameCommand), 0, 0, 0, byte(frameExit), 0, 3, notStarted}, []byte(nil))
	f.Add([]byte{byte(frameLog), 0, 200, 'x', byte(frameStop), 0, 0, 0, byte(frameData), 2, 255, 1}, []byte(nil))
	f.Fuzz(func(t *testing.T, in, rest []byte) {
		b := appendHello(nil, roleAgent, Hello{build, ""})
		for ; len(in) >= 4; in = in[4:] {
			b = appendFrame(b, frame{frameType(in[0]), int(in[1]), bytes.Repeat(in[3:4], int(in[2]))})
		}
		const window = 300
		h, err := Accept(peer{bytes.NewReader(append(b, rest...))}, HostConfig{Builds: []string{build}, Window: window})
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		h.Stdin.Write(make([]byte, 10*window)) // fails, if not before then at the end of the bytes
		<-h.c.gone
		for i, r := range []io.Reader{h.Stdout, h.Stderr} {
			if got, _ := io.ReadAll(r); len(got) > window {
				t.Errorf("%d bytes of stream %d were buffered", len(got), i+1)
			}
		}
		if e, err := h.Wait(); err != nil && e != (Exit{}) {
			t.Errorf("%+v, %v", e, err)
		}
	})
}
