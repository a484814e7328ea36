package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"gvm/control"
)

// ask runs a gvm command about machines, in the directory dir.
func ask(t *testing.T, dir string, args ...string) result {
	t.Helper()
	c := command(t, args...)
	c.Dir = dir
	return gvmRuns(t, c)
}

// awaitHalt waits until the first CPU of a machine has halted, which it does after the guest's
// words.
func awaitHalt(t *testing.T, name string) {
	t.Helper()
	for {
		r := ask(t, t.TempDir(), "inspect", name, "vcpu/0/mp_state")
		switch {
		case r.status == 0 && r.out == "vcpu/0/mp_state halted\n":
			return
		case r.status != 0 && !strings.Contains(r.errs, "the machine does not run now"):
			t.Fatalf("inspect: status %d, %q, %q", r.status, r.out, r.errs)
		}
	}
}

// errsOf returns the messages without gvm list's notes about machines of other tests, which end
// meanwhile.
func errsOf(name, errs string) string {
	return regexp.MustCompile(`(?m)^note: machine .*\n`).ReplaceAllStringFunc(errs, func(note string) string {
		if strings.HasPrefix(note, "note: machine "+name+" ") {
			return note
		}
		return ""
	})
}

// TestDiskCommands runs gvm disk on a machine with an idle guest.
func TestDiskCommands(t *testing.T) {
	t.Parallel()
	testDiskCommands(t, fmt.Sprintf("disks-%d", os.Getpid()), "off")
}

// TestDiskCommandsSandbox does the same in the sandbox, where the broker opens the files, but for
// all but disks.
func TestDiskCommandsSandbox(t *testing.T) {
	t.Parallel()
	testDiskCommands(t, fmt.Sprintf("sandboxed-%d", os.Getpid()), "on")
}

func testDiskCommands(t *testing.T, name, sandbox string) {
	dir := t.TempDir()
	for _, name := range []string{"one.img", "two.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Link(filepath.Join(dir, "one.img"), filepath.Join(dir, "linked.img")),
		os.WriteFile(filepath.Join(dir, "run.trace"), []byte("gvm-trace 1\n{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	p := startGVM(t, dir, guestRun("--name="+name, "--disk=one.img,serial=ONE", "--sandbox="+sandbox, "hang")...)
	p.expect("hanging")
	awaitHalt(t, name)
	pid := fmt.Sprint(p.cmd.Process.Pid)
	one, two := filepath.Join(dir, "one.img"), filepath.Join(dir, "two.img")
	for _, v := range []struct {
		args   string // VM is the machine's name
		status int
		out    string
		errs   string // parts
	}{
		{"list", 0, "VM", ""},
		{"pause VM", 0, "", ""},
		{"list", 0, " paused ", ""},
		{"pause " + pid, 2, "", "machine VM is paused already"},
		{"disk list VM", 0, one, ""},
		{"inspect VM", 0, "pci/00:01.0/virtio/device_status 0x", ""},
		{"inspect VM paused", 0, "paused true\n", ""},
		{"inspect " + pid + " disk/0/path", 0, "disk/0/path " + one + "\n", ""},
		{"inspect VM disk/0/ --json", 0, `"serial": "ONE",`, ""},
		{"inspect VM vcpu/0/mp_state --json", 0, `"halted"` + "\n", ""},
		{"inspect VM pause", 2, "", `no "pause" in the machine; did you mean paused?`},
		{"inspect VM disk/9", 2, "", `no "9" in disk, which has 0`},
		{"inspect VM disk 0", 2, "", "inspect takes [VM] [PATH], and got 3 words"},
		{"resume VM", 0, "", ""},
		{"list", 0, " running ", ""},
		{"resume VM", 2, "", "machine VM is not paused"},
		{"pause VM", 0, "", ""},
		{"stop VM", 2, "", "the machine is paused, and its guest cannot power off"},
		{"resume VM", 0, "", ""},
		{"reset VM", 0, "", ""},
		{"ps", 0, "VM", ""},
		{"sysrq VM", 2, "", "sysrq takes [VM] KEY: VM is a machine, and KEY is missing"},
		{"sysrq VM lw", 2, "", "key \"lw\": want one letter, digit or mark"},
		{"sysrq", 2, "", "sysrq takes [VM] KEY, and got 0 words"},
		{"sysrq absent w", 2, "", "no machine of this user has the name or PID absent; there "},
		{"nmi absent", 2, "", "no machine of this user has the name or PID absent; there "},
		{"nmi VM VM", 2, "", "nmi takes [VM], and got 2 words"},
		{"reset VM VM", 2, "", "reset takes [VM], and got 2 words"},
		{"balloon VM", 2, "", "the machine has no balloon: start it with gvm run --balloon"},
		{"balloon VM 1", 2, "", "the machine has no balloon: start it with gvm run --balloon"},
		{"console VM --hvc", 2, "", "the machine has no virtio console: start it with gvm run --hvc"},
		{"balloon VM lots", 2, "", "balloon of lots: "},
		{"balloon VM 1 2", 2, "", "balloon takes ["},
		{"reset absent", 2, "", "no machine of this user has the name or PID absent; there "},
		{"stop absent", 2, "", "no machine of this user has the name or PID absent; there "},
		{"stop VMM", 2, "", "did you mean VM?"},
		{"stop VM VM", 2, "", "stop takes [VM], and got 2 words"},
		{"stop --grace=-1s VM", 2, "", "--grace -1s: want 0 to 24h"},
		{"resume VM VM", 2, "", "resume takes [VM], and got 2 words"},
		{"pause absent", 2, "", "no machine of this user has the name or PID absent; there "},
		{"disk list VM", 0,
			"LUN  SIZE   BLOCK  CACHE      MODE  BACKEND  SERIAL  IMAGE\n" +
				"0    1 MiB  512    writeback  rw    process  ONE     " + one + "\n", ""},
		{"disk list VM --json", 0, "\"serial\": \"ONE\"", ""},
		{"disk add VM one.img", 2, "", "one.img: given twice"},
		{"disk add VM linked.img", 2, "", "linked.img: given twice: " + one},
		{"disk add VM linked.img,lock=off", 2, "", "linked.img: given twice: " + one},
		{"disk add VM run.trace,size=1M", 2, "", "run.trace: trace of gvm's"},
		{"disk add VM none.img", 2, "", "none.img: file does not exist"},
		{"disk add VM mem:1M,lun=0", 2, "", "--disk mem:1M: lun=0 is"},
		{"disk remove VM", 2, "", "VM is a machine, and DISK is missing"},
		{"disk add VM", 2, "", "VM is a machine, and DISK is missing"},
		{"disk resize VM", 2, "", "VM is a machine, and DISK is missing"},
		{"disk resize VM 2M", 2, "", "VM is a machine, and DISK is missing"},
		{"disk remove VM EMPTY", 2, "", "disk remove: DISK is empty: want [VM] DISK"},
		{"disk resize VM EMPTY 2M", 2, "", "disk resize: DISK is empty: want [VM] DISK [SIZE]"},
		{"disk resize VM 0 2M 3M", 2, "", "disk resize takes [VM] DISK [SIZE], and got 4 words"},
		{"disk add VM two.img,lun=0", 2, "", "lun=0 is"},
		{"disk add VM two.img,serial=ONE", 2, "",
			"it has the serial \"ONE\", as LUN 0, one.img, has: give one of them another with serial="},
		{"disk add VM two.img,color=red", 2, "", `unknown option "color"`},
		{"disk add VM two.img,backend=vhost", 2, "", "the machine was started without backend=vhost disks"},
		{"disk add VM new.img,size=2M,serial=ONE", 2, "",
			"it has the serial \"ONE\", as LUN 0, one.img, has: give one of them another with serial="},
		{"disk add VM two.img,serial=TWO,cache=writethrough", 0, "added LUN 1, " + two + ", serial TWO, 1 MiB", ""},
		{"disk add VM two.img", 2, "", "two.img: given twice"},
		{"disk list " + pid, 0, "1    1 MiB  512    writethrough  rw    process  TWO     " + two + "\n", ""},
		{"disk resize VM TWO 3M", 0, "resized LUN 1, " + two + ", serial TWO, 3 MiB", ""},
		{"disk resize VM 1 2M", 2, "", "the data behind them would be lost, which --shrink allows"},
		{"disk resize --shrink VM two.img 2M", 0, "resized LUN 1, " + two + ", serial TWO, 2 MiB", ""},
		{"disk resize VM 1 1000", 2, "", "size 1000 is not a multiple of the block size 512; 1024 is"},
		{"disk resize VM 1 much", 2, "", "disk 1: size \"much\""},
		{"disk resize VM 1 0", 2, "", "disk 1: size 0: want 512 bytes or more"},
		{"disk resize VM 1 1P", 2, "", "disk 1: size \"1P\": want a number and K, M, G or T, such as 1024T"},
		{"disk resize VM 1", 0, "resized LUN 1", ""},
		{"disk resize VM 7 2M", 2, "", "no disk of this machine has the LUN, serial number or path 7"},
		{"disk remove VM two.img", 0, "removed LUN 1", ""},
		{"disk remove VM two.img", 2, "", "no disk of this machine has the LUN, serial number or path " + two},
		{"disk add VM mem:1M", 0, "added LUN 1, mem:1M, serial gvm-memory-1, 1 MiB", ""},
		{"disk resize VM 1 2M", 0, "resized LUN 1, mem:2M, serial gvm-memory-1, 2 MiB", ""},
		{"disk list VM", 0, " gvm-memory-1  mem:2M\n", ""},
		{"disk remove VM mem:1M", 2, "", "no disk of this machine has"},
		{"disk remove VM mem:2048K", 0, "removed LUN 1, mem:2M", ""},
		{"disk add VM null:1M", 0, "added LUN 1, null:1M", ""},
		{"disk add VM null:1M", 0, "added LUN 2, null:1M", ""},
		{"disk remove VM null:1M", 2, "",
			"several disks are null:1M: name one by its LUN or serial number, such as 1 or gvm-memory-1"},
		{"disk remove VM gvm-memory-1", 0, "removed LUN 1, null:1M", ""},
		{"disk remove VM null:1M", 0, "removed LUN 2, null:1M", ""},
		{"disk add VM two.img,lun=9", 0, "added LUN 9", ""},
		{"disk remove VM 9", 0, "removed LUN 9", ""},
		{"disk remove absent 1", 2, "", "no machine of this user has the name or PID absent; there "},
		{"disk add", 2, "", "disk add takes [VM] DISK, and got 0 words"},
		{"disk eject", 2, "", `unknown command "eject" of gvm disk`},
		{"list all", 2, "", "list takes no argument"},
		{"run --name=" + name, 2, "", "in use by process " + pid},
		{"run --name=7", 2, "", `--name: "7" is not a name of a machine`},
	} {
		args := strings.Fields(strings.ReplaceAll(v.args, "VM", name))
		if i := slices.Index(args, "EMPTY"); i >= 0 {
			args[i] = ""
		}
		if sandbox == "on" && args[0] != "disk" {
			continue
		}
		r := ask(t, dir, args...)
		out := strings.ReplaceAll(v.out, "VM", name)
		v.errs = strings.ReplaceAll(strings.ReplaceAll(v.errs, "[VM]", "[vm]"), "VM", name)
		v.errs = strings.ReplaceAll(v.errs, "[vm]", "[VM]")
		r.errs = errsOf(name, r.errs)
		if r.status != v.status || !strings.Contains(r.out, out) || !strings.Contains(r.errs, v.errs) ||
			strings.Count(r.errs, "\n") > min(v.status, 1) {
			t.Errorf("%s: status %d, output %q, errors %q; want %d, %q, %q", v.args, r.status, r.out,
				r.errs, v.status, out, v.errs)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "new.img")); !os.IsNotExist(err) {
		t.Errorf("a disk that was refused has left its image: %v", err)
	}
	var rows []struct {
		control.Info
		Disks []control.Disk
	}
	r := ask(t, dir, "list", "--json")
	if err := json.Unmarshal([]byte(r.out), &rows); err != nil {
		t.Fatalf("%v: %s", err, r.out)
	}
	found := false
	for _, row := range rows {
		if row.Name == name {
			found = fmt.Sprint(row.PID) == pid && row.CPUs == 1 && row.Memory == 512<<20 && len(row.Disks) == 1 &&
				row.Disks[0].Serial == "ONE" && row.Disks[0].Options["serial"] == "ONE"
		}
	}
	if !found {
		t.Errorf("gvm list --json: %s", r.out)
	}
	if r := ask(t, dir, "run", "--disk=two.img", "--guest-arg=write"); r.status != 0 { // the lock is released
		t.Errorf("status %d: %s", r.status, r.errs)
	}
	p.signal(syscall.SIGKILL)
	p.wait()
	socket := filepath.Join(runtimeDir, "gvm", name, "sock")
	if r := ask(t, dir, "list"); r.status != 0 || strings.Contains(r.out, name) {
		t.Errorf("after the end: %+v", r)
	}
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("gvm list has left the socket: %v", err)
	}
}

// TestSocketPlaces: a machine without a given name runs even where there can be no control socket,
// and one with a socket leaves no file.
func TestSocketPlaces(t *testing.T) {
	t.Parallel()
	for _, v := range []struct {
		name   string
		mode   uint32
		args   []string
		status int
		errs   string
	}{
		{"private", 0o700, nil, 0, ""},
		{"private, named", 0o700, []string{"--name=vm"}, 0, ""},
		{"open to others", 0o755, nil, 0, "others can get into it, want 0700"},
		{"open to others, a pause by the watchdog", 0o755, []string{"--watchdog=pause"}, exitUsage,
			"gvm: --watchdog pause: nothing could resume the machine: control socket: "},
		{"open to others, a failing disk", 0o755, []string{"--disk=mem:1M,error=stop"}, exitUsage,
			"gvm: --disk mem:1M: error=: nothing could resume the machine: control socket: "},
		{"open to others, named", 0o755, []string{"--name=vm"}, exitHost, "gvm: --name vm: control socket: "},
	} {
		t.Run(v.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mkdir(filepath.Join(dir, "gvm"), v.mode); err != nil {
				t.Fatal(err)
			}
			c := command(t, append(guestRun(), v.args...)...)
			c.Env = append(c.Env, "XDG_RUNTIME_DIR="+dir)
			r := gvmRuns(t, c)
			if r.status != v.status || !strings.Contains(r.errs, v.errs) || v.errs == "" && r.errs != "" ||
				strings.Count(r.errs, "\n") > 1 {
				t.Errorf("status %d: %q, want %d with %q", r.status, r.errs, v.status, v.errs)
			}
			if left, err := os.ReadDir(filepath.Join(dir, "gvm")); len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

// TestNothingToPrint: an empty list gives a message, and failing output is a failure of the host.
func TestNothingToPrint(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	for _, v := range []struct {
		args      string
		full      bool
		status    int
		out, errs string
	}{
		{"list", false, 0, "", "note: no machine of this user runs\n"},
		{"list --json", false, 0, "[]\n", ""},
		{"help", true, exitHost, "", "no space left on device\n"},
		{"help run", true, exitHost, "", "no space left on device\n"},
		{"run --help", true, exitHost, "", "no space left on device\n"},
		{"--version", true, exitHost, "", "no space left on device\n"},
		{"disk", true, exitHost, "", "no space left on device\n"},
		{"exit-status", true, exitHost, "", "no space left on device\n"},
	} {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		c := command(t, strings.Fields(v.args)...)
		c.Env = append(c.Env, "XDG_RUNTIME_DIR="+dir)
		var out, errs bytes.Buffer
		c.Stdout, c.Stderr = &out, &errs
		if v.full {
			c.Stdout = full
		}
		_ = c.Run()
		if status := c.ProcessState.ExitCode(); status != v.status || out.String() != v.out ||
			!strings.HasSuffix(errs.String(), v.errs) || strings.Count(errs.String(), "\n") > 1 {
			t.Errorf("%s: status %d, output %q, errors %q; want %d, %q, %q", v.args, status, &out, &errs,
				v.status, v.out, v.errs)
		}
	}
}

// TestSysRqKey: the guest reads the key of gvm sysrq, and ends by it.
func TestSysRqKey(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("keys-%d", os.Getpid())
	p := startGVM(t, t.TempDir(), guestRun("--name="+name, "echo")...)
	p.expect("ready")
	for _, key := range []string{"w", "q"} {
		if r := ask(t, t.TempDir(), "sysrq", name, key); r.status != 0 || r.out+errsOf(name, r.errs) != "" {
			t.Errorf("%s: status %d, %q, %q", key, r.status, r.out, r.errs)
		}
	}
	if r := p.wait(); r.status != 0 || !strings.Contains(r.out, "w") {
		t.Errorf("status %d, %q, %q", r.status, r.out, r.errs)
	}
}

// TestNMICommand: the interrupt reaches a guest that halts with interrupts off.
func TestNMICommand(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("nmi-%d", os.Getpid())
	p := startGVM(t, t.TempDir(), guestRun("--name="+name, "--cpus=2", "hang")...)
	p.expect("hanging")
	if r := ask(t, t.TempDir(), "nmi", name); r.status != 0 || r.out+errsOf(name, r.errs) != "" {
		t.Errorf("status %d, %q, %q", r.status, r.out, r.errs)
	}
	if r := p.wait(); r.status != exitPanic || !strings.Contains(r.out, "FAIL: exception 2, ") {
		t.Errorf("status %d, %q, %q", r.status, r.out, r.errs)
	}
}

// TestStop: gvm stop ends a guest that does not listen to the power button, or that gvm stop does
// not ask.
func TestStop(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"stop"}, {"stop", "--force"}, {"stop", "--grace=0s"}} {
		name := fmt.Sprintf("stop-%d-%d", os.Getpid(), len(args[len(args)-1]))
		p := startGVM(t, t.TempDir(), guestRun("--name="+name, "spin")...)
		p.expect("spinning")
		if r := ask(t, t.TempDir(), append(args, name)...); r.status != 0 ||
			r.out+errsOf(name, r.errs) != "" {
			t.Errorf("%v: status %d, %q, %q", args, r.status, r.out, r.errs)
		}
		if r := p.wait(); r.status != exitTerminated || !strings.Contains(r.errs, "stopped by gvm stop") {
			t.Errorf("%v: gvm run: status %d, %q", args, r.status, r.errs)
		}
	}
}

// TestStopWaits: gvm stop returns after the end of the process, which waits for the reader of its
// output.
func TestStopWaits(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("waits-%d", os.Getpid())
	p := startGVMAs(t, t.TempDir(), func(p *proc) { p.cmd.Stderr = w }, guestRun("--name="+name, "hang")...)
	p.expect("hanging")
	if r := ask(t, t.TempDir(), "stop", "--force", name); r.status != 0 {
		t.Errorf("status %d, %q", r.status, r.errs)
	}
	var info unix.Siginfo // reports a child that has ended and is not yet waited for
	if err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT,
		nil); err != nil || info.Signo != int32(unix.SIGCHLD) {
		t.Errorf("the process has not ended: %+v, %v", info, err)
	}
	if r := p.wait(); r.status != exitTerminated {
		t.Errorf("status %d", r.status)
	}
}

// TestStoppedMachine: the list names a machine whose process is stopped, and does not wait for it.
// It is not parallel: tests beside it would see the note about the machine.
func TestStoppedMachine(t *testing.T) {
	name := fmt.Sprintf("asleep-%d", os.Getpid())
	p := startGVM(t, t.TempDir(), guestRun("--name="+name, "hang")...)
	p.expect("hanging")
	p.signal(syscall.SIGSTOP)
	pid := fmt.Sprintf("(process %d)", p.cmd.Process.Pid)
	var all []*proc // at the same time, as each waits
	for _, args := range [][]string{{"list"}, {"disk", "list", name}, {"pause", name}, {"stop", name},
		{"disk", "remove", name, "0"}} {
		all = append(all, startGVM(t, "", args...))
	}
	for _, asks := range all {
		args, status := asks.cmd.Args[1:], 3
		if args[0] == "list" {
			status = 0
		}
		r := asks.wait()
		want := "machine " + name + ": no answer: its process is stopped (kill -CONT PID) " + pid
		if r.status != status || !strings.Contains(r.errs, want) {
			t.Errorf("%v: status %d, %q", args, r.status, r.errs)
		}
	}
	p.signal(syscall.SIGCONT)
	if r := ask(t, t.TempDir(), "stop", name); r.status != 0 {
		t.Errorf("it goes on, and stop ends with %d, %q", r.status, r.errs)
	}
	if r := p.wait(); r.status != exitTerminated {
		t.Errorf("status %d, %q", r.status, r.errs)
	}
}

// patient is a machine that answers only once another machine has been asked.
type patient struct {
	evilMachine
	name string
	all  *sync.WaitGroup
}

func (p patient) Info() control.Info {
	p.all.Done()
	p.all.Wait()
	return control.Info{Name: p.name}
}

// TestListAsksAtOnce: the list asks all machines in parallel.
func TestListAsksAtOnce(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	var all sync.WaitGroup
	names := []string{"first", "second"}
	all.Add(len(names))
	for _, name := range names {
		s, err := control.Claim(control.DefaultDirectory(), name)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.Serve(patient{name: name, all: &all})
	}
	var out, notes bytes.Buffer
	if err := listMachines(t.Context(), &out, &notes, false); err != nil || notes.Len() > 0 ||
		strings.Count(out.String(), "\n") != 3 {
		t.Errorf("%v\n%s%s", err, &out, &notes)
	}
}
