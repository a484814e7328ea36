package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio"
	"gvm/devices/virtio/virtqtest"
	"gvm/devices/virtio/vscsi"
	"gvm/guestmem"
	"gvm/machine/disk"
)

var update = flag.Bool("update", false, "write testdata anew")

// traced is a virtio-scsi device with disks at LUN 0 and 300, two request queues with a driver
// each, and a trace. Each reading of the trace's clock is later than the one before by a different
// time.
type traced struct {
	t      *testing.T
	dev    *vscsi.Device
	queues []*virtqtest.Driver
	tag    uint64
}

const queueSpan = 1 << 20

// record returns the trace of the requests of drive.
func record(t *testing.T, readOnly bool, drive func(*traced)) []byte {
	t.Helper()
	ds, err := disk.Open(t.Context(), nil, disk.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 300} {
		if err := ds.Attach(disk.Spec{Serial: fmt.Sprintf("TRACED%d", n), LUN: n, ReadOnly: readOnly && n == 300},
			block.NewMem(1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	var now, looks time.Duration
	clock := func() time.Duration {
		looks++
		now += 1500*time.Nanosecond + looks*looks*looks*3*time.Nanosecond
		return now
	}
	h := ds.TraceHeader(version, 2)
	h.GVM, h.Kernel, h.Start = "1.2.3", "6.12.0", time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	var file bytes.Buffer
	w, err := trace.NewWriter(&file, h, clock)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := vscsi.New(vscsi.Config{Target: ds.Target(), Queues: 2, Observer: w.Device(0)})
	if err != nil {
		t.Fatal(err)
	}
	g := &traced{t: t, dev: dev}
	mem := guestmem.Heap(0, 4*queueSpan)
	a := virtio.Activation{Mem: mem, Broken: func(err error) { t.Error(err) }}
	for i, size := range dev.QueueSizes() {
		d, err := virtqtest.New(mem, uint64(i)*queueSpan, size, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		g.queues = append(g.queues, d)
		a.Queues = append(a.Queues, virtio.Queue{Layout: d.Layout, Kick: d.Kick, Call: d.Call})
	}
	if err := dev.Activate(a); err != nil {
		t.Fatal(err)
	}
	drive(g)
	if err := dev.Reset(); err != nil {
		t.Fatal(err)
	}
	dev.PowerOn()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return file.Bytes()
}

// send sends out and room for in bytes on a queue and waits for the answer.
func (g *traced) send(queue int, out []byte, in int) []byte {
	g.t.Helper()
	d := g.queues[queue]
	to, from := d.Alloc(len(out)), d.Alloc(in)
	copy(d.Bytes(to, len(out)), out)
	if _, ok := d.Add(virtqtest.Seg{Addr: to, Len: uint32(len(out))},
		virtqtest.Seg{Addr: from, Len: uint32(in), Write: true}); !ok {
		g.t.Fatal("no room in the queue")
	}
	if _, err := d.Publish(); err != nil {
		g.t.Fatal(err)
	}
	if _, _, err := d.Wait(); err != nil {
		g.t.Fatal(err)
	}
	return d.Bytes(from, in)
}

// do sends a command to request queue q (0 or 1).
func (g *traced) do(q int, lun [8]byte, cdb []byte, out []byte, in int) {
	g.t.Helper()
	g.tag++
	b := make([]byte, 51)
	copy(b, lun[:])
	binary.LittleEndian.PutUint64(b[8:], g.tag)
	copy(b[19:], cdb)
	g.send(2+q, append(b, out...), 108+in)
}

func (g *traced) manage(function uint32, lun [8]byte, tag uint64) {
	g.t.Helper()
	b := binary.LittleEndian.AppendUint32(make([]byte, 4), function)
	g.send(0, binary.LittleEndian.AppendUint64(append(b, lun[:]...), tag), 1)
}

func rw(op byte, lba uint32, blocks byte) []byte {
	b := make([]byte, 10)
	binary.BigEndian.PutUint32(b[2:], lba)
	b[0], b[8] = op, blocks
	return b
}

// session sends typical requests of a driver, with some bad ones.
func session(g *traced) {
	first, second := trace.UnitLUN(0), trace.UnitLUN(300)
	for _, lun := range [][8]byte{first, second} {
		g.do(0, lun, []byte{0x12, 0, 0, 0, 36, 0}, nil, 36)
		g.do(0, lun, make([]byte, 6), nil, 0)
		g.do(0, lun, []byte{0x12, 1, 0x83, 0, 255, 0}, nil, 255)
	}
	g.do(1, trace.UnitLUN(9), make([]byte, 6), nil, 0)                     // no such LUN
	g.do(1, [8]byte{1, 7}, make([]byte, 6), nil, 0)                        // no such target
	g.do(1, [8]byte{0xc1, 1}, []byte{0xa0, 9: 16, 11: 0}, nil, 16)         // the well-known LUN
	g.do(1, first, []byte{0x9e, 0x10, 13: 32, 15: 0}, nil, 32)             // READ CAPACITY(16)
	g.do(0, first, rw(0x2a, 8, 2), bytes.Repeat([]byte("one "), 256), 0)   // write
	g.do(1, second, rw(0x2a, 16, 1), bytes.Repeat([]byte("two "), 128), 0) // to the other disk, which may be read-only
	g.do(0, first, []byte{0x88, 8, 13: 2, 15: 0}, nil, 1024)               // READ(16) with FUA
	g.do(0, first, rw(0x28, 4000, 1), nil, 4096)                           // buffer too large, out of range
	g.do(0, first, rw(0x28, 8, 8), nil, 512)                               // buffer too small
	g.do(0, first, []byte{0x12, 2, 0, 0, 36, 0}, nil, 36)                  // invalid field
	g.do(0, first, []byte{0xc5, 1, 2, 3, 4, 5, 6, 7}, nil, 0)              // no such command
	g.do(1, second, rw(0x35, 0, 0), nil, 0)                                // flush
	g.manage(0, first, 0x1234)
	g.manage(5, second, 0)
	g.manage(99, second, 0)
	g.do(1, second, make([]byte, 6), nil, 0)
}

func traces(t *testing.T) (a, b string) {
	t.Helper()
	a, b = "testdata/a.trace", "testdata/b.trace"
	files := map[string][]byte{
		a: record(t, false, session),
		// LUN 300 is read-only, b has an additional request, and another request comes earlier.
		b: record(t, true, func(g *traced) {
			g.do(1, [8]byte{1, 7}, make([]byte, 6), nil, 0)
			session(g)
			g.do(1, trace.UnitLUN(300), []byte{0x1a, 0, 0x3f, 0, 64, 0}, nil, 64)
		}),
	}
	for path, want := range files {
		if *update {
			if err := os.WriteFile(path, want, 0o666); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not the device's record now; if that is right, go test -update", path)
		}
	}
	return a, b
}

// gvmTrace runs gvm trace and returns its output, exit status and error.
func gvmTrace(args ...string) (out string, status int, errText string) {
	out, status, errText, _ = gvmTraceNotes(args...)
	return out, status, errText
}

// gvmTraceNotes is gvmTrace, and also returns the rest of standard error.
func gvmTraceNotes(args ...string) (out string, status int, errText, notes string) {
	var b, e bytes.Buffer
	app := app(nil)
	app.Writer, app.ErrWriter = &b, &e
	words := append([]string{"gvm", "trace"}, args...)
	if args[0] == "replay" {
		words = append([]string{"gvm"}, append(args, "--sandbox=off")...) // which has no way back
	}
	err := app.Run(flagsFirst(app.Commands, words))
	if err == nil {
		return b.String(), 0, "", e.String()
	}
	var end endError
	if errors.As(err, &end) {
		return b.String(), end.status, err.Error(), e.String()
	}
	return b.String(), exitStatus(err), err.Error(), e.String()
}

// TestTraceGolden compares the output of the commands for two traces with files.
func TestTraceGolden(t *testing.T) {
	a, b := traces(t)
	for _, tt := range []struct {
		name   string
		status int
		args   []string
	}{
		{"show", 0, []string{"show", a}},
		{"show-json", 0, []string{"show", "--json", a}},
		{"show-lun", 0, []string{"show", a, "--lun", "300"}},
		{"show-errors", 0, []string{"show", a, "--errors", "--lun=0"}},
		{"show-write", 0, []string{"show", "--op", "write", a}},
		{"show-code", 0, []string{"show", a, "--op", "0x88", "--min-latency", "1us"}},
		{"show-reset", 0, []string{"show", a, "--op", "Device"}},
		{"show-slow", 0, []string{"show", "--min-latency", "200us", a}},
		{"stat", 0, []string{"stat", a}},
		{"stat-two", 0, []string{"stat", a, b}},
		{"stat-json", 0, []string{"stat", a, "--json"}},
		{"diff-same", 0, []string{"diff", a, a}},
		{"diff", 1, []string{"diff", a, b}},
		{"diff-json", 1, []string{"diff", a, b, "--json"}},
	} {
		out, status, errText := gvmTrace(tt.args...)
		if status != tt.status || status == 1 && errText != a+" and "+b+" differ" {
			t.Errorf("%v: status %d, %s", tt.args, status, errText)
		}
		golden := filepath.Join("testdata", "trace-"+tt.name+".txt")
		if *update {
			if err := os.WriteFile(golden, []byte(out), 0o666); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if out != string(want) {
			t.Errorf("%v says\n%s\nand should\n%s", tt.args, out, want)
		}
		if slices.Contains(tt.args, "--json") {
			for d := json.NewDecoder(strings.NewReader(out)); ; {
				var v any
				if err := d.Decode(&v); err == io.EOF {
					break
				} else if err != nil {
					t.Fatalf("%v: %v", tt.args, err)
				}
			}
		}
	}
}

func TestTraceMistakes(t *testing.T) {
	a, _ := traces(t)
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o666); err != nil {
			t.Fatal(err)
		}
		return path
	}
	whole, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	none, disk, empty := filepath.Join(dir, "none"), file("disk", make([]byte, 4096)),
		file("empty", bytes.Join(bytes.SplitAfterN(whole, []byte("\n"), 3)[:2], nil))
	bad := bytes.Clone(whole)
	bad[len(bad)-10] ^= 1
	damaged := file("damaged", bad)
	for _, tt := range []struct {
		args string
		want string
	}{
		{"frob", `unknown command "frob" of gvm trace; see gvm help trace`},
		{"show", "want gvm trace show FILE, and got 0 files"},
		{"show " + a + " " + a, "want gvm trace show FILE, and got 2 files"},
		{"diff " + a, "want gvm trace diff A B, and got 1 file"},
		{"show --frob " + a, "unknown flag --frob; see gvm help trace show"},
		{"show " + a + " --frob", "unknown flag --frob; see gvm help trace show"},
		{"show " + a + " --json=3", `--json "3": want true or false; see gvm help trace show`},
		{"show " + a + " --op", "--op: want a value, NAME|CODE; see gvm help trace show"},
		{"show " + a + " --op 0x100", "--op 0x100: want a name or an operation code from 0 to 0xff"},
		{"show " + a + " --op nosuch", "--op nosuch: want TEST UNIT READY, REQUEST SENSE, READ, WRITE, INQUIRY, "},
		{"show " + a + " --op unmop", "--op unmop: want TEST UNIT READY, REQUEST SENSE, READ, WRITE, INQUIRY, "},
		{"show " + a + " --op=", `--op "": want TEST UNIT READY, REQUEST SENSE, READ, WRITE, INQUIRY, `},
		{"show " + a + " --lun 16384", "--lun 16384: want 0 to 16383"},
		{"show --lun -1 " + a, "--lun -1: want 0 to 16383"},
		{"show " + none, none + ": no such file or directory; check the path"},
		{"show " + dir, dir + ": is a directory; want a regular file or a pipe"},
		{"show " + disk, disk + ": not a trace of gvm"},
		{"stat " + damaged, fmt.Sprintf("%s: damaged at byte %d: a record's checksum is", damaged, len(whole)-64)},
		{"diff " + a + " " + damaged, damaged + ": damaged at byte"},
		{"plot " + a, "-o \"\": want a file name that ends with .svg or .png"},
		{"replay", "want gvm replay FILE, or gvm replay --corpus"},
		{"replay --corpus " + a, "want gvm replay FILE, or gvm replay --corpus"},
		{"replay --corpus", "--corpus has no answers to compare with: add --backend both"},
		{"replay " + a + " " + a, "want gvm replay FILE, and got 2 files"},
		{"replay " + a + " --frob", "unknown flag --frob; see gvm help replay"},
		{"replay " + a + " --backend frob", "--backend frob: want both, process or vhost"},
		{"replay " + a + " --vhost-abi frob", "--vhost-abi \"frob\": want a version number or any"},
		{"replay " + disk, disk + ": not a trace of gvm"},
		{"replay " + damaged, damaged + ": damaged at byte"},
		{"plot " + a + " -o x.pdf", "-o \"x.pdf\": want a file name that ends with .svg or .png"},
		{"plot " + empty + " -o " + dir + "/x.svg", empty + ": no request to plot"},
		{"plot " + a + " -o " + none + "/x.svg", none + "/x.svg: no such file or directory; there is no directory " +
			none + ": make it first"},
	} {
		const want = 2
		_, status, got := gvmTrace(strings.Fields(tt.args)...)
		if status != want || !strings.HasPrefix(got, tt.want) || strings.Contains(got, "\n") {
			t.Errorf("gvm trace %s: status %d, %s\nwant %d, %s", tt.args, status, got, want, tt.want)
		}
	}
}

// TestTraceCut reads the trace of a killed gvm.
func TestTraceCut(t *testing.T) {
	a, _ := traces(t)
	b, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut")
	if err := os.WriteFile(cut, b[:len(b)-64-10], 0o666); err != nil {
		t.Fatal(err)
	}
	all, _, _ := gvmTrace("show", a)
	out, status, errText, notes := gvmTraceNotes("show", cut)
	if want := "gvm: " + cut + " ends inside a record, of which 54 bytes are left out: its gvm was killed, " +
		"ran out of disk space or runs still\n"; notes != want {
		t.Errorf("it notes %q, want %q", notes, want)
	}
	lines := strings.SplitAfter(all, "\n")
	if want := strings.Join(lines[:len(lines)-3], ""); status != 0 || out != want { // two records and the end
		t.Errorf("status %d, %s:\n%s\nwant\n%s", status, errText, out, want)
	}
}

func TestTracePlot(t *testing.T) {
	a, b := traces(t)
	dir := t.TempDir()
	for _, tt := range []struct {
		files, want []string
	}{
		{[]string{a}, []string{"SCSI request latency: a.trace (gvm 1.2.3 on Linux 6.12.0)",
			"INQUIRY: 5", "TEST UNIT READY: 5"}},
		{[]string{a, b}, []string{"INQUIRY: 10", "TEST UNIT READY: 11", "a.trace (process)", "b.trace (process)"}},
	} {
		out := filepath.Join(dir, "out.svg")
		if _, status, errText := gvmTrace(append([]string{"plot", "-o", out}, tt.files...)...); status != 0 {
			t.Fatal(errText)
		}
		svg, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range tt.want {
			if !strings.Contains(string(svg), ">"+want+"<") {
				t.Errorf("%v: the plot does not say %q", tt.files, want)
			}
		}
	}
}
