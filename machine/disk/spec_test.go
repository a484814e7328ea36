package disk

import (
	"reflect"
	"strings"
	"testing"

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
			IOPS: scsi.Limit{Rate: 100}, BPS: scsi.Limit{Rate: 1 << 20, Burst: 1 << 30}},
		"a,pi=1":                    {Path: "a", LUN: -1, BlockSize: 512, PI: true},
		"a,pi=0":                    {Path: "a", LUN: -1, BlockSize: 512},
		"a,error=report,iops=1:2":   {Path: "a", LUN: -1, BlockSize: 512, IOPS: scsi.Limit{Rate: 1, Burst: 2}},
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
		"a,pi=1", "mem:1M,lock=off", "null:3T,lun=2", "a,overlay=on,lock=off",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
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

// TestGoesWith gives options to disks that cannot have them.
func TestGoesWith(t *testing.T) {
	for s, want := range map[string]string{
		"mem:1M,size=2M":                       "size=2M is for images, not for mem:",
		"null:1M,readonly":                     "readonly is for images, not for null:",
		"null:1M,pi=1":                         "pi=1 is for images and mem:",
		"mem:1M,overlay=on":                    "overlay=on is for images, not for mem:",
		"a,overlay=on,readonly":                "readonly does not go with overlay=",
		"a,size=1M,overlay=f":                  "size=1M does not go with overlay=",
		"a,overlay=on,pi=1":                    "pi=1 does not go with overlay=",
		"a,overlay=on,backend=vhost":           "overlay=on is for backend=process",
		"a,iops=5,backend=auto":                "iops=5 is for backend=process",
		"a,workers=2":                          "workers=2 is for backend=vhost",
		"mem:1M,backend=vhost":                 "mem: is for backend=process",
		"wwn=naa.5":                            "needs backend=vhost",
		"wwn=naa.5,backend=vhost,cache=unsafe": "cache=unsafe is not for a target that exists",
	} {
		if _, err := Parse(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", s, err, want)
		}
	}
	for _, s := range []string{"mem:1M,pi=0", "a,backend=vhost,error=report", "a,overlay=on,lock=on", "mem:1M,pi=1"} {
		if _, err := Parse(s); err != nil {
			t.Error(err)
		}
	}
}
