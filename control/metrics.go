package control

import (
	"bytes"
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"

	"gvm/inspect"
)

// metrics is an answer in Prometheus's text format, version 0.0.4.
type metrics []byte

const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// metricsOf returns the numbers of a tree as metrics. A metric's name is gvm and the names of the
// path, joined by "_". A name that begins with no letter, or has other characters than letters,
// digits and "_", such as that of a CPU or a device, is the value of a label, which is named as the
// group that it is in. Counters end with _total, and times and their histograms with _seconds. The
// texts of a group are labels of one metric of the value 1, which ends with _info. Registers,
// addresses, sets of bits and nodes of the kind inspect.Passing are no metrics.
func metricsOf(root inspect.Node) metrics {
	e := exposition{families: map[string]*family{}}
	e.group(root, series{name: "gvm"})
	e.add(series{name: "gvm_busy", path: "the parts that could not be read in time"}, "gauge", fmt.Sprint(e.busy))
	var b bytes.Buffer
	for _, f := range e.order {
		b.Write(f.Bytes())
	}
	return b.Bytes()
}

// exposition is the metrics of a tree, by families, as the format wants them.
type exposition struct {
	families map[string]*family
	order    []*family
	busy     int
}

type family struct{ bytes.Buffer }

// series is the way to a node: the name that its metric has so far, the path with "*" for values of
// labels, and the name of the group.
type series struct {
	name, path, group string
	labels            []label
}

type label struct{ name, value string }

func (e *exposition) group(n inspect.Node, s series) {
	info := s
	info.name += "_info"
	for _, c := range n.Nodes {
		if c.Kind == inspect.Passing {
			continue
		}
		if v, ok := c.Value.(string); ok {
			name := c.Name
			if !isName(name) {
				name = "value"
			}
			info = info.with(name, v)
			continue
		}
		e.node(c, s.to(c.Name))
	}
	if len(info.labels) > len(s.labels) {
		e.add(info, "gauge", "1")
	}
}

func (e *exposition) node(n inspect.Node, s series) {
	number := ""
	switch v := n.Value.(type) {
	case nil:
		if n.Kind == inspect.Distribution {
			e.histogram(inspect.HistogramOf(n), s)
		} else {
			e.group(n, s)
		}
		return
	case bool:
		number = map[bool]string{false: "0", true: "1"}[v]
	case inspect.Age:
		s.name += "_seconds"
		number = strconv.FormatFloat(time.Duration(v).Seconds(), 'f', -1, 64)
	case inspect.Hex:
		return
	default:
		if v == inspect.Busy {
			e.busy++
			return
		}
		number = fmt.Sprintf("%d", v)
	}
	kind := "gauge"
	if n.Kind == inspect.Counter {
		s.name += "_total"
		kind = "counter"
	}
	e.add(s, kind, number)
}

// histogram adds a histogram, with a bucket for each power of two.
func (e *exposition) histogram(h inspect.Histogram, s series) {
	s.name += "_seconds"
	seconds := func(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) }
	bucket := func(le string, n uint64) {
		e.add(s.with("le", le), "histogram", fmt.Sprint(n), "_bucket")
	}
	inspect.Octaves(func(d time.Duration) { bucket(seconds(d), h.Below(d)) })
	bucket("+Inf", h.Count())
	e.add(s, "histogram", seconds(h.Sum()), "_sum")
	e.add(s, "histogram", fmt.Sprint(h.Count()), "_count")
}

// to returns the way on to a node's name.
func (s series) to(name string) series {
	if isName(name) {
		s.name, s.path, s.group = s.name+"_"+name, join(s.path, name), name
		return s
	}
	s.path = join(s.path, "*")
	return s.with(cmp.Or(s.group, "part"), name)
}

func join(path, name string) string { return strings.TrimPrefix(path+"/"+name, "/") }

// with adds a label. A name that is taken gets a number.
func (s series) with(name, value string) series {
	free := name
	for i := 0; i < len(s.labels); i++ {
		if s.labels[i].name == free {
			free, i = fmt.Sprintf("%s_%d", free, i+2), -1
		}
	}
	s.labels = append(s.labels[:len(s.labels):len(s.labels)], label{free, value})
	return s
}

// isName reports whether a metric and a label may have a name: a letter of ASCII, then letters,
// digits and "_".
func isName(s string) bool {
	for i, c := range s {
		if (c|0x20 < 'a' || c|0x20 > 'z') && (i == 0 || c != '_' && (c < '0' || c > '9')) {
			return false
		}
	}
	return s != ""
}

var (
	escapeHelp  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	escapeLabel = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

// add adds a sample to its family. One of a histogram has a suffix.
func (e *exposition) add(s series, kind, number string, suffix ...string) {
	f := e.families[s.name]
	if f == nil {
		f = new(family)
		e.families[s.name], e.order = f, append(e.order, f)
		help := escapeHelp.Replace(cmp.Or(s.path, "the machine"))
		fmt.Fprintf(f, "# HELP %s %s\n# TYPE %s %s\n", s.name, help, s.name, kind)
	}
	f.WriteString(s.name + strings.Join(suffix, ""))
	before := byte('{')
	for _, l := range s.labels {
		// The format is UTF-8; a path or a guest may have any bytes.
		value := escapeLabel.Replace(strings.ToValidUTF8(l.value, "\ufffd"))
		fmt.Fprintf(f, `%c%s="%s"`, before, l.name, value)
		before = ','
	}
	if len(s.labels) > 0 {
		f.WriteByte('}')
	}
	fmt.Fprintf(f, " %s\n", number)
}
