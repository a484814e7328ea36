package trace

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/scsi"
)

var start = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

var header = Header{
	GVM: "1.2.3", Kernel: "6.12.0", Start: start,
	Devices: []Device{{Backend: "process", Queues: 2,
		Disks: []Disk{{LUN: 5, Serial: "S5", Size: 1 << 20, BlockSize: 512}}}, {Backend: "vhost"}},
}

func cdb(n int, first ...byte) []byte { return append(first, make([]byte, n-len(first))...) }

// some has a record of each kind, with every field different.
func some() []Record {
	return []Record{
		{
			Kind: Command, Missing: NoQueue, Device: 1, Queue: 0x0203, Time: 0x0405060708090a0b, Latency: 0x0c0d0e0f,
			LUN: [8]byte{1, 0, 0x40, 5, 6, 7, 8, 9},
			Tag: 0xf1f2f3f4f5f6f7f8, Attr: scsi.HeadOfQueue, CDB: []byte{0x28, 1, 2, 3, 4, 5, 6, 7, 8, 9},
			Out: 0x11121314, In: 0x21222324,
			Response: 9, Status: scsi.CheckCondition, Residual: 0x31323334, Sense: []byte{0x70, 0, 5},
			Payload: []byte("data-out"),
		},
		{Kind: TaskManagement, Missing: NoResidual, Time: 1, LUN: [8]byte{1, 0, 0x41, 0x2c}, Tag: 77,
			Function: 0x80000005, Response: 12, CDB: []byte{}, Sense: []byte{}},
		{Kind: Reset, Missing: NoQueue, Time: 2, CDB: []byte{}, Sense: []byte{}},
		{Kind: PowerOn, Missing: NoQueue, Time: 3, CDB: []byte{}, Sense: []byte{}},
		{Kind: Lost, Time: 4, Count: 99, CDB: []byte{}, Sense: []byte{}},
		{Kind: Command, CDB: cdb(6), Sense: []byte{}, Payload: []byte{}},
	}
}

func write(t testing.TB, records ...Record) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, header, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range records {
		w.Observe(&records[i])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// read returns the records, copied, and the last error of Next.
func read(b []byte) (list []Record, cut int, err error) {
	t, err := NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, 0, err
	}
	for {
		var r Record
		if err := t.Next(&r); err != nil {
			return list, t.Cut(), err
		}
		r.CDB, r.Sense, r.Payload = bytes.Clone(r.CDB), bytes.Clone(r.Sense), bytes.Clone(r.Payload)
		list = append(list, r)
	}
}

func TestRoundTrip(t *testing.T) {
	b := write(t, some()...)
	got, cut, err := read(b)
	if err != io.EOF || cut != 0 || !reflect.DeepEqual(got, some()) {
		t.Errorf("%d bytes cut, %v; got\n%+v, want\n%+v", cut, err, got, some())
	}
	r, err := NewReader(bytes.NewReader(b))
	if err != nil || !reflect.DeepEqual(r.Header, header) {
		t.Errorf("header %+v, %v", r.Header, err)
	}
}

// TestLayout is docs/trace.md in bytes.
func TestLayout(t *testing.T) {
	want := "gvm-trace 1\n" +
		`{"gvm":"1.2.3","kernel":"6.12.0","start":"2026-11-24T12:00:00Z","devices":[` +
		`{"backend":"process","queues":2,"disks":[{"lun":5,"serial":"S5","size":1048576,"block_size":512}]},` +
		`{"backend":"vhost","queues":0,"disks":null}]}` + "\n" +
		"\x55\x00\x00\x00" + "\x15\xe0\x16\x28" + // size, checksum
		"\x01\x01" + "\x03\x02" + // kind, flags, queue
		"\x0b\x0a\x09\x08\x07\x06\x05\x04" + "\x0f\x0e\x0d\x0c\x00\x00\x00\x00" + // time, latency
		"\x01\x00\x40\x05\x06\x07\x08\x09" + "\xf8\xf7\xf6\xf5\xf4\xf3\xf2\xf1" + // lun, tag
		"\x14\x13\x12\x11" + "\x24\x23\x22\x21" + "\x34\x33\x32\x31" + // out, in, residual
		"\x02\x02\x09\x01" + // attribute, status, response, missing
		"\x0a\x00\x03\x01" + // CDB and sense length, device
		"\x28\x01\x02\x03\x04\x05\x06\x07\x08\x09" + "\x70\x00\x05" + "data-out"
	if got := write(t, some()[0]); string(got) != want {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
}

// TestTrim keeps the CDB and drops the rest of its field.
func TestTrim(t *testing.T) {
	for _, tt := range []struct {
		cdb  []byte
		want int
	}{
		{cdb(32), 6}, {cdb(32, 0x28), 10}, {cdb(32, 0x5a), 10}, {cdb(32, 0x88), 16}, {cdb(32, 0xa0), 12},
		{cdb(32, 0xc1), 6}, {cdb(32, 0x7f), 6},
		{append(cdb(31, 0x12), 1), 32}, {append(cdb(12, 0x12), 1), 13}, {cdb(6, 0x28), 6}, {nil, 0},
	} {
		if got := trim(tt.cdb); len(got) != tt.want || !bytes.HasPrefix(tt.cdb, got) {
			t.Errorf("% x becomes % x", tt.cdb, got)
		}
	}
}

// TestCut cuts a trace at every byte: whole records can be read, and Cut reports the rest.
func TestCut(t *testing.T) {
	all := some()[:3]
	b := write(t, all...)
	ends := []int{len(write(t))}
	for i := range all {
		ends = append(ends, len(write(t, all[:i+1]...)))
	}
	for n := range b {
		got, cut, err := read(b[:n])
		if n < ends[0] {
			var bad *FormatError
			if !errors.As(err, &bad) || len(got) > 0 {
				t.Fatalf("%d bytes, inside the header: %d records, %v", n, len(got), err)
			}
			continue
		}
		whole := 0
		for whole < len(all) && ends[whole+1] <= n {
			whole++
		}
		if err != io.EOF || len(got) != whole || cut != n-ends[whole] {
			t.Fatalf("%d bytes: %d records, %d bytes cut, %v; want %d, %d", n, len(got), cut, err, whole, n-ends[whole])
		}
	}
}

// resum makes the checksum of the record at the end of b right.
func resum(b []byte, size int) []byte {
	f := b[len(b)-size:]
	binary.LittleEndian.PutUint32(f[4:], crc32.Checksum(f[8:], castagnoli))
	return b
}

func TestDamage(t *testing.T) {
	one := write(t, some()[1])
	at := len(one) - 64
	poke := func(off int, v ...byte) []byte {
		b := bytes.Clone(one)
		copy(b[at+off:], v)
		return resum(b, 64)
	}
	for _, tt := range []struct {
		name string
		b    []byte
		want string
	}{
		{"empty", nil, "not a trace of gvm"},
		{"a disk", make([]byte, 512), "not a trace of gvm"},
		{"one line", []byte("hello\n"), "not a trace of gvm"},
		{"no version", []byte("gvm-trace x\n{}\n"), `"x" is not a version of the trace format`},
		{"newer", []byte("gvm-trace 2\nx"),
			"version 2 of the trace format, and this gvm reads version 1; use the gvm that wrote it"},
		{"bad header", []byte("gvm-trace 1\nx\n"),
			"damaged at byte 12: the header: invalid character 'x' looking for beginning of value"},
		{"long header", append([]byte("gvm-trace 1\n"), make([]byte, 2<<20)...),
			"damaged at byte 1310732: the header has no end"},
		{"a flipped bit", append(one[:at:at],
			append(bytes.Clone(one[at:at+40]), append([]byte{one[at+40] ^ 4}, one[at+41:]...)...)...),
			fmt.Sprintf("damaged at byte %d: a record's checksum is", at)},
		{"zeros", append(bytes.Clone(one), make([]byte, 100)...),
			fmt.Sprintf("damaged at byte %d: a record of 0 bytes; they have 64 to 4194304", len(one))},
		{"a huge record", append(bytes.Clone(one), 0xff, 0xff, 0xff, 0xff),
			fmt.Sprintf("damaged at byte %d: a record of 4294967295 bytes; they have 64 to 4194304", len(one))},
		{"time", poke(19, 0x80), fmt.Sprintf("damaged at byte %d: a record's time is out of range", at)},
		{"latency", poke(12, bytes.Repeat([]byte{0x7f}, 16)...),
			fmt.Sprintf("damaged at byte %d: a record's time is out of range", at)},
		{"CDB past the end", poke(60, 1),
			fmt.Sprintf("damaged at byte %d: a record of 64 bytes says that it holds more", at)},
		{"sense past the end", poke(62, 1),
			fmt.Sprintf("damaged at byte %d: a record of 64 bytes says that it holds more", at)},
	} {
		_, _, err := read(tt.b)
		var bad *FormatError
		if !errors.As(err, &bad) || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}
	}
	// A kind of a later gvm is passed over.
	b := append(poke(8, 200), one[at:]...)
	if got, _, err := read(b); err != io.EOF || len(got) != 1 || got[0].Kind != TaskManagement {
		t.Errorf("an unknown kind: %+v, %v", got, err)
	}
}

type readError struct{}

func (readError) Read([]byte) (int, error) { return 0, io.ErrNoProgress }

func TestReadError(t *testing.T) {
	var bad *FormatError
	if _, err := NewReader(readError{}); !errors.Is(err, io.ErrNoProgress) || errors.As(err, &bad) {
		t.Errorf("in the header: %v", err)
	}
	b := write(t)
	r, err := NewReader(io.MultiReader(bytes.NewReader(b), readError{}))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Next(&Record{}); !errors.Is(err, io.ErrNoProgress) || errors.As(err, &bad) {
		t.Errorf("in a record: %v", err)
	}
}

// gate is a file whose writes wait until they are let through, and fail then if
// it has an error.
type gate struct {
	bytes.Buffer
	in, out chan struct{} // nil: open
	err     error
}

func (g *gate) Write(p []byte) (int, error) {
	if g.in != nil {
		g.in <- struct{}{}
		<-g.out
	}
	if g.err != nil {
		return 0, g.err
	}
	return g.Buffer.Write(p)
}

// TestLost has a file that is too slow: Observe returns all the same, counts the records that do
// not fit, and the trace marks their place.
func TestLost(t *testing.T) {
	g := &gate{}
	w, err := NewWriter(g, header, nil)
	if err != nil {
		t.Fatal(err)
	}
	g.in, g.out = make(chan struct{}), make(chan struct{})
	r := Record{Kind: Command, CDB: cdb(6)}
	for range 1 + flushAt/70 {
		w.Observe(&r)
	}
	<-g.in // the file is busy
	const n = MaxRecord/70 + 1000
	for i := range n {
		r.Tag = uint64(i)
		w.Observe(&r)
	}
	go func() {
		for {
			g.out <- struct{}{}
			<-g.in
		}
	}()
	if err := w.Close(); err == nil || !strings.Contains(err.Error(), "the trace lacks ") {
		t.Errorf("Close: %v", err)
	}
	list, cut, err := read(g.Bytes())
	if err != io.EOF || cut != 0 {
		t.Fatalf("%d bytes cut, %v", cut, err)
	}
	last := list[len(list)-1]
	if kept := list[1+flushAt/70 : len(list)-1]; last.Kind != Lost || len(kept)+int(last.Count) != n ||
		last.Count < 1000 {
		t.Errorf("%d of %d kept, then %+v", len(kept), n, last)
	}
}

func TestWriteError(t *testing.T) {
	full := errors.New("the disk is full")
	if _, err := NewWriter(&gate{err: full}, header, nil); !errors.Is(err, full) {
		t.Errorf("header: %v", err)
	}
	g := &gate{}
	w, err := NewWriter(g, header, nil)
	if err != nil {
		t.Fatal(err)
	}
	g.err = full
	for range 3 * MaxRecord / 64 { // more than fits: Observe does not wait for the file
		w.Observe(&Record{Kind: Command})
	}
	if err := w.Close(); !errors.Is(err, full) {
		t.Errorf("Close: %v", err)
	}
	for range 2 * flushAt / 64 { // a request that ends late
		w.Observe(&Record{Kind: Command})
	}
	if len(w.buf) > 0 {
		t.Errorf("%d bytes after the end", len(w.buf))
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close again: %v", err)
	}
}

// TestCreatedAtOnce: a file that is locked between its making and its lock is the other's.
func TestCreatedAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	was := setLock
	defer func() { setLock = was }()
	setLock = func(fd uintptr, cmd int, l *unix.Flock_t) error {
		other, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { other.Close() })
		if err := was(other.Fd(), cmd, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
			t.Fatal(err)
		}
		return was(fd, cmd, l)
	}
	if _, err := Create(path, header); !errors.Is(err, ErrRefused) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the other's file is gone: %v", err)
	}
}

// TestCreate has other files at the path of a trace.
func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "t")
	for range 2 { // the second time in place of the first
		f, err := Create(path, header)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Create(path, header); !errors.Is(err, ErrRefused) ||
			err.Error() != "trace "+path+": another gvm writes to it, or has it as a disk; name another file" {
			t.Errorf("while it is written: %v", err)
		}
		f.Device(1).Observe(&Record{Kind: Command, CDB: cdb(6)})
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if list, _, err := read(b); err != io.EOF || len(list) != 1 || list[0].Device != 1 {
			t.Errorf("%+v, %v", list, err)
		}
	}
	disk := filepath.Join(dir, "disk.img")
	for _, content := range []string{"a disk image", "short"} {
		if err := os.WriteFile(disk, []byte(content), 0o666); err != nil {
			t.Fatal(err)
		}
		if _, err := Create(disk, header); !errors.Is(err, ErrRefused) ||
			err.Error() != "trace "+disk+
				": it holds something other than a trace and was left alone; name another file" {
			t.Errorf("a disk: %v", err)
		}
		if b, _ := os.ReadFile(disk); string(b) != content {
			t.Errorf("the disk holds %q now", b)
		}
	}
	if _, err := Create(filepath.Join(dir, "none", "t"), header); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := os.Stat("/dev/full"); err == nil {
		if _, err := Create("/dev/full", header); err == nil || !strings.HasPrefix(err.Error(), "trace /dev/full: ") {
			t.Errorf("a full disk: %v", err)
		}
	}
}

// TestFlushes has few records reach the file while the run goes on.
func TestFlushes(t *testing.T) {
	g := &gate{in: nil}
	w, err := NewWriter(g, header, nil)
	if err != nil {
		t.Fatal(err)
	}
	g.in, g.out = make(chan struct{}), make(chan struct{}, 1)
	w.Observe(&Record{Kind: Command, CDB: cdb(6)})
	select {
	case <-g.in: // without Close
	case <-time.After(time.Minute):
		t.Fatal("nothing is written until the end")
	}
	g.out <- struct{}{}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestObserveAllocatesNothing(t *testing.T) {
	w, err := NewWriter(io.Discard, header, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	o := w.Device(0)
	r := some()[0]
	if n := testing.AllocsPerRun(100_000, func() { r.Time = o.Now(); o.Observe(&r) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkObserve measures the cost of tracing for a request: two reads of the clock and a record.
func BenchmarkObserve(b *testing.B) {
	f, err := Create(filepath.Join(b.TempDir(), "t"), header)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	o := f.Device(0)
	r := Record{Kind: Command, CDB: cdb(32, 0x28), LUN: UnitLUN(0), In: 4096}
	b.ReportAllocs()
	for b.Loop() {
		r.Time = o.Now()
		r.Latency = o.Now() - r.Time
		o.Observe(&r)
	}
}

// FuzzReader reads arbitrary traces, with wrong checksums and with right ones.
func FuzzReader(f *testing.F) {
	b := write(f, some()...)
	f.Add(b)
	f.Add(b[:len(b)-30])
	f.Add([]byte("gvm-trace 1\n{}\n"))
	f.Add([]byte("gvm-trace 1\n{\"devices\":[{\"disks\":[]}]}\n\x40\x00\x00\x00"))
	f.Add(append(bytes.Clone(b), bytes.Repeat([]byte{0xff}, 80)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		// Most fuzz inputs have a bad checksum: each record is tried with a right one too.
		for _, sum := range []bool{false, true} {
			if sum {
				b = bytes.Clone(b)
				for at := bytes.IndexByte(b, '}') + 2; at > 1 && len(b)-at >= 64; {
					n := int(binary.LittleEndian.Uint32(b[at:]))
					if n < 64 || n > len(b)-at {
						break
					}
					binary.LittleEndian.PutUint32(b[at+4:], crc32.Checksum(b[at+8:at+n], castagnoli))
					at += n
				}
			}
			list, _, err := read(b)
			var bad *FormatError
			if err != io.EOF && !errors.As(err, &bad) {
				t.Fatalf("error %v", err)
			}
			if err != nil && strings.ContainsRune(err.Error(), '\n') {
				t.Fatalf("error of several lines: %q", err)
			}
			var s Stats
			for i := range list {
				r := &list[i]
				if _, err := r.MarshalJSON(); err != nil {
					t.Fatal(err)
				}
				_ = r.Unit() + r.Detail()
				s.Add("x", r)
				again := r.append(nil)
				var back Record
				if what := back.parse(again); what != "" {
					t.Fatalf("%+v is written as what %s", r, what)
				}
				if back.key() != r.key() || !bytes.Equal(back.Sense, r.Sense) {
					t.Fatalf("%+v comes back as %+v", r, back)
				}
			}
			for _, row := range s.Rows() {
				_ = row.Latency.Quantile(0.5)
				_ = row.Latency.Buckets()
			}
			if err == io.EOF {
				a, _ := NewReader(bytes.NewReader(b))
				c, _ := NewReader(bytes.NewReader(b))
				if d, err := Compare(a, c); err != nil || !d.Same() || d.Moved > 0 {
					t.Fatalf("a trace differs from itself: %+v, %v", d, err)
				}
			}
		}
	})
}

// TestAlign holds align against the textbook's table of longest common
// subsequences.
func TestAlign(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		random := func() []int {
			s := make([]int, rnd.IntN(25))
			for i := range s {
				s[i] = rnd.IntN(4)
			}
			return s
		}
		a, b := random(), random()
		pairs := align(a, b)
		lastX, lastY := -1, -1
		for _, p := range pairs {
			if p[0] <= lastX || p[1] <= lastY || a[p[0]] != b[p[1]] {
				t.Fatalf("%v and %v: pairs %v", a, b, pairs)
			}
			lastX, lastY = p[0], p[1]
		}
		best := make([][]int, len(a)+1)
		best[0] = make([]int, len(b)+1)
		for i := range a {
			best[i+1] = make([]int, len(b)+1)
			for j := range b {
				best[i+1][j+1] = max(best[i][j+1], best[i+1][j])
				if a[i] == b[j] {
					best[i+1][j+1] = best[i][j] + 1
				}
			}
		}
		if len(pairs) != best[len(a)][len(b)] {
			t.Fatalf("%v and %v: %d pairs, want %d", a, b, len(pairs), best[len(a)][len(b)])
		}
	}
	// Far more differences than it looks ahead for.
	var a, b []int
	for i := range 5000 {
		a, b = append(a, -i), append(b, i)
	}
	a, b = append(a, 7000, 7001), append(b, 7000, 7001)
	if pairs := align(a, b); len(pairs) < 2 || a[pairs[len(pairs)-1][0]] != 7001 {
		t.Errorf("%d pairs", len(pairs))
	}
}

// TestPipeWithoutReader: a pipe that no program reads is refused, one that no program empties does
// not keep a run from ending, and one whose reader goes is an error.
func TestPipeWithoutReader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(path, header); !errors.Is(err, ErrRefused) {
		t.Errorf("no reader: %v", err)
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	f, err := Create(path, header)
	if err != nil {
		t.Fatal(err)
	}
	reader.Close()
	f.Device(0).Observe(&Record{Kind: Command, CDB: cdb(32)})
	if err := f.Close(); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the reader has gone: %v", err)
	}
	if reader, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	f, err = Create(path, header)
	if err != nil {
		t.Fatal(err)
	}
	for range 4096 { // more than a pipe holds
		f.Device(0).Observe(&Record{Kind: Command, CDB: cdb(32)})
	}
	closed := make(chan error, 1)
	go func() { closed <- f.Close() }()
	select {
	case err := <-closed:
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Close: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("Close waits for a reader")
	}
	if _, err := Create(path, header); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("again: %v", err)
	}
}

// TestCreateOverDisk: a trace's file that a gvm has as a disk is not a trace's any more.
func TestCreateOverDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, []byte(magic+"1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(path, header); !errors.Is(err, ErrRefused) {
		t.Errorf("in place of a disk: %v", err)
	}
}

// TestHeaderSizes: a header asks for no more than a machine can have.
func TestHeaderSizes(t *testing.T) {
	for what, h := range map[string]Header{
		"devices":   {Devices: make([]Device, 33)},
		"disk size": {Devices: []Device{{Disks: []Disk{{Size: 1 << 63}}}}},
	} {
		b, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		var bad *FormatError
		if _, err := NewReader(strings.NewReader(magic + "1\n" + string(b) + "\n")); !errors.As(err, &bad) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
