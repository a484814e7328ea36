package gdbstub

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// fake is a target of three threads with two registers, 4 and 2 bytes, and 64 KiB of memory at
// 0x1000.
type fake struct {
	mem      []byte
	regs     [3][]byte
	points   []Point
	stops    chan Stop
	ended    chan struct{}
	resumed  chan struct{}
	mu       sync.Mutex // guards the rest, which tests read
	log      []string
	attached bool
}

func newFake() *fake {
	f := &fake{mem: make([]byte, 64<<10), stops: make(chan Stop, 1), ended: make(chan struct{}),
		resumed: make(chan struct{}, 1)}
	for i := range f.regs {
		f.regs[i] = []byte{byte(i), 1, 2, 3, 4, 5}
	}
	return f
}

func (f *fake) say(format string, a ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, fmt.Sprintf(format, a...))
}

func (f *fake) said() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := strings.Join(f.log, " ")
	f.log = nil
	return s
}

func (f *fake) Attach() (Stop, error) {
	f.say("attach")
	f.attached = true
	return Stop{Signal: SIGTRAP, Thread: 2}, nil
}

func (f *fake) Detach() {
	f.say("detach")
	if !f.attached {
		panic("detached twice")
	}
	f.attached, f.points = false, nil
}
func (f *fake) Kill()                         { f.say("kill") }
func (f *fake) Ended() <-chan struct{}        { return f.ended }
func (f *fake) Description() string           { return "<target>#1*</target>" }
func (f *fake) RegisterSizes() []int          { return []int{4, 2} }
func (f *fake) Threads() int                  { return len(f.regs) }
func (f *fake) Thread(i int) (string, string) { return fmt.Sprint("CPU ", i-1), "a<b" }
func (f *fake) Registers(i int) ([]byte, error) {
	if i == 3 {
		return nil, errors.New("CPU 2 is busy")
	}
	return slices.Clone(f.regs[i-1]), nil
}

func (f *fake) SetRegisters(i int, regs []byte) error {
	if len(regs) != 6 {
		panic("length")
	}
	f.regs[i-1] = regs
	return nil
}

func (f *fake) ReadMemory(_ int, addr uint64, p []byte) (int, error) {
	if addr < 0x1000 || addr >= 0x11000 {
		return 0, errors.New("not mapped")
	}
	return copy(p, f.mem[addr-0x1000:]), nil
}

func (f *fake) WriteMemory(_ int, addr uint64, p []byte) error {
	if addr < 0x1000 || addr > 0x11000-uint64(len(p)) {
		return errors.New("not mapped")
	}
	copy(f.mem[addr-0x1000:], p)
	return nil
}

func (f *fake) Moved(thread int) (uint64, bool) {
	return 0xffffffff_92200000, thread == 2 && f.mem[0] != 0
}

func (f *fake) Insert(_ int, p Point) error {
	if p.Kind == ReadWatchpoint {
		return ErrUnsupported
	}
	f.points = append(f.points, p)
	return nil
}

func (f *fake) Remove(_ int, p Point) error {
	f.points = slices.DeleteFunc(f.points, func(q Point) bool { return p == q })
	return nil
}

func (f *fake) Resume(actions []Action) error {
	if len(actions) != 3 {
		panic("actions")
	}
	f.say("resume %v", actions)
	select {
	case f.resumed <- struct{}{}:
	default:
	}
	if actions[0].Kind == Step {
		f.stops <- Stop{Signal: SIGTRAP, Thread: 1}
	}
	return nil
}
func (f *fake) Interrupt() {
	select {
	case f.stops <- Stop{Signal: SIGINT, Thread: 1}:
	default:
	}
}
func (f *fake) Stops() <-chan Stop { return f.stops }

// client is a debugger.
type client struct {
	*testing.T
	net.Conn
	r      *bufio.Reader
	f      *fake
	served chan error
}

func newClient(t *testing.T) *client {
	a, b := net.Pipe()
	c := &client{t, a, bufio.NewReader(a), newFake(), make(chan error, 1)}
	go func() { c.served <- Serve(b, c.f) }()
	t.Cleanup(func() { a.Close(); <-c.served })
	return c
}

func (c *client) write(text string) {
	c.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		c.Error(err)
	}
}

// reply reads a packet, without its acknowledgment.
func (c *client) reply() string {
	c.Helper()
	m, err := read(c.r)
	if err != nil || m.kind != '$' {
		c.Fatalf("message %q: %v", m.kind, err)
	}
	return string(m.body)
}

// ask sends a packet and returns its reply.
func (c *client) ask(body string) string {
	c.Helper()
	go c.write(string(packet(body))) // the acknowledgment comes before the end of the write
	return c.reply()
}

func TestPackets(t *testing.T) {
	c := newClient(t)
	for _, row := range []struct{ packet, reply string }{
		{"qSupported:multiprocess+;swbreak+;hwbreak+", "PacketSize=4000;QStartNoAckMode+;qXfer:features:read+;" +
			"qXfer:threads:read+;vContSupported+;swbreak+;hwbreak+"},
		{"QStartNoAckMode", "OK"},
		{"vMustReplyEmpty", ""},
		{"", ""},
		{"?", "T05thread:2;"},
		{"qC", "QC2"},
		{"qAttached", "1"},
		{"qOffsets", ""},
		{"M1000,1:01", "OK"}, // the target has moved
		{"qOffsets", "TextSeg=ffffffff92200000"},
		{"M1000,1:00", "OK"},
		{"qfThreadInfo", "m1,2,3"},
		{"qsThreadInfo", "l"},
		{"qXfer:features:read:target.xml:0,9", "m<target>#"},
		{"qXfer:features:read:target.xml:9,100", "l1*</target>"},
		{"qXfer:features:read:target.xml:ffffffffffffffff,100", "l"},
		{"qXfer:features:read:other.xml:0,9", "E00"},
		{"qXfer:", "E.malformed packet"},
		{"qXfer", "E.malformed packet"},
		{"qXfer:threads:read::0,1000", "l<threads>\n" +
			"<thread id=\"1\" core=\"0\" name=\"CPU 0\">a&lt;b</thread>\n" +
			"<thread id=\"2\" core=\"1\" name=\"CPU 1\">a&lt;b</thread>\n" +
			"<thread id=\"3\" core=\"2\" name=\"CPU 2\">a&lt;b</thread>\n</threads>\n"},
		{"g", "010102030405"},
		{"p1", "0405"},
		{"p2", "E.there is no register 2"},
		{"pffff", "E.there is no register 65535"},
		{"px", "E.malformed packet"},
		{"P0=aabbccdd", "OK"},
		{"P1=aa", "E.a value of 1 bytes for 2"},
		{"P1", "E.a value of 0 bytes for 2"},
		{"P1=zz", "E.malformed packet"},
		{"g", "aabbccdd0405"},
		{"G0102030405", "E.a value of 5 bytes for 6"},
		{"G010203040506", "OK"},
		{"g", "010203040506"},
		{"Hg3", "OK"},
		{"g", "E.CPU 2 is busy"},
		{"Hg4", "E.there is no thread 4"},
		{"Hg0", "OK"},
		{"Hg-1", "OK"},
		{"Hc1", "OK"},
		{"H", "E.malformed packet"},
		{"qC", "QC3"},
		{"Hg1", "OK"},
		{"g", "000102030405"},
		{"T3", "OK"},
		{"T4", "E.there is no thread 4"},
		{"M1000,2:abcd", "OK"},
		{"M1000,3:abcd", "E.malformed packet"},
		{"m1000,3", "abcd00"},
		{"m10ff8,10", strings.Repeat("00", 8)}, // memory ends
		{"m0,10", "E0e"},
		{"m0", "E.malformed packet"},
		{"m1000,ffffffffffffffff", "abcd" + strings.Repeat("00", maxPacket/2-2)},
		{"X1000,4:#$}*", "OK"},
		{"m1000,4", hex.EncodeToString([]byte("#$}*"))},
		{"Xffffffffffffffff,1:a", "E.not mapped"},
		{"Z0,1000,1", "OK"},
		{"Z2,1008,4;X1,0", "OK"},
		{"Z3,1008,4", ""},
		{"Z5,1008,4", ""},
		{"Z,1008,4", "E.malformed packet"},
		{"z0,1000,1", "OK"},
		{"vCont?", "vCont;c;C;s;S;r"},
		{"vCont;t", "E.malformed packet"},
		{"vCont;c:4", "E.there is no thread 4"},
		{"vCont;r1000", "E.malformed packet"},
		{"vCont;s:1", "T05thread:1;"},
		{"vKill;1", ""},
		{strings.Repeat("m", maxPacket+1), ""},
	} {
		if got := c.ask(row.packet); got != row.reply {
			t.Errorf("%.40s: %.80q; want %.80q", row.packet, got, row.reply)
		}
	}
	if len(c.f.points) != 1 || c.f.points[0] != (Point{WriteWatchpoint, 0x1008, 4}) {
		t.Errorf("points: %v", c.f.points)
	}
}

// TestResume: each thread has the first action that names it, and the reply is the stop.
func TestResume(t *testing.T) {
	c := newClient(t)
	c.ask("QStartNoAckMode")
	c.f.said()
	for _, row := range []struct{ packet, actions string }{
		{"vCont;c", "[{1 0 0} {1 0 0} {1 0 0}]"},
		{"vCont;C05", "[{1 0 0} {1 0 0} {1 0 0}]"},
		{"vCont;c:2;s", "[{2 0 0} {1 0 0} {2 0 0}]"},
		{"vCont;c:-1;s:2", "[{1 0 0} {1 0 0} {1 0 0}]"},
		{"vCont;r10,2f:3;c", "[{1 0 0} {1 0 0} {3 16 47}]"},
		{"vCont;s:3", "[{0 0 0} {0 0 0} {2 0 0}]"},
		{"c", "[{1 0 0} {1 0 0} {1 0 0}]"},
		{"C05", "[{1 0 0} {1 0 0} {1 0 0}]"},
		{"S05", "[{2 0 0} {0 0 0} {0 0 0}]"},
	} {
		go func() { c.write(string(packet(row.packet)) + string(rune(interrupt))) }()
		if got := c.reply(); got != "T02thread:1;" && got != "T05thread:1;" {
			t.Errorf("%s: %s", row.packet, got)
		}
		if got := c.f.said(); got != "resume "+row.actions {
			t.Errorf("%s: %s", row.packet, got)
		}
	}
}

// TestStopReasons: a client learns the reasons that it knows.
func TestStopReasons(t *testing.T) {
	for _, row := range []struct {
		stop    Stop
		old, of string
	}{
		{Stop{5, 3, nil}, "T05thread:3;", "T05thread:3;"},
		{Stop{5, 1, &Point{SoftwareBreakpoint, 1, 1}}, "T05thread:1;", "T05thread:1;swbreak:;"},
		{Stop{5, 1, &Point{HardwareBreakpoint, 1, 1}}, "T05thread:1;", "T05thread:1;hwbreak:;"},
		{Stop{5, 1, &Point{WriteWatchpoint, 0x1f, 1}}, "T05thread:1;watch:1f;", "T05thread:1;watch:1f;"},
		{Stop{5, 1, &Point{AccessWatchpoint, 0x1f, 1}}, "T05thread:1;awatch:1f;", "T05thread:1;awatch:1f;"},
		{Stop{5, 1, &Point{ReadWatchpoint, 0x1f, 1}}, "T05thread:1;rwatch:1f;", "T05thread:1;rwatch:1f;"},
	} {
		s := session{stop: row.stop}
		if got := s.stopReply(); got != row.old {
			t.Errorf("%v: %s", row.stop, got)
		}
		s.swbreak, s.hwbreak = true, true
		if got := s.stopReply(); got != row.of {
			t.Errorf("%v: %s", row.stop, got)
		}
	}
}

// TestAcknowledgments: a damaged packet is asked for again, and a lost reply is sent again.
func TestAcknowledgments(t *testing.T) {
	c := newClient(t)
	want := func(write, read string) {
		t.Helper()
		go c.write(write)
		b := make([]byte, len(read))
		if _, err := io.ReadFull(c.r, b); err != nil || string(b) != read {
			t.Fatalf("%q: %q, %v; want %q", write, b, err, read)
		}
	}
	want("$qC#00", "-")
	want("$m10$qC#b4", "+$QC2#c6")
	want("+-", "$QC2#c6")
	want("junk$QStartNoAckMode#b0", "+$OK#9a")
	want("+$qC#b4", "$QC2#c6")
	c.write("$qC#00")
	if _, err := c.r.ReadByte(); err != io.EOF {
		t.Errorf("a wrong checksum without acknowledgments: %v", err)
	}
}

// TestEnds: a client is detached however it leaves, and hears of the target's end.
func TestEnds(t *testing.T) {
	for _, row := range []struct {
		name string
		end  func(c *client) string
		said string
	}{
		{"no packet", func(c *client) string { c.Close(); return "" }, ""},
		{"gone", func(c *client) string { c.ask("?"); c.Close(); return "" }, "attach detach"},
		{"gone in a packet", func(c *client) string {
			c.write("$qC")
			c.Close()
			return ""
		}, ""},
		{"gone while the target runs", func(c *client) string {
			go c.write(string(packet("vCont;c")))
			_, _ = c.r.ReadByte()
			<-c.f.resumed
			c.Close()
			return ""
		}, "attach resume [{1 0 0} {1 0 0} {1 0 0}] detach"},
		{"detached", func(c *client) string { return c.ask("D") }, "attach detach"},
		{"killed", func(c *client) string {
			c.write("$k#6b")
			_, _ = c.r.ReadByte()
			return ""
		}, "attach kill detach"},
		{"ended", func(c *client) string {
			go func() {
				c.write(string(packet("vCont;c")))
				<-c.f.resumed
				close(c.f.ended)
			}()
			return c.reply()
		}, "attach resume [{1 0 0} {1 0 0} {1 0 0}] detach"},
		{"ended with a client that hangs", func(c *client) string {
			c.write("$qC#b")
			close(c.f.ended)
			return ""
		}, ""},
		{"ended with a client that does not read", func(c *client) string {
			c.write("$qC#b4")
			_, _ = c.r.ReadByte()
			close(c.f.ended)
			return ""
		}, "attach detach"},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := newClient(t)
			reply := row.end(c)
			if want := map[string]string{"detached": "OK", "ended": "W00"}[row.name]; reply != want {
				t.Errorf("reply %q; want %q", reply, want)
			}
			err := <-c.served
			c.served <- err
			if got := c.f.said(); got != row.said || err != nil {
				t.Errorf("%q; want %q (%v)", got, row.said, err)
			}
		})
	}
}

// TestKilledClient: a client that ends without having read all has left. Its socket is reset then,
// or the reply has no reader.
func TestKilledClient(t *testing.T) {
	var ends [2]net.Conn
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	served := make(chan error, 1)
	go func() { served <- Serve(ends[1], newFake()) }()
	if _, err := ends[0].Write(packet("?")); err != nil {
		t.Fatal(err)
	}
	if _, err := ends[0].Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	ends[0].Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// script is a stream with a client's bytes, which ends with them.
type script struct {
	*bytes.Reader
	out bytes.Buffer
}

func (s *script) Write(p []byte) (int, error) { return s.out.Write(p) }
func (s *script) Close() error                { return nil }

// FuzzServe: a client sends anything, and gets whole packets.
func FuzzServe(f *testing.F) {
	for _, bodies := range [][]string{
		{"qSupported:swbreak+", "QStartNoAckMode", "?", "g", "p1", "P1=0102", "m1000,10", "X1000,1:}", "D"},
		{"qXfer:features:read:target.xml:0,ff", "qXfer:threads:read::0,ff", "Hg2", "vCont?", "Z0,1000,1", "z0,1000,1"},
		{"vCont;s:1;c", "vCont;r0,10:1", "T1", "G010203040506", "M1000,1:00", "qC", "k"},
	} {
		var b []byte
		for _, body := range bodies {
			b = append(b, packet(body)...)
		}
		f.Add(append(b, interrupt, '-', '+'))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, target := &script{Reader: bytes.NewReader(b)}, newFake()
		_ = Serve(s, target)
		if target.attached {
			t.Error("the client is still attached")
		}
		for r := bufio.NewReader(&s.out); ; {
			m, err := read(r)
			if err == io.EOF {
				return
			}
			if err != nil || m.kind == '!' || len(m.body) > maxPacket {
				t.Fatalf("reply %q: %v", m.kind, err)
			}
		}
	})
}
