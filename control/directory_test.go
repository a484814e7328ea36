package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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
	for _, file := range []string{"vm/sock", "vm/lock"} {
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

// TestNamesLikeFiles: machines may have the names of each other's files.
func TestNamesLikeFiles(t *testing.T) {
	d := testDir(t)
	var want []Entry
	for _, name := range []string{"lock", "vm.lock", "vm.sock", "vm.vsock", "vm"} {
		s, err := Claim(d, name)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		want = append(want, Entry{name, os.Getpid()})
	}
	slices.SortFunc(want, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	if list, err := d.List(); err != nil || !reflect.DeepEqual(list, want) {
		t.Errorf("%v, %v, want %v", list, err, want)
	}
	if _, err := Claim(d, "vm"); !errors.Is(err, ErrInUse) {
		t.Error(err)
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

// TestComingAndGoing has machines end while others begin, two of them with one name: the last one
// removes the directory, and the next makes it again.
func TestComingAndGoing(t *testing.T) {
	d := testDir(t)
	var machines sync.WaitGroup
	for i := range 4 {
		machines.Go(func() {
			for range 50 {
				s, err := Claim(d, fmt.Sprint("vm", i/2*2))
				if errors.Is(err, ErrInUse) {
					continue
				}
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

// TestDead: the files of a killed machine are taken over, or removed by the next List. Of its
// directory sockets for ports of the guest stay, as programs of the user listen at them.
func TestDead(t *testing.T) {
	for _, how := range []string{"claim the name", "claim another", "list"} {
		t.Run(how, func(t *testing.T) {
			d := testDir(t)
			for _, dir := range []string{"", "vm", "half", "unlocked", "empty", "kept", "-no-name"} {
				if err := os.Mkdir(filepath.Join(d.path, dir), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			for _, name := range []string{"vm/lock", "vm/sock", "vm/vsock", "half/lock", "unlocked/sock", "kept/lock",
				"kept/vsock_52", "-no-name/lock", "vm.lock", "vm.sock", "vm.vsock", "old.lock", "old.sock", "notes.txt",
				"-no-name.lock"} {
				if err := os.WriteFile(filepath.Join(d.path, name), []byte("4711\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want := []string{"-no-name/lock", "-no-name.lock", "kept/vsock_52", "notes.txt"}
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
			if err := filepath.WalkDir(d.path, func(path string, f fs.DirEntry, err error) error {
				if list, _ := os.ReadDir(path); err == nil && len(list) == 0 {
					left = append(left, strings.TrimPrefix(path, d.path+"/"))
				}
				return err
			}); err != nil || !reflect.DeepEqual(left, want) {
				t.Errorf("left: %q, want %q, %v", left, want, err)
			}
		})
	}
}

// TestLockRemoved: the user has removed the lock of a machine, which does not leave its socket.
func TestLockRemoved(t *testing.T) {
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(d.path, "vm/lock")), s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(d.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}

// TestPortKept: the socket of a program for a port of the guest outlasts the machine, and its
// directory serves the next of the name.
func TestPortKept(t *testing.T) {
	d := testDir(t)
	port := filepath.Join(d.path, "vm/vsock_52")
	if err := errors.Join(os.MkdirAll(filepath.Dir(port), 0o700), os.WriteFile(port, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s, err := Claim(d, "vm")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if left, err := filepath.Glob(d.path + "/*/*"); err != nil || !slices.Equal(left, []string{port}) {
			t.Errorf("left: %v, %v", left, err)
		}
	}
}

// TestOlder: the machine of an older gvm, whose files are side by side, is listed and answers, and
// its name is in use.
func TestOlder(t *testing.T) {
	d := testDir(t)
	s, err := Claim(d, "vm")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"lock", "sock"} {
		if err := os.Rename(filepath.Join(d.path, "vm", file), filepath.Join(d.path, "vm."+file)); err != nil {
			t.Fatal(err)
		}
	}
	s.Serve(newFake())
	if list, err := d.List(); err != nil || !reflect.DeepEqual(list, []Entry{{"vm", os.Getpid()}}) {
		t.Errorf("%v, %v", list, err)
	}
	if i, err := NewClient(d, "vm").Info(t.Context()); err != nil || i.Name != "vm" {
		t.Errorf("%+v, %v", i, err)
	}
	if _, err := Claim(d, "vm"); !errors.Is(err, ErrInUse) {
		t.Errorf("claimed: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if list, err := d.List(); err != nil || list != nil {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := os.Lstat(d.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
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
		"above": {func(path string) error {
			return errors.Join(os.Remove(filepath.Dir(path)), os.WriteFile(filepath.Dir(path), nil, 0o600))
		}, "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			d := testDir(t)
			if err := tt.make(d.path); err != nil {
				t.Fatal(err)
			}
			if _, err := Claim(d, "vm"); err == nil || !strings.Contains(err.Error(), tt.want) ||
				strings.Count(err.Error(), "; remove it")+strings.Count(err.Error(), "; set XDG_RUNTIME_DIR to")+
					strings.Count(err.Error(), "want 0700") != 1 {
				t.Errorf("claimed: %v", err)
			}
			_, asked := NewClient(d, "vm").Info(t.Context())
			if name == "parent" { // there is no machine
				if !errors.Is(asked, ErrNoSocket) {
					t.Errorf("asked: %v", asked)
				}
				return
			}
			if _, err := d.List(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("listed: %v", err)
			}
			if asked == nil || !strings.Contains(asked.Error(), tt.want) {
				t.Errorf("asked: %v", asked)
			}
		})
	}
	if err := private(t.TempDir(), os.Geteuid()+1); err == nil || !strings.Contains(err.Error(), "is not this user's") {
		t.Errorf("another user's: %v", err)
	}
	// A lock file that is a link is not followed.
	d := testDir(t)
	target := filepath.Join(t.TempDir(), "precious")
	if err := errors.Join(os.WriteFile(target, []byte("data"), 0o600), os.MkdirAll(filepath.Join(d.path, "vm"), 0o700),
		os.Symlink(target, filepath.Join(d.path, "vm/lock"))); err != nil {
		t.Fatal(err)
	}
	if _, err := Claim(d, "vm"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("claimed over a link: %v", err)
	}
	if b, err := os.ReadFile(target); err != nil || string(b) != "data" {
		t.Errorf("the link's target: %q, %v", b, err)
	}
	// Nor is a machine's directory that is a link.
	if err := errors.Join(os.RemoveAll(filepath.Join(d.path, "vm")),
		os.Symlink(t.TempDir(), filepath.Join(d.path, "vm"))); err != nil {
		t.Fatal(err)
	}
	if _, err := Claim(d, "vm"); err == nil || !strings.HasSuffix(err.Error(), "/vm is not a directory; remove it") {
		t.Errorf("claimed by a link: %v", err)
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
	dir, err := d.lock(unix.LOCK_EX, true, lockTimeout)
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
	dir, err := d.lock(unix.LOCK_EX, true, lockTimeout)
	if err != nil {
		t.Fatal(err)
	}
	defer d.unlock(dir)
	if err := flock(dir, unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d.path, "dead", lockFile)
	if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("1\n"), 0o600)); err != nil {
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
	if list, err := d.List(); len(list) != 0 || err != nil {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := os.Lstat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the dead machine's directory is left: %v", err)
	}
}

// TestReleaseWaitsForNoLock: a machine's end does not wait for the directory's lock, whose holder
// may be stopped, and removes the machine's files without it.
func TestReleaseWaitsForNoLock(t *testing.T) {
	d := testDir(t)
	lock, l, err := d.claim("vm")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir, err := d.lock(unix.LOCK_EX, true, lockTimeout)
	if err != nil {
		t.Fatal(err)
	}
	defer d.unlock(dir)
	synctest.Test(t, func(t *testing.T) {
		began := time.Now() // of a clock that only waits advance
		if err := d.release("vm", lock); err != nil || time.Now() != began {
			t.Errorf("%v, waited %v", err, time.Since(began))
		}
	})
	if _, err := os.Lstat(d.Machine("vm")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the machine's directory: %v", err)
	}
}
