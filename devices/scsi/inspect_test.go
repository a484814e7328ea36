package scsi_test

import (
	"runtime"
	"sync"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
	"gvm/inspect"
)

// idle returns the state of a unit without tasks: a task leaves, and its answer counts, after Done.
func idle(u *scsi.Unit) inspect.Node {
	for {
		if state := inspect.Group("", u.Inspect()...); state.Get("tasks") == 0 {
			return state
		}
		runtime.Gosched()
	}
}

// TestInspect: a unit counts its commands, and shows the last ones.
func TestInspect(t *testing.T) {
	target := attach(t, scsi.UnitConfig{Backend: block.NewMem(1 << 20)})
	u := target.Unit(0)
	before := idle(u)
	count := func(name string) uint64 { n, _ := before.Get(name).(uint64); return n }
	for range 10 {
		scsitest.Do(target, 0, cdb16(0x88, 0, 8, 4), nil, 4*512)
	}
	taken := inspect.Clock()
	scsitest.Run(target, &scsi.Command{CDB: cdb10(0x2a, 0, 7, 1), Out: [][]byte{make([]byte, 512)}, Taken: taken})
	scsitest.Do(target, 0, cdb10(0x28, 0, 1<<20, 1), nil, 512)
	scsitest.Do(target, 0, []byte{0x9e, 0x1f, 15: 0}, nil, 0)
	n := idle(u)
	for path, want := range map[string]any{
		"commands": count("commands") + 13, "check_conditions": count("check_conditions") + 2,
		"data_out_bytes": uint64(512),
		"last/0/command": "SERVICE ACTION IN(16), service action 1fh", "last/0/lba": nil, "last/0/age": nil,
		"last/1/command": "READ(10)", "last/1/lba": uint64(1 << 20), "last/1/status": "CHECK CONDITION",
		"last/1/sense":   "ILLEGAL REQUEST, logical block address out of range",
		"last/2/command": "WRITE(10)", "last/2/blocks": uint64(1), "last/2/status": "GOOD", "last/2/sense": nil,
		"last/7/command": "READ(16)", "last/8/command": nil,
	} {
		if got := n.Get(path); got != want {
			t.Errorf("%s is %v, want %v", path, got, want)
		}
	}
	if age, ok := n.Get("last/2/age").(inspect.Age); !ok || age < 0 || age > inspect.Age(inspect.Clock()-taken) {
		t.Errorf("last/2/age is %v", n.Get("last/2/age"))
	}
}

// TestInspectBusy reads the state of a unit while commands come, wait and are aborted.
func TestInspectBusy(t *testing.T) {
	hang := make(chan struct{})
	rec := &scsitest.Recorder{Backend: block.NewMem(1 << 20), OnCall: func(string) { <-hang }}
	target := attach(t, scsi.UnitConfig{Backend: rec})
	u := target.Unit(0)
	var done sync.WaitGroup
	const n = 100
	for i := range n {
		done.Add(1)
		target.Submit(&scsi.Command{CDB: cdb10(0x28, 0, uint32(i), 1), In: [][]byte{make([]byte, 512)}, Tag: uint64(i),
			Attr: scsi.TaskAttr(i % 3), Done: func(scsi.Result) { done.Done() }})
	}
	state := inspect.Group("", u.Inspect()...)
	for path, want := range map[string]any{"tasks": n, "task/0/lba": uint64(0), "task/63/tag": inspect.Hex(63),
		"task/64/tag": nil, "last/0/lba": uint64(n - 1), "last/0/status": nil} {
		if got := state.Get(path); got != want {
			t.Errorf("%s is %v, want %v", path, got, want)
		}
	}
	stop := make(chan struct{})
	var reads sync.WaitGroup
	reads.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				u.Inspect()
			}
		}
	})
	close(hang)
	target.AbortTaskSet(0, 0)
	done.Wait()
	for range 1000 {
		scsitest.Do(target, 0, cdb10(0x28, 0, 0, 1), nil, 512)
	}
	close(stop)
	reads.Wait()
	if got := idle(u).Get("last/7/status"); got != "GOOD" {
		t.Errorf("status %v", got)
	}
}
