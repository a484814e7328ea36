package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"gvm/control"
	"gvm/devices/scsi/trace"
	"gvm/guest/embedded"
	"gvm/inspect"
	"gvm/testrun"
	"gvm/verdict"
	"gvm/vmm"
)

// evil has bytes that must not reach a terminal, an SVG or a line of text: escape sequences in 7
// and 8 bits, a bell, a new line, a tab, a change of the writing direction and invalid UTF-8.
const evil = "a\x1b]0;x\x07\u009b31m\nb\tc\x7f\u202e\ufffe\xff<&"

// harmless fails the test if words are more than lines of printable text.
func harmless(t *testing.T, what, words string) {
	t.Helper()
	if words == "" {
		t.Errorf("%s: nothing", what)
	}
	if !utf8.ValidString(words) {
		t.Errorf("%s: not UTF-8: %q", what, words)
	}
	for line := range strings.Lines(words) {
		if strings.ContainsFunc(strings.TrimSuffix(line, "\n"),
			func(r rune) bool { return r != '\t' && !unicode.IsPrint(r) }) || strings.HasPrefix(line, "b") {
			t.Errorf("%s: %q", what, line)
		}
	}
}

// TestForeignWords: every command that shows words from a file, a path, another machine or the
// kernel's target escapes them.
func TestForeignWords(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, evil)
	write := func(path string, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	header := trace.Header{GVM: evil, Kernel: evil, Start: time.Now(),
		Devices: []trace.Device{{Backend: evil, Disks: []trace.Disk{{Serial: evil, BlockSize: 512}}}}}
	var b bytes.Buffer
	w, err := trace.NewWriter(&b, header, func() time.Duration { return time.Millisecond })
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	write(path, b.Bytes())
	write(path+"2", append(readTestFile(t, "testdata/a.trace"), 1))
	facts, err := json.Marshal(map[string]any{"gvm": evil, "kernel": evil, evil: evil})
	if err != nil {
		t.Fatal(err)
	}
	write(path+".json", facts)
	write(path+"2.json", []byte(`{"kernel":"6"}`))
	write(filepath.Join(dir, "disk"), make([]byte, 1<<20))
	run := func(args ...string) {
		t.Helper()
		c := command(t, args...)
		r := gvmRuns(t, c)
		if r.status == exitBug {
			t.Errorf("gvm %q: status %d", args, r.status)
		}
		harmless(t, strings.Join(args, " "), r.out+r.errs)
	}
	svg := filepath.Join(dir, "x.svg")
	run("trace", "show", path)
	run("trace", "show", path+"2", "--json")
	run("trace", "stat", path, path+"2")
	run("trace", "stat", path, path+"2", "--json")
	run("trace", "diff", path, path+"2")
	run("trace", "diff", path, path+"2", "--json")
	run("trace", "plot", path, path+"2", "-o", svg)
	run("replay", path)
	run("abi", "diff", path+".json", path+"2.json")
	run("image", "info", path)
	run("image", "info", path, "--json")
	run("image", "info", filepath.Join(dir, "no"+evil))
	run("run", "--disk", filepath.Join(dir, "no"+evil), "--timeout=1s")
	run("run", "--kernel", path, "--timeout=1s")
	run("run", "--disk", filepath.Join(dir, "disk")+",error="+evil)
	run("run", evil)
	run(evil)
	run("--" + evil)
	run("run", "--"+evil)
	run("trace", "show", path, "--"+evil)
	run("help", evil)
	// The note names the kernel tree that contains this directory.
	for _, name := range []string{"Kbuild", "MAINTAINERS", "arch/x86/Makefile", "arch/x86/boot/bzImage"} {
		name = filepath.Join(dir, evil+"tree", name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		write(name, nil)
	}
	c := command(t, "run")
	c.Dir = filepath.Join(dir, evil+"tree", "arch")
	r := gvmRuns(t, c)
	harmless(t, "run below a tree", r.out+r.errs)
	if !strings.HasPrefix(r.errs, "gvm: booting ") {
		t.Errorf("no note: %q", r.errs)
	}

	drawn := readTestFile(t, svg)
	for d := xml.NewDecoder(bytes.NewReader(drawn)); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Errorf("the plot: %v", err)
			break
		}
	}
	harmless(t, "the plot", string(drawn))
}

func readTestFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestForeignAnswers: tables escape the answers of other machines and of configfs.
func TestForeignAnswers(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	s, err := control.Claim(control.DefaultDirectory(), "evil")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Serve(evilMachine{})
	for _, args := range []string{"list", "list --json", "disk list", "disk list --json", "disk remove 1", "pause",
		"stat --interval 50ms", "stat --json --interval 50ms",
		"inspect", "inspect --json", "balloon", "balloon --json", "balloon evil 1",
		"console --hvc"} {
		var out, notes bytes.Buffer
		a := app(nil)
		a.Writer, a.ErrWriter = printer(&out), printer(&notes)
		if err := a.Run(append([]string{"gvm"}, strings.Fields(args)...)); err != nil {
			out.WriteString(errorText(err))
		}
		harmless(t, args, out.String()+notes.String())
		if strings.Contains(args, "--json") {
			var v any
			if err := json.Unmarshal(out.Bytes(), &v); err != nil {
				t.Errorf("%s: %v", args, err)
			}
		}
	}

	root := filepath.Join(t.TempDir(), "config", "target")
	disk := filepath.Join(root, "core/fileio_0", strings.ReplaceAll(evil, "/", ""))
	if err := os.MkdirAll(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(disk, "udev_path"), []byte("/srv/"+evil), 0o644); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := lioList(&out, io.Discard, root, false); err != nil {
		t.Fatal(err)
	}
	harmless(t, "lio list", out.String())
	crash := ended(vmm.Outcome{Ending: vmm.GuestCrashed, Err: errors.New(evil), Report: "RIP 0\n" +
		strings.ReplaceAll(evil, "\n", "")})
	if s := errorText(crash); !strings.Contains(s, "\nRIP 0\n") {
		t.Errorf("the report has lost its lines: %q", s)
	} else {
		harmless(t, "crash", strings.Replace(s, "\nb", "", 1))
	}
}

type evilMachine struct{}

func (evilMachine) Stop(control.Stop) (control.Stopped, error) { return control.Stopped{}, nil }
func (evilMachine) Pause(context.Context) error                { return errors.New(evil) }
func (evilMachine) Resume() error                              { return errors.New(evil) }
func (evilMachine) Reset() error                               { return nil }
func (evilMachine) Balloon(context.Context) (control.Balloon, error) {
	return control.Balloon{Stats: inspect.Group("", inspect.Text(evil, evil))}, nil
}
func (evilMachine) ResizeBalloon(control.ResizeBalloon) (control.Balloon, error) {
	return control.Balloon{}, errors.New(evil)
}
func (evilMachine) NMI(context.Context) error         { return nil }
func (evilMachine) SysRq(context.Context, byte) error { return nil }
func (evilMachine) Break()                            {}
func (evilMachine) Console() io.ReadWriteCloser       { return nil }
func (evilMachine) HVC() (io.ReadWriteCloser, error)  { return nil, errors.New(evil) }
func (evilMachine) ResizeHVC(control.TerminalSize) error {
	return errors.New(evil)
}
func (evilMachine) Agent(context.Context) (io.ReadWriteCloser, error) {
	return nil, errors.ErrUnsupported
}
func (evilMachine) Core(context.Context) (io.ReadCloser, error) { return nil, errors.ErrUnsupported }
func (evilMachine) Info() control.Info {
	return control.Info{Name: evil, GVM: evil, Kernel: evil, State: evil}
}
func (evilMachine) Disks() []control.Disk {
	return []control.Disk{{Path: evil, Serial: evil, Backend: evil, Cache: evil, WWN: evil, BlockSize: 512}}
}
func (evilMachine) Inspect(context.Context, string) (inspect.Node, error) {
	queue := inspect.Group("queue", inspect.Group(evil, inspect.Count("requests", 1)))
	return inspect.Group("", inspect.Group(evil, inspect.Text(evil, evil)),
		inspect.Group("vcpu", inspect.Group(evil), inspect.Node{Name: evil, Value: inspect.Busy}),
		inspect.Group("disk", inspect.Group(evil)),
		inspect.Group("pci", inspect.Group(evil, inspect.Group("virtio", queue)))), nil
}
func (m evilMachine) AddDisk(ctx context.Context, _ control.AddDisk) (control.Change, error) {
	return m.RemoveDisk(ctx, "")
}
func (m evilMachine) RemoveDisk(context.Context, string) (control.Change, error) {
	return control.Change{Disk: m.Disks()[0], Guest: evil}, nil
}
func (m evilMachine) ResizeDisk(ctx context.Context, _ string, _ control.ResizeDisk) (control.Change, error) {
	return m.RemoveDisk(ctx, "")
}

// TestNamesOfBytes: files whose names are not UTF-8, or have spaces at their ends, work as kernels,
// initrds and disks, also of a running machine, and messages escape the names.
func TestNamesOfBytes(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "d\xe4")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"one\xff", "two\xff", " three ", "over\xfe"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "kernel\xff"), embedded.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("names-%d", os.Getpid())
	p := startGVM(t, dir, "run", "--name", name, "--kernel", "kernel\xff", "-i", "one\xff", "-i", " three ",
		"--cmdline", "hang", "--disk", "one\xff,serial=ONE", "--disk", " three ,serial=THREE",
		"--disk", "over\xfe,serial=OVER,overlay=layer\xff", "--trace", "trace\xff")
	p.expect("hanging")
	for _, tt := range []struct{ args, want string }{
		{"list", `/d\xe4/kernel\xff`},
		{"list --json", `/d\udce4/kernel\udcff"`},
		{"disk list", `ONE     PATH/d\xe4/one\xff`},
		{"disk list", `/ three ` + "\n"},
		{"disk list --json", `/d\udce4/one\udcff"`},
		{"image info --json one\xff", `/d\udce4/one\udcff"`},
		{"image info --json layer\xff", `/d\udce4/over\udcfe"`},
		{"disk add VM two\xff,serial=TWO", `added LUN 3, PATH/d\xe4/two\xff, serial TWO`},
		{"disk resize VM two\xff 2M", `resized LUN 3, PATH/d\xe4/two\xff, serial TWO, 2 MiB`},
		{"disk remove VM two\xff", `removed LUN 3, PATH/d\xe4/two\xff`},
		{"disk add VM none\xff", `none\xff: file does not exist`},
		{"disk remove VM none\xff", `no disk of this machine has the LUN, serial number or path none\xff; gvm disk list`},
	} {
		args := strings.Fields(strings.ReplaceAll(tt.args, "VM", name))
		if len(args) > 1 && args[1] == "list" {
			args = append(args, name)
		}
		r := ask(t, dir, args...)
		if want := strings.ReplaceAll(tt.want, "PATH", filepath.Dir(dir)); !strings.Contains(r.out+r.errs, want) {
			t.Errorf("%q: %q, %q; want %s", args, r.out, r.errs, want)
		}
		harmless(t, tt.args, r.out+r.errs)
	}
	p.signal(syscall.SIGTERM)
	if r := p.wait(); r.status != exitTerminated {
		t.Errorf("status %d, %q", r.status, r.errs)
	}
	if r := ask(t, dir, "trace", "diff", "--json", "trace\xff", "trace\xff"); r.status != 0 ||
		!strings.Contains(r.out, `"a": "trace\udcff"`) {
		t.Errorf("%+v", r)
	}
}

// TestExplainIsPrintable: a guest that has taken over the process of a matrix's cell writes its
// result.
func TestExplainIsPrintable(t *testing.T) {
	report := verdict.Report{Fails: true}
	report.Fingerprint, report.Text = "\x1b[2J", []string{"\x1b[2J"}
	res := &testrun.Result{Kind: testrun.Fault, Reports: []verdict.Report{report}}
	if s := explain("gvm: ", res); !strings.Contains(s, "fingerprint") || strings.Contains(s, "\x1b") {
		t.Errorf("%q", s)
	}
}
