package disk

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gvm/control"
	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/virtio/vhostscsi"
)

func TestSplitCommas(t *testing.T) {
	for s, want := range map[string][]string{
		"":           {""},
		"a":          {"a"},
		"a,b":        {"a", "b"},
		"a,,b":       {"a,b"},
		"a,,,b":      {"a,", "b"},
		"a,,,,b":     {"a,,b"},
		",a":         {"", "a"},
		"a,":         {"a", ""},
		",,":         {","},
		",,,":        {",", ""},
		"é,x,,y=z,w": {"é", "x,y=z", "w"},
	} {
		if got := splitCommas(s); !reflect.DeepEqual(got, want) {
			t.Errorf("splitCommas(%q) = %q, want %q", s, got, want)
		}
	}
}

func TestParseDisk(t *testing.T) {
	for s, want := range map[string]Spec{
		"a.img":            {Path: "a.img", LUN: -1, BlockSize: 512},
		"a,,b=c":           {Path: "a,b=c", LUN: -1, BlockSize: 512},
		"readonly":         {Path: "readonly", LUN: -1, BlockSize: 512},
		"a,readonly":       {Path: "a", LUN: -1, BlockSize: 512, ReadOnly: true},
		"a,serial=x=y,,z":  {Path: "a", LUN: -1, BlockSize: 512, Serial: "x=y,z"},
		"a,lun=0":          {Path: "a", LUN: 0, BlockSize: 512},
		"a,lun=16383":      {Path: "a", LUN: 16383, BlockSize: 512},
		"a,cache=unsafe":   {Path: "a", LUN: -1, BlockSize: 512, Cache: scsi.Unsafe},
		"a,size=1000":      {Path: "a", LUN: -1, BlockSize: 512, Size: 1000},
		"a,size=1.5M":      {Path: "a", LUN: -1, BlockSize: 512, Size: 3 << 19},
		"a,block_size=512": {Path: "a", LUN: -1, BlockSize: 512},
		"a,lun=3,block_size=4096,cache=writethrough,size=4T,serial=s,readonly": {Path: "a", LUN: 3, BlockSize: 4096,
			Cache: scsi.WriteThrough, Size: 4 << 40, Serial: "s", ReadOnly: true},
		"a,error=stop,physical_block_size=4096": {Path: "a", LUN: -1, BlockSize: 512, OnError: Stop, Physical: 4096},
		"a,error=enospc-stop,iops=100,bps=1M:1G": {Path: "a", LUN: -1, BlockSize: 512, OnError: StopOnFull,
			IOPS: block.Limit{Rate: 100}, BPS: block.Limit{Rate: 1 << 20, Burst: 1 << 30}},
		"a,pi=1":                    {Path: "a", LUN: -1, BlockSize: 512, PI: true},
		"a,pi=0":                    {Path: "a", LUN: -1, BlockSize: 512},
		"a,error=report,iops=1:2":   {Path: "a", LUN: -1, BlockSize: 512, IOPS: block.Limit{Rate: 1, Burst: 2}},
		"a,backend=process":         {Path: "a", LUN: -1, BlockSize: 512},
		"a,workers=2,backend=vhost": {Path: "a", LUN: -1, BlockSize: 512, Backend: Vhost, Workers: 2},
		"a,backend=auto,workers=shared": {Path: "a", LUN: -1, BlockSize: 512, Backend: Auto,
			Workers: vhostscsi.SharedWorker},
		"wwn=naa.5,backend=vhost": {WWN: "naa.5", LUN: -1, BlockSize: 512, Backend: Vhost},
		"wwn=iqn.a:b,,c,workers=3,backend=vhost": {WWN: "iqn.a:b,c", LUN: -1, BlockSize: 512,
			Backend: Vhost, Workers: 3},
	} {
		if got, err := Parse(s); err != nil || got != want {
			t.Errorf("Parse(%q) = %+v, %v, want %+v", s, got, err, want)
		}
	}
}

// FuzzParse checks that Parse reads a parsed disk's String as the same disk.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "a", "a,,b,readonly", "a,serial=x,,y,lun=7", "a,cache=unsafe,size=1.5G,block_size=4096",
		"a,size=4194304T", "a,lun=99999", "a,foo=", ",,", "a,backend=vhost,workers=4",
		"wwn=naa.5,backend=vhost,workers=shared", "a,error=stop,iops=5:7,bps=1M,physical_block_size=4096",
		"a,pi=1", "mem:1M,lock=off", "null:3T,lun=2", "a,overlay=on,lock=off", "temp:1G,serial=x",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, c := range Complete(s) {
			if _, err := Parse(c); !strings.HasPrefix(c, s) || err != nil && !strings.HasSuffix(c, "=") &&
				!strings.Contains(err.Error(), "backend=vhost") {
				t.Fatalf("Complete(%q) has %q: %v", s, c, err)
			}
		}
		d, err := Parse(s)
		if err != nil {
			return
		}
		if (d.Path == "") == (d.WWN == "") || d.Workers < vhostscsi.SharedWorker || d.Workers > MaxQueues ||
			d.LUN < -1 || d.LUN > 16383 ||
			d.Size < 0 || d.BlockSize != 512 && d.BlockSize != 4096 || d.Cache > scsi.Unsafe {
			t.Fatalf("Parse(%q) = %+v", s, d)
		}
		if e, err := Parse(d.String()); err != nil || e != d {
			t.Fatalf("Parse(%q) = %+v; written as %q it is %+v, %v", s, d, d.String(), e, err)
		}
	})
}

// TestOptions: every option has a place in the text of a disk, and goes with some disk.
func TestOptions(t *testing.T) {
	values := map[string]string{"S": "x", "N": "7", "SIZE": "4096", "N[:BURST]": "5:7",
		"SIZE[:BURST]": "4096", "on|FILE": "f"}
	for _, o := range Options() {
		val := values[o.Value]
		if strings.Contains(o.Value, "|") && val == "" {
			words := strings.Split(o.Value, "|")
			val = words[len(words)-1]
		}
		if o.Key == "physical_block_size" {
			val = "4096"
		}
		given := o.name() + val
		with := ""
		if o.goesWith&byProcess == 0 {
			with = ",backend=vhost"
		}
		d, err := Parse("a" + with + "," + given)
		if err != nil || !strings.Contains(d.String()+",", ","+given+",") {
			t.Errorf("%s: %v, %q", given, err, d.String())
		}
		if o.Value == "" || o.Value == "S" || o.Key == "overlay" {
			continue // any value is right
		}
		if _, err := Parse("a" + with + "," + o.name() + "?"); err == nil ||
			!strings.Contains(err.Error(), o.name()+"?: ") {
			t.Errorf("%s?: error %v does not name it", o.name(), err)
		}
	}
}

// TestComplete has the options that go with a disk, and their words.
func TestComplete(t *testing.T) {
	for s, want := range map[string]string{
		"":                             "",
		"a":                            "",
		"a,,l":                         "",
		"a,l":                          "a,lun= a,lock=",
		"a,,b,ca":                      "a,,b,cache=",
		"a,cache=":                     "a,cache=writeback a,cache=writethrough a,cache=unsafe",
		"a,cache=w":                    "a,cache=writeback a,cache=writethrough",
		"a,rea":                        "a,readonly",
		"a,readonly,rea":               "",
		"a,serial=":                    "",
		"a,xyz=1,ca":                   "",
		"a,size=0,ca":                  "",
		"a,o":                          "a,overlay=",
		"a,overlay=":                   "a,overlay=on",
		"a,size=1M,o":                  "",
		"a,overlay=f,size":             "",
		"a,b":                          "a,block_size= a,bps= a,backend=",
		"a,iops=5,backend=":            "a,iops=5,backend=process",
		"a,backend=vhost,b":            "a,backend=vhost,block_size=",
		"a,backend=process,w":          "",
		"a,w":                          "a,workers=",
		"a,workers=":                   "a,workers=shared",
		"mem:1M,p":                     "mem:1M,physical_block_size= mem:1M,pi=",
		"null:1M,p":                    "null:1M,physical_block_size=",
		"mem:1M,backend=":              "mem:1M,backend=process",
		"null:1M,pi=":                  "",
		"wwn=naa.5,":                   "wwn=naa.5,backend= wwn=naa.5,workers=",
		"wwn=naa.5,backend=":           "wwn=naa.5,backend=vhost",
		"wwn=naa.5,backend=vhost,work": "wwn=naa.5,backend=vhost,workers=",
	} {
		if got := strings.Join(Complete(s), " "); got != want {
			t.Errorf("Complete(%q) = %q, want %q", s, got, want)
		}
	}
}

// TestNewOption adds an option by its row alone.
func TestNewOption(t *testing.T) {
	rows := options
	t.Cleanup(func() { options = rows })
	options = func() []Option {
		return append(slices.Clone(rows()), Option{"shade", "light|dark", "how bright it is", image | byProcess,
			func(s *Spec, val string) error { s.Serial = val; return nil },
			func(s *Spec) string { return s.Serial }})
	}
	d, err := Parse("a,shade=dark")
	if err != nil || !strings.HasSuffix(d.String(), ",shade=dark") {
		t.Errorf("%q, %v", d.String(), err)
	}
	for s, want := range map[string]string{
		"a,shad=dark":               "did you mean shade?",
		"a,shade":                   "want shade=light|dark",
		"a,shade=dark,shade=dark":   "shade= is given twice",
		"mem:1M,shade=dark":         "shade=dark is for images, not for mem:",
		"a,shade=dark,overlay=on":   "shade=dark does not go with overlay=",
		"a,backend=vhost,shade=dim": "shade=dim is for backend=process",
	} {
		if _, err := Parse(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Parse(%q): %v, want %q", s, err, want)
		}
	}
	for s, want := range map[string]string{"a,sh": "a,shade=", "a,shade=d": "a,shade=dark", "mem:1M,sh": ""} {
		if got := strings.Join(Complete(s), " "); got != want {
			t.Errorf("Complete(%q) = %q, want %q", s, got, want)
		}
	}
	all, err := json.Marshal(control.Disk{Options: d.options()})
	if err != nil || !strings.Contains(string(all), `"shade":"dark"`) {
		t.Errorf("%s, %v", all, err)
	}
	const row = "| `shade=light\\|dark` | how bright it is | images | `overlay=`, `backend=vhost` |\n"
	if !strings.HasSuffix(optionTable(), row) {
		t.Errorf("the last row of\n%s is not\n%s", optionTable(), row)
	}
}

var update = flag.Bool("update", false, "write the table of docs/storage.md anew")

// optionTable returns the table of docs/storage.md: a line for each option.
func optionTable() string {
	b := "| option | meaning | for | not with |\n|---|---|---|---|\n"
	list := func(o Option, is bool, names ...named) string {
		var words []string
		for _, n := range names {
			if (o.goesWith&n.uses != 0) == is {
				words = append(words, n.name)
			}
		}
		return strings.Join(words, ", ")
	}
	for _, o := range Options() {
		b += fmt.Sprintf("| `%s` | %s | %s | %s |\n", strings.ReplaceAll(o.Word(), "|", `\|`), o.Meaning,
			list(o, true, named{image, "images"}, named{memory, "`mem:`, `temp:`"}, named{null, "`null:`"},
				named{target, "`wwn=`"}),
			list(o, false, named{overlaid, "`overlay=`"}, named{byProcess, "`backend=process`"},
				named{byVhost, "`backend=vhost`"}))
	}
	return b
}

type named struct {
	uses
	name string
}

// TestDocs holds the table of docs/storage.md against the rows. -update writes it.
func TestDocs(t *testing.T) {
	const path = "../../docs/storage.md"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	was := regexp.MustCompile(`(?m)^\| option \|.*\n(\|.*\n)*`).FindString(string(text))
	switch table := optionTable(); {
	case was == "":
		t.Fatalf("%s has no table of options", path)
	case was == table:
	case *update:
		if err := os.WriteFile(path, []byte(strings.Replace(string(text), was, table, 1)), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s differs from the rows: go test -run TestDocs ./machine/disk -update", path)
	}
}

// TestGoesWith gives options to disks that cannot have them.
func TestGoesWith(t *testing.T) {
	for s, want := range map[string]string{
		"mem:1M,size=2M":                       "size=2M is for images, not for mem:",
		"null:1M,readonly":                     "readonly is for images, not for null:",
		"null:1M,pi=1":                         "pi=1 is for images and disks of mem: or temp: alone",
		"mem:1M,overlay=on":                    "overlay=on is for images, not for mem:",
		"a,overlay=on,readonly":                "readonly does not go with overlay=",
		"a,size=1M,overlay=f":                  "size=1M does not go with overlay=",
		"a,overlay=on,pi=1":                    "pi=1 does not go with overlay=",
		"a,overlay=on,backend=vhost":           "overlay=on is for backend=process",
		"a,iops=5,backend=auto":                "iops=5 is for backend=process",
		"a,workers=2":                          "workers=2 is for backend=vhost",
		"temp:1M,overlay=on":                   "overlay=on is for images, not for temp:",
		"mem:1M,backend=vhost":                 "mem: is for backend=process",
		"wwn=naa.5":                            "needs backend=vhost",
		"wwn=naa.5,backend=vhost,cache=unsafe": "cache=unsafe is not for a target that exists",
	} {
		if _, err := Parse(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", s, err, want)
		}
	}
	for _, s := range []string{"mem:1M,pi=0", "a,backend=vhost,error=report", "a,overlay=on,lock=on", "mem:1M,pi=1",
		"temp:1M,pi=1"} {
		if _, err := Parse(s); err != nil {
			t.Error(err)
		}
	}
}
