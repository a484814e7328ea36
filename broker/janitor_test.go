package broker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/lio"
	"gvm/text"
)

// inJail has a Janitor, and the kernel of a broker that asks it.
type inJail struct {
	kernel
	client *Client // of the broker
	dir    string  // of the jail, with run/
	named  string  // an image of the command line

	mu      sync.Mutex
	added   []lio.Unit
	removed []int
	fails   error // of the janitor's steps
}

const jailedWWN = "naa.5001405000000001"

// newInJail starts a Janitor that has added disks.
func newInJail(t *testing.T, added int) *inJail {
	t.Helper()
	s := &inJail{dir: t.TempDir(), named: filepath.Join(t.TempDir(), "named.img")}
	if err := os.Mkdir(filepath.Join(s.dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	mine := func(pid int, wwn string) error {
		if pid != 4 || wwn != jailedWWN {
			return fmt.Errorf("%d, %s: no such target", pid, wwn)
		}
		return s.fails
	}
	janitor := &Janitor{Machine: 4, Jail: dir, Images: []string{s.named}, rest: time.Nanosecond, added: added,
		kernel: kernel{
			addTo: func(pid int, wwn string, u lio.Unit) ([]string, error) {
				s.mu.Lock()
				defer s.mu.Unlock()
				_, err := scsi.NewUnit(u.UnitConfig)
				if err := errors.Join(mine(pid, wwn), err); err != nil {
					return nil, err
				}
				s.added = append(s.added, u)
				return []string{"a note"}, nil
			},
			removeFrom: func(pid int, wwn string, lun int) error {
				s.mu.Lock()
				defer s.mu.Unlock()
				if err := mine(pid, wwn); err != nil {
					return err
				}
				s.removed = append(s.removed, lun)
				return nil
			},
		}}
	ours, theirs := pair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		janitor.serve(theirs)
	}()
	s.client = newClient("m", ours, func(string) {})
	go s.client.receive()
	j := jailed{s.client}
	s.kernel = kernel{addTo: j.addTo, removeFrom: j.removeFrom}
	t.Cleanup(func() {
		ours.Close()
		<-done
		theirs.Close()
		dir.Close()
	})
	return s
}

// changes returns the additions and removals since the last call.
func (s *inJail) changes() (added []lio.Unit, removed []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	added, removed = s.added, s.removed
	s.added, s.removed = nil, nil
	return added, removed
}

// image makes an image of two blocks and returns it as the broker has it, by its path in the jail.
func (s *inJail) image(t *testing.T, onHost, path string, o block.Options) *block.File {
	t.Helper()
	if err := os.WriteFile(onHost, make([]byte, 1024), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := block.Open(onHost, o)
	if err != nil {
		t.Fatal(err)
	}
	facts, files := f.Export()
	named, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", files[0].Fd()), unix.O_PATH, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	facts.Path, facts.Identity, facts.Uses = text.Name(path), text.Name(path), nil
	b, err := block.Import(facts, []*os.File{named}, block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { named.Close() })
	return b
}

// TestJanitor: a broker in a jail has the kernel serve an image of DIR/run and one of the command
// line, by their paths on the host, to its own machine, as it says, and removes disks. It adds no
// more than a machine may have.
func TestJanitor(t *testing.T) {
	s := newInJail(t, maxAdded-2)
	in := filepath.Join(s.dir, "run", "in.img")
	images := []*block.File{s.image(t, in, "/run/in.img", block.Options{}),
		s.image(t, s.named, s.named, block.Options{ReadOnly: true})}
	add := func(i int) error {
		t.Helper()
		u := scsi.UnitConfig{Backend: images[i], Serial: "S", ReadOnly: i == 1, BlockSize: 512, Cache: scsi.WriteThrough,
			PhysicalBlockExponent: 3}
		notes, err := s.addTo(0, jailedWWN, lio.Unit{LUN: i + 2, UnitConfig: u})
		added, _ := s.changes()
		if err != nil {
			return err
		}
		if len(notes) != 1 || notes[0] != "a note" || len(added) != 1 {
			t.Fatalf("%q; added %+v", notes, added)
		}
		b, f := added[0].Backend.(*block.File), images[i]
		added[0].Backend, u.Backend = nil, nil
		if got, want := fmt.Sprint(added[0]), fmt.Sprint(lio.Unit{LUN: i + 2, UnitConfig: u}); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		if b.Identity() != []string{in, s.named}[i] || b.Size() != 1024 ||
			b.DiscardGranularity() != f.DiscardGranularity() {
			t.Errorf("%s, %d bytes, %d", b.Identity(), b.Size(), b.DiscardGranularity())
		}
		return nil
	}
	if err := errors.Join(add(0), add(1)); err != nil {
		t.Fatal(err)
	}
	if err := add(0); !errors.Is(err, lio.ErrUnit) || !strings.Contains(err.Error(), "256 added disks") {
		t.Errorf("a disk too many: %v", err)
	}
	err := s.removeFrom(0, jailedWWN, 3)
	if _, removed := s.changes(); err != nil || len(removed) != 1 || removed[0] != 3 {
		t.Errorf("%v, removed %v", err, removed)
	}
	if err := add(0); err != nil {
		t.Error(err)
	}
	if s.removeFrom(0, "naa.5001405000000002", 0) == nil {
		t.Error("a disk of another's target is removed")
	}
	for _, want := range []error{lio.ErrUnit, lio.ErrBusy} {
		s.mu.Lock()
		s.fails = fmt.Errorf("x: %w", want)
		s.mu.Unlock()
		if err := s.removeFrom(0, jailedWWN, 3); !errors.Is(err, want) || err.Error() != "x: "+want.Error() {
			t.Errorf("%v, want %v", err, want)
		}
	}
	s.client.conn.Close()
	if err := s.removeFrom(0, jailedWWN, 2); err == nil || !strings.Contains(err.Error(), "the janitor that changes") {
		t.Errorf("a dead janitor: %v", err)
	}
}

// TestJanitorRefuses: a process that asks the janitor gets no right that it has not: to a file that
// it has not open to read and write, or has by another path, and to another machine's target.
func TestJanitorRefuses(t *testing.T) {
	s := newInJail(t, 0)
	at := func(name string) string { return filepath.Join(s.dir, name) }
	in, other := at("run/in.img"), at("other.img")
	for _, path := range []string{in, other} {
		if err := os.WriteFile(path, make([]byte, 1024), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(other, at("run/link")), os.Symlink("/", at("run/root")),
		os.Mkdir(at("run/dir"), 0o700), unix.Mkfifo(at("run/pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	good, read := unit{BlockSize: 512}, unit{BlockSize: 512, ReadOnly: true}
	const run, closed, link, elsewhere = "/run/in.img", "is not open for the disk's", "too many levels of symbolic links",
		"put it there, and add it as /run/NAME"
	for _, tt := range []struct {
		what string
		path string
		open string
		flag int
		unit unit
		want string // of the error; "": none
	}{
		{"nothing wrong", run, in, unix.O_RDWR, good, ""},
		{"a file that is read, for a disk that is", run, in, unix.O_RDONLY, read, ""},
		{"no block size", run, in, unix.O_RDWR, unit{}, ""},
		{"a file that is read", run, in, unix.O_RDONLY, good, closed},
		{"a file that is written", run, in, unix.O_WRONLY, good, closed},
		{"a file that is written at its end", run, in, unix.O_RDWR | unix.O_APPEND, good, closed},
		{"a file that is only named", run, in, unix.O_PATH, read, closed},
		{"a directory", "/run/dir", at("run/dir"), unix.O_RDONLY, read, closed},
		{"a pipe", "/run/pipe", at("run/pipe"), unix.O_RDWR, good, closed},
		{"another file", run, other, unix.O_RDWR, good, "was replaced"},
		{"a link", "/run/link", other, unix.O_RDWR, good, link},
		{"a link on the way", "/run/root" + other, other, unix.O_RDWR, good, link},
		{"a path that leads out", "/run/../other.img", other, unix.O_RDWR, good, elsewhere},
		{"a path of the host", other, other, unix.O_RDWR, good, elsewhere},
		{"no path", "", in, unix.O_RDWR, good, elsewhere},
		{"no file", "/run/none", in, unix.O_RDWR, good, "no such file"},
		{"a wrong block size", run, in, unix.O_RDWR, unit{BlockSize: -1}, "block size"},
		{"a line in the serial number", run, in, unix.O_RDWR, unit{BlockSize: 512, Serial: "a\nb"}, "not printable"},
	} {
		f, err := os.OpenFile(tt.open, tt.flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.client.call(message{Op: addTo, Path: text.Name(tt.path), WWN: jailedWWN, Unit: &tt.unit}, nil, f)
		added, _ := s.changes()
		if ok := tt.want == "" && err == nil && len(added) == 1 || tt.want != "" && len(added) == 0 && err != nil &&
			strings.Contains(err.Error(), tt.want) && !strings.Contains(err.Error(), "\n"); !ok {
			t.Errorf("%s: %v, added %+v", tt.what, err, added)
		}
		f.Close()
	}
	f, err := os.OpenFile(in, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ask := func(m message, files ...*os.File) {
		t.Helper()
		_, err := s.client.call(m, nil, files...)
		if added, removed := s.changes(); err == nil || len(added) > 0 || len(removed) > 0 {
			t.Errorf("%+v: %v, added %+v, removed %v", m, err, added, removed)
		}
	}
	ask(message{Op: addTo, Path: run, WWN: jailedWWN}, f) // no unit
	ask(message{Op: addTo, Path: run, WWN: "naa.5001405000000002", Unit: &good}, f)
	ask(message{Op: takeDown, WWN: jailedWWN})
	ask(message{Op: openFile, Path: "/etc/passwd"}, f)
	ask(message{}, f)
	ask(message{Op: addTo, Path: run, WWN: jailedWWN, Unit: &good})
	ask(message{Op: addTo, Path: run, WWN: jailedWWN, Unit: &good}, f, f)
}

// FuzzJanitor: a process that sends the janitor anything, with a file that is not in the jail, adds
// no disk.
func FuzzJanitor(f *testing.F) {
	for _, line := range []string{`{"ID":1,"Op":"addTo","Path":"/run/a","WWN":"naa.1","Unit":{"BlockSize":512}}`,
		`{"ID":2,"Op":"addTo","Path":"/run/../a","Unit":{"Serial":"s","Cache":2,"Physical":3,"Granularity":-1}}`,
		`{"ID":3,"Op":"addTo"}`, `{"Op":"end"}`, `{"ID":4,"Op":"open","Path":"/etc/passwd"}` + "\ndata"} {
		f.Add([]byte(line + "\n"))
	}
	dir := f.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "run"), 0o700),
		os.WriteFile(filepath.Join(dir, "run", "a"), nil, 0o600),
		os.WriteFile(filepath.Join(dir, "a"), nil, 0o600)); err != nil {
		f.Fatal(err)
	}
	jail, err := os.Open(dir)
	if err != nil {
		f.Fatal(err)
	}
	outside, err := os.OpenFile(filepath.Join(dir, "a"), os.O_RDWR, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs := pair(t)
		defer ours.Close()
		defer theirs.Close()
		if len(b) == 0 || len(b) > maxMessage/2 {
			return
		}
		added := false
		j := &Janitor{Machine: 4, Jail: jail, kernel: kernel{
			addTo:      func(int, string, lio.Unit) ([]string, error) { added = true; return nil, nil },
			removeFrom: func(int, string, int) error { return nil },
		}}
		if _, _, err := ours.WriteMsgUnix(b, unix.UnixRights(int(outside.Fd())), nil); err != nil {
			t.Fatal(err)
		}
		m, _, files, err := newReceiver(theirs).next()
		if err != nil {
			return
		}
		defer closeAll(files)
		if _, err := j.do(m, files); added || err == nil && m.Op != removeFrom {
			t.Errorf("%+v: %v", m, err)
		}
	})
}
