package gdbstub

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"gvm/kvmapi/nowait"
	"gvm/panics"
)

// endPatience is the time that a client has to take the news of the target's end.
const endPatience = 200 * time.Millisecond

// session is the connection of a client.
type session struct {
	t        Target
	conn     io.Writer
	attached bool
	running  bool // until a Stop arrives
	noAck    bool // no acknowledgments are sent
	swbreak  bool // the client knows the stop reason swbreak
	hwbreak  bool // and hwbreak
	thread   int  // of Hg
	stop     Stop // the last one
	last     []byte
	xfer     string // the document of which qXfer reads parts
}

// Serve serves one client until it detaches, its stream ends or the target has ended. It then
// closes conn, whose Close must end a Read and a Write. The target is stopped at the first packet.
// A client that leaves without detaching is detached. The error is of the stream or the client's
// packets; it is nil if the client has left, or the target has ended, also if the stream fails by
// that.
func Serve(conn io.ReadWriteCloser, t Target) error {
	s := &session{t: t, conn: conn, thread: 1}
	in, served := make(chan message), make(chan struct{})
	var helpers sync.WaitGroup
	var readErr error
	helpers.Go(panics.Func(func() {
		defer close(in)
		r := bufio.NewReader(conn)
		for {
			m, err := read(r)
			if err != nil {
				readErr = err
				return
			}
			select {
			case in <- m:
			case <-served:
				return
			}
		}
	}))
	helpers.Go(panics.Func(func() {
		select {
		case <-t.Ended():
			select {
			case <-time.After(endPatience):
			case <-served:
			}
		case <-served:
		}
		conn.Close()
	}))
	err := s.serve(in)
	if s.attached {
		t.Detach()
	}
	close(served)
	helpers.Wait()
	if err == errStream {
		err = readErr
	}
	if nowait.IsCut(err) {
		return nil
	}
	select {
	case <-t.Ended():
		return nil
	default:
		return err
	}
}

// errStream stands for the error of the reader, which is known when that has ended.
var errStream = errors.New("the stream has ended")

// errLeft is the end of a session that the client asked for.
var errLeft = errors.New("the client has left")

func (s *session) serve(in <-chan message) error {
	for {
		var stops <-chan Stop
		if s.running {
			stops = s.t.Stops()
		}
		var err error
		select {
		case m, ok := <-in:
			if !ok {
				return errStream
			}
			err = s.message(m)
		case stop := <-stops:
			s.running, s.stop, s.thread = false, stop, stop.Thread
			err = s.send(s.stopReply())
		case <-s.t.Ended():
			if s.running {
				err = s.send("W00")
			}
			return err
		}
		if err == errLeft {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *session) send(body string) error {
	s.last = packet(body)
	_, err := s.conn.Write(s.last)
	return err
}

// message takes a message of the client.
func (s *session) message(m message) error {
	switch m.kind {
	case interrupt:
		if s.running {
			s.t.Interrupt()
		}
		return nil
	case '-':
		_, err := s.conn.Write(s.last)
		return err
	case '!':
		if s.noAck {
			return errors.New("a packet has a wrong checksum")
		}
		_, err := s.conn.Write([]byte{'-'})
		return err
	}
	if !s.noAck {
		if _, err := s.conn.Write([]byte{'+'}); err != nil {
			return err
		}
	}
	if s.running { // a client waits for the Stop before it sends a packet
		return s.send("E.the target is running")
	}
	if !s.attached {
		stop, err := s.t.Attach()
		if err != nil {
			return err
		}
		s.attached, s.stop, s.thread = true, stop, stop.Thread
	}
	body := string(m.body)
	switch {
	case body == "k":
		s.t.Kill()
		return errLeft
	case body == "D" || strings.HasPrefix(body, "D;"):
		s.attached = false
		s.t.Detach()
		if err := s.send("OK"); err != nil {
			return err
		}
		return errLeft
	case body == "QStartNoAckMode":
		err := s.send("OK")
		s.noAck = true
		return err
	}
	reply, err := s.packet(body)
	switch {
	case errors.Is(err, ErrUnsupported):
		reply = ""
	case err != nil:
		reply = "E." + strings.ReplaceAll(err.Error(), "\n", " ")
	case s.running:
		return nil // the reply is the Stop
	}
	return s.send(reply)
}

var errBad = errors.New("malformed packet")

// packet answers a packet. An unknown one has an empty answer.
func (s *session) packet(body string) (string, error) {
	if body == "" {
		return "", nil
	}
	rest := body[1:]
	switch body[0] {
	case '?':
		return s.stopReply(), nil
	case 'g':
		regs, err := s.t.Registers(s.thread)
		return hex.EncodeToString(regs), err
	case 'G':
		regs, err := hex.DecodeString(rest)
		if err != nil {
			return "", errBad
		}
		return ok(s.setRegisters(0, regs, true))
	case 'p':
		return s.register(rest)
	case 'P':
		number, value, _ := strings.Cut(rest, "=")
		n, err := strconv.ParseUint(number, 16, 16)
		bytes, err2 := hex.DecodeString(value)
		if err != nil || err2 != nil {
			return "", errBad
		}
		return ok(s.setRegisters(int(n), bytes, false))
	case 'm':
		addr, n, err := addrLen(rest)
		if err != nil {
			return "", err
		}
		p := make([]byte, min(n, maxPacket/2))
		read, err := s.t.ReadMemory(s.thread, addr, p)
		if read == 0 && err != nil {
			return "E0e", nil // EFAULT; gdb 13 takes the text of an error for data here
		}
		return hex.EncodeToString(p[:read]), nil
	case 'M', 'X':
		where, data, _ := strings.Cut(rest, ":")
		addr, n, err := addrLen(where)
		p := []byte(data)
		if err == nil && body[0] == 'M' {
			p, err = hex.DecodeString(data)
		}
		if err != nil || uint64(len(p)) != n {
			return "", errBad
		}
		return ok(s.t.WriteMemory(s.thread, addr, p))
	case 'Z', 'z':
		kind, where, _ := strings.Cut(rest, ",")
		where, _, _ = strings.Cut(where, ";") // conditions and commands were not offered
		addr, n, err := addrLen(where)
		if err != nil || len(kind) != 1 {
			return "", errBad
		}
		p := Point{PointKind(kind[0] - '0'), addr, n}
		switch {
		case p.Kind < SoftwareBreakpoint || p.Kind > AccessWatchpoint:
			return "", nil
		case body[0] == 'Z':
			return ok(s.t.Insert(s.thread, p))
		}
		return ok(s.t.Remove(s.thread, p))
	case 'H':
		if rest == "" {
			return "", errBad
		}
		thread, err := s.threadID(rest[1:])
		if err == nil && thread > 0 && rest[0] == 'g' {
			s.thread = thread
		}
		return ok(err)
	case 'T':
		_, err := s.threadID(rest)
		return ok(err)
	case 'c', 's':
		if rest != "" { // an address
			return "", nil
		}
		return "", s.resume(body)
	case 'C', 'S':
		return "", s.resume(body[:1])
	case 'v':
		if actions, is := strings.CutPrefix(body, "vCont;"); is {
			return "", s.resume(strings.Split(actions, ";")...)
		}
		if body == "vCont?" {
			return "vCont;c;C;s;S;r", nil
		}
	case 'q':
		return s.query(body)
	}
	return "", nil
}

func ok(err error) (string, error) { return "OK", err }

// query answers the packets that begin with q.
func (s *session) query(body string) (string, error) {
	name, rest, _ := strings.Cut(body, ":")
	switch name {
	case "qSupported":
		for f := range strings.SplitSeq(rest, ";") {
			s.swbreak, s.hwbreak = s.swbreak || f == "swbreak+", s.hwbreak || f == "hwbreak+"
		}
		return fmt.Sprintf("PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;qXfer:threads:read+;"+
			"vContSupported+;swbreak+;hwbreak+", maxPacket), nil
	case "qAttached":
		return "1", nil // a client that ends detaches
	case "qOffsets": // at target remote; the offset of the text is that of all segments
		if text, ok := s.t.Moved(s.thread); ok {
			return fmt.Sprintf("TextSeg=%x", text), nil
		}
	case "qC":
		return fmt.Sprintf("QC%x", s.thread), nil
	case "qfThreadInfo":
		var ids []string
		for i := range s.t.Threads() {
			ids = append(ids, strconv.FormatInt(int64(i+1), 16))
		}
		return "m" + strings.Join(ids, ","), nil
	case "qsThreadInfo":
		return "l", nil
	case "qXfer":
		return s.transfer(rest)
	}
	return "", nil
}

// transfer answers qXfer: a part of a document.
func (s *session) transfer(rest string) (string, error) {
	colon := strings.LastIndex(rest, ":")
	if colon < 0 {
		return "", errBad
	}
	object := rest[:colon]
	offset, n, err := addrLen(rest[colon+1:])
	if err != nil {
		return "", err
	}
	if offset == 0 {
		switch object {
		case "features:read:target.xml":
			s.xfer = s.t.Description()
		case "threads:read:":
			s.xfer = s.threadList()
		default:
			return "E00", nil
		}
	}
	doc := s.xfer[min(offset, uint64(len(s.xfer))):]
	if most := min(n, maxPacket/4); uint64(len(doc)) > most {
		return "m" + doc[:most], nil
	}
	return "l" + doc, nil
}

// threadList is the document of qXfer:threads.
func (s *session) threadList() string {
	var b strings.Builder
	b.WriteString("<threads>\n")
	text := strings.NewReplacer("&", "&amp;", "<", "&lt;", `"`, "&quot;")
	for i := range s.t.Threads() {
		name, state := s.t.Thread(i + 1)
		fmt.Fprintf(&b, "<thread id=\"%x\" core=\"%d\" name=\"%s\">%s</thread>\n", i+1, i, text.Replace(name),
			text.Replace(state))
	}
	b.WriteString("</threads>\n")
	return b.String()
}

// stopReply describes the last Stop.
func (s *session) stopReply() string {
	b := fmt.Sprintf("T%02xthread:%x;", s.stop.Signal, s.stop.Thread)
	if p := s.stop.Point; p != nil {
		switch p.Kind {
		case SoftwareBreakpoint:
			if s.swbreak {
				b += "swbreak:;"
			}
		case HardwareBreakpoint:
			if s.hwbreak {
				b += "hwbreak:;"
			}
		default:
			b += fmt.Sprintf("%s:%x;", map[PointKind]string{WriteWatchpoint: "watch", ReadWatchpoint: "rwatch",
				AccessWatchpoint: "awatch"}[p.Kind], p.Addr)
		}
	}
	return b
}

// register answers p: one register.
func (s *session) register(number string) (string, error) {
	n, err := strconv.ParseUint(number, 16, 16)
	if err != nil {
		return "", errBad
	}
	at, size, err := s.place(int(n))
	if err != nil {
		return "", err
	}
	regs, err := s.t.Registers(s.thread)
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(regs[at : at+size]), nil
}

// place returns where a register is among all.
func (s *session) place(n int) (at, size int, err error) {
	sizes := s.t.RegisterSizes()
	if n >= len(sizes) {
		return 0, 0, fmt.Errorf("there is no register %d", n)
	}
	for _, size := range sizes[:n] {
		at += size
	}
	return at, sizes[n], nil
}

// setRegisters sets register n, or all.
func (s *session) setRegisters(n int, value []byte, all bool) error {
	at, size, err := s.place(n)
	if err != nil {
		return err
	}
	regs, err := s.t.Registers(s.thread)
	if err != nil {
		return err
	}
	if all {
		size = len(regs)
	}
	if len(value) != size {
		return fmt.Errorf("a value of %d bytes for %d", len(value), size)
	}
	copy(regs[at:], value)
	return s.t.SetRegisters(s.thread, regs)
}

// resume lets threads go on. Of several actions the first one for a thread counts.
func (s *session) resume(words ...string) error {
	actions, set := make([]Action, s.t.Threads()), make([]bool, s.t.Threads())
	for _, word := range words {
		word, id, one := strings.Cut(word, ":")
		thread := -1
		if one {
			var err error
			if thread, err = s.threadID(id); err != nil {
				return err
			}
		}
		if thread == 0 || len(words) == 1 && !one && strings.HasPrefix(strings.ToLower(word), "s") {
			thread = s.thread // any, and a step without a thread
		}
		a, err := action(word)
		if err != nil {
			return err
		}
		for i := range actions {
			if !set[i] && (thread < 0 || thread == i+1) {
				actions[i], set[i] = a, true
			}
		}
	}
	err := s.t.Resume(actions)
	s.running = err == nil
	return err
}

// action reads an action of vCont. Signals mean nothing to a machine.
func action(word string) (a Action, err error) {
	switch {
	case word == "c", len(word) == 3 && word[0] == 'C', word == "C":
		a.Kind = Continue
	case word == "s", len(word) == 3 && word[0] == 'S', word == "S":
		a.Kind = Step
	case strings.HasPrefix(word, "r"):
		a.Kind = StepRange
		a.Start, a.End, err = addrLen(word[1:])
	default:
		err = errBad
	}
	return a, err
}

// threadID reads a thread-id: 0 is any thread, -1 all.
func (s *session) threadID(id string) (int, error) {
	if id == "-1" {
		return -1, nil
	}
	n, err := strconv.ParseUint(id, 16, 16)
	if err != nil {
		return 0, errBad
	}
	if n > uint64(s.t.Threads()) {
		return 0, fmt.Errorf("there is no thread %d", n)
	}
	return int(n), nil
}

// addrLen reads two hexadecimal numbers with a comma between them.
func addrLen(text string) (addr, n uint64, err error) {
	a, b, _ := strings.Cut(text, ",")
	addr, err = strconv.ParseUint(a, 16, 64)
	n, err2 := strconv.ParseUint(b, 16, 64)
	if err != nil || err2 != nil {
		return 0, 0, errBad
	}
	return addr, n, nil
}
