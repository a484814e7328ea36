package draw

import (
	"bytes"
	"encoding/xml"
	"image/png"
	"io"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"gvm/devices/scsi/trace/traceplot"
	"gvm/plot"
)

// sampled is a plot of n requests of each operation in each source.
func sampled(n int, ops, sources []string) *traceplot.Plot {
	rnd := rand.New(rand.NewPCG(1, 2))
	p := &traceplot.Plot{Title: "SCSI request latency: a test"}
	for i := range n {
		for o, op := range ops {
			for s, source := range sources {
				at := time.Duration(i) * 10 * time.Second / time.Duration(n)
				p.Add(source, op, at, time.Duration(float64(8000*(o+1)*(s+1))*(0.6+rnd.ExpFloat64())))
			}
		}
	}
	return p
}

// write draws p as gvm-plot does.
func write(w io.Writer, p *traceplot.Plot, format string) error {
	l, err := p.Latencies()
	if err != nil {
		return err
	}
	return Write(w, &plot.Plot{Version: plot.Version, Format: format, Latencies: l})
}

var dotColour = regexp.MustCompile(`fill:(#[0-9A-F]{6});fill-opacity:0.62`)

// svg draws p and returns the file, which is well-formed, with its words and
// the colours of its dots.
func svg(t *testing.T, p *traceplot.Plot) (file string, words []string, dots map[string]int) {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b, p, "svg"); err != nil {
		t.Fatal(err)
	}
	file = b.String()
	d := xml.NewDecoder(strings.NewReader(file))
	for {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("not XML: %v", err)
		}
		if text, ok := token.(xml.CharData); ok && strings.TrimSpace(string(text)) != "" {
			words = append(words, strings.TrimSpace(string(text)))
		}
	}
	dots = map[string]int{}
	for _, m := range dotColour.FindAllStringSubmatch(file, -1) {
		dots[m[1]]++
	}
	return file, words, dots
}

func TestSeries(t *testing.T) {
	operations := []string{"READ(10)", "WRITE(10)", "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS"}
	_, words, dots := svg(t, sampled(20, operations, []string{"process", "vhost"}))
	all := strings.Join(words, "\n")
	for _, want := range []string{
		"SCSI request latency: a test", "latency", "time since the start of the run (s)",
		"requests that took no longer (%)",
		"READ(10): 40", "WRITE(10): 40", "REPORT SUPPORTED TASK MAN…: 40", "process", "vhost", "10µs", "100",
	} {
		if !strings.Contains("\n"+all+"\n", "\n"+want+"\n") {
			t.Errorf("the plot does not say %q; it says\n%s", want, all)
		}
	}
	if len(dots) != 3 {
		t.Errorf("colours of dots: %v", dots)
	}
}

// TestManyOps has more operations than colours.
func TestManyOps(t *testing.T) {
	ops := strings.Split("a b c d e f g h i j", " ")
	p := sampled(3, ops, []string{"process"})
	for range 5 {
		p.Add("process", "often", 0, time.Millisecond)
	}
	_, words, dots := svg(t, p)
	all := strings.Join(words, "\n")
	if len(dots) != 7 || // and black, which SVG does not name
		!strings.Contains(all, "often: 5") || !strings.Contains(all, "all others: 12") ||
		strings.Contains(all, "\nh: 3") || strings.Contains(all, "process") {
		t.Errorf("%d colours; words\n%s", len(dots), all)
	}
}

// TestManyRequests has more requests than dots, and keeps the slowest one.
func TestManyRequests(t *testing.T) {
	p := sampled(250_000, []string{"READ(10)"}, []string{"process"})
	p.Add("process", "READ(10)", 5*time.Second, 7*time.Second)
	file, words, dots := svg(t, p)
	if all := strings.Join(words, "\n"); len(file) > 5<<20 || dots["#0071B1"] < 2000 ||
		!strings.Contains(all, "READ(10): 250001") || !strings.Contains(all, "\n1s") ||
		!strings.Contains(all, "\n8\n") || strings.Contains(all, "\n12\n") {
		t.Errorf("%d bytes, %d dots; words\n%s", len(file), dots["#0071B1"], all)
	}
}

func TestExtremes(t *testing.T) {
	for _, at := range []time.Duration{0, 1, time.Second, 1<<63 - 1} {
		for _, latency := range []time.Duration{-1, 0, 1, 2300, 1<<63 - 1} {
			p := &traceplot.Plot{}
			p.Add("process", "x", at, latency)
			if _, words, _ := svg(t, p); !strings.Contains(strings.Join(words, "\n"), "s\n") {
				t.Errorf("%v at %v: %q", latency, at, words)
			}
		}
	}
}

func TestFormats(t *testing.T) {
	p := sampled(2000, []string{"READ(10)", "WRITE(10)", "SYNCHRONIZE CACHE(10)", "INQUIRY"},
		[]string{"process", "vhost"})
	var b bytes.Buffer
	if err := write(&b, p, "png"); err != nil {
		t.Fatal(err)
	}
	if name := os.Getenv("GVM_TEST_PLOT"); name != "" { // to look at
		if err := os.WriteFile(name, b.Bytes(), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	img, err := png.Decode(&b)
	if err != nil || img.Bounds().Dx() != 1320 || img.Bounds().Dy() != 1020 {
		t.Errorf("%v, %v", img.Bounds(), err)
	}
	if err := write(&b, p, "pdf"); err == nil {
		t.Error("a format that there is not")
	}
}

// TestForeignNames draws names that are not XML.
func TestForeignNames(t *testing.T) {
	const evil = "\x1b[31m\x00\x07\u009b\ufffe\xff<&\"'\n\u202e"
	p := &traceplot.Plot{Title: evil}
	p.Add(evil, evil, 1, 2)
	p.Add("other", evil, 1, 2)
	file, words, _ := svg(t, p)
	if !utf8.ValidString(file) ||
		strings.ContainsFunc(file, func(r rune) bool { return r != '\n' && r != '\t' && !unicode.IsPrint(r) }) {
		t.Errorf("the file has %q", words)
	}
}
