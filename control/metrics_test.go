package control

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"gvm/inspect"
)

// parse reads metrics as Prometheus does, and returns their series and values.
func parse(t *testing.T, b []byte) map[string]string {
	t.Helper()
	var p expfmt.TextParser
	families, err := p.TextToMetricFamilies(bytes.NewReader(b))
	if err != nil {
		t.Fatalf("%v in\n%s", err, b)
	}
	all := map[string]string{}
	for name, f := range families {
		if f.GetHelp() == "" || f.GetType() == dto.MetricType_UNTYPED ||
			strings.HasSuffix(name, "_total") != (f.GetType() == dto.MetricType_COUNTER) {
			t.Errorf("%s is a %v, of %q", name, f.GetType(), f.GetHelp())
		}
		for _, m := range f.Metric {
			value := fmt.Sprint(m.GetGauge().GetValue() + m.GetCounter().GetValue())
			if h := m.Histogram; h != nil {
				value = fmt.Sprintf("%d in %gs", h.GetSampleCount(), h.GetSampleSum())
				for _, b := range h.Bucket {
					if b.GetCumulativeCount() > 0 {
						value += fmt.Sprintf(", %d below %g", b.GetCumulativeCount(), b.GetUpperBound())
						break
					}
				}
			}
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			series := name + " " + strings.Join(labels, " ")
			if _, twice := all[series]; twice {
				t.Errorf("%s: twice", series)
			}
			all[series] = value
		}
	}
	return all
}

func wantMetrics(t *testing.T, got []byte, want map[string]string) {
	t.Helper()
	all := parse(t, got)
	for series, v := range want {
		if all[series] != v {
			t.Errorf("%s: %q, want %s", series, all[series], v)
		}
		delete(all, series)
	}
	for series, v := range all {
		t.Errorf("%s %s is too much", series, v)
	}
}

// TestMetrics: the names, labels and kinds of the metrics of a tree.
func TestMetrics(t *testing.T) {
	const evil = "a\"b\\c\nd\xff{}=,é\x1b"
	const valid = "a\"b\\c\nd\ufffd{}=,é\x1b"
	var h inspect.Histogram
	h.Add(300*time.Nanosecond, 2)
	h.Add(time.Second, 1)
	root := inspect.Group("",
		inspect.Bool("paused", true),
		inspect.Group("vcpu",
			inspect.Group("0", inspect.Bits("rip", uint64(1)), inspect.Count("exits", uint64(1<<53)),
				inspect.Int("cpl", uint8(3)), inspect.Text("mp_state", "halted"), inspect.Text("error", evil)),
			inspect.Node{Name: "1", Value: inspect.Busy},
			inspect.Group("2", inspect.Count("exits", 4), inspect.Text("mp_state", "runnable"))),
		inspect.Group("pci", inspect.Group("00:01.0", inspect.Group("queue", inspect.Group("0",
			inspect.Node{Name: "age", Value: inspect.Age(1500 * time.Millisecond)}, inspect.Int("depth", -1),
			h.Node("latency"))))),
		inspect.Group("lio", inspect.Group("naa.5", inspect.Group("0", inspect.Int("size", int64(7))))),
		inspect.Group("task", inspect.Int("lba", 1)).As(inspect.Passing),
		inspect.Text("time", "now").As(inspect.Passing),
		inspect.Text("id", "x"),
		inspect.Group(evil, inspect.Int(evil, 5), inspect.Text(evil, evil)),
		inspect.Group("empty"))
	wantMetrics(t, metricsOf(root), map[string]string{
		`gvm_paused `: "1", `gvm_info id="x"`: "1", `gvm_busy `: "1",
		`gvm_vcpu_exits_total vcpu="0"`: "9.007199254740992e+15", `gvm_vcpu_exits_total vcpu="2"`: "4",
		`gvm_vcpu_cpl vcpu="0"`: "3", `gvm_vcpu_info vcpu="2" mp_state="runnable"`: "1",
		fmt.Sprintf(`gvm_vcpu_info vcpu="0" mp_state="halted" error=%q`, valid): "1",
		`gvm_pci_queue_age_seconds pci="00:01.0" queue="0"`:                     "1.5",
		`gvm_pci_queue_latency_seconds pci="00:01.0" queue="0"`:                 "3 in 1.0000006s, 2 below 5.12e-07",
		`gvm_pci_queue_depth pci="00:01.0" queue="0"`:                           "-1",
		`gvm_lio_size lio="naa.5" lio_2="0"`:                                    "7",
		fmt.Sprintf(`gvm part=%q part_2=%[1]q`, valid):                          "5",
		fmt.Sprintf(`gvm_info part=%q value=%[1]q`, valid):                      "1",
	})
}

// TestServeMetrics: the socket has the metrics of the machine and of its state.
func TestServeMetrics(t *testing.T) {
	d, c := serve(t, newFake())
	const path = "/a\"b\\c\nd\xff"
	if _, err := c.AddDisk(t.Context(), AddDisk{Disk: path}); err != nil {
		t.Fatal(err)
	}
	h := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.dial(ctx, "vm") }}}
	resp, err := h.Get("http://gvm/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != metricsType {
		t.Errorf("%v, %+v", err, resp)
	}
	wantMetrics(t, b, map[string]string{
		`gvm_disk_size disk="0"`: "512", `gvm_disk_info disk="0" path="/a\"b\\c\nd�"`: "1",
		`gvm_up part=".."`: "1", `gvm_busy `: "1", `gvm_machine_pid `: "4711", `gvm_machine_cpus `: "2",
		`gvm_machine_memory_bytes `:                                     "1.073741824e+09",
		`gvm_machine_info name="vm" gvm="1.2.3" kernel="/boot/bzImage"`: "1",
	})
}

// FuzzMetrics: of a tree with any names and texts, Prometheus reads the values and texts of
// it.
func FuzzMetrics(f *testing.F) {
	f.Add("queue", "0", "a\"b\\c\nd\xff\x00\r# {}=,1 2")
	f.Add("", "gvm", "\u2028\x7f\\")
	f.Add("\n", "le", "# TYPE gvm_info counter\n")
	f.Fuzz(func(t *testing.T, group, name, words string) {
		b := metricsOf(inspect.Group("", inspect.Group(group, inspect.Text(name, words),
			inspect.Group(name, inspect.Int("n", 7)))))
		all := parse(t, b)
		var values []string
		for series, v := range all {
			values = append(values, v)
			if v == "1" && !strings.Contains(series, fmt.Sprintf("=%q", strings.ToValidUTF8(words, "\ufffd"))) {
				t.Errorf("%s has no %q", series, words)
			}
		}
		if slices.Sort(values); !slices.Equal(values, []string{"0", "1", "7"}) {
			t.Errorf("%v in\n%s", all, b)
		}
	})
}
