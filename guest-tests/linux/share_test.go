package linux

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

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

// TestShare mounts a writable and a read-only directory of the host: the test suite of go-fuse, git in
// a tree of 2,000 files, edits on the host, a program that runs from it, and a pause meanwhile. Then it
// moves data over vsock between the guest's program, which sends all of it back, and this one.
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
		modules:      []string{"virtiofs", "vmw_vsock_virtio_transport"},
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
		Vsock:  e.config(),
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
