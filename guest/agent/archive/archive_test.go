package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// files maps the paths below a directory to their modes, contents or targets.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		what := fi.Mode().String()
		switch {
		case fi.Mode()&fs.ModeSymlink != 0:
			what, err = os.Readlink(path)
			what = "-> " + what
		case fi.Mode().IsRegular():
			var b []byte
			b, err = os.ReadFile(path)
			what += fmt.Sprintf(" %.20q %d", b, len(b))
		}
		if err == nil && fi.Mode()&fs.ModeSymlink == 0 {
			what += " " + fi.ModTime().UTC().Format(time.RFC3339Nano)
		}
		all[name] = what
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// makeTree makes a tree of every kind of entry. Its time has nanoseconds.
func makeTree(t *testing.T, dir string) {
	t.Helper()
	then := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
	write := func(name string, mode fs.FileMode, data string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), 0o600),
			os.Chmod(path, mode), os.Chtimes(path, then, then)); err != nil {
			t.Fatal(err)
		}
	}
	big := make([]byte, 3*partSize+5)
	rand.NewChaCha8([32]byte{}).Read(big)
	write("big", 0o640, string(big))
	write("part", 0o444, string(big[:partSize]))
	write("empty", 0o755, "")
	write("sub/x\n\xff"+strings.Repeat("y", 200), 0o600, "odd name")
	write("sub/deep/file", fs.ModeSetuid|0o711, "setuid is lost")
	if err := errors.Join(os.Symlink("/no/such/target", filepath.Join(dir, "sub/link")),
		os.Symlink("deep", filepath.Join(dir, "sub/dirlink")), os.Mkdir(filepath.Join(dir, "none"), 0o700),
		os.Chmod(filepath.Join(dir, "sub/deep"), 0o710)); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"none", "sub/deep", "sub", "."} {
		if err := os.Chtimes(filepath.Join(dir, d), then, then); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTree: a tree arrives as it was, also over an older copy of it.
func TestTree(t *testing.T) {
	from, to := filepath.Join(t.TempDir(), "from"), t.TempDir()
	makeTree(t, from)
	want := files(t, from)
	want["sub/deep/file"] = strings.Replace(want["sub/deep/file"], "urwx", "-rwx", 1)
	for i, dest := range []string{to, filepath.Join(to, "new"), filepath.Join(to, "slash") + "/", to} {
		var b bytes.Buffer
		if err := Pack(&b, from, true); err != nil {
			t.Fatal(err)
		}
		if err := Unpack(&b, dest, Base(from+"/")); err != nil {
			t.Fatal(err)
		}
		if dest == to {
			dest = filepath.Join(to, "from")
		}
		got := files(t, dest)
		if len(got) != len(want) {
			t.Errorf("%s: %d names, want %d", dest, len(got), len(want))
		}
		for name, w := range want {
			if g := got[name]; g != w && !(i == 3 && g[:1] == "d") { // its time is that of the new entries
				t.Errorf("%s: %q is %s, want %s", dest, name, g, w)
			}
		}
	}
}

// TestPlaces: a copy is where cp(1) would make it, or the reason is named.
func TestPlaces(t *testing.T) {
	src := t.TempDir()
	for _, f := range []string{"file", "dir/in"} {
		os.Mkdir(filepath.Join(src, "dir"), 0o755)
		if err := os.WriteFile(filepath.Join(src, f), []byte(f), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("file", filepath.Join(src, "tofile")),
		os.Symlink("dir", filepath.Join(src, "todir"))); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ from, to, want string }{
		{"file", "d", "d/file"},
		{"file", "d/", "d/file"},
		{"file", "d/.", "d/file"},
		{"file", "new", "new"},
		{"file", "f", "f"},
		{"file", "lf", "f"},
		{"file", "ld", "d/file"},
		{"tofile", "d", "d/tofile"},
		{"dir", "d", "d/dir/in"},
		{"dir/", "d", "d/dir/in"},
		{"dir/.", "d", "d/in"},
		{"todir", "d", "d/todir/in"},
		{"dir", "new", "new/in"},
		{"dir", "new/", "new/in"},
		{"file", "new/", "!there is no such directory"},
		{"file", "no/new", "!no such file or directory"},
		{"file", "f/x", "!not a directory"},
		{"file", "f/", "!not a directory"},
		{"file", "pipe", "!is no file"},
		{"file", "d2", "!d2/file: is there already, and is no file"},
		{"dir", "f", "!f: is not a directory"},
		{"dir", "d3", "!d3/dir: not a directory"},
		{"file", "disk", "!disk: a program has it locked"},
		{"none", "new", "!no such file or directory"},
		{"/dev/null", "new", "!is no file, directory"},
	} {
		dst := t.TempDir()
		p := func(name string) string { return filepath.Join(dst, name) }
		if err := errors.Join(os.Mkdir(p("d"), 0o755), os.WriteFile(p("f"), []byte("old"), 0o600), os.Symlink("f", p("lf")),
			os.Symlink("d", p("ld")), unix.Mkfifo(p("pipe"), 0o600), os.MkdirAll(p("d2/file"), 0o755),
			os.Mkdir(p("d3"), 0o755), os.WriteFile(p("d3/dir"), nil, 0o600), os.WriteFile(p("disk"), []byte("data"), 0o600),
		); err != nil {
			t.Fatal(err)
		}
		disk, err := os.Open(p("disk"))
		if err == nil {
			err = unix.FcntlFlock(disk.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
		}
		if err != nil {
			t.Fatal(err)
		}
		defer disk.Close()
		before := files(t, dst)
		from := tt.from
		if !filepath.IsAbs(from) {
			from = src + "/" + tt.from
		}
		var b bytes.Buffer
		err = Pack(&b, from, true)
		if err == nil {
			err = Unpack(&b, dst+"/"+tt.to, Base(tt.from))
		}
		if reason, fails := strings.CutPrefix(tt.want, "!"); fails {
			if err == nil || !strings.Contains(err.Error(), reason) || !Refused(err) {
				t.Errorf("%s to %s: %v, want %s", tt.from, tt.to, err, reason)
			}
			if after := files(t, dst); !maps.Equal(before, after) {
				t.Errorf("%s to %s failed and left %v", tt.from, tt.to, after)
			}
			continue
		}
		want := "file"
		if filepath.Base(tt.want) == "in" {
			want = "dir/in"
		}
		if got, rerr := os.ReadFile(p(tt.want)); err != nil || rerr != nil || string(got) != want {
			t.Errorf("%s to %s: %v, %v, %q", tt.from, tt.to, err, rerr, got)
		}
	}
}

// TestPack: a directory needs to be asked for; a file of unknown size arrives whole; anything but a
// file is left out, and all else is there.
func TestPack(t *testing.T) {
	dir := t.TempDir()
	var b bytes.Buffer
	if err := Pack(&b, dir, false); err == nil || !strings.Contains(err.Error(), "--recursive") || !Refused(err) {
		t.Error(err)
	}
	b.Reset()
	if err := Pack(&b, "/proc/self/mountinfo", false); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := UnpackStream(&b, &out); err != nil || out.Len() == 0 {
		t.Errorf("a file of /proc: %d bytes, %v", out.Len(), err)
	}
	data := make([]byte, 5*partSize/2)
	rand.NewChaCha8([32]byte{}).Read(data)
	for _, n := range []int{0, 1, partSize, len(data)} {
		b.Reset()
		if err := PackStream(&b, bytes.NewReader(data[:n])); err != nil {
			t.Fatal(err)
		}
		whole := slices.Clone(b.Bytes())
		out.Reset()
		if err := UnpackStream(&b, &out); err != nil || !bytes.Equal(out.Bytes(), data[:n]) {
			t.Errorf("%d of %d bytes: %v", out.Len(), n, err)
		}
		for _, cut := range []int{0, 100, len(whole) / 3, len(whole) / 2, len(whole)} {
			path := filepath.Join(dir, "cut")
			err := Unpack(bytes.NewReader(whole[:min(cut, len(whole)-headSize-1)]), path, "")
			if !errors.As(err, new(*StreamError)) {
				t.Errorf("%d of %d bytes: %v", cut, len(whole), err)
			} else if _, serr := os.Lstat(path); err != nil && !errors.Is(serr, fs.ErrNotExist) {
				t.Errorf("%d of %d bytes made a file: %v", cut, len(whole), serr)
			}
			os.Remove(path)
		}
	}
	if names := files(t, dir); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
	for _, f := range []string{"a", "b"} {
		if err := unix.Mkfifo(filepath.Join(dir, f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "c"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	var left *LeftOutError
	err := Pack(&b, dir, true)
	if !errors.As(err, &left) || left.Count != 2 || !strings.HasPrefix(err.Error(), dir+"/a: is no file,") {
		t.Error(err)
	}
	to := t.TempDir()
	if err := Unpack(&b, to, "."); err != nil || len(files(t, to)) != 2 {
		t.Errorf("%v: %v", err, files(t, to))
	}
}

type failing struct{ n int }

func (f *failing) Write(p []byte) (int, error) {
	if f.n -= len(p); f.n < 0 {
		return 0, unix.ENOSPC
	}
	return len(p), nil
}

// TestErrors: an error of the stream is told from one of a file, which has the file's name and
// reason.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir)
	if err := Pack(&failing{partSize}, dir, true); !errors.As(err, new(*StreamError)) || !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	var b bytes.Buffer
	if err := PackStream(&b, io.MultiReader(strings.NewReader("x"), errReader{})); !errors.Is(err, io.ErrNoProgress) {
		t.Error(err)
	}
	b.Reset()
	if err := Pack(&b, dir+"/big", false); err != nil {
		t.Fatal(err)
	}
	err := UnpackStream(&b, &failing{10})
	if errors.As(err, new(*StreamError)) || !errors.Is(err, unix.ENOSPC) || Refused(err) {
		t.Error(err)
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, io.ErrNoProgress }

// rec is a record of an archive, with parts of contents.
func rec(kind byte, name string, parts ...string) string {
	b := append([]byte{kind, 0xff, 0xff, 1, 2, 3, 4, 0, 0, 0, 0, 5, 0, 0, 0}, byte(len(name)), byte(len(name)>>8))
	b = append(b, name...)
	for _, p := range parts {
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(p))), p...)
	}
	return string(b)
}

// hostile are archives that try to leave their destination, or to make more than files.
var hostile = map[string]string{
	"parent":           rec(isDir, "") + rec(isFile, "..", "evil", ""),
	"path":             rec(isDir, "") + rec(isFile, "../x", "evil", ""),
	"absolute":         rec(isDir, "") + rec(isFile, "/x", "evil", ""),
	"itself":           rec(isDir, "") + rec(isFile, ".", "evil", ""),
	"parent directory": rec(isDir, "") + rec(isDir, "..") + rec(isFile, "x", "evil", ""),
	"no name":          rec(isDir, "") + rec(isDir, "") + rec(isFile, "x", "evil", ""),
	"NUL":              rec(isDir, "") + rec(isFile, "x\x00y", "evil", ""),
	"through a link":   rec(isDir, "") + rec(isLink, "a", "..", "") + rec(isDir, "a") + rec(isFile, "x", "evil", ""),
	"through old link": rec(isDir, "") + rec(isDir, "old") + rec(isFile, "x", "evil", ""),
	"above the top":    rec(isDir, "") + rec(endDir, "") + rec(isFile, "x", "evil", "") + rec(end, ""),
	"end in a dir":     rec(isDir, "") + rec(end, ""),
	"file and more":    rec(isFile, "", "evil", "") + rec(isFile, "x", "evil", "") + rec(end, ""),
	"link as the top":  rec(isLink, "", "..", "") + rec(end, ""),
	"a named top":      rec(isDir, "x") + rec(endDir, "") + rec(end, ""),
	"another kind":     rec(isDir, "") + rec('b', "x") + rec(endDir, "") + rec(end, ""),
	"nothing":          "",
	"end alone":        rec(end, ""),
	"no end":           rec(isDir, "") + rec(endDir, ""),
	"no last part":     rec(isDir, "") + rec(isFile, "x", "evil"),
	"a cut part":       rec(isDir, "") + rec(isFile, "x") + "\x05\x00\x00\x00evil",
	"a large part":     rec(isDir, "") + rec(isFile, "x") + "\x01\x00\x04\x00" + strings.Repeat("x", partSize+1),
	"a long name":      rec(isDir, "") + rec(isFile, strings.Repeat("x", 256), "evil", ""),
	"a long target":    rec(isDir, "") + rec(isLink, "x", strings.Repeat("x", 4000), strings.Repeat("x", 4000), ""),
	"an empty target":  rec(isDir, "") + rec(isLink, "x", ""),
	"depth":            strings.Repeat(rec(isDir, ""), 1) + strings.Repeat(rec(isDir, "d"), maxDepth),
}

// TestHostile: such archives are refused, and change nothing beside the destination.
func TestHostile(t *testing.T) {
	for name, in := range hostile {
		if err := unpackHostile(t, in); err == nil {
			t.Errorf("%s: unpacked", name)
		}
	}
}

// unpackHostile unpacks beside files that it must not reach, and checks all that is there then.
func unpackHostile(t *testing.T, in string) error {
	dir := t.TempDir()
	dest := filepath.Join(dir, "dest")
	if err := errors.Join(os.MkdirAll(dest+"/top", 0o755), os.Mkdir(dir+"/outside", 0o755),
		os.WriteFile(dir+"/victim", []byte("kept"), 0o600), os.WriteFile(dest+"/victim", []byte("kept"), 0o600),
		os.Symlink("../../outside", dest+"/top/old")); err != nil {
		t.Fatal(err)
	}
	beside := func() map[string]string {
		all := files(t, dir)
		maps.DeleteFunc(all, func(name, _ string) bool { return strings.HasPrefix(name, "dest/top") || name == "dest" })
		return all
	}
	before := beside()
	err := Unpack(strings.NewReader(in), dest, "top")
	if after := beside(); !maps.Equal(before, after) {
		t.Errorf("beside the destination there is %v", after)
	}
	for name, what := range files(t, dest+"/top") {
		plain := what[0] == '-' || strings.HasPrefix(what, "dr") || strings.HasPrefix(what, "d-")
		if !plain || strings.Contains(name, ".gvm-cp-") {
			t.Errorf("%q is %s", name, what)
		}
	}
	return err
}

// FuzzUnpack: no archive reaches files beside its destination, leaves a temporary file, or makes
// more than files, directories and links.
func FuzzUnpack(f *testing.F) {
	for _, in := range hostile {
		if len(in) < 1<<10 { // long ones are slow
			f.Add(in)
		}
	}
	dir := f.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/a", 0o755), os.WriteFile(dir+"/a/b", []byte("x"), 0o600),
		os.Symlink("..", dir+"/c")); err != nil {
		f.Fatal(err)
	}
	var b bytes.Buffer
	if err := Pack(&b, dir, true); err != nil {
		f.Fatal(err)
	}
	f.Add(b.String())
	f.Fuzz(func(t *testing.T, in string) { _ = unpackHostile(t, in) })
}
