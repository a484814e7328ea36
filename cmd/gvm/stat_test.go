package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/prometheus/common/expfmt"

	"gvm/control"
	"gvm/inspect"
)

// state is a machine's state after some time at the same rates.
func state(seconds uint64, busy bool) inspect.Node {
	var h inspect.Histogram
	h.Add(10*time.Microsecond, 60*seconds)
	h.Add(time.Millisecond, 40*seconds)
	cpu := inspect.Group("1")
	if cpu.Nodes = []inspect.Node{inspect.Group("exit", inspect.Count("io", 2*seconds))}; busy {
		cpu = inspect.Node{Name: "1", Value: inspect.Busy}
	}
	return inspect.Group("", inspect.Bool("paused", true),
		inspect.Group("memory", inspect.Group("0", inspect.Int("size", 1<<30), inspect.Int("resident", 3<<20)),
			inspect.Group("1", inspect.Int("size", 1<<30), inspect.Int("resident", 1<<19))),
		inspect.Group("vcpu", inspect.Group("0",
			inspect.Group("exit", inspect.Count("io", 1), inspect.Count("mmio", 123456*seconds),
				inspect.Count("interrupted", 5-min(seconds, 5))),
			inspect.Group("kvm", inspect.Count("exits", 1234567*seconds), inspect.Count("halt_exits", seconds/4))), cpu),
		inspect.Group("pci",
			inspect.Group("00:00.0", inspect.Text("name", "host bridge")),
			inspect.Group("00:01.0", inspect.Group("virtio", inspect.Int("device_type", 8), inspect.Group("queue",
				inspect.Group("0", inspect.Count("requests", 0)),
				inspect.Group("2", inspect.Count("requests", 100*seconds), inspect.Count("interrupts", 10*seconds),
					inspect.Int("in_flight", 7), h.Node("latency")),
				inspect.Group("3", inspect.Int("last_avail_idx", 9))))),
			inspect.Group("00:02.0", inspect.Group("virtio", inspect.Int("device_type", 5),
				inspect.Group("device", inspect.Int("actual", 512)),
				inspect.Group("queue", inspect.Group("0", inspect.Count("requests", 1)))))),
		inspect.Group("disk", inspect.Group("0", inspect.Count("commands", 100*seconds),
			inspect.Count("data_in_bytes", 5<<30*seconds), inspect.Count("data_out_bytes", 1536*seconds),
			inspect.Int("tasks", 7), inspect.Count("check_conditions", 0))))
}

// TestStatTables: rates of two readings, and of counters that began again, in 80 columns.
func TestStatTables(t *testing.T) {
	start := time.Now()
	at := func(seconds uint64, busy bool) *reading {
		b, err := json.Marshal(state(seconds, busy))
		var n inspect.Node
		if err := errors.Join(err, json.Unmarshal(b, &n)); err != nil {
			t.Fatal(err)
		}
		r := newReading(n)
		r.at = start.Add(time.Duration(seconds) * time.Second)
		return r
	}
	got := at(6, true).since(at(4, false))
	got.Machine = "build"
	const want = `build, 2 CPUs, 2 GiB of memory, 3.5 MiB resident, 2 MiB in the balloon, paused

VCPU      EXITS/s     IO/s   MMIO/s   HALT/s    IRQ/s SIGNAL/s INJECT/s
0           1.23M        0   123.5k        0        -        0        -
1            busy

QUEUE       DEVICE      REQ/s       P50       P90       P99      NOW   INT/s
00:01.0/2   scsi          100     9.9µs    1.02ms    1.05ms        7      10
00:02.0/0   balloon         0         -         -         -        0       -

DISK         COMMANDS/s         READ/s      WRITTEN/s      NOW   CHECK/s
0                   100          5 GiB        1.5 KiB        7         0
`
	if s := got.String(); s != want {
		t.Errorf("%s\nwant\n%s", s, want)
	}
	for line := range strings.Lines(got.String()) {
		if n := utf8.RuneCountInString(line) - 1; n > helpWidth {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	reset := at(3, false)
	reset.at = start.Add(11 * time.Second)
	if s := reset.since(at(9, false)); *s.Queues[0].Requests != 150 || *s.CPUs[1].IO != 3 {
		t.Errorf("after a reset %+v, %+v", s.Queues[0], s.CPUs[1])
	}
	for r, word := range map[float64]string{0: "0", 3: "3", 0.26: "0.3", 99.94: "99.9", 99.96: "100", 9999: "9999",
		9999.6: "10.0k", 999949: "999.9k", 999950: "1.00M", 123456789: "123.46M"} {
		if got := rateWord(&r); got != word {
			t.Errorf("%v: %s, want %s", r, got, word)
		}
	}
}

// TestStat: two watchers at a time see a machine and end with it; the socket has its metrics; and a
// machine that is stopped does not hold them.
func TestStat(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("stat-%d", os.Getpid())
	p := startGVM(t, t.TempDir(), guestRun("--name="+name, "--disk=mem:1M", "hang")...)
	p.expect("hanging")
	quick := "--interval=50ms"
	for args, want := range map[string][]any{
		"stat VM":                          {0, "VCPU ", ""},
		"stat VM --json":                   {0, `"vcpus": [`, ""},
		"stat VM VM":                       {2, "", "stat takes [VM], and got 2 words\n"},
		"stat absent":                      {2, "", "no machine of this user has the name or PID absent; there "},
		"stat --interval=1ms VM":           {2, "", "--interval 1ms: want 50ms to 1h\n"},
		"stat --watch --interval=2h VM":    {2, "", "--interval 2h0m0s: want 50ms to 1h\n"},
		"inspect VM nothing --watch":       {2, "", `no "nothing" in the machine, which has paused, `},
		"inspect VM paused --interval=-1s": {2, "", "--interval -1s: want"},
	} {
		words := strings.Fields(strings.ReplaceAll(args, "VM", name))
		if want[0] == 0 {
			words = append(words, quick)
		}
		if r := ask(t, "", words...); r.status != want[0] || !strings.Contains(r.out, want[1].(string)) ||
			!strings.Contains(r.errs, want[2].(string)) || strings.Count(r.errs, "\n") > 1 {
			t.Errorf("%s: %+v, want %v", args, r, want)
		}
	}
	wantRealMetrics(t, name)

	stat := startGVM(t, "", "stat", name, "--watch", quick)
	state := startGVM(t, "", "inspect", name, "paused", "--watch", "--json", quick)
	onTerminal := startOnTerminal(t, "stat", name, "--watch", quick)
	full := startGVMAs(t, "", func(p *proc) { // an output that is not read, and closed at the end
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		if _, err := w.Write(make([]byte, 1<<16)); err != nil {
			t.Fatal(err)
		}
		p.cmd.Stdout = w
		t.Cleanup(func() { w.Close() })
	}, "stat", name, "--watch", quick)
	onTerminal.expectCount("\x1b[H"+name+", 1 CPU, 512 MiB of memory, ", 2)
	onTerminal.typeIn("\x03")
	if r := onTerminal.wait(); onTerminal.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
		t.Errorf("Ctrl-C: %v, %+v", onTerminal.cmd.ProcessState, r)
	}
	stat.expectCount("\n"+name+", 1 CPU, ", 2)
	state.expectCount("false\n", 3)
	full.signal(syscall.SIGINT)
	if full.cmd.Wait(); full.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
		t.Errorf("an output that is full: %v", full.cmd.ProcessState)
	}
	if r := ask(t, "", "stop", "--force", name); r.status != 0 {
		t.Errorf("%+v", r)
	}
	p.wait()
	for _, w := range []*proc{stat, state} {
		if r := w.wait(); r.status != 0 || r.errs != "gvm: machine "+name+" has ended\n" {
			t.Errorf("after the machine's end: %+v", r)
		}
	}
}

// TestStatStopped: a machine whose process is stopped ends its watchers, and refuses new ones, with
// a line.
func TestStatStopped(t *testing.T) {
	t.Parallel()
	const name = "stopped"
	runtime := "XDG_RUNTIME_DIR=" + t.TempDir() // of its own: gvm list of other tests would wait for it
	start := func(args ...string) *proc {
		return startGVMAs(t, "", func(p *proc) { p.cmd.Env = append(p.cmd.Env, runtime) }, args...)
	}
	p := start(guestRun("--name="+name, "hang")...)
	p.expect("hanging")
	watchers := []*proc{start("stat", name, "--watch", "--interval=50ms"),
		start("inspect", name, "vcpu", "--watch", "--interval=50ms")}
	watchers[0].expect(name)
	watchers[1].expect("vcpu/0/rip 0x")
	p.signal(syscall.SIGSTOP)
	watchers = append(watchers, start("stat", name), start("inspect", name, "--watch"))
	for _, w := range watchers {
		if r := w.wait(); r.status != exitHost || strings.Count(r.errs, "\n") != 1 ||
			!strings.Contains(r.errs, "gvm: machine "+name+": no answer: its process is stopped") {
			t.Errorf("%+v", r)
		}
	}
	p.signal(syscall.SIGCONT)
	p.signal(syscall.SIGTERM)
	p.wait()
}

// TestStatKilled: a machine that was killed, and left its socket, has ended.
func TestStatKilled(t *testing.T) {
	t.Parallel()
	name := fmt.Sprintf("killed-%d", os.Getpid())
	p := startGVM(t, t.TempDir(), guestRun("--name="+name, "--sandbox=off", "hang")...)
	p.expect("hanging")
	watchers := []*proc{startGVM(t, "", "stat", name, "--watch", "--interval=50ms"),
		startGVM(t, "", "inspect", name, "paused", "--watch", "--interval=50ms")}
	watchers[0].expect(name)
	watchers[1].expect("paused false")
	p.signal(syscall.SIGKILL)
	p.wait()
	for _, w := range watchers {
		if r := w.wait(); r.status != 0 || r.errs != "gvm: machine "+name+" has ended\n" {
			t.Errorf("%+v", r)
		}
	}
}

// wantRealMetrics checks /metrics of a machine by Prometheus's parser.
func wantRealMetrics(t *testing.T, name string) {
	t.Helper()
	h := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("unix", filepath.Join(runtimeDir, "gvm", name, "sock"))
		}}}
	resp, err := h.Get("http://gvm/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var p expfmt.TextParser
	families, err := p.TextToMetricFamilies(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"gvm_vcpu_exit_io_total", "gvm_memory_resident", "gvm_disk_commands_total",
		"gvm_disk_info", "gvm_pci_virtio_queue_queue_size", "gvm_machine_info", "gvm_com1_output"} {
		if families[want] == nil {
			t.Errorf("no %s", want)
		}
	}
	for _, passing := range []string{"gvm_rtc_info", "gvm_vcpu_rip"} {
		if families[passing] != nil {
			t.Errorf("%s: %v", passing, families[passing])
		}
	}
}

// shownMachine is a machine with a state.
type shownMachine struct{ evilMachine }

func (shownMachine) Info() control.Info { return control.Info{Name: "build", State: control.Running} }
func (shownMachine) Inspect(ctx context.Context, path string) (inspect.Node, error) {
	return state(1, false).Read(ctx, path)
}

// TestInspectWord: a word that is neither a machine nor a part is refused as both.
func TestInspectWord(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	inspectWord := func(words ...string) string {
		var out bytes.Buffer
		a := app(nil)
		a.Writer, a.ErrWriter = &out, &out
		if err := a.Run(append([]string{"gvm", "inspect"}, words...)); err != nil {
			return fmt.Sprint(exitStatus(err), " ", errorText(err))
		}
		return out.String()
	}
	for i, name := range []string{"build", "other"} {
		s, err := control.Claim(control.DefaultDirectory(), name)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.Serve(shownMachine{})
		const has = `, which has paused, memory, vcpu, pci, disk`
		for _, tt := range [][2]string{
			{"paused", "paused true\n"},
			{"buidl", "2 buidl is neither a machine (there is build; did you mean build?) nor a part of its state: " +
				`no "buidl" in the machine` + has},
			{"vcpus", "2 vcpus is neither a machine (there is build) nor a part of its state: " +
				`no "vcpus" in the machine; did you mean vcpu?`},
			{"--interval 1ms nothing", "2 --interval 1ms: want 50ms to 1h"},
			{"build nothing", `2 no "nothing" in the machine` + has},
		} {
			want := tt[1]
			if words := strings.Fields(tt[0]); i > 0 && len(words) == 1 {
				want = "2 " + words[len(words)-1] + " is no machine, and for a part of the state: " +
					"several machines run: name one of build, other"
			}
			if got := inspectWord(strings.Fields(tt[0])...); got != want {
				t.Errorf("%d machines, %s: %q, want %q", i+1, tt[0], got, want)
			}
		}
	}
}
