package machine_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"gvm/guest/embedded/embeddedtest"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/vmm"
)

// errStopped is the cause with which the tests stop a machine.
var errStopped = errors.New("the test stops it")

// screen is a console whose output a test waits for.
type screen struct {
	mu    sync.Mutex
	more  *sync.Cond
	out   []byte
	ended bool
}

func newScreen() *screen {
	s := &screen{}
	s.more = sync.NewCond(&s.mu)
	return s
}

func (s *screen) Connect(vmm.Input) {}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out = append(s.out, p...)
	s.more.Broadcast()
	return len(p), nil
}

// end ends the waits for output that does not come.
func (s *screen) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.more.Broadcast()
}

// shows waits until the output has text n times, and reports whether it has.
func (s *screen) shows(text string, n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for bytes.Count(s.out, []byte(text)) < n && !s.ended {
		s.more.Wait()
	}
	return bytes.Count(s.out, []byte(text)) >= n
}

// text returns the output with the line ends of a file.
func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.ReplaceAll(string(s.out), "\r\n", "\n")
}

// guest is a machine whose guest a test watches.
type guest struct {
	*machine.Machine
	t      *testing.T
	screen *screen
	stop   context.CancelCauseFunc

	mu    sync.Mutex
	notes string
}

// tooLong is the time after which a test gives up waiting: long enough for the lab on a busy host.
const tooLong = 2 * time.Minute

var errTooLong = errors.New("the guest hangs")

// begin starts a machine with the disks, in the grammar of gvm help disk.
func begin(t *testing.T, spec machine.Spec, disks ...string) (*guest, error) {
	t.Helper()
	g := &guest{t: t, screen: newScreen()}
	if spec.Memory.Size == 0 {
		spec.Memory.Size = 64 << 20
	}
	for _, d := range disks {
		parsed, err := disk.Parse(d)
		if err != nil {
			t.Fatal(err)
		}
		spec.Disks = append(spec.Disks, parsed)
	}
	spec.Console = g.screen
	spec.Note = func(s string) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.notes += s + "\n"
	}
	ctx, stop := context.WithCancelCause(context.Background())
	g.stop = stop
	var err error
	if g.Machine, err = machine.Start(ctx, spec); err != nil {
		stop(nil)
		return nil, err
	}
	giveUp := time.AfterFunc(tooLong, func() { stop(errTooLong) })
	go func() {
		<-g.Ended()
		giveUp.Stop()
		g.screen.end()
	}()
	t.Cleanup(func() { stop(errStopped); _, _ = g.Wait() })
	return g, nil
}

// launch starts a machine whose guest gets the words.
func launch(t *testing.T, words string, disks ...string) *guest {
	t.Helper()
	g, err := begin(t, machine.Spec{GuestArgs: strings.Fields(words)}, disks...)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// expect waits until the console shows text n times.
func (g *guest) expect(text string, n int) {
	g.t.Helper()
	if !g.screen.shows(text, n) {
		g.t.Fatalf("not %d times %q on the console:\n%s", n, text, g.screen.text())
	}
}

// wait waits for the end. Outcome.Left depends on the load of the host: TestNothingLeft looks for
// threads that do not end.
func (g *guest) wait() vmm.Outcome {
	g.t.Helper()
	out, err := g.Wait()
	if err != nil || errors.Is(out.Err, errTooLong) {
		g.t.Errorf("%+v, %v:\n%s", out, err, g.screen.text())
	}
	return out
}

// said returns the notes so far.
func (g *guest) said() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.notes
}

// passes runs the embedded guest, which passes its checks, and returns its report and console.
func passes(t *testing.T, words string, disks ...string) (embeddedtest.Report, string) {
	t.Helper()
	g := launch(t, words, disks...)
	out := g.wait()
	report, err := embeddedtest.ParseReport(g.screen.text())
	if err != nil || !report.Passed || out.Ending != vmm.PoweredOff || g.said() != "" {
		t.Fatalf("%+v, %v\n%s%s", out, err, g.screen.text(), g.said())
	}
	return report, g.screen.text()
}

// refused checks that a machine with the disks does not start, for a reason that the user can mend.
func refused(t *testing.T, want string, disks ...string) {
	t.Helper()
	if _, err := begin(t, machine.Spec{}, disks...); !machine.IsConfig(err) || !strings.Contains(err.Error(), want) {
		t.Errorf("%q: %v, want %q", disks, err, want)
	}
}

// image makes a file of n bytes, in which all blocks differ, also from those of an image with
// another seed.
func image(t *testing.T, seed byte, n int) string {
	t.Helper()
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8)*7 ^ byte(i>>16)*13 ^ seed
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
