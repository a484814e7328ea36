package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestClaim: one machine takes a name; requests wait for Serve; closing removes a socket that was
// claimed and never served.
func TestClaim(t *testing.T) {
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"vm.sock", "vm.lock"} {
		if fi, err := os.Stat(filepath.Join(d.path, file)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", file, fi.Mode(), err)
		}
	}
	if _, err := Claim(d, "vm"); !errors.Is(err, ErrInUse) ||
		err.Error() != fmt.Sprintf("control socket: the name vm is in use by process %d", os.Getpid()) {
		t.Errorf("claimed twice: %v", err)
	}
	asked := make(chan error, 1)
	go func() {
		_, err := NewClient(d, "vm").Info(context.Background())
		asked <- err
	}()
	s.Serve(newFake())
	if err := <-asked; err != nil {
		t.Error(err)
	}
	other, err := Claim(d, "other")
	if err != nil {
		t.Fatal(err)
	}
	want := []Entry{{"other", os.Getpid()}, {"vm", os.Getpid()}}
	if list, err := d.List(); err != nil || !reflect.DeepEqual(list, want) {
		t.Errorf("%v, %v, want %v", list, err, want)
	}
	for _, s := range []*Server{s, other} {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if list, err := d.List(); err != nil || list != nil {
		t.Errorf("%v, %v", list, err)
	}
}

// TestClaimOnce: of many claims of one name at a time one succeeds.
func TestClaimOnce(t *testing.T) {
	d := testDir(t)
	for range 20 {
		var claims sync.WaitGroup
		got := make(chan *Server, 8)
		for range cap(got) {
			claims.Go(func() {
				s, err := Claim(d, "vm")
				if err == nil {
					got <- s
				} else if !errors.Is(err, ErrInUse) {
					t.Error(err)
				}
				if _, err := d.List(); err != nil {
					t.Error(err)
				}
			})
		}
		claims.Wait()
		if len(got) != 1 {
			t.Fatalf("%d claims of one name succeeded", len(got))
		}
		if err := (<-got).Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestComingAndGoing has machines end while others begin: the last one removes the directory, and
// the next makes it again.
func TestComingAndGoing(t *testing.T) {
	d := testDir(t)
	var machines sync.WaitGroup
	for i := range 4 {
		machines.Go(func() {
			for range 50 {
				s, err := Claim(d, fmt.Sprint("vm", i))
				if err != nil {
					t.Error(err)
					return
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	machines.Wait()
	if _, err := os.Lstat(d.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}

// TestDead: the files of a killed machine are taken over, or removed by the next List.
func TestDead(t *testing.T) {
	for _, how := range []string{"claim the name", "claim another", "list"} {
		t.Run(how, func(t *testing.T) {
			d := testDir(t)
			if err := os.Mkdir(d.path, 0o700); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"vm.lock", "vm.sock", "vm.vsock", "half.lock", "notes.txt", "-no-name.lock"} {
				if err := os.WriteFile(filepath.Join(d.path, name), []byte("4711\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want := []string{"-no-name.lock", "notes.txt"} // not the Directory's files
			var list []Entry
			switch name := map[string]string{"claim the name": "vm", "claim another": "other"}[how]; name {
			case "":
				var err error
				if list, err = d.List(); err != nil || list != nil {
					t.Errorf("%v, %v", list, err)
				}
			default:
				s, err := Claim(d, name)
				if err != nil {
					t.Fatal(err)
				}
				s.Serve(newFake())
				if _, err := NewClient(d, name).Info(t.Context()); err != nil {
					t.Error(err)
				}
				if list, err := d.List(); err != nil || !reflect.DeepEqual(list, []Entry{{name, os.Getpid()}}) {
					t.Errorf("%v, %v", list, err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
			var left []string
			files, err := os.ReadDir(d.path)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				left = append(left, f.Name())
			}
			if !reflect.DeepEqual(left, want) {
				t.Errorf("left: %q, want %q", left, want)
			}
		})
	}
}

// TestDirectoryTricks: a directory that other users made, or a file that is not a directory, is not
// used.
func TestDirectoryTricks(t *testing.T) {
	for name, tt := range map[string]struct {
		make func(path string) error
		want string
	}{
		"link":     {func(path string) error { return os.Symlink(t.TempDir(), path) }, "is not a directory"},
		"dangling": {func(path string) error { return os.Symlink("/nonexistent", path) }, "is not a directory"},
		"file":     {func(path string) error { return os.WriteFile(path, nil, 0o600) }, "is not a directory"},
		"open": {func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, 0o755)) },
			"has mode 0755: others can get into it"},
		"parent": {func(path string) error { return os.Remove(filepath.Dir(path)) }, "no such file or directory"},
	} {
		t.Run(name, func(t *testing.T) {
			d := testDir(t)
			if err := tt.make(d.path); err != nil {
				t.Fatal(err)
			}
			if _, err := Claim(d, "vm"); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("claimed: %v", err)
			}
			if name != "parent" {
				if _, err := d.List(); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("listed: %v", err)
				}
			}
			if _, err := NewClient(d, "vm").Info(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("asked: %v", err)
			}
		})
	}
	if err := private(t.TempDir(), os.Geteuid()+1); err == nil || !strings.Contains(err.Error(), "is not this user's") {
		t.Errorf("another user's: %v", err)
	}
	// A lock file that is a link is not followed.
	d := testDir(t)
	target := filepath.Join(t.TempDir(), "precious")
	if err := errors.Join(os.WriteFile(target, []byte("data"), 0o600), os.Mkdir(d.path, 0o700),
		os.Symlink(target, filepath.Join(d.path, "vm.lock"))); err != nil {
		t.Fatal(err)
	}
	if _, err := Claim(d, "vm"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("claimed over a link: %v", err)
	}
	if b, err := os.ReadFile(target); err != nil || string(b) != "data" {
		t.Errorf("the link's target: %q, %v", b, err)
	}
}

func TestDefaultDirectory(t *testing.T) {
	uid := strconv.Itoa(os.Geteuid())
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	t.Setenv("XDG_RUNTIME_DIR", "/some/where")
	if d := DefaultDirectory(); d.path != "/some/where/gvm" {
		t.Error(d)
	}
	for _, unusable := range []string{"", "relative"} {
		t.Setenv("XDG_RUNTIME_DIR", unusable)
		want := filepath.Join(temp, "gvm-"+uid)
		if private("/run/user/"+uid, os.Geteuid()) == nil {
			want = "/run/user/" + uid + "/gvm"
		}
		if d := DefaultDirectory(); d.path != want {
			t.Errorf("%q, want %q", d.path, want)
		}
	}
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"a", "gvm-1", "0x", "A.b_c-9", strings.Repeat("x", maxName)} {
		if err := CheckName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "1", "4711", ".", "..", ".a", "-a", "a/b", "a b", "ä", "a\x00",
		strings.Repeat("x", maxName+1)} {
		if err := CheckName(name); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
		if _, err := Claim(testDir(t), name); !errors.Is(err, ErrName) {
			t.Errorf("claimed %q: %v", name, err)
		}
	}
}

// TestLockHeld: the wait for a directory's lock is bounded, as its holder may be stopped.
func TestLockHeld(t *testing.T) {
	d := testDir(t)
	dir, err := d.lock(unix.LOCK_EX, true)
	if err != nil {
		t.Fatal(err)
	}
	defer d.unlock(dir)
	_, err = d.List() // hangs if it waits for the lock without a limit
	if err == nil || !strings.Contains(err.Error(), d.path+": another process has held its lock") {
		t.Errorf("list: %v", err)
	}
}

// TestListsTogether: lists do not wait for each other, nor does one see the other's look at a dead
// machine's lock as a live machine.
func TestListsTogether(t *testing.T) {
	d := testDir(t)
	dir, err := d.lock(unix.LOCK_EX, true)
	if err != nil {
		t.Fatal(err)
	}
	defer d.unlock(dir)
	if err := flock(dir, unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d.path, "dead"+lockSuffix)
	if err := os.WriteFile(path, []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := flock(other, unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	if list, dead, err := d.list(unix.LOCK_SH); len(list) != 0 || !dead || err != nil {
		t.Errorf("%v, dead %v, %v", list, dead, err)
	}
}
