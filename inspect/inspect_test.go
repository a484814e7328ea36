package inspect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
)

func tree(mu *sync.Mutex, reads *int) Node {
	return Group("",
		Group("vcpu", Group("0", Bits("rip", uint64(1)<<63), Int("apic_id", 7))),
		Locked("disk", mu, func() []Node {
			*reads++
			return []Node{Text("path", "/a\n\xff"), Bool("readonly", true), Group("none")}
		}))
}

func list(n Node, path string) string {
	var b strings.Builder
	for p, v := range n.Values(path) {
		fmt.Fprintf(&b, "%s=%v;", p, v)
	}
	return b.String()
}

// TestRead reads parts of a tree, and nothing else of it.
func TestRead(t *testing.T) {
	var mu sync.Mutex
	for _, tt := range []struct {
		path, want string
		reads      int
	}{
		{"", "vcpu/0/rip=0x8000000000000000;vcpu/0/apic_id=7;disk/path=/a\n\xff;disk/readonly=true;", 1},
		{"vcpu/0", "vcpu/0/rip=0x8000000000000000;vcpu/0/apic_id=7;", 0},
		{"/vcpu/0/apic_id/", "/vcpu/0/apic_id/=7;", 0},
		{"disk/readonly", "disk/readonly=true;", 1},
		{"disk/none", "", 1},
	} {
		reads := 0
		n, err := tree(&mu, &reads).Read(t.Context(), tt.path)
		if got := list(n, tt.path); err != nil || got != tt.want || reads != tt.reads {
			t.Errorf("%s: %q, %d reads, %v", tt.path, got, reads, err)
		}
	}
}

// TestNoPath: an unknown path is an error that names what there is.
func TestNoPath(t *testing.T) {
	var mu sync.Mutex
	for path, want := range map[string]string{
		"vcpus/0":          `no "vcpus" in the machine; did you mean vcpu?`,
		"vcpu/0/ripp":      `no "ripp" in vcpu/0; did you mean rip?`,
		"vcpu/9":           `no "9" in vcpu, which has 0`,
		"vcpu/0/rip/x":     `no vcpu/0/rip/x: there is nothing below vcpu/0/rip`,
		"disk/a\x1b]":      `no "a\x1b]" in disk, which has path, readonly, none`,
		"vcpu/0/../0/rip/": `no ".." in vcpu/0, which has rip, apic_id`,
	} {
		reads := 0
		_, err := tree(&mu, &reads).Read(t.Context(), path)
		if e := (*PathError)(nil); !errors.As(err, &e) || err.Error() != want {
			t.Errorf("%s: %v, want %s", path, err, want)
		}
	}
}

// TestBusy: a lock that is held makes its own subtree busy for a reading of any part.
func TestBusy(t *testing.T) {
	var mu sync.Mutex
	mu.Lock()
	defer mu.Unlock()
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for _, ctx := range []context.Context{t.Context(), over} {
		reads := 0
		n, err := tree(&mu, &reads).Read(ctx, "")
		if err != nil || n.Get("disk") != Busy || n.Get("vcpu/0/apic_id") != 7 || reads != 0 {
			t.Errorf("%s, %v", list(n, ""), err)
		}
		if n, err := tree(&mu, &reads).Read(ctx, "disk/path"); err != nil || n.Value != Busy || n.Name != "path" {
			t.Errorf("%+v, %v", n, err)
		}
	}
}

// TestJSON: a tree keeps its order and its numbers over JSON.
func TestJSON(t *testing.T) {
	n := Group("", Int("z", uint64(1)<<63), Bits("a", uint8(31)), Bool("b", false), Group("g", Text("t", "\x1b\xff")),
		Node{Name: "x", Value: Busy}, Node{Name: "age", Value: Age(1500e6)}, Group("e"))
	b, err := json.Marshal(n)
	const want = `{"z":9223372036854775808,"a":"0x1f","b":false,"g":{"t":"\u001b\udcff"},"x":"busy","age":1.5,"e":{}}`
	if err != nil || string(b) != want {
		t.Fatalf("%s, %v", b, err)
	}
	var back Node
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if got := list(back, ""); !strings.HasPrefix(got, "z=9223372036854775808;a=") {
		t.Errorf("%s", got)
	}
	if again, err := json.Marshal(back); err != nil || string(again) != want {
		t.Errorf("%s, %v", again, err)
	}
}

// TestDeepJSON: groups in each other do not cost more than beside each other.
func TestDeepJSON(t *testing.T) {
	allocated := func(depth int) uint64 {
		b := []byte(strings.Repeat(`{"g":`, depth) + fmt.Sprintf("%q", strings.Repeat("x", 100*depth)) +
			strings.Repeat("}", depth))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var n Node
		if err := json.Unmarshal(b, &n); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	if one, two := allocated(1000), allocated(2000); two > 3*one {
		t.Errorf("%d bytes for 1000 groups, %d for 2000", one, two)
	}
}

// FuzzNode: a tree of any JSON is the same one after it was written, and has no array.
func FuzzNode(f *testing.F) {
	for _, s := range []string{`{"z":9223372036854775808,"a":"0x1f","g":{"t":"\u001b\udcff","":null},"age":1.5e9,"e":{}}`,
		`"\ud800"`, ` { "a" : { "b" : [ 1 ] } } `, `{"a":1,"a":{"a":false}}`, "1", "[]", "{"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var n Node
		if json.Unmarshal(b, &n) != nil {
			return
		}
		for path, v := range n.Values("") {
			switch v.(type) {
			case bool, string, json.Number:
			default:
				t.Errorf("%q has %s of the type %T", b, path, v)
			}
		}
		once, err := json.Marshal(n)
		if err != nil {
			t.Fatalf("%q is not written: %v", b, err)
		}
		var again Node
		if err := json.Unmarshal(once, &again); err != nil {
			t.Fatalf("%q is written as %q, which is not read: %v", b, once, err)
		}
		if list(again, "") != list(n, "") {
			t.Errorf("%q is %q; written as %q it is %q", b, list(n, ""), once, list(again, ""))
		}
	})
}
