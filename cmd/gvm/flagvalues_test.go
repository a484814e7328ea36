package main

import (
	"errors"
	"fmt"
	stdnet "net"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"gvm/control"
	"gvm/devices/virtio/fs"
	"gvm/devices/virtio/net/tap"
	"gvm/jail"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/testrun/kubernetes"
	"gvm/text"
	"gvm/vmm/x86"
)

// flagValues has a row for each flag and argument whose value has a grammar of its own: seeds, and
// the check of an arbitrary value. That of --disk is FuzzParse of package disk.
var flagValues = []struct {
	name  string
	seeds []string
	check func(t *testing.T, name, s string)
}{
	{"--vsock", []string{"unix,cid=7,path=a,b", "vhost,cid=3", "path=a", "cid=4294967294", "vhost"},
		comesBack(parseVsock, func(v *vsockConfig) string {
			s := v.kind
			if v.cid != 0 {
				s += fmt.Sprint(",cid=", v.cid)
			}
			if v.path != "" {
				s += ",path=" + v.path
			}
			return s
		}, func(v *vsockConfig) bool { return v.cid == 0 || v.cid > 2 && v.cid < 1<<32-1 })},
	{"--net", []string{"none", "user,mac=02:00:00:12:34:56,host=off", "tap=tap0,queues=4,vhost=on", "tap=a,mac="},
		comesBack(parseOneNet, oneNet.String, oneNet.valid)},
	{"--publish", []string{"8080:80", "0.0.0.0:0:53/udp", "[::1]:1:65535/tcp", "::1:8080:80", "fe80::1%eth0:1:2"},
		comesBack(func(s string) (publication, error) {
			p, err := parsePublish(s)
			p.word = ""
			return p, err
		}, func(p publication) string {
			protocol := "tcp"
			if p.udp {
				protocol = "udp"
			}
			return fmt.Sprintf("%s:%d/%s", p.addr, p.guest, protocol)
		}, func(p publication) bool { return p.addr.IsValid() && p.guest > 0 })},
	{"--gdb", []string{":1234", "1234", "0.0.0.0:1", "tcp:[::1]:1", "unix:a b", "stdio", "/run/gdb"},
		comesBack(parseGDB, func(a *gdbAddress) string {
			switch a.network {
			case "stdio":
				return "stdio"
			case "unix":
				return "unix:" + a.address
			}
			return "tcp:" + a.address
		}, func(a *gdbAddress) bool {
			_, port, err := stdnet.SplitHostPort(a.address)
			n, _ := strconv.ParseUint(port, 10, 16)
			return a.network == "stdio" || a.network == "unix" && a.address != "" && len(a.address) <= maxUnixPath ||
				a.network == "tcp" && err == nil && n > 0
		})},
	{"--share", []string{"src=.", "ref=/usr,ro", "a=b,ro,ro", "a=b=c", "=b", "a=,ro"},
		comesBack(parseShare, func(s fs.Share) string {
			if s.ReadOnly {
				return s.Tag + "=" + s.Dir + ",ro"
			}
			return s.Tag + "=" + s.Dir
		}, func(s fs.Share) bool { return s.Tag != "" && s.Dir != "" })},
	{"--apic-ids", []string{"0,2,300", "32767", "1,1", "0x1"},
		comesBack(parseAPICIDs, commas, func(ids []uint32) bool {
			return len(ids) > 0 && slices.IsSorted(ids) && len(slices.Compact(slices.Clone(ids))) == len(ids) &&
				ids[len(ids)-1] < 1<<15
		})},
	{"--cpus", []string{"1,4", "0", "2,2"},
		comesBack(parseCPUs, commas, func(all []int) bool { return len(all) > 0 && slices.Min(all) > 0 })},
	{"--cpu-features", []string{"-x2apic,+avx2", "avx2", "+nosuch", ""},
		comesBack(x86.ParseFeatures, func(all []x86.FeatureChange) string {
			var words []string
			for _, c := range all {
				words = append(words, map[bool]string{false: "-", true: "+"}[c.Enable]+c.Name)
			}
			return strings.Join(words, ",")
		}, func([]x86.FeatureChange) bool { return true })},
	{"--memory", []string{"512M", "1.5G", "8GiB", "4194304T", "1e9", "2P"},
		comesBack(func(s string) (uint64, error) { return text.ParseSize(s, 1) }, text.SizeWord,
			func(n uint64) bool { return n <= text.MaxSize })},
	{"--scratch", []string{"5x5G", "1G", "64x4096", "65x4K", "1x0"},
		comesBack(parseScratch, func(disks []disk.Spec) string {
			return fmt.Sprintf("%dx%d", len(disks), disks[0].Size)
		}, func(disks []disk.Spec) bool {
			return len(disks) > 0 && len(disks) <= maxScratch && disks[0].Size > 0 && disks[0].Size%scratchUnit == 0
		})},
	{"--emit", []string{"kubernetes,image=i,kvm=r,mount=/a,mount=/b", "kubernetes,image=", "kubernetes,mount=a"},
		comesBack(parseEmit, func(j kubernetes.Job) string {
			s := "kubernetes,image=" + j.Image
			if j.KVM != "" {
				s += ",kvm=" + j.KVM
			}
			for _, dir := range j.Mounts {
				s += ",mount=" + dir
			}
			return s
		}, func(j kubernetes.Job) bool {
			return j.Image != "" && !slices.ContainsFunc(j.Mounts, func(dir string) bool { return !filepath.IsAbs(dir) })
		})},
	{"--jail-limit", []string{"memory=4G,cpus=1.5", "pids=10,nofile=100,fsize=1M", "cpus=nan", "pids=0", "memory"},
		comesBack(func(s string) (limited, error) {
			l := limited{word: s}
			return l, l.Add(s)
		}, func(l limited) string { return l.word }, func(limited) bool { return true })},
	{"--name", []string{"build-1", ".a", "12", "a/b"},
		comesBack(func(s string) (string, error) { return s, control.CheckName(s) }, func(s string) string { return s },
			func(s string) bool { return filepath.Base(s) == s && s != "." && s != ".." && text.Word(s) == s })},
	{"gvm cp", []string{"vm:a", "vm:", "./a:b", ":"},
		comesBack(func(s string) (guestFile, error) {
			vm, path, ok := guestPath(s)
			if !ok {
				return guestFile{}, errors.New("a path of the host")
			}
			return guestFile{vm, path}, nil
		}, func(f guestFile) string { return f.vm + ":" + f.path },
			func(f guestFile) bool { return f.path != "" && !strings.ContainsAny(f.vm, "/:") })},
}

type guestFile struct{ vm, path string }

type limited struct {
	word string
	jail.Limits
}

// oneNet is the result of a single --net.
type oneNet struct {
	nets []machine.Net
	user *userConfig
}

func parseOneNet(s string) (n oneNet, err error) {
	n.nets, n.user, err = parseNets([]string{s})
	return n, err
}

func (o oneNet) String() string {
	if len(o.nets) == 0 {
		return "none"
	}
	n, s := o.nets[0], "user"
	if o.user == nil {
		s = "tap=" + n.Tap
	} else if o.user.hostOff {
		s += ",host=off"
	}
	if mac := n.Device.MAC; mac != [6]byte{} {
		s += ",mac=" + stdnet.HardwareAddr(mac[:]).String()
	}
	if n.Pairs > 0 {
		s += fmt.Sprint(",queues=", n.Pairs)
	}
	for word, v := range vhosts {
		if v == n.Vhost && v != machine.VhostAuto {
			s += ",vhost=" + word
		}
	}
	return s
}

func (o oneNet) valid() bool {
	if len(o.nets) == 0 {
		return o.user == nil
	}
	n := o.nets[0]
	return len(o.nets) == 1 && (n.Tap == "") == (o.user != nil) && (n.Tap == "" || tap.CheckName(n.Tap) == nil) &&
		n.Device.MAC[0]&1 == 0
}

func parseScratch(s string) ([]disk.Spec, error) {
	var t testConfig
	err := t.parseScratch(s)
	return t.scratch, err
}

func commas[N uint32 | int](all []N) string {
	var words []string
	for _, n := range all {
		words = append(words, fmt.Sprint(n))
	}
	return strings.Join(words, ",")
}

// comesBack returns the check of a parser: it returns a value that is valid and that it reads again
// from the word that write makes of it, or an error whose size is bounded by that of the input, and
// no pointer or slice with that.
func comesBack[V any](
	parse func(string) (V, error), write func(V) string, valid func(V) bool,
) func(t *testing.T, name, s string) {
	return func(t *testing.T, name, s string) {
		v, err := parse(s)
		if err != nil {
			switch r := reflect.ValueOf(v); r.Kind() {
			case reflect.Pointer, reflect.Slice:
				if !r.IsNil() {
					t.Errorf("%s %q: %+v and the error %v", name, s, v, err)
				}
			}
			if n := len(err.Error()); n == 0 || n > 1000+10*len(s) {
				t.Errorf("%s %q: an error of %d bytes", name, s, n)
			}
			return
		}
		if !valid(v) {
			t.Errorf("%s %q is %+v", name, s, v)
			return
		}
		word := write(v)
		if again, err := parse(word); err != nil || write(again) != word {
			t.Errorf("%s %q is %+v; written as %q it is %+v, %v", name, s, v, word, again, err)
		}
	}
}

// FuzzFlags: a value of a flag is an error, or is read as a valid one, which is read again when it
// is written; continuations of it begin with its options so far.
func FuzzFlags(f *testing.F) {
	for _, row := range flagValues {
		for _, s := range row.seeds {
			f.Add(s)
		}
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, row := range flagValues {
			row.check(t, row.name, s)
		}
		for _, complete := range []func(string) []string{completeNet, completeVsock} {
			for _, c := range complete(s) {
				if !strings.HasPrefix(c, s[:strings.LastIndexByte(s, ',')+1]) {
					t.Errorf("%q is continued by %q", s, c)
				}
			}
		}
		completePublish(s)
	})
}
