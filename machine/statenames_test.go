package machine_test

import (
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	stdnet "net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gvm/control"
	"gvm/devices/statusport"
	"gvm/devices/virtio/console"
	virtiofs "gvm/devices/virtio/fs"
	"gvm/devices/virtio/net"
	"gvm/devices/virtio/vsock"
	"gvm/guestmem"
	"gvm/inspect"
	"gvm/kvmapi"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/vmm"
	"gvm/vmm/vmcore"
)

// unshown are the names of docs/inspect.md, by their rows, that the machine of TestStateNames does
// not show. Each is a string in the code of a part that shows state. A name error is in no row's
// list: any part may fail.
var unshown = map[string]string{
	"…/virtio/device": "function/M function detail lun age response " + // the guest sends commands alone
		"vhost_wwpn endpoint running", // the kernel serves nothing
	"…/virtio/device/connection/HOSTPORT-GUESTPORT": "state shutdown peer_shutdown buf_alloc fwd_cnt tx_cnt " +
		"peer_buf_alloc peer_fwd_cnt rx_cnt buffered to_write", // the guest has no driver of sockets
	"…/virtio/device/stats": "age",         // nor of the balloon
	"disk/N":                "reservation", // the guest makes none
	"sandbox/jail":          "directory uid gid limits",
	"lio/WWN/N":             "path storage serial size block_size readonly cache",
}

// openRows are the rows of names that the kernels of the host and the guest choose.
var openRows = []string{"vcpu/N/kvm", "…/virtio/device/stats"}

// parts are the parts of paths in docs/inspect.md that stand for others.
var parts = map[string]string{"N": `\d+`, "M": `\d+`, "…": `pci/00:[0-9a-f]{2}\.0`, "00:SS.0": `00:[0-9a-f]{2}\.0`,
	"WWN": `[^/]+`, "HOSTPORT-GUESTPORT": `\d+-\d+`, "barN": `bar\d`}

// pattern returns a regular expression for a path of the page.
func pattern(path string) string {
	var all []string
	for part := range strings.SplitSeq(path, "/") {
		if p, ok := parts[part]; ok {
			part = p
		} else {
			part = regexp.QuoteMeta(part)
		}
		all = append(all, part)
	}
	return strings.Join(all, "/")
}

// stateRow is a row of the page's table, or several of the same path.
type stateRow struct {
	path  string
	at    *regexp.Regexp // matches paths that begin with this one
	names []string       // paths below it
}

// has reports whether the row names a path that it matches.
func (r *stateRow) has(path string) bool {
	below := strings.TrimPrefix(r.at.ReplaceAllString(path, ""), "/")
	if below == "" || slices.Contains(openRows, r.path) {
		return true
	}
	for part := range strings.SplitSeq(below, "/") {
		if part != "error" && !slices.ContainsFunc(r.names, func(name string) bool {
			return regexp.MustCompile("^(" + strings.ReplaceAll(pattern(name), "/", "|") + ")$").MatchString(part)
		}) {
			return false
		}
	}
	return true
}

// shows reports whether a machine has a path that the row names.
func (r *stateRow) shows(paths []string, name string) bool {
	re := regexp.MustCompile(r.at.String() + "(.*/)?" + pattern(name) + "(/|$)")
	return slices.ContainsFunc(paths, re.MatchString)
}

// stateRows reads the table of the page.
func stateRows(t *testing.T, page string) (rows []*stateRow) {
	_, rest, ok := strings.Cut(page, "| path | contents |\n|---|---|\n")
	table, _, _ := strings.Cut(rest, "\n\n")
	if !ok {
		t.Fatal("the page has no table of paths")
	}
	quoted := regexp.MustCompile("`([^`]+)`")
	series := regexp.MustCompile("`([a-z]+)([0-9]+)` to `[a-z]+([0-9]+)`")
	name := regexp.MustCompile(`^[a-z][a-z0-9_]*N?(/[A-Z-]+)?$`)
	for line := range strings.Lines(table) {
		cells := strings.Split(line, " | ")
		if len(cells) != 2 {
			t.Fatalf("a row has other than 2 cells: %s", line)
		}
		text := series.ReplaceAllStringFunc(cells[1], func(s string) string {
			m := series.FindStringSubmatch(s)
			from, _ := strconv.Atoi(m[2])
			to, _ := strconv.Atoi(m[3])
			s = ""
			for i := from; i <= to; i++ {
				s += fmt.Sprintf("`%s%d` ", m[1], i)
			}
			return s
		})
		for _, path := range quoted.FindAllStringSubmatch(cells[0], -1) {
			i := slices.IndexFunc(rows, func(r *stateRow) bool { return r.path == path[1] })
			if i < 0 {
				i = len(rows)
				rows = append(rows, &stateRow{path[1], regexp.MustCompile("^" + pattern(path[1]) + "(/|$)"), nil})
			}
			for _, word := range quoted.FindAllStringSubmatch(text, -1) {
				if name.MatchString(word[1]) && !strings.Contains(table, "\n| `"+word[1]+"` |") && word[1] != "error" {
					rows[i].names = append(rows[i].names, word[1])
				}
			}
		}
	}
	return rows
}

// rowOf returns the row of a path: that of the longest path which it begins with.
func rowOf(rows []*stateRow, path string) (longest *stateRow) {
	for _, r := range rows {
		parts := func(r *stateRow) int { return strings.Count(r.at.String(), "/") }
		if r.at.MatchString(path) && (longest == nil || parts(r) > parts(longest)) {
			longest = r
		}
	}
	return longest
}

func pathsOf(n inspect.Node) (paths []string) {
	for path := range n.Values("") {
		paths = append(paths, path)
	}
	return paths
}

// hasStats reports whether KVM has statistics, as from Linux 5.14 on.
func hasStats(t *testing.T) bool {
	sys, err := kvmapi.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer sys.Close()
	const binaryStatsFD = 203 // KVM_CAP_BINARY_STATS_FD
	return sys.Check(binaryStatsFD) > 0
}

// launchAll starts a machine with every kind of device that this process serves. The limit of its
// first disk holds up the guest for ever. ended gets the state of the end.
func launchAll(t *testing.T) (g *guest, ended chan inspect.Node) {
	near, far := stdnet.Pipe()
	t.Cleanup(func() { near.Close() })
	com2, own := stdnet.Pipe()
	t.Cleanup(func() { com2.Close() })
	wires, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ended = make(chan inspect.Node, 1)
	final := func(out vmm.Outcome, _ *guestmem.Memory, _ []vmcore.CPU, _ func()) { ended <- *out.State }
	g, err = begin(t, machine.Spec{CPUs: 2, Vsock: &vsock.Config{},
		Ports: []console.Port{{Name: "port", Stream: far}}, HVC: true, Balloon: true, COM2: own,
		Shares: []virtiofs.Share{{Tag: "tree", Dir: t.TempDir()}},
		Nets:   []machine.Net{{Device: net.Config{MAC: [6]byte{2}, Queues: wires[:1]}}},
		Status: func(statusport.Report) {}, Watchdog: vmm.WatchdogExit, KeepState: true, Final: final,
	}, "mem:1M,bps=1", image(t, 1, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.stop(errStopped)
		if out, _ := g.Wait(); !out.Left { // on a host so busy that a thread still uses them
			unix.Close(wires[0])
			unix.Close(wires[1])
		}
	})
	g.expect("gvm embedded guest", 1)
	added, err := disk.Parse("mem:1M")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.AddDisk(t.Context(), added); err != nil {
		t.Fatal(err)
	}
	return g, ended
}

// state reads the machine's state until no part of it is busy, and a command waits for the limit.
func (g *guest) state() inspect.Node {
	g.t.Helper()
	for {
		n, err := g.Inspect(g.t.Context(), "")
		if err != nil {
			g.t.Fatal(err)
		}
		busy := false
		for _, v := range n.Values("") {
			busy = busy || v == inspect.Busy
		}
		if age, ok := n.Get("disk/0/task/0/age").(inspect.Age); ok && time.Duration(age) > 100*time.Millisecond && !busy {
			return n
		}
		g.runs()
	}
}

// runs fails the test if the machine has ended, as it does after tooLong.
func (g *guest) runs() {
	g.t.Helper()
	select {
	case <-g.Ended():
		g.t.Fatalf("the machine has ended: %+v\n%s", g.wait(), g.screen.text())
	default:
	}
}

// shown is a machine whose state a control socket shows.
type shown struct {
	control.Machine
	g *guest
}

func (shown) Info() control.Info { return control.Info{Name: "vm"} }
func (s shown) Inspect(ctx context.Context, path string) (inspect.Node, error) {
	return s.g.Inspect(ctx, path)
}

// metrics returns the names of the machine's metrics and the paths that they are of, of a reading
// in which no part is busy.
func (g *guest) metrics() map[string]string {
	in := control.In(filepath.Join(g.t.TempDir(), "run"))
	s, err := control.Claim(in, "vm")
	if err != nil {
		g.t.Fatal(err)
	}
	defer s.Close()
	s.Serve(shown{g: g})
	h := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (stdnet.Conn, error) {
			return stdnet.Dial("unix", filepath.Join(in.Machine("vm"), "sock"))
		}}}
	for {
		resp, err := h.Get("http://gvm/metrics")
		if err != nil {
			g.t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			g.t.Fatalf("%s, %v: %s", resp.Status, err, b)
		}
		if !strings.Contains(string(b), "\ngvm_busy 0\n") {
			g.runs()
			continue
		}
		all := map[string]string{}
		for line := range strings.Lines(string(b)) {
			if help, ok := strings.CutPrefix(line, "# HELP "); ok {
				name, path, _ := strings.Cut(strings.TrimSuffix(help, "\n"), " ")
				all[name] = path
			}
		}
		return all
	}
}

// wantMetrics returns the names of the metrics of a tree, by the rule of docs/inspect.md, and the
// paths that they are of, with * for parts that are values of labels.
func wantMetrics(n inspect.Node, name, path string, all map[string]string) {
	isName := regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]*$`)
	for _, c := range n.Nodes {
		of, at := name, "*"
		if isName.MatchString(c.Name) {
			of, at = name+"_"+c.Name, c.Name
		}
		at = strings.TrimPrefix(path+"/"+at, "/")
		if c.Kind == inspect.Counter {
			of += "_total"
		}
		switch c.Value.(type) {
		case nil:
			if c.Kind == inspect.Distribution {
				all[of+"_seconds"] = at
			} else if c.Kind != inspect.Passing {
				wantMetrics(c, of, at, all)
			}
		case inspect.Hex:
		case string:
			if c.Kind != inspect.Passing {
				all[name+"_info"] = path
			}
		case inspect.Age:
			all[of+"_seconds"] = at
		default:
			all[of] = at
		}
	}
}

// TestStateNames holds docs/inspect.md against the state of a machine with all devices: each path
// has a row that names it, and each name of a row is in the state, or among those that this machine
// cannot show. Metrics, the state that a crash record keeps, and the report of a deadline have the
// same names.
func TestStateNames(t *testing.T) {
	b, err := os.ReadFile("../docs/inspect.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	rows := stateRows(t, page)
	g, ended := launchAll(t)
	state := g.state()
	metrics := g.metrics()
	g.stop(context.DeadlineExceeded)
	out, err := g.Wait()
	if err != nil {
		t.Fatal(err)
	}

	paths := pathsOf(state)
	missing := map[string]bool{}
	for _, path := range slices.Concat(paths, pathsOf(<-ended)) {
		if r := rowOf(rows, path); r == nil || !r.has(path) {
			missing[regexp.MustCompile(`\b\d+\b`).ReplaceAllString(path, "N")] = true
		}
	}
	for path := range missing {
		t.Errorf("docs/inspect.md has no %s", path)
	}
	literals := stateLiterals(t)
	for _, r := range rows {
		hidden := strings.Fields(unshown[r.path])
		if r.path == "vcpu/N/kvm" && !hasStats(t) {
			continue
		}
		if !slices.ContainsFunc(paths, r.at.MatchString) && len(hidden) == 0 {
			t.Errorf("docs/inspect.md has %s, which the machine does not", r.path)
		}
		if slices.Contains(openRows, r.path) && len(hidden) == 0 {
			continue
		}
		for _, name := range r.names {
			if r.shows(paths, name) == slices.Contains(hidden, name) {
				t.Errorf("%s/%s: the machine shows it: %v", r.path, name, r.shows(paths, name))
			}
		}
		for _, name := range hidden {
			first, _, _ := strings.Cut(name, "/")
			if !slices.Contains(r.names, name) || !literals[first] {
				t.Errorf("%s/%s: the page has it: %v, the code: %v", r.path, name, slices.Contains(r.names, name),
					literals[first])
			}
		}
	}
	for path := range unshown {
		if !slices.ContainsFunc(rows, func(r *stateRow) bool { return r.path == path }) {
			t.Errorf("docs/inspect.md has no row %s", path)
		}
	}

	want := map[string]string{"gvm_busy": "the parts that could not be read in time"}
	wantMetrics(inspect.Group("", append(state.Nodes, inspect.Group("machine", inspect.Text("name", ""),
		inspect.Int("pid", 0), inspect.Int("cpus", 0), inspect.Int("memory_bytes", 0)))...), "gvm", "", want)
	want["gvm_info"] = "the machine"
	for name, path := range want {
		if metrics[name] != path {
			t.Errorf("the metric %s is of %q, want %q", name, metrics[name], path)
		}
	}
	for name, path := range metrics {
		if want[name] == "" {
			t.Errorf("the metric %s is of %q, which is not in the state", name, path)
		}
	}
	for _, name := range regexp.MustCompile(`gvm_[a-z_]*[a-z]`).FindAllString(page, -1) {
		if metrics[name] == "" && !strings.HasPrefix(name, "gvm_lio_") {
			t.Errorf("docs/inspect.md has the metric %s", name)
		}
	}

	said := 0
	for line := range strings.Lines(out.Report) {
		path, values, _ := strings.Cut(strings.TrimSpace(line), ": ")
		for _, value := range strings.Split(values, ", ") {
			name, _, ok := strings.Cut(value, " ")
			if name = path + "/" + name; ok && !slices.Contains(paths, name) {
				t.Errorf("the report has %q, and the state no %s", line, name)
			}
			said++
		}
	}
	if !strings.Contains(out.Report, "disk/0/task/0: command READ") || said < 20 {
		t.Errorf("the report has %d values:\n%s", said, out.Report)
	}
}

// stateLiterals returns the strings in the code of the packages that show state.
func stateLiterals(t *testing.T) map[string]bool {
	all := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), "\"gvm/inspect\"\n") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
				s, _ := strconv.Unquote(l.Value)
				all[s] = true
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
