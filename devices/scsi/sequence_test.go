package scsi_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// A sequence is a test that its input steers: commands, task management functions and events of the
// host at three units and three initiators, against a model.
type sequence struct {
	t      *testing.T
	in     []byte
	target *scsi.Target
	units  [3]*modelUnit
	held   []*heldCommand
}

// modelUnit is a unit, its storage, and the expected state of both.
type modelUnit struct {
	lun        scsi.LUN
	cfg        scsi.UnitConfig
	unit       *scsi.Unit
	disk       *watched
	attached   bool
	content    []byte
	stopped    bool
	wce, swp   bool
	dSense     bool
	doubt      bool // a failure may have left something unflushed
	attentions [3]attentions
	// For how long a failure of the backend in SANITIZE keeps the medium away is
	// the target's to say.
	sanitized bool
}

// attentions are the unit attention conditions that a nexus has to find, but for those of
// reservations, which FuzzReservations is about.
type attentions struct {
	queue   []string
	seen    bool // the unit knows the nexus; one that it does not know finds POWER ON OCCURRED alone
	unknown bool // one may have been taken unseen
}

func (a *attentions) add(code string) {
	switch {
	case !a.seen:
	case code[:2] == "29":
		*a = attentions{queue: []string{code}, seen: true}
	case !slices.Contains(a.queue, code):
		a.queue = append(a.queue, code)
	}
}

// heldCommand waits in its backend, or for one that does.
type heldCommand struct {
	u       *modelUnit
	done    bool
	tag     uint64
	nexus   scsi.NexusID
	aborted bool
}

// next is the next byte of the input, 0 after its end.
func (s *sequence) next() byte {
	if len(s.in) == 0 {
		return 0
	}
	b := s.in[0]
	s.in = s.in[1:]
	return b
}

func newSequence(t *testing.T, in []byte) *sequence {
	s := &sequence{t: t, in: in, target: scsi.NewTarget()}
	for i, cfg := range []scsi.UnitConfig{
		{Serial: "thin", Protection: newTuples()},
		{Serial: "large", BlockSize: 4096, Cache: scsi.WriteThrough},
		{Serial: "readonly", ReadOnly: true},
	} {
		size := max(cfg.BlockSize, blockSize)
		d := &watched{Mem: block.NewMem(int64(32 * size)), t: t, block: size}
		_, _ = d.Mem.WriteAt(bytes.Repeat([]byte{byte(i) + 1}, size), 0)
		cfg.Backend = d
		if i == 1 {
			cfg.Backend = struct {
				block.Backend
				block.Vectored
				block.Syncer
			}{d, d, d}
		}
		u, err := scsi.NewUnit(cfg)
		if err != nil {
			t.Fatal(err)
		}
		lun, _ := scsi.EncodeLUN(i)
		m := &modelUnit{lun: lun, cfg: cfg, unit: u, disk: d, content: d.all()}
		s.units[i] = m
		s.attach(m)
	}
	return s
}

func (s *sequence) attach(u *modelUnit) {
	if err := s.target.Attach(u.lun, u.unit); err != nil {
		s.t.Fatal(err)
	}
	u.attached = true
	u.powerOn()
	s.lunsChanged(u)
}

// powerOn applies a power on to the model of a unit.
func (u *modelUnit) powerOn() {
	u.stopped, u.swp, u.dSense, u.wce = false, false, false, u.cfg.Cache == scsi.WriteBack
	for i := range u.attentions {
		u.attentions[i] = attentions{queue: []string{"2901"}}
	}
}

// lunsChanged notifies the initiators that know the units beside u.
func (s *sequence) lunsChanged(u *modelUnit) {
	for _, other := range s.units {
		if other != nil && other != u && other.attached {
			other.tell("3f0e", -1)
		}
	}
}

// tell adds a unit attention condition for every nexus but one.
func (u *modelUnit) tell(code string, except int) {
	for i := range u.attentions {
		if i != except {
			u.attentions[i].add(code)
		}
	}
}

// usages are the CDB USAGE DATA of all commands of the thin unit.
var usages = sync.OnceValue(func() (list [][]byte) {
	target := scsi.NewTarget()
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(4096), Serial: "s"})
	if err == nil {
		err = errors.Join(target.Attach(0, u), scsitest.Ready(target, 0))
	}
	if err != nil {
		panic(err)
	}
	all := scsitest.Do(target, 0, []byte{0xa3, 0x0c, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0}, nil, 65536).Data
	for d := all[4:]; len(d) >= 8; d = d[8:] {
		one := scsitest.Do(target, 0, []byte{0xa3, 0x0c, 3, d[0], d[2], d[3], 0, 0, 1, 0, 0, 0}, nil, 256).Data
		list = append(list, one[4:])
	}
	return list
})

// cdb is one that means something, more often than not.
func (s *sequence) cdb() []byte {
	usage := usages()[int(s.next())%len(usages())]
	cdb := bytes.Clone(usage)
	for i := 1; i < len(cdb); {
		run := 0
		for i+run < len(cdb) && usage[i+run] == 0xff {
			run++
		}
		switch {
		case run == 0:
			// An operation code with a service action has it in the low bits.
			if i != 1 || !slices.Contains([]byte{0x48, 0x5e, 0x5f, 0x83, 0x84, 0x9e, 0xa3}, cdb[0]) {
				cdb[i] = 0
				if b := s.next(); b&7 == 7 {
					cdb[i] = usage[i] & s.next()
				}
			}
			run = 1
		case run >= 12:
			run = 8
		case run == 8 && len(cdb) == 12:
			run = 4
		}
		if usage[i] == 0xff {
			clear(cdb[i : i+run])
			cdb[i+run-1] = s.next() % 48
		}
		i += run
	}
	if s.next() == 0xff {
		cdb[1+int(s.next())%(len(cdb)-1)] = s.next()
	}
	return cdb
}

// parameters is data-out that suits the CDB, more often than not.
func (s *sequence) parameters(cdb []byte, size int) []byte {
	var b []byte
	switch cdb[0] {
	case 0x15, 0x55: // MODE SELECT
		b = make([]byte, map[byte]int{0x15: 4, 0x55: 8}[cdb[0]])
		if f := s.next(); f&1 == 0 {
			b = append(append(b, 0x08, 0x12, f&0x04), make([]byte, 17)...)
		} else {
			b = append(append(b, 0x0a, 0x0a, 0x02|f&0x04, 0x10, f&0x08), make([]byte, 7)...)
		}
		cdb[1] |= 0x10
		cdb[len(cdb)-2] = byte(len(b))
	case 0x42: // UNMAP
		n := int(s.next()) % 4
		b = make([]byte, 8+16*n)
		binary.BigEndian.PutUint16(b, uint16(len(b)-2))
		binary.BigEndian.PutUint16(b[2:], uint16(16*n))
		for i := range n {
			b[8+16*i+7], b[8+16*i+11] = s.next()%40, s.next()%8
		}
		cdb[8] = byte(len(b))
	case 0x5f: // PERSISTENT RESERVE OUT
		b = make([]byte, 24)
		b[7], b[15] = s.next()&3, s.next()&3
		cdb[2], cdb[8] = s.next()&0x0f, 24
	case 0x41, 0x93, 0x48: // WRITE SAME, SANITIZE
		b = bytes.Repeat([]byte{s.next() & 3}, size)
		if cdb[0] == 0x48 {
			b = append([]byte{1, 0, byte(size >> 8), byte(size)}, b...)
			cdb[7], cdb[8] = byte(len(b)>>8), byte(len(b))
			if cdb[1]&0x1f != 1 {
				b, cdb[7], cdb[8] = nil, 0, 0
			}
		}
	default:
		n := int(s.next())
		if _, want := extent(cdb); n&3 != 0 {
			if n = want; cdb[0] == 0x89 { // COMPARE AND WRITE
				n = 2 * int(cdb[13])
			}
		}
		for range n % 12 {
			b = append(b, bytes.Repeat([]byte{s.next() & 3}, size)...)
		}
	}
	if s.next() == 0xff {
		b = b[:len(b)*int(s.next())/256]
	}
	return b
}

// command does one, or begins it while others are held.
func (s *sequence) command() {
	where := s.next()
	u, nexus := s.units[int(where)%3], int(where>>2)%3
	cdb := s.cdb()
	out := s.parameters(cdb, u.disk.block)
	in := make([]byte, 2*(int(s.next())%8)*u.disk.block)
	attr := scsi.Simple
	if where&0xc0 == 0xc0 {
		attr = scsi.TaskAttr(s.next() % 3)
	}
	if !u.attached || attr != scsi.Simple ||
		!bytes.Contains([]byte{0x28, 0x88, 0x00, 0x12, 0xa0, 0x03, 0x5e}, cdb[:1]) {
		s.release() // reads are held, and nothing waits for held commands
	}
	before, changes := bytes.Clone(u.content), u.disk.changes
	sent := bytes.Clone(out)
	var a scsitest.Answer
	h := &heldCommand{u: u, tag: uint64(s.next()), nexus: scsi.NexusID(nexus)}
	c := &scsi.Command{LUN: u.lun, CDB: cdb, Nexus: h.nexus, Attr: attr, Tag: h.tag, Out: [][]byte{out},
		In: [][]byte{in}}
	c.Done = func(r scsi.Result) {
		if h.done {
			s.t.Error("Done called twice")
		}
		h.done, a.Result = true, r
		h.aborted = r.Abort != scsi.NotAborted
	}
	go s.target.Submit(c)
	synctest.Wait()
	u.attentions[nexus].seen = u.attached
	if !h.done {
		if u.disk.gate == nil {
			s.t.Fatalf("%s % x waits for nothing", scsi.OpcodeName(cdb), cdb)
		}
		s.held = append(s.held, h)
		u.attentions[nexus].unknown = true // whether it has taken one is seen when it ends
		return
	}
	if !bytes.Equal(out, sent) {
		s.t.Error("data-out has changed")
	}
	s.check(u, nexus, cdb, out, in, a, before, changes)
}

// release lets held commands go on, and waits for them.
func (s *sequence) release() {
	for _, u := range s.units {
		if u.disk.gate != nil {
			close(u.disk.gate)
			u.disk.gate = nil
		}
	}
	synctest.Wait()
	for _, h := range s.held {
		if !h.done {
			s.t.Fatal("a command that was held does not end")
		}
	}
	s.held = nil
}

// manage does a task management function, and releases held commands: the function waits for them.
func (s *sequence) manage() {
	what := s.next()
	u, nexus, tag := s.units[int(what)%3], scsi.NexusID(what>>2%3), uint64(s.next())
	hit := slices.ContainsFunc(s.held, func(h *heldCommand) bool {
		return h.u == u && h.nexus == nexus && h.tag == tag
	})
	if got := s.target.QueryTask(nexus, u.lun, tag); u.attached && (got == scsi.FunctionSucceeded) != hit {
		s.t.Errorf("QUERY TASK: %v, and the task is there: %v", got, hit)
	}
	ended := func(h *heldCommand) bool { return h.u == u }
	do := func() scsi.TaskResponse { return s.target.LogicalUnitReset(u.lun) }
	switch what >> 5 {
	case 0:
		do = func() scsi.TaskResponse { return s.target.AbortTask(nexus, u.lun, tag) }
		ended = func(h *heldCommand) bool { return h.u == u && h.nexus == nexus && h.tag == tag }
	case 1:
		do = func() scsi.TaskResponse { return s.target.AbortTaskSet(nexus, u.lun) }
		ended = func(h *heldCommand) bool { return h.u == u && h.nexus == nexus }
	case 2:
		do = func() scsi.TaskResponse { return s.target.ClearTaskSet(nexus, u.lun) }
		if len(s.held) > 0 {
			for i := range u.attentions {
				u.attentions[i].unknown = true // COMMANDS CLEARED BY ANOTHER INITIATOR
			}
		}
	case 3:
		do = func() scsi.TaskResponse { return s.target.NexusReset(nexus) }
		ended = func(h *heldCommand) bool { return h.nexus == nexus }
		for _, u := range s.units {
			if u.attached {
				u.attentions[nexus].add("2907")
			}
		}
	case 4:
		do = func() scsi.TaskResponse { s.target.PowerOn(); return scsi.FunctionComplete }
		ended = func(*heldCommand) bool { return true }
		for _, u := range s.units {
			if u.attached {
				u.powerOn()
			}
		}
	default:
		if u.attached {
			u.stopped, u.swp, u.dSense = false, false, false
			u.tell("2903", -1)
		}
	}
	held, answered := s.held, false
	go func() {
		if r := do(); r != scsi.FunctionComplete && u.attached {
			s.t.Errorf("task management function: %v", r)
		}
		answered = true
	}()
	synctest.Wait()
	if answered && slices.ContainsFunc(held, func(h *heldCommand) bool { return !h.done && ended(h) && h.u.attached }) {
		s.t.Error("a task management function ends before the tasks that it aborts")
	}
	s.release()
	if !answered {
		s.t.Fatal("a task management function does not end")
	}
	for _, h := range held {
		if h.aborted != (ended(h) && h.u.attached) {
			s.t.Errorf("a command is aborted: %v, and should be: %v", h.aborted, ended(h))
		}
	}
}

// host is an event of the host's side.
func (s *sequence) host() {
	what := s.next()
	u := s.units[int(what)%3]
	switch what >> 4 % 4 {
	case 0: // another size
		s.release()
		blocks := 32 + int(s.next())%8
		if err := u.unit.Resize(func() error { return u.disk.resize(int64(blocks * u.disk.block)) }); err != nil {
			s.t.Fatal(err)
		}
		if blocks*u.disk.block != len(u.content) && u.attached {
			u.tell("2a09", -1)
		}
		u.content = u.disk.all()
	case 1: // it comes or goes
		s.release()
		if !u.attached {
			s.attach(u)
		} else if err := s.target.Detach(u.lun); err != nil {
			s.t.Fatal(err)
		} else {
			u.attached = false
			s.lunsChanged(u)
		}
	case 2: // it begins or ceases to fail
		s.release()
		u.disk.failing = !u.disk.failing
		u.sanitized = true // of a failure there may be news later
		for i := range u.attentions {
			u.attentions[i].unknown = true // deferred errors
		}
	case 3: // reads wait
		if u.disk.gate == nil {
			u.disk.gate = make(chan struct{})
		}
	}
}

// FuzzSequence runs sequences.
func FuzzSequence(f *testing.F) {
	r := rand.New(rand.NewPCG(7, 11))
	for range 48 {
		in := make([]byte, 5000)
		for i := range in {
			in[i] = byte(r.Uint32())
		}
		f.Add(in)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		usages()
		synctest.Test(t, func(t *testing.T) {
			s := newSequence(t, in)
			for _, u := range s.units {
				u.wce = u.cfg.Cache == scsi.WriteBack
				for i := range u.attentions {
					ready := &scsi.Command{LUN: u.lun, CDB: testUnitReady, Nexus: scsi.NexusID(i)}
					for scsitest.Run(s.target, ready).Status != scsi.Good {
					}
					u.attentions[i] = attentions{seen: true}
				}
			}
			for steps := 0; len(s.in) > 0 && steps < 400; steps++ {
				switch what := s.next(); {
				case what < 0xf2:
					s.command()
				case what < 0xf8:
					s.manage()
				default:
					s.host()
				}
			}
			s.release()
		})
	})
}
