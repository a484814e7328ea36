package linux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio/fs"
	"gvm/devices/virtio/vsock"
	"gvm/guest-tests/lab"
	"gvm/guestmem"
	"gvm/machine"
	"gvm/vmm"
)

// watcher is the console of a guest. It calls when for each line of a script's say, with the words.
type watcher struct {
	mu   sync.Mutex
	all  bytes.Buffer
	line []byte
	when func(words string)
}

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all.Write(p)
	for _, c := range p {
		if c != '\n' {
			w.line = append(w.line, c)
			continue
		}
		if words, ok := strings.CutPrefix(strings.TrimSpace(string(w.line)), "= "); ok {
			w.when(words)
		}
		w.line = w.line[:0]
	}
	return len(p), nil
}

// TestShare mounts a writable and a read-only directory of the host: the test suite of go-fuse, git
// in a tree of 2,000 files, edits on the host, a program that runs from it, and a pause meanwhile.
// Then it moves data over vsock between the guest's program, which sends all of it back, and this
// one.
func TestShare(t *testing.T) {
	host := t.TempDir()
	tree, posix := filepath.Join(host, "tree"), filepath.Join(host, "posix")
	for i := range 2000 {
		writeFile(t, filepath.Join(tree, fmt.Sprint(i%40), fmt.Sprint(i)), fmt.Sprint("file ", i))
	}
	for _, args := range []string{"init -q", "add .", "commit -q -m all"} {
		c := exec.Command("git", strings.Fields("-c user.name=a -c user.email=a@b "+args)...)
		c.Dir = tree
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	indexFile := filepath.Join(tree, ".git", "index") // a guest's git rewrites it
	index, err := os.ReadFile(indexFile)
	must(t, err)
	for _, name := range []string{"cloud", "5.10", "7.3"} {
		writeFile(t, filepath.Join(host, "edited"), "old")
		writeFile(t, filepath.Join(tree, "7", "7"), "file 7")
		must(t, errors.Join(os.WriteFile(indexFile, index, 0o644), os.RemoveAll(filepath.Join(host, "made")),
			os.RemoveAll(posix), os.Mkdir(posix, 0o755)))
		t.Run(name, func(t *testing.T) { testShare(t, name, host) })
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	must(t, errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o755)))
}

func testShare(t *testing.T, name, host string) {
	ref := t.TempDir()
	writeFile(t, filepath.Join(ref, "program"), "#!/bin/sh\necho = runs\n")
	writeFile(t, filepath.Join(ref, "data"), string(content("share", 5<<20)))
	const streams = 20
	e := vsockEcho{T: t, accepted: make(chan *vsock.Conn, streams)}
	g := guest{
		kernel:       kernel(t, name),
		modules:      []string{"virtiofs", "vmw_vsock_virtio_transport", "virtio_balloon"},
		files:        map[string]string{"bin/posixtest": lab.Program("posixtest"), "bin/vsockecho": lab.Program("vsockecho")},
		hostPrograms: []string{"/usr/bin/git"},
		script: `
export HOME=/ GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
mkdir -p /rw /ro /tmp
mount -t virtiofs rw /rw && mount -t virtiofs ro /ro && say mounted
cd /rw/tree
say status "$(git status --porcelain | wc -l)"
cd /
echo guest >/rw/made && say edit
until [ "$(cat /rw/edited)" = new ]; do sleep 0.1; done
say edited
cd /rw/tree
until [ "$(git status --porcelain)" = " M 7/7" ]; do sleep 0.1; done
say "modified"
cd /
/ro/program
say sum "$(sum /ro/data)"
touch /ro/data 2>/dev/null || say refused
umount /ro && mount -t virtiofs ro /ro && say sum "$(sum /ro/data)"
DIR=/rw/posix posixtest && say posix ok
umount /ro; umount /rw && say unmounted
` + rebindVsock + fmt.Sprintf("vsockecho -connect %d && say echoed\nklog", streams),
	}
	var m *machine.Machine
	started := make(chan struct{})
	console := &watcher{when: func(words string) {
		<-started
		switch words {
		case "edit":
			// A new file takes the place of the old one, as editors do it.
			writeFile(t, filepath.Join(host, "next"), "new")
			if err := os.Rename(filepath.Join(host, "next"), filepath.Join(host, "edited")); err != nil {
				t.Error(err)
			}
			writeFile(t, filepath.Join(host, "tree", "7", "7"), "another text")
		case "modified":
			go func() {
				if err := errors.Join(m.Pause(t.Context()), m.Resume()); err != nil {
					t.Error(err)
				}
			}()
		}
	}}
	m = g.launch(t, machine.Spec{
		Memory: guestmem.Config{Size: 512 << 20}, Console: machine.Output(console),
		Shares: []fs.Share{{Tag: "rw", Dir: host}, {Tag: "ro", Dir: ref, ReadOnly: true}},
		Vsock:  e.config(), Balloon: true,
	})
	close(started)
	e.m = m
	t.Run("vsock", func(t *testing.T) {
		e.T = t
		e.all(streams)
	})
	if t.Failed() {
		m.Stop(errors.New("the test failed"), 0)
	}
	out, err := m.Wait()
	r := result{console: strings.ReplaceAll(console.all.String(), "\r", "")}
	if err != nil || out.Ending != vmm.PoweredOff {
		r.fatalf(t, "%v, %v, %v", out.Ending, out.Err, err)
	}
	data := "sum " + sum(content("share", 5<<20))
	for _, want := range []string{"mounted", "status 0", "edited", "modified", "runs", data, "refused",
		data + "\n(.*\n)*= posix ok", "unmounted", "rebound", "echoed"} {
		if ok, _ := regexp.MatchString("(?m)^= "+want+"$", r.console); !ok {
			t.Errorf("no %q on the console", want)
		}
	}
	if text, err := os.ReadFile(filepath.Join(host, "made")); string(text) != "guest\n" {
		t.Errorf("the guest's file: %q, %v", text, err)
	}
	if t.Failed() {
		r.fatalf(t, "see above")
	}
	r.kernelLog(t, 1)
}

// TestEscapes: a guest's root tries to leave the directories that it shares, in 35 ways. None of
// them gets at a file outside, and none makes one that gives a program of the host rights.
func TestEscapes(t *testing.T) { testEscapes(t, 0) }

// TestEscapesOfUser does the same with an ordinary user's gvm, whose files those outside are as
// well.
func TestEscapesOfUser(t *testing.T) { testEscapes(t, 65534) }

func testEscapes(t *testing.T, uid int) {
	needsRoot(t, "a test of one user's gvm by another")
	const attempts = 35
	base := t.TempDir()
	dir := func(name ...string) string { return filepath.Join(append([]string{base}, name...)...) }
	must(t, errors.Join(os.Chmod(filepath.Dir(base), 0o755),
		os.Mkdir(dir("rw"), 0o755), os.Mkdir(dir("outside"), 0o755), os.Mkdir(dir("rw/moves"), 0o755),
		os.Symlink("../outside", dir("rw/relative")), os.Symlink(dir("outside"), dir("rw/absolute")),
		os.Symlink("../outside", dir("rw/exchanged")), unix.Mkfifo(dir("rw/fifo"), 0o666)))
	writeFile(t, dir("rw/file"), "#!/bin/sh\n")
	writeFile(t, dir("rw/dir/file"), "")
	writeFile(t, dir("ro/file"), "read-only")
	outside := map[string]string{"moves": ""}
	for i := 1; i <= attempts; i++ {
		name := fmt.Sprint(i)
		outside[name] = "secret " + name
		writeFile(t, dir("outside", name), outside[name])
		writeFile(t, dir("rw/other", name), "inside")
	}
	fifo, err := unix.Open(dir("rw/fifo"), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fifo)
	socket, err := net.Listen("unix", dir("rw/socket"))
	must(t, err)
	defer socket.Close()
	must(t, filepath.WalkDir(base, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, uid, uid))
	}))

	// The host exchanges a directory and a link, and moves a directory when the guest asks for it.
	ctx, stop := context.WithCancel(t.Context())
	hostDone := make(chan error, 1)
	go func() {
		for {
			err := unix.Renameat2(unix.AT_FDCWD, dir("rw/exchanged"), unix.AT_FDCWD, dir("rw/other"), unix.RENAME_EXCHANGE)
			if os.Remove(dir("rw/move")) == nil {
				err = errors.Join(err, os.Rename(dir("rw/moves"), dir("outside/moves")))
			}
			if err != nil || ctx.Err() != nil {
				hostDone <- err
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	r := asUser(t, uid, theLab(t).Cloud, "escapes", []string{dir("rw"), dir("ro"), dir("outside")},
		"--timeout", "2m", "--rw", dir("rw"), "--ro", dir("ro"))
	stop()
	must(t, <-hostDone)
	if r.status != 0 {
		r.fatalf(t, "exit status %d, want 0", r.status)
	}
	for _, line := range strings.Split(strings.TrimSuffix(r.console, "\n"), "\n") {
		attempt, result, _ := strings.Cut(line, ": ")
		number, name, _ := strings.Cut(attempt, " ")
		t.Run(name, func(t *testing.T) {
			if result != "refused" {
				t.Error(result)
			}
			if b, err := os.ReadFile(dir("outside", number)); string(b) != outside[number] {
				t.Errorf("its file outside has %q, want %q; %v", b, outside[number], err)
			}
			delete(outside, number)
		})
	}
	if len(outside) != 1 {
		r.fatalf(t, "no attempt of %v", outside)
	}
	left, err := os.ReadDir(dir("outside"))
	if err != nil || len(left) != attempts+1 {
		t.Errorf("outside has %d entries, want %d; %v", len(left), attempts+1, err)
	}
	if b, err := os.ReadFile(dir("ro/file")); string(b) != "read-only" {
		t.Errorf("the read-only file has %q; %v", b, err)
	}
	if n, err := unix.Read(fifo, make([]byte, 10)); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("%d bytes from the FIFO, %v", n, err)
	}
	must(t, filepath.WalkDir(base, func(path string, e os.DirEntry, err error) error {
		info, statErr := os.Lstat(path)
		if statErr == nil && info.Mode()&(os.ModeSetuid|os.ModeSetgid|os.ModeDevice) != 0 {
			t.Errorf("%s: %v", path, info.Mode())
		}
		return errors.Join(err, statErr)
	}))
}

// asUser runs gvm test, with a program of the test's as the command, as a user of the host with no
// right but that to use KVM. The files that the user cannot reach are mounted where it can.
func asUser(t *testing.T, uid int, k *lab.Kernel, program string, programArgs []string, args ...string) result {
	t.Helper()
	info, err := os.Stat("/dev/kvm")
	if err == nil && os.Getenv(lab.InLabEnv) == "1" {
		err = os.Chmod("/dev/kvm", 0o660) // as udev does
	}
	must(t, err)
	open := func() string { // a directory
		dir := t.TempDir()
		must(t, errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Chown(dir, uid, uid)))
		return dir
	}
	visible := func(path string) string {
		at := filepath.Join(open(), filepath.Base(path))
		info, err := os.Stat(path)
		must(t, err)
		if info.IsDir() {
			err = os.Mkdir(at, 0o755)
		} else {
			err = os.WriteFile(at, nil, 0o644)
		}
		must(t, errors.Join(err, unix.Mount(path, at, "", unix.MS_BIND, "")))
		t.Cleanup(func() { must(t, unix.Unmount(at, 0)) })
		return at
	}
	tree := filepath.Dir(filepath.Dir(k.BZImage))
	image := filepath.Join(visible(tree), strings.TrimPrefix(k.BZImage, tree))
	own, id := open(), fmt.Sprint(uid)
	args = append([]string{"--reuid", id, "--regid", id, "--groups", fmt.Sprint(info.Sys().(*syscall.Stat_t).Gid),
		"--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "env", "HOME=" + own, "XDG_RUNTIME_DIR=" + own,
		visible(lab.Program("gvm")), "test", "-k", image, "-a", "quiet"}, args...)
	args = append(args, "--", visible(lab.Program(program)))
	return startProgram(t, "/usr/bin/setpriv", nil, own, append(args, programArgs...)...).wait()
}
