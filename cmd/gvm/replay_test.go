package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/fs/hostfs/hostfstest"
	"gvm/devices/virtio/replay"
	"gvm/devices/virtio/replay/equivalence"
	"gvm/devices/virtio/vhostscsi"
)

// TestReplay replays a trace of gvm's own target at gvm's target: all answers match but one that
// was changed in the trace.
func TestReplay(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	unit := trace.UnitLUN(0)
	whole := record(t, false, func(g *traced) {
		g.do(0, unit, make([]byte, 6), nil, 0) // clears the unit attention of power on
		g.do(0, unit, rw(0x2a, 8, 2), make([]byte, 1024), 0)
		g.do(1, unit, rw(0x28, 8, 2), nil, 1024)
		g.do(1, trace.UnitLUN(9), make([]byte, 6), nil, 0)
		g.do(0, unit, []byte{0x15, 0x10, 0, 0, 24, 0}, append(append(make([]byte, 4), 0x08, 18), make([]byte, 18)...),
			0)
		g.manage(5, unit, 0)
	})
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	same := write("same.trace", whole)
	out, status, text := gvmTrace("replay", same)
	if status != 0 || out != "6 requests, 0 answered differently\n" {
		t.Fatalf("status %d, %s\n%s", status, text, out)
	}

	f, err := os.Open(same)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := trace.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var other strings.Builder
	w, err := trace.NewWriter(&other, r.Header, nil)
	if err != nil {
		t.Fatal(err)
	}
	var rec trace.Record
	for r.Next(&rec) == nil {
		if rec.Kind == trace.Command && rec.CDB[0] == 0x28 {
			rec.Status, rec.Residual = scsi.Busy, 512
		}
		w.Observe(&rec)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	changed := write("changed.trace", []byte(other.String()))
	out, status, text = gvmTrace("replay", "--backend", "process", changed)
	want := `request 2 at `
	if status != 1 || text != "1 of 6 answers differ" || !strings.HasPrefix(out, want) ||
		!strings.Contains(out, "READ(10) 8+2: status, residual\n  cdb 28 00 00 00 00 08 00 00 02 00\n"+
			"  trace    BUSY: residual 512\n  process  GOOD\n6 requests, 1 answered differently\n") {
		t.Errorf("status %d, %s\n%s", status, text, out)
	}
	out, status, _ = gvmTrace("replay", changed, "--json")
	var d struct {
		What    []string
		Request struct{ Op string }
		A, B    struct{ From, Outcome string }
	}
	if err := json.Unmarshal([]byte(out), &d); err != nil || status != 1 || d.Request.Op != "READ(10)" ||
		d.A.From != "trace" || d.B.Outcome != "GOOD" || len(d.What) != 2 {
		t.Errorf("status %d, %v, %+v in\n%s", status, err, d, out)
	}
	if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}

	// A host whose kernel serves no disks, or not for this user, gives one line and leaves nothing
	// behind.
	if vhostscsi.Check(vhostscsi.ABIPolicy{}) != nil {
		if _, status, text = gvmTrace("replay", "--backend", "both", same); status != 3 ||
			!strings.Contains(text, "vhost-scsi") || strings.Contains(text, "\n") {
			t.Errorf("status %d, %s", status, text)
		}
	}
	strange := r.Header
	strange.Devices = []trace.Device{{Backend: "process",
		Disks: []trace.Disk{{Serial: "S", Size: 1 << 20, BlockSize: 512, Cache: "frob"}}}}
	other.Reset()
	if w, err = trace.NewWriter(&other, strange, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, status, text = gvmTrace("replay", write("strange.trace", []byte(other.String()))); status != 2 ||
		!strings.Contains(text, "cache=frob") {
		t.Errorf("status %d, %s", status, text)
	}
	if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}

	none := r.Header
	none.Devices = []trace.Device{{Backend: "vhost"}}
	other.Reset()
	if w, err = trace.NewWriter(&other, none, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, status, text = gvmTrace("replay", write("none.trace", []byte(other.String()))); status != 2 ||
		!strings.Contains(text, "a run with wwn=… cannot be replayed") {
		t.Errorf("status %d, %s", status, text)
	}
}

// TestKnownDifferences counts differences that docs/backends.md lists. One that it does not list is
// shown and decides the exit status.
func TestKnownDifferences(t *testing.T) {
	inquiry := &trace.Record{Kind: trace.Command, LUN: trace.UnitLUN(0),
		CDB: []byte("\x12\x00\x00\x00\x24\x00"), In: 36}
	listed := &replay.Difference{Number: 7, Record: inquiry, What: []string{"data"}, Data: []int{3},
		A: replay.Answer{Data: make([]byte, 36)}, B: replay.Answer{Data: []byte{3: 2, 35: 0}}}
	other := *listed
	other.Data = []int{8}
	for _, tt := range []struct {
		name        string
		all         bool
		ds          []*replay.Difference
		want, lacks string
		err         string
	}{
		{"listed alone", false, []*replay.Difference{listed, listed},
			"9 requests, 2 answered differently as docs/backends.md lists, 0 otherwise\n      2 inquiry\n", "INQUIRY",
			""},
		{"another", false, []*replay.Difference{listed, &other}, "INQUIRY", "known",
			"1 of 9 answers differ in a way that docs/backends.md does not list"},
		{"all", true, []*replay.Difference{listed}, "  known    inquiry\n", "", ""},
		{"many others", false, slices.Repeat([]*replay.Difference{&other}, shownDifferences+3),
			"… and 3 more; --all shows them", "", "23 of 9"},
	} {
		var b strings.Builder
		s := differences{report: &report{w: &b}, names: []string{"process", "vhost"}, all: tt.all,
			known: equivalence.NewList(trace.Header{}, false)}
		for _, d := range tt.ds {
			if err := s.add(d); err != nil {
				t.Fatal(err)
			}
		}
		sum := replay.Summary{Requests: 9, Different: len(tt.ds)}
		s.summary(sum)
		err := s.verdict(sum)
		if flushErr := s.flush(); flushErr != nil {
			t.Fatal(flushErr)
		}
		if out := b.String(); !strings.Contains(out, tt.want) || tt.lacks != "" && strings.Contains(out, tt.lacks) {
			t.Errorf("%s:\n%s\nlacks %q or has %q", tt.name, out, tt.want, tt.lacks)
		}
		if (err == nil) != (tt.err == "") || err != nil && !strings.HasPrefix(err.Error(), tt.err) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestReplayEnds: a signal ends gvm replay while it reads a trace from a pipe that has no end.
func TestReplayEnds(t *testing.T) {
	f, dir := openFIFO(t)
	disks := []trace.Disk{{Serial: "A", Size: 1 << 20, BlockSize: 512}}
	w, err := trace.NewWriter(f, trace.Header{Devices: []trace.Device{{Backend: "process", Queues: 1, Disks: disks}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	p := startGVM(t, dir, "replay", "fifo")
	taken := func() bool {
		n, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.eof:
			return true
		default:
			return n == 0
		}
	}
	for !taken() { // the header
		time.Sleep(time.Millisecond)
	}
	if _, err := f.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	for !taken() { // a part of the first record
		time.Sleep(time.Millisecond)
	}
	p.signal(syscall.SIGTERM)
	if r := p.wait(); r.status != 143 || !strings.HasSuffix(r.errs, "stopped by SIGTERM while fifo was read\n") {
		t.Errorf("status %d: %s", r.status, r.errs)
	}
}

// TestReplayDeafStorage: a signal ends gvm replay while the directory of its scratch disks is on
// storage that does not answer.
func TestReplayDeafStorage(t *testing.T) {
	dir := t.TempDir()
	hung := filepath.Join(dir, "hung")
	m := hostfstest.MountMortal(t, hung)
	m.Strike()
	trace, err := filepath.Abs("testdata/a.trace")
	if err != nil {
		t.Fatal(err)
	}
	p := startGVMAs(t, dir, func(p *proc) { p.cmd.Env = append(p.cmd.Env, "TMPDIR="+hung) }, "replay", trace)
	if !m.Asked(tooLong) {
		t.Fatal("it does not look at the directory")
	}
	p.signal(syscall.SIGTERM)
	if r := p.wait(); r.status != exitTerminated || !strings.HasPrefix(r.errs, "gvm: stopped by SIGTERM") {
		t.Errorf("status %d: %s", r.status, r.errs)
	}
}
