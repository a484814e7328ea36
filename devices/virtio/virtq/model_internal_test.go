package virtq

import (
	"fmt"
	"go/constant"
	"go/token"
	"go/types"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"gvm/guestmem"
)

// TestModelConstants holds the model against the code: flags, the wrap of indices, and the decision
// to interrupt.
func TestModelConstants(t *testing.T) {
	text, err := os.ReadFile("testdata/models/split.pml")
	if err != nil {
		t.Fatal(err)
	}
	// macro returns the first definition of a name, which is the right one where the model has a wrong
	// one too.
	macro := func(name string) string {
		m := regexp.MustCompile(`(?m)^#define ` + regexp.QuoteMeta(name) + ` ([^\n/]+)`).FindSubmatch(text)
		if m == nil {
			t.Fatalf("the model has no %s", name)
		}
		return strings.TrimSpace(string(m[1]))
	}
	number := func(name string) int {
		n, err := strconv.Atoi(macro(name))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for name, want := range map[string]int{
		"VIRTQ_AVAIL_F_NO_INTERRUPT": availFNoInterrupt, "VIRTQ_USED_F_NO_NOTIFY": usedFNoNotify,
	} {
		if got := number(name); got != want {
			t.Errorf("%s is %d, want %d", name, got, want)
		}
	}
	// The model's queue is as large for its indices as the largest queue is for 16 bits.
	if q, m := number("QSIZE"), number("MASK"); (m+1)/q != 65536/maxSize {
		t.Errorf("QSIZE %d, MASK %d", q, m)
	}
	if got := macro("idx(n)"); got != "((n) & MASK)" {
		t.Errorf("idx(n) is %s", got)
	}

	// On integers Promela's operators are Go's, whose type checker computes the expression.
	decision := strings.ReplaceAll(macro("need_event(event, new, old)"), "idx(", "65535 & (")
	mem := guestmem.Heap(0, 4096)
	for _, old := range []uint16{0, 1, maxSize - 1, maxSize, 65534, 65535} {
		for _, step := range []uint16{1, 2, 3, maxSize} {
			for _, from := range []uint16{old - 2, old + step - 2, old + maxSize} {
				for event := from; event != from+4; event++ {
					q, err := New(mem, Layout{Size: 4, Driver: 1024, Device: 2048}, FeatureEventIdx, old)
					if err != nil {
						t.Fatal(err)
					}
					q.usedIdx += step
					guestmem.StoreUint16(q.usedEvent, event)
					expr := strings.NewReplacer("new", fmt.Sprint(old+step), "old", fmt.Sprint(old),
						"event", fmt.Sprint(event)).Replace(decision)
					v, err := types.Eval(token.NewFileSet(), nil, token.NoPos, expr)
					if err != nil {
						t.Fatalf("%s: %v", expr, err)
					}
					if got := q.Publish(); got != constant.BoolVal(v.Value) {
						t.Errorf("event %d, idx from %d to %d: Publish returns %t", event, old, old+step, got)
					}
				}
			}
		}
	}
}
