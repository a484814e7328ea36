package hostfs_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"gvm/devices/virtio/fs/hostfs"
)

// Variables of the process that serves a mount. It is not the process that uses it: while the
// kernel waits for an answer, Go may wait for the thread that waits for the kernel.
const (
	serveTree  = "HOSTFS_TEST_SERVE"
	serveFiles = "HOSTFS_TEST_FILES"
)

func TestMain(m *testing.M) {
	if tree := os.Getenv(serveTree); tree != "" {
		if err := serve(tree); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serve serves the FUSE device that is descriptor 3.
func serve(tree string) error {
	files, err := strconv.Atoi(os.Getenv(serveFiles))
	if err != nil {
		return err
	}
	fs, err := hostfs.Open(hostfs.Config{Dir: tree, Files: files, Valid: time.Millisecond})
	if err != nil {
		return err
	}
	var servers sync.WaitGroup
	var failed atomic.Pointer[error]
	for range 4 {
		servers.Go(func() {
			in, out := make([]byte, 2<<20), make([]byte, 2<<20)
			for {
				n, err := unix.Read(3, in)
				switch err {
				case unix.EINTR, unix.ENOENT, unix.EAGAIN:
					continue
				case nil:
				default:
					return // unmounted
				}
				if n, err = fs.Serve([][]byte{in[:n]}, [][]byte{out[:100], out[100:]}); err != nil {
					failed.Store(&err)
				} else if n > 0 {
					unix.Write(3, out[:n]) // ENOENT: the request was interrupted
				}
			}
		})
	}
	servers.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	fs.Close()
	if c := fs.Counts(); c.Files != 0 {
		return fmt.Errorf("after the unmount: %+v", c)
	}
	return nil
}

// mount mounts a tree that hostfs serves to this machine's kernel.
func mount(t *testing.T, tree string, files int) string {
	t.Helper()
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	defer dev.Close()
	dir := t.TempDir()
	if err := unix.Mount("hostfs", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV,
		fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", dev.Fd())); err != nil {
		t.Skipf("needs to mount: %v", err)
	}
	server := exec.Command(os.Args[0])
	server.Env = append(os.Environ(), serveTree+"="+tree, fmt.Sprint(serveFiles, "=", files))
	server.Stderr, server.ExtraFiles = os.Stderr, []*os.File{dev}
	err = server.Start()
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(dir, unix.MNT_DETACH), server.Wait()); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestPosix runs go-fuse's tests for any file system.
func TestPosix(t *testing.T) {
	dir := mount(t, t.TempDir(), 0)
	for name, test := range posixtest.All {
		// Its own author skips the first; the second races with itself on any file system.
		if slices.Contains([]string{"FcntlFlockLocksFile", "OpenSymlinkRace"}, name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			sub := filepath.Join(dir, name)
			if err := os.Mkdir(sub, 0o755); err != nil {
				t.Fatal(err)
			}
			test(t, sub)
		})
	}
}

// TestGit runs git in a tree of 2,000 files, and edits it on the host.
func TestGit(t *testing.T) {
	t.Run("2000 files", func(t *testing.T) { testGit(t, 2000, 0) })
	t.Run("few descriptors", func(t *testing.T) { testGit(t, 300, 64) })
}

func testGit(t *testing.T, count, files int) {
	host := t.TempDir()
	dir := mount(t, host, files)
	git := func(args ...string) string {
		t.Helper()
		options := []string{"-c", "safe.directory=*", "-c", "core.fsync=none", "-c", "user.name=a", "-c", "user.email=a@b"}
		c := exec.Command("git", append(options, args...)...)
		c.Dir = dir
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	for i := range count {
		path := filepath.Join(dir, fmt.Sprint(i%40), fmt.Sprint(i))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(path), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	git("init", "-q")
	git("add", ".")
	git("commit", "-q", "-m", "all")
	if out := git("status", "--porcelain"); out != "" {
		t.Errorf("after the commit: %s", out)
	}
	if err := os.WriteFile(filepath.Join(host, "7", "7"), []byte("edited"), 0o644); err != nil {
		t.Fatal(err)
	}
	for out := ""; out == ""; { // until the attributes are not valid any longer
		if out = git("status", "--porcelain"); out != "" && out != " M 7/7\n" {
			t.Errorf("after an edit on the host: %q", out)
		}
	}
}
