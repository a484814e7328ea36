package broker

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/text"
)

// newRecord returns a setup with a record in the directory crashes, where another machine has one.
// That directory moves before the record is made, and a link is in its place.
func newRecord(t *testing.T) (s *setup, r *Record, dir string) {
	t.Helper()
	s = newSetup(t)
	in, other := filepath.Join(s.dir, "crashes"), filepath.Join(s.dir, "crashes/other")
	if err := errors.Join(os.MkdirAll(other, 0o755), os.WriteFile(other+"/end", []byte("text"), 0o600)); err != nil {
		t.Fatal(err)
	}
	r, err := NewRecord(in)
	if err != nil {
		t.Fatal(err)
	}
	r.Machine = "m"
	s.KeepRecord(r)
	if err := s.Shut(); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(s.dir, "moved")
	if err := errors.Join(os.Rename(in, dir), os.Symlink("..", in)); err != nil {
		t.Fatal(err)
	}
	return s, r, dir
}

// recordOf returns the name of the record in a directory with that of another machine.
func recordOf(t *testing.T, dir string) string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil || len(list) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	return list[0].Name() // a time
}

// TestRecord: the broker makes one directory for the end of a machine, in the one that the machine
// named at its start, and the files of a record in it, each once.
func TestRecord(t *testing.T) {
	s, r, in := newRecord(t)
	path, err := r.Directory()
	if again, _ := r.Directory(); err != nil || filepath.Dir(path) != filepath.Join(s.dir, "crashes") || again != path {
		t.Fatalf("%q, then %q, %v", path, again, err)
	}
	dir := filepath.Join(in, filepath.Base(path))
	files, err := r.Create(textFiles...)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range textFiles {
		f := files[i]
		if _, err := f.WriteString(name); err != nil || f.Name() != filepath.Join(path, name) {
			t.Errorf("%s: %v", f.Name(), err)
		}
		f.Close()
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != name {
			t.Errorf("%q, %v", b, err)
		}
		if _, err := r.Create(name); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s again: %v", name, err)
		}
	}
	f, named, err := r.Core()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	core := filepath.Join(dir, "vmcore")
	if _, err := os.Lstat(core); (err == nil) != named {
		t.Errorf("named %v: %v", named, err)
	}
	if _, _, err := r.Core(); !errors.Is(err, fs.ErrExist) {
		t.Errorf("another core: %v", err)
	}
	if _, err := f.WriteString("memory"); err != nil {
		t.Error(err)
	}
	if err := r.LinkCore(); err != nil {
		t.Error(err)
	}
	if err := r.RemoveCore(); err != nil { // it is complete
		t.Error(err)
	}
	if b, err := os.ReadFile(core); err != nil || string(b) != "memory" {
		t.Errorf("%q, %v", b, err)
	}
	if fi, err := os.Stat(core); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	if err := r.LinkCore(); err == nil {
		t.Error("the core is linked twice")
	}
	if _, _, err := r.Core(); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a core behind the complete one: %v", err)
	}
	if left, err := os.ReadDir(in); err != nil || len(left) != 2 { // other, and the record
		t.Errorf("%v, %v", left, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != len(textFiles)+1 {
		t.Errorf("%v, %v", left, err)
	}
}

// TestRecordGivenUp: a core that is not complete leaves nothing, also where the file system makes
// no file without a name.
func TestRecordGivenUp(t *testing.T) {
	for _, named := range []bool{false, true} {
		s, r, in := newRecord(t)
		path, err := r.Directory()
		if err != nil {
			t.Fatal(err)
		}
		if named {
			s.broker.mu.Lock()
			made := s.broker.record
			s.broker.mu.Unlock()
			made.mu.Lock()
			f, err := made.open(coreName, unix.O_CREAT|unix.O_EXCL, 0o600)
			made.core, made.named = f, true
			made.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
		} else if f, _, err := r.Core(); err != nil {
			t.Fatal(err)
		} else {
			defer f.Close()
		}
		if err := r.RemoveCore(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(filepath.Join(in, filepath.Base(path))); err != nil || len(left) > 0 {
			t.Errorf("named %v: left %v, %v", named, left, err)
		}
	}
}

// TestHostileRecord: a machine that its guest has taken over gets no other file of the directory,
// and none elsewhere.
func TestHostileRecord(t *testing.T) {
	s, r, in := newRecord(t)
	names := []string{"", ".", "..", "vmcore", "end/x", "../other/end", "/etc/passwd", in + "/other/end",
		strings.Repeat("x", 5000)}
	for _, name := range names {
		if files, err := r.Create("console", name); !errors.Is(err, unix.EACCES) || files != nil {
			t.Errorf("%q: %v, %v", name, files, err)
		}
		_ = os.Remove(filepath.Join(in, recordOf(t, in), "console"))
	}
	for _, op := range []operation{openFile, replace, remove, discard, syncFile} {
		_, err := s.call(message{Op: op, Path: text.Name(in + "/other/end")}, nil)
		if !errors.Is(err, unix.EACCES) {
			t.Errorf("%s: %v", op, err)
		}
	}
	if err := r.LinkCore(); err == nil {
		t.Error("a core that is not there is linked")
	}
	// Too late for another directory.
	outside, err := os.Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	if err := send(s.conn, message{Op: records, Paths: []text.Name{"x", "y"}}, nil, outside); err != nil {
		t.Fatal(err)
	}
	path, err := r.Directory()
	if err != nil || !strings.HasPrefix(path, filepath.Join(s.dir, "crashes")) {
		t.Errorf("%q, %v", path, err)
	}
	if b, err := os.ReadFile(in + "/other/end"); err != nil || string(b) != "text" {
		t.Errorf("%q, %v", b, err)
	}
	left, err := os.ReadDir(s.dir)
	if err != nil || slices.ContainsFunc(left, func(e os.DirEntry) bool {
		return !slices.Contains([]string{"run", "crashes", "moved"}, e.Name())
	}) {
		t.Errorf("%v, %v", left, err)
	}

	none := newSetup(t) // a machine without --crash-dir
	if err := none.Shut(); err != nil {
		t.Fatal(err)
	}
	for _, op := range []operation{recordDirectory, recordFiles, recordCore, linkCore, removeCore} {
		if _, err := none.call(message{Op: op, Path: "end"}, nil); !errors.Is(err, unix.EACCES) {
			t.Errorf("%s without a record: %v", op, err)
		}
	}
}

// TestRecordDeath: without its broker a machine gets no record, and does not wait for one.
func TestRecordDeath(t *testing.T) {
	ours, theirs := pair(t)
	c := newClient("m", ours, func(string) {})
	c.shut = true
	go c.receive()
	theirs.Close()
	dir := t.TempDir()
	r, err := NewRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	r.client = c
	_, err1 := r.Directory()
	_, err2 := r.Create("end")
	_, _, err3 := r.Core()
	for _, err := range []error{err1, err2, err3, r.LinkCore(), r.RemoveCore()} {
		if !errors.Is(err, errEnded) {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
