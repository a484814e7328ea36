package vscsi

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sync"
	"testing"
	"time"

	"gvm/devices/scsi"
	"gvm/devices/virtio"
	"gvm/inspect"
)

func tmf(function uint32, lun string, id uint64) []byte {
	b := binary.LittleEndian.AppendUint32(make([]byte, 4), function)
	b = append(b, lun...)
	return binary.LittleEndian.AppendUint64(b, id)
}

func TestTaskManagement(t *testing.T) {
	const target1 = "\x01\x01\x40\x05\x00\x00\x00\x00"
	f := &fake{submit: good}
	r := newRig(t, Config{Target: f, Nexus: 3}, virtio.FeatureEventIdx)
	for _, tt := range []struct {
		name     string
		req      []byte
		response scsi.TaskResponse
		call     string
		code     byte
	}{
		{"abort task", tmf(0, lun5, 0xabcd), scsi.FunctionComplete, "abort task 3 0x4005000000000000 0xabcd", 0},
		{"abort task set", tmf(1, lun5, 0), scsi.FunctionComplete, "abort task set 3 0x4005000000000000", 0},
		{"clear ACA", tmf(2, lun5, 0), scsi.FunctionComplete, "", 11},
		{"clear task set", tmf(3, lun5, 0), scsi.FunctionComplete, "clear task set 3 0x4005000000000000", 0},
		{"I_T nexus reset", tmf(4, lun5, 0), scsi.FunctionComplete, "nexus reset 3", 0},
		{"logical unit reset", tmf(5, lun5, 0), scsi.FunctionComplete, "logical unit reset 0x4005000000000000", 0},
		{"query task", tmf(6, lun5, 9), scsi.FunctionSucceeded, "query task 3 0x4005000000000000 0x9", 10},
		{"query task set", tmf(7, lun5, 0), scsi.FunctionSucceeded, "query task set 3 0x4005000000000000", 10},
		{"function 8", tmf(8, lun5, 0), scsi.FunctionComplete, "", 11},
		{"rejected", tmf(5, lun5, 0), scsi.FunctionRejected, "logical unit reset 0x4005000000000000", 11},
		{"no such unit", tmf(5, lun5, 0), scsi.IncorrectLUN, "logical unit reset 0x4005000000000000", 12},
		{"an answer of later", tmf(5, lun5, 0), 77, "logical unit reset 0x4005000000000000", 9},
		{"no such target", tmf(5, target1, 0), scsi.FunctionComplete, "", 3},
	} {
		f.response = tt.response
		resp := r.roundTrip(0, tt.req, []int{2, 13}, 4, nil)
		var want []string
		if tt.call != "" {
			want = []string{tt.call}
		}
		if calls := f.taken(); len(resp) != 1 || resp[0] != tt.code || !slices.Equal(calls, want) {
			t.Errorf("%s: response % x, target asked %q", tt.name, resp, calls)
		}
	}
}

// TestFunctionsInspected: the device shows its last task management functions, the newest first,
// and that one is not answered yet.
func TestFunctionsInspected(t *testing.T) {
	var during []inspect.Node
	f := &asked{fake: &fake{submit: good}}
	r := newRig(t, Config{Target: f}, 0)
	show := func() []inspect.Node { return r.dev.functions.inspect().Nodes }
	f.reset = func() { during = show() }
	for i := range 9 {
		r.roundTrip(0, tmf(tmfAbortTask, lun5, uint64(i)), nil, 1, nil)
	}
	r.roundTrip(0, tmf(tmfLogicalUnitReset, lun5, 0), nil, 1, nil)
	if len(during) != 8 || during[0].Get("response") != nil || during[0].Get("lun") != 5 {
		t.Errorf("during the function: %v", during)
	}
	after := show()
	if len(after) != 8 || after[0].Get("function") != "LOGICAL UNIT RESET" || after[0].Get("response") != "OK" ||
		after[1].Get("function") != "ABORT TASK" || after[1].Get("detail") != "tag 8" {
		t.Errorf("after it: %v", after)
	}
}

// asked is a target that calls reset in a LOGICAL UNIT RESET.
type asked struct {
	*fake
	reset func()
}

func (a *asked) LogicalUnitReset(lun scsi.LUN) scsi.TaskResponse {
	a.reset()
	return a.fake.LogicalUnitReset(lun)
}

func TestAsynchronousNotification(t *testing.T) {
	r := newRig(t, Config{Target: &fake{submit: good}}, 0)
	for typ := byte(1); typ <= 2; typ++ {
		req := append([]byte{typ, 0, 0, 0}, lun5...)
		req = append(req, 0xff, 0xff, 0, 0)
		if resp := r.roundTrip(0, req, []int{5}, 5, []int{4}); !bytes.Equal(resp, []byte{0, 0, 0, 0, 0}) {
			t.Errorf("type %d: % x", typ, resp)
		}
		req[5] = 9
		if resp := r.roundTrip(0, req, nil, 5, nil); !bytes.Equal(resp, []byte{0, 0, 0, 0, 3}) {
			t.Errorf("type %d, target 9: % x", typ, resp)
		}
	}
}

// holder is a target that keeps commands until they are aborted.
type holder struct {
	fake
	hold sync.Mutex
	kept []*scsi.Command
}

func newHolder() *holder {
	h := &holder{}
	h.submit = func(c *scsi.Command) {
		h.hold.Lock()
		defer h.hold.Unlock()
		h.kept = append(h.kept, c)
	}
	h.onReset = func() { // an asynchronous target: its answers come later
		go func() {
			time.Sleep(time.Millisecond)
			h.end(scsi.AbortedByReset, func(*scsi.Command) bool { return true })
		}()
	}
	return h
}

func (h *holder) end(how scsi.Abort, match func(*scsi.Command) bool) {
	h.hold.Lock()
	defer h.hold.Unlock()
	h.kept = slices.DeleteFunc(h.kept, func(c *scsi.Command) bool {
		if !match(c) {
			return false
		}
		c.Done(scsi.Result{Status: scsi.TaskAborted, Abort: how})
		return true
	})
}

func (h *holder) AbortTask(_ scsi.NexusID, _ scsi.LUN, tag uint64) scsi.TaskResponse {
	h.end(scsi.AbortedByTask, func(c *scsi.Command) bool { return c.Tag == tag })
	return scsi.FunctionComplete
}

// TestAbortFindsTheCommand aborts a command right after it was put in its
// queue: when the driver sees the answer, the command has been answered, and
// as aborted, however far the request queue's worker had come.
func TestAbortFindsTheCommand(t *testing.T) {
	h := newHolder()
	r := newRig(t, Config{Target: h, Queues: 2}, virtio.FeatureEventIdx)
	for i := range uint64(500) {
		q := 2 + int(i%2)
		segs := r.send(q, header(lun5, i, 0, 0x28), nil, 108, nil)
		if resp := r.roundTrip(0, tmf(0, lun5, i), nil, 1, nil); resp[0] != 0 {
			t.Fatalf("response %d", resp[0])
		}
		if _, _, ok := r.q[q].Used(); !ok {
			t.Fatalf("round %d: TMF answered before the command", i)
		}
		if code := r.q[q].Bytes(segs[0].Addr, 108)[11]; code != 2 {
			t.Fatalf("round %d: response %d", i, code)
		}
	}
}

// TestResetEndsCommands: Reset returns when every command has been answered.
func TestResetEndsCommands(t *testing.T) {
	h := newHolder()
	r := newRig(t, Config{Target: h, Queues: 2}, virtio.FeatureEventIdx)
	for i := range 20 {
		r.send(2+i%2, header(lun5, uint64(i), 0, 0x28), nil, 108, nil)
	}
	r.send(1, nil, nil, 16, nil) // an event buffer, which is never used
	for q := 2; q < 4; q++ {     // all are with the target
		if err := r.dev.workers[q].Barrier(); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.dev.Reset(); err != nil {
		t.Fatal(err)
	}
	if calls := h.taken(); !slices.Equal(calls, []string{"nexus reset 0"}) {
		t.Fatalf("target asked %q", calls)
	}
	for q, want := range []int{0, 0, 10, 10} {
		n := 0
		for {
			if _, _, ok := r.q[q].Used(); !ok {
				break
			}
			n++
		}
		if n != want {
			t.Errorf("queue %d: %d used, want %d", q, n, want)
		}
	}
	if err := r.dev.Reset(); err != nil || len(h.taken()) != 0 {
		t.Fatal("a second reset does something", err)
	}
}
