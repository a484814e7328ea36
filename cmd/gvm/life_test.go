package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"gvm/devices/virtio/fs/hostfs/hostfstest"
	"gvm/guest/embedded"
)

// TestLife: a start or a closing that waits for the host is left once the end was asked for, and
// not before.
func TestLife(t *testing.T) {
	defer theLife.Store(nil)
	cause := errors.New("told to")
	failed := func(err error) string { return err.Error() }
	for name, tt := range map[string]struct {
		f    func(l *life[string], free chan struct{}) string
		want string
	}{
		"no wait": {func(*life[string], chan struct{}) string { return "done" }, "done"},
		"start": {func(l *life[string], free chan struct{}) string {
			l.at("FILE was opened")
			<-free
			return "late"
		}, "told to while FILE was opened"},
		"run": {func(l *life[string], _ chan struct{}) string {
			l.begins()
			<-l.ctx.Done()
			time.Sleep(time.Hour)
			return "ended"
		}, "ended"},
		"closing": {func(l *life[string], free chan struct{}) string {
			l.begins()
			l.ends("ended", true)
			<-free
			return "late"
		}, "ended"},
		"closing, and then the end": {func(l *life[string], free chan struct{}) string {
			l.begins()
			l.ends("ended", false)
			<-free
			return "late"
		}, "ended"},
		"short closing": {func(l *life[string], _ chan struct{}) string {
			l.begins()
			l.ends("ended", true)
			return "closed"
		}, "closed"},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			l, free, got := newLife[string](ctx), make(chan struct{}), make(chan string, 1)
			l.leave = func(time.Duration) {}
			go func() {
				got <- l.run(func() string { return tt.f(l, free) }, failed)
			}()
			synctest.Wait()
			time.Sleep(time.Hour)
			cancel(cause)
			if s := <-got; s != tt.want {
				t.Errorf("%s: %s", name, s)
			}
			close(free)
		})
	}
}

// TestOneEnd: the start, its steps that are urgent, the files for results and a crash record, all
// on storage that does not answer, have one time together after the end was asked for.
func TestOneEnd(t *testing.T) {
	defer theLife.Store(nil)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		free, begin := make(chan struct{}), time.Now()
		l := newLife[error](ctx)
		l.leave = func(patience time.Duration) { time.Sleep(patience) }
		hangs, record := func() error { <-free; return nil }, new(crashRecord)
		cancel(errors.New("told to"))
		steps := []error{
			l.run(hangs, func(err error) error { return err }),
			saveOutputs(true, []*outputFile{{path: "FILE"}}, hangs),
			record.await(make(chan error)),
			record.await(make(chan error)), // which is not tried after that
		}
		if took, want := time.Since(begin), 900*time.Millisecond; took != want { // see nowait.Left
			t.Errorf("took %v, want %v", took, want)
		}
		for i, err := range steps {
			if err == nil {
				t.Errorf("step %d has ended", i)
			}
		}
		close(free)
	})
}

// onStorage are command lines with a path below hung, where a test mounts a file system, and the
// ends while that does not answer.
var onStorage = map[string]struct {
	args    string
	message string // behind the reason; "": it depends on which part is over first
	early   bool   // gvm catches no signals yet, and says nothing
	endless bool   // the command has no --timeout
}{
	"kernel":        {args: "run --kernel hung/file"},
	"initrd":        {args: "run --kernel guest --initrd hung/file"},
	"allow":         {args: "run --oops=fail --allow hung/file"},
	"disk":          {args: "run --disk hung/file"},
	"overlay":       {args: "run --disk disk,overlay=hung/file"},
	"trace":         {args: "run --trace hung/file"},
	"vsock":         {args: "run --vsock path=hung/file", message: " while the socket of --vsock was made"},
	"gdb":           {args: "run --gdb unix:hung/file", message: " while the socket of --gdb was made"},
	"share":         {args: "run --kernel guest --share t=hung"},
	"results":       {args: "run --results hung/file", message: looked, early: true},
	"crash record":  {args: "run --crash-dir hung", message: looked, early: true},
	"kunit results": {args: "kunit --kernel guest --junit hung/file", message: looked, early: true},
	"verdict":       {args: "test -k guest --verdict hung/file -- true", message: looked, early: true},
	"shared":        {args: "test -k guest --rw hung -- true", message: looked, early: true},
	"jail": {args: "run --jail DIR/jail --uid 2001 --gid 2001 --disk DIR/hung/file",
		message: " while the jail was made", early: true},
	"jail's directory": {args: "run --jail DIR/hung --uid 2001 --gid 2001",
		message: " while the jail was made", early: true},
	"matrix": {args: "test -k guest --repeat 2 --junit hung/file -- true", message: looked, early: true},
	"matrix's directory": {args: "test -k guest --repeat 2 --output hung/file -- true", message: looked,
		early: true},
	"program":      {args: "test -k guest -- ./hung/file", message: " while the command was looked up"},
	"file":         {args: "test -k guest --file hung/file -- true", message: " while the guest's files were read"},
	"log":          {args: "test -k guest --klog hung/file -- true"},
	"image create": {args: "image create hung/file 1M", early: true, endless: true},
	"image info":   {args: "image info hung/file", early: true, endless: true},
	"kernel check": {args: "kernel check hung/file", early: true, endless: true},
	"replay":       {args: "replay hung/file", early: true, endless: true},
	"bench":        {args: "bench disk --disk hung/file", message: ", before the orderly end was over", endless: true},
}

const looked = " while the files of the command line were looked at"

// onStorageDir returns the directory of a command of onStorage, without the file system yet.
func onStorageDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range map[string][]byte{"guest": embedded.Image, "disk": make([]byte, 1<<20)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "jail"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestDeafStorage: a signal or --timeout ends each command while a path of its command line is on
// storage that does not answer.
func TestDeafStorage(t *testing.T) {
	for name, tt := range onStorage {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if strings.Contains(tt.args, "--jail") {
				needsJail(t)
			}
			for _, timeout := range []bool{false, true} {
				if timeout && tt.endless {
					continue
				}
				dir := onStorageDir(t)
				m := hostfstest.MountMortal(t, filepath.Join(dir, "hung"))
				m.Strike()
				args := strings.Fields(strings.ReplaceAll(tt.args, "DIR", dir))
				status, want := 143, "stopped by SIGTERM"+tt.message
				if timeout {
					args = slices.Insert(args, 1, "--timeout=500ms")
					status, want = exitTimeout, "elapsed"+tt.message
				} else if tt.early {
					want = ""
				}
				p := startGVM(t, dir, args...)
				if !m.Asked(tooLong) {
					t.Fatal("it does not look at the file")
				}
				if !timeout {
					p.signal(syscall.SIGTERM)
				}
				if r := p.wait(); r.status != status || !strings.Contains(r.errs, want) || want == "" && r.errs != "" {
					t.Errorf("with --timeout %v: status %d: %s", timeout, r.status, r.errs)
				}
			}
		})
	}
}

// TestDeafRead: the end of its context ends readInput when the storage stops to answer after the
// open, and the error names the file.
func TestDeafRead(t *testing.T) {
	for answers := range 2 {
		dir := filepath.Join(t.TempDir(), "hung")
		m := hostfstest.MountMortal(t, dir)
		m.StrikeAfter(answers + 1)
		ctx, stop := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := readInput(ctx, filepath.Join(dir, "file"), 1<<20)
			done <- err
		}()
		<-m.Struck()
		if !m.Asked(tooLong) {
			t.Fatal("it does not read the file")
		}
		stop(errors.New("stopped"))
		select {
		case err := <-done:
			if want := "stopped while " + dir + "/file was "; err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%v; want %s", err, want)
			}
		case <-time.After(tooLong):
			t.Fatal("the read has no end")
		}
	}
}

// TestNoPoll: the commands ask the server of a FUSE file system for no POLL, for which Go's
// scheduler would wait, neither of a file that is there nor of a new one.
func TestNoPoll(t *testing.T) {
	for name, tt := range onStorage {
		if strings.Contains(tt.args, " hung/file") || strings.Contains(tt.args, "=hung/file") {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				for _, there := range []bool{true, false} {
					var made, polled atomic.Bool
					var opened atomic.Int32
					made.Store(there)
					dir := onStorageDir(t)
					hostfstest.Mount(t, filepath.Join(dir, "hung"), func(opcode uint32) unix.Errno {
						switch opcode {
						case hostfstest.Lookup:
							if !made.Load() {
								return unix.ENOENT
							}
						case hostfstest.Create:
							made.Store(true)
							opened.Add(1)
						case hostfstest.Open:
							opened.Add(1)
						case hostfstest.Poll:
							polled.Store(true)
						}
						return 0
					})
					r := startGVM(t, dir, strings.Fields(tt.args)...).wait()
					if polled.Load() {
						t.Errorf("file there: %v: the server was asked for POLL", there)
					}
					t.Logf("file there: %v: opened %d times, status %d: %s", there, opened.Load(), r.status, r.errs)
				}
			})
		}
	}
}

// TestDeafResults: a signal ends a run whose files for results, or other files that it still has
// open, are by then on storage that does not answer.
func TestDeafResults(t *testing.T) {
	for _, tt := range []struct{ name, args, said string }{
		{"results", "run --guest-arg spin --results hung/file",
			"stopped by SIGTERM\nthe storage does not answer while hung/file was written\n"},
		{"junit", "run --guest-arg spin --junit hung/file",
			"stopped by SIGTERM\nthe storage does not answer while hung/file was written\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			m := hostfstest.MountMortal(t, filepath.Join(dir, "hung"))
			p := startGVM(t, dir, strings.Fields(tt.args)...)
			p.expect("gvm embedded guest")
			m.Strike()
			p.signal(syscall.SIGTERM)
			if r := p.wait(); r.status != 143 || !strings.HasSuffix(r.errs, "gvm: "+tt.said) {
				t.Errorf("status %d: %s", r.status, r.errs)
			}
		})
	}
}

// TestDeafOutput: a signal ends a matrix whose --output is on storage that stops to answer when a
// machine's output is to be made, or its verdict.
func TestDeafOutput(t *testing.T) {
	for _, suffix := range []string{".out", ".verdict.json"} {
		t.Run(suffix[1:], func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			m := hostfstest.MountMortal(t, filepath.Join(dir, "hung"))
			m.StrikeAfterLookup("exit0-run1" + suffix)
			p := startGVM(t, dir, "test", "-k", exitKernel(t, 0), "--repeat", "2", "-j", "1", "--output", "hung/out",
				"--", "sh")
			p.eventually("the storage stops to answer", func() bool {
				select {
				case <-m.Struck():
					return true
				default:
					return false
				}
			})
			if !m.Asked(tooLong) {
				t.Fatal("it does not make the file")
			}
			p.signal(syscall.SIGTERM)
			const why = "--output: stopped by SIGTERM while hung/out/exit0-run1.verdict.json was written\n"
			if r := p.wait(); r.status != exitTerminated || !strings.Contains(r.out, why) ||
				!strings.HasSuffix(r.out, "2 cells: 0 passed, 1 not tested, 1 not run\n") {
				t.Errorf("status %d:\n%s\n%s", r.status, r.out, r.errs)
			}
		})
	}
}

// TestSignalAfterLeave: a second signal ends the process also when a life was left: nothing of what
// it takes is locked.
func TestSignalAfterLeave(t *testing.T) {
	removed := 0
	removeAtEnd(func() error { removed++; return nil })
	leave(tidyPatience)
	urgent.Lock() // waits for ever if leave has it
	defer urgent.Unlock()
	if removed != 1 || urgent.remove != nil || giveUp(nil) {
		t.Errorf("removed %d times, %d steps are left", removed, len(urgent.remove))
	}
}
