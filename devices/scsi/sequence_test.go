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

	"gvm/devices/scsi"
	"gvm/devices/scsi/backend"
	"gvm/devices/scsi/scsitest"
)

// A sequence is a test that its input steers: commands, task management functions and events of
// the host at three units and three initiators, against a model of what must come of them.
type sequence struct {
	t      *testing.T
	in     []byte
	target *scsi.Target
	units  [3]*modelUnit
	held   []*heldCommand
}

// modelUnit is a unit, its storage, and what both have to be.
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

var errBackend = errors.New("the backend fails")

// watched is storage that looks at how it is used.
type watched struct {
	*backend.Mem
	t       *testing.T
	block   int
	mu      sync.Mutex
	changes int
	dirty   bool          // something was written and not flushed
	failing bool          // everything fails
	gate    chan struct{} // reads wait for it, nil: they do not
}

func (w *watched) use(n int, off int64, changes bool) error {
	if off < 0 || n < 0 || off%int64(w.block) != 0 || n%w.block != 0 || off+int64(n) > w.Size() {
		w.t.Errorf("backend used at %d for %d bytes, its size is %d", off, n, w.Size())
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if changes {
		w.changes++
		w.dirty = true
	}
	if w.failing {
		return errBackend
	}
	return nil
}

func (w *watched) ReadVec(iov [][]byte, off int64) (int, error) {
	w.mu.Lock()
	gate := w.gate
	w.mu.Unlock()
	if gate != nil {
		<-gate
	}
	if err := w.use(total(iov), off, false); err != nil {
		return 0, err
	}
	return w.Mem.ReadVec(iov, off)
}

func (w *watched) WriteVec(iov [][]byte, off int64) (int, error) {
	if err := w.use(total(iov), off, true); err != nil {
		return 0, err
	}
	return w.Mem.WriteVec(iov, off)
}

func (w *watched) ReadVecNow(iov [][]byte, off int64) bool {
	if w.gate != nil || w.failing {
		return false
	}
	_, err := w.ReadVec(iov, off)
	return err == nil
}

func (w *watched) WriteVecNow(iov [][]byte, off int64) bool {
	if w.failing {
		return false
	}
	_, err := w.WriteVec(iov, off)
	return err == nil
}

func (w *watched) WriteVecDurable(iov [][]byte, off int64) (int, error) {
	was := w.dirty
	n, err := w.WriteVec(iov, off)
	w.dirty = was
	return n, err
}

func (w *watched) Flush() error {
	if err := w.use(0, 0, false); err != nil {
		return err
	}
	w.dirty = false
	return nil
}

func (w *watched) Discard(off, n int64) error {
	if err := w.use(int(n), off, true); err != nil {
		return err
	}
	return w.Mem.Discard(off, n)
}

func (w *watched) Zero(off, n int64) error { return w.Discard(off, n) }

// resize makes the storage another.
func (w *watched) resize(n int64) error {
	m := backend.NewMem(n)
	old := make([]byte, min(n, w.Size()))
	_, _ = w.Mem.ReadAt(old, 0)
	_, _ = m.WriteAt(old, 0)
	w.Mem = m
	return nil
}

func (w *watched) all() []byte {
	b := make([]byte, w.Size())
	_, _ = w.Mem.ReadAt(b, 0)
	return b
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
		size := max(cfg.BlockSize, block)
		d := &watched{Mem: backend.NewMem(int64(32 * size)), t: t, block: size}
		_, _ = d.Mem.WriteAt(bytes.Repeat([]byte{byte(i) + 1}, size), 0)
		cfg.Backend = d
		if i == 1 {
			cfg.Backend = struct {
				scsi.Backend
				scsi.Vectored
				scsi.Syncer
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

// powerOn is what a power on makes of a unit.
func (u *modelUnit) powerOn() {
	u.stopped, u.swp, u.dSense, u.wce = false, false, false, u.cfg.Cache == scsi.WriteBack
	for i := range u.attentions {
		u.attentions[i] = attentions{queue: []string{"2901"}}
	}
}

// lunsChanged tells those who know the units beside u.
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

// usages are the CDB USAGE DATA of all that the thin unit knows.
var usages = sync.OnceValue(func() (list [][]byte) {
	target := scsi.NewTarget()
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: backend.NewMem(4096), Serial: "s"})
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
	if !u.attached || attr != scsi.Simple || !bytes.Contains([]byte{0x28, 0x88, 0x00, 0x12, 0xa0, 0x03, 0x5e}, cdb[:1]) {
		s.release() // reads are held, and nothing waits for what is held
	}
	before, changes := bytes.Clone(u.content), u.disk.changes
	sent := bytes.Clone(out)
	var a scsitest.Answer
	h := &heldCommand{u: u, tag: uint64(s.next()), nexus: scsi.NexusID(nexus)}
	c := &scsi.Command{LUN: u.lun, CDB: cdb, Nexus: h.nexus, Attr: attr, Tag: h.tag, Out: [][]byte{out}, In: [][]byte{in}}
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

// check holds an answer against the model.
func (s *sequence) check(u *modelUnit, nexus int, cdb, out, in []byte, a scsitest.Answer, before []byte, changes int) {
	t, name := s.t, scsi.OpcodeName(cdb)
	key, asc, ascq := a.Codes()
	switch a.Status {
	case scsi.Good, scsi.ReservationConflict:
		if len(a.Sense) > 0 {
			t.Errorf("%s: status %02x with sense % x", name, a.Status, a.Sense)
		}
	case scsi.CheckCondition:
		if len(a.Sense) < 8 || key == 0 {
			t.Errorf("%s: CHECK CONDITION with sense % x", name, a.Sense)
		}
		if (key == scsi.MediumError || key == scsi.HardwareError || key == scsi.AbortedCommand) && !u.disk.failing && !u.sanitized && cdb[0] != 0x83 {
			t.Errorf("%s: %v with a sound backend", name, a)
		}
	default:
		t.Errorf("%s: status %02x", name, a.Status)
	}
	if int(a.Residual) > len(in)+len(out) {
		t.Errorf("%s: residual %d of %d bytes", name, a.Residual, len(in)+len(out))
	}
	if cdb[0] == 0xa0 && a.Status == scsi.Good {
		for _, u := range s.units {
			q := &u.attentions[nexus].queue
			*q = slices.DeleteFunc(*q, func(code string) bool { return code == "3f0e" })
		}
		s.luns(cdb, in, a)
	}
	if !u.attached {
		if u.disk.changes != changes {
			t.Errorf("%s: a unit that is not there is written to", name)
		}
		return
	}
	s.attention(u, nexus, cdb, in, a, string([]byte{"0123456789abcdef"[asc>>4], "0123456789abcdef"[asc&15], "0123456789abcdef"[ascq>>4], "0123456789abcdef"[ascq&15]}))
	protected := u.cfg.ReadOnly || u.swp
	medium := !bytes.Contains([]byte{0x48, 0x83}, cdb[:1]) // these work on a unit that is stopped
	if u.disk.changes != changes && (a.Status == scsi.ReservationConflict || key == scsi.UnitAttention || key == scsi.IllegalRequest || protected || u.stopped && medium) {
		t.Errorf("%s % x: the medium is written to: %v, protected %v, stopped %v", name, cdb, a, protected, u.stopped)
	}
	if a.Status == scsi.Good || key == scsi.MediumError && bytes.Contains([]byte{0x15, 0x55}, cdb[:1]) {
		s.predict(u, nexus, cdb, out, in, a) // MODE SELECT holds although what was written could not be flushed
	}
	if u.disk.failing || cdb[0] == 0x83 {
		for _, u := range s.units { // any part may have been done
			u.content = u.disk.all()
		}
	}
	if got := u.disk.all(); !bytes.Equal(got, u.content) {
		t.Fatalf("%s % x, %v: the medium is not as it should be", name, cdb, a)
	}
	if !u.disk.failing && a.Status != scsi.Good && !bytes.Equal(before, u.content) {
		t.Errorf("%s: %v, and the medium has changed", name, a)
	}
	u.doubt = u.doubt || u.disk.failing
	flushes := (cdb[0] == 0x35 || cdb[0] == 0x91) && (cdb[1]&0x02 == 0 || !u.disk.failing) // IMMED: a failure is told later
	if a.Status == scsi.Good && u.disk.dirty && (flushes || !u.wce && !u.doubt) {
		t.Errorf("%s is answered before what was written is durable", name)
	}
	u.doubt = u.doubt && u.disk.dirty
	if cdb[0] == 0x48 && a.Status == scsi.Good {
		u.sanitized = u.disk.failing
	}
}

// attention is check for unit attention conditions.
func (s *sequence) attention(u *modelUnit, nexus int, cdb, in []byte, a scsitest.Answer, code string) {
	n := &u.attentions[nexus]
	key, _, _ := a.Codes()
	if cdb[0] == 0x03 && a.Status == scsi.Good { // REQUEST SENSE takes one
		switch moved := len(in) - int(a.Residual); {
		case len(n.queue) > 0 && moved < 14:
			n.unknown = true
		case len(n.queue) > 0 && in[0]&0x7e == 0x70 && in[2] == 6 && in[12] != 0x2a || len(n.queue) > 0 && in[0]&0x7e == 0x72 && in[1] == 6 && in[2] != 0x2a:
			n.queue = n.queue[1:]
		default:
			n.unknown = true
		}
	}
	reservations := []string{"2a03", "2a04", "2a05"}
	switch {
	case n.unknown:
		if a.Status == scsi.Good && cdb[0] == 0x00 {
			*n = attentions{seen: true} // nothing is left
		} else if code == "2901" || code == "2903" || code == "2907" {
			n.queue = nil
		}
	case key == scsi.UnitAttention && slices.Contains(reservations, code):
	case key == scsi.UnitAttention && (len(n.queue) == 0 || n.queue[0] != code):
		s.t.Fatalf("%s: unit attention %s, want one of %v", scsi.OpcodeName(cdb), code, n.queue)
	case key == scsi.UnitAttention:
		n.queue = n.queue[1:]
	case a.Status == scsi.Good && len(n.queue) > 0 && !bytes.Contains([]byte{0x12, 0xa0, 0x03}, cdb[:1]):
		s.t.Fatalf("%s: GOOD, and %v pending", scsi.OpcodeName(cdb), n.queue)
	}
}

// luns holds the inventory of REPORT LUNS against the units there are.
func (s *sequence) luns(cdb, in []byte, a scsitest.Answer) {
	if cdb[2] != 0 || len(in)-int(a.Residual) < 4 {
		return
	}
	n := 0
	for _, u := range s.units {
		if u.attached {
			n++
		}
	}
	if got := int(binary.BigEndian.Uint32(in)); got != 8*n {
		s.t.Errorf("REPORT LUNS: %d bytes for %d units", got, n)
	}
}

// extent is where a command reads or writes, if it does.
func extent(cdb []byte) (lba, n int) {
	be := binary.BigEndian
	switch cdb[0] >> 5 {
	case 0:
		if n = int(cdb[4]); n == 0 {
			n = 256
		}
		return int(be.Uint32(cdb) & 0x1fffff), n
	case 1, 2:
		return int(be.Uint32(cdb[2:])), int(be.Uint16(cdb[7:]))
	case 5:
		return int(be.Uint32(cdb[2:])), int(be.Uint32(cdb[6:]))
	}
	return int(be.Uint64(cdb[2:])), int(be.Uint32(cdb[10:]))
}

// predict works out what a command that ended GOOD has done, and checks what it returned.
func (s *sequence) predict(u *modelUnit, nexus int, cdb, out, in []byte, a scsitest.Answer) {
	be, size := binary.BigEndian, u.disk.block
	lba, n := extent(cdb)
	part := func(n int) []byte { return u.content[lba*size : (lba+n)*size] }
	switch cdb[0] {
	case 0x08, 0x28, 0x88, 0xa8:
		if got := in[:min(n*size, len(in))]; !bytes.Equal(got, part(n)[:len(got)]) {
			s.t.Errorf("%s % x: wrong data", scsi.OpcodeName(cdb), cdb)
		}
	case 0x0a, 0x2a, 0x8a, 0xaa, 0x2e, 0x8e, 0xae:
		copy(part(n), out)
	case 0x8b: // ORWRITE
		for i := range part(n) {
			part(n)[i] |= out[i]
		}
	case 0x89: // COMPARE AND WRITE
		n = int(cdb[13])
		if !bytes.Equal(part(n), out[:n*size]) {
			s.t.Error("COMPARE AND WRITE is GOOD, and the medium is not so")
		}
		copy(part(n), out[n*size:])
	case 0x41, 0x93: // WRITE SAME
		for i := range n {
			if cdb[0] == 0x93 && cdb[1]&1 != 0 {
				clear(part(n))
				break
			}
			copy(part(n)[i*size:(i+1)*size], out)
		}
	case 0x2f, 0x8f, 0xaf: // VERIFY
		if check := cdb[1] >> 1 & 3; check == 1 && !bytes.Equal(part(n), out[:n*size]) {
			s.t.Error("VERIFY is GOOD, and the medium is not so")
		}
	case 0x42: // UNMAP
		if list := int(be.Uint16(cdb[7:])); list >= 8 {
			for d := out[8:min(8+int(be.Uint16(out[2:]))/16*16, list)]; len(d) >= 16; d = d[16:] {
				lba, n = int(be.Uint64(d)), int(be.Uint32(d[8:]))
				clear(part(n))
			}
		}
	case 0x48: // SANITIZE
		switch cdb[1] & 0x1f {
		case 1:
			for i := 0; i < len(u.content); i += int(be.Uint16(out[2:])) {
				copy(u.content[i:], out[4:4+be.Uint16(out[2:])])
			}
		case 2:
			clear(u.content)
		}
	case 0x1b: // START STOP UNIT
		if cdb[4]>>4 == 0 {
			u.stopped = cdb[4]&1 == 0
		}
	case 0x25:
		if len(in) >= 8 && int(be.Uint32(in))+1 != len(u.content)/size {
			s.t.Errorf("READ CAPACITY(10): %d blocks of %d", be.Uint32(in)+1, len(u.content)/size)
		}
	case 0x15, 0x55:
		s.modeSelect(u, nexus, cdb, out)
	case 0x1a, 0x5a:
		s.modeSense(u, cdb, in, a)
	}
}

// modeSelect takes the pages that parameters makes.
func (s *sequence) modeSelect(u *modelUnit, nexus int, cdb, out []byte) {
	header, size := 4, int(cdb[4])
	if cdb[0] == 0x55 {
		header, size = 8, int(binary.BigEndian.Uint16(cdb[7:]))
	}
	if size <= header {
		return
	}
	p := out[header:size]
	switch {
	case len(p) >= 3 && p[0]&0x7f == 0x08 && u.wce != (p[2]&4 != 0):
		u.wce = !u.wce
		u.tell("2a01", nexus)
	case len(p) >= 5 && p[0]&0x7f == 0x0a:
		if swp, dSense := p[4]&8 != 0, p[2]&4 != 0; swp != u.swp || dSense != u.dSense {
			u.swp, u.dSense = swp, dSense
			u.tell("2a01", nexus)
		}
	}
}

// modeSense checks WP and the caching page.
func (s *sequence) modeSense(u *modelUnit, cdb, in []byte, a scsitest.Answer) {
	header, specific := 4, 2
	if cdb[0] == 0x5a {
		header, specific = 8, 3
	}
	moved := len(in) - int(a.Residual)
	if moved <= header+16 || cdb[1]&0x08 == 0 || cdb[2] != 0x08 { // DBD, the current caching page
		return
	}
	if wp := in[specific]&0x80 != 0; wp != (u.cfg.ReadOnly || u.swp) {
		s.t.Errorf("MODE SENSE: WP %v", wp)
	}
	if wce := in[header+2]&4 != 0; wce != u.wce {
		s.t.Errorf("MODE SENSE: WCE %v, want %v", wce, u.wce)
	}
}

// release lets what is held go on, and waits for it.
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

// manage does a task management function, and lets what is held go on: it waits for that.
func (s *sequence) manage() {
	what := s.next()
	u, nexus, tag := s.units[int(what)%3], scsi.NexusID(what>>2%3), uint64(s.next())
	hit := slices.ContainsFunc(s.held, func(h *heldCommand) bool { return h.u == u && h.nexus == nexus && h.tag == tag })
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
		s.t.Error("a task management function ends before what it aborts")
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
