package scsi_test

import (
	"bytes"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"gvm/devices/block"
	"gvm/devices/scsi"
)

// answers submits commands to LUN 0 of a unit with limits, one after another and all at once,
// and returns when each was answered.
func answers(t *testing.T, cfg scsi.UnitConfig, commands ...*scsi.Command) []time.Duration {
	t.Helper()
	cfg.Backend = block.NewMem(blocks * blockSize)
	target := attach(t, cfg)
	start, at := time.Now(), make([]time.Duration, len(commands))
	var done sync.WaitGroup
	done.Add(len(commands))
	for i, command := range commands {
		c := *command // the list may have one twice
		c.Done = func(r scsi.Result) {
			defer done.Done()
			at[i] = time.Since(start)
			if r.Status != scsi.Good {
				t.Errorf("command %d: status %02x", i, r.Status)
			}
		}
		target.Submit(&c)
	}
	done.Wait()
	return at
}

func reads(n, blocks int) (list []*scsi.Command) {
	for range n {
		list = append(list, &scsi.Command{CDB: cdb10(0x28, 0, 0, uint16(blocks)),
			In: [][]byte{make([]byte, blocks*blockSize)}})
	}
	return list
}

func TestLimits(t *testing.T) {
	type seconds []float64
	same := &scsi.Command{CDB: cdb10(0x41, 0, 0, 8), Out: [][]byte{bytes.Repeat([]byte{1}, blockSize)}}
	discard := &scsi.Command{CDB: cdb10(0x41, 8, 0, 8), Out: [][]byte{make([]byte, blockSize)}}
	verify := &scsi.Command{CDB: cdb10(0x2f, 0, 0, 8)}
	ready := &scsi.Command{CDB: testUnitReady}
	writeBack := &scsi.Command{CDB: cdb10(0x2e, 0, 9, 1), Out: [][]byte{make([]byte, blockSize)}}
	or := &scsi.Command{CDB: cdb16(0x8b, 0, 9, 1), Out: [][]byte{make([]byte, blockSize)}}
	compare := &scsi.Command{CDB: cdb16(0x89, 0, 9, 0), Out: [][]byte{make([]byte, 2*blockSize)}}
	compare.CDB[13] = 1
	for name, v := range map[string]struct {
		cfg      scsi.UnitConfig
		commands []*scsi.Command
		want     seconds
	}{
		"both": {scsi.UnitConfig{IOPS: block.Limit{Rate: 1, Burst: 1},
			Bandwidth: block.Limit{Rate: blockSize, Burst: 2 * blockSize}}, reads(3, 2), seconds{0, 2, 4}},
		"what moves no data": {scsi.UnitConfig{IOPS: block.Limit{Rate: 1, Burst: 1}},
			[]*scsi.Command{reads(1, 1)[0], ready, {CDB: syncCache}, ready}, seconds{0, 0, 1, 0}},
		"moved bytes": {scsi.UnitConfig{Bandwidth: block.Limit{Rate: blockSize, Burst: blockSize}},
			[]*scsi.Command{same, discard, verify}, seconds{7, 7, 15}},
		"bytes moved twice": {scsi.UnitConfig{Bandwidth: block.Limit{Rate: blockSize, Burst: blockSize}},
			[]*scsi.Command{writeBack, or, compare}, seconds{1, 3, 5}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				at := answers(t, v.cfg, v.commands...)
				for i, want := range v.want {
					if got := at[i].Seconds(); got < want-1e-6 || got > want+1e-6 {
						t.Errorf("command %d is answered after %gs, want %gs", i, got, want)
					}
				}
			})
		})
	}
}

// TestLimitShortCDB: a CDB without the field that the cost is in is refused as ever.
func TestLimitShortCDB(t *testing.T) {
	target := attach(t, scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize), IOPS: block.Limit{Rate: 1 << 40}})
	for _, op := range []byte{0x41, 0x93, 0x2f, 0xaf, 0x8f, 0x28} {
		expect(t, target, []byte{op, 0}, nil, 0, "CHECK 5/0e/03")
	}
}

// TestLimitDelaysNoOther: a command that waits for its limit delays neither its caller nor other
// units, can be aborted, and keeps its place before an ORDERED command.
func TestLimitDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize), Serial: "slow",
			IOPS: block.Limit{Rate: 1, Burst: 1}})
		if err != nil {
			t.Fatal(err)
		}
		target := attach(t, scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize)})
		lun, _ := scsi.EncodeLUN(1)
		if err := target.Attach(lun, slow); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		var log []string
		submit := func(name string, c *scsi.Command, lun scsi.LUN, tag uint64) {
			c.LUN, c.Tag = lun, tag
			c.Done = func(r scsi.Result) {
				if r.Abort != scsi.NotAborted {
					name += " aborted"
				}
				log = append(log, name+" after "+time.Since(start).Round(time.Millisecond).String())
			}
			target.Submit(c)
			synctest.Wait()
		}
		for range 2 { // POWER ON OCCURRED, REPORTED LUNS DATA HAS CHANGED
			submit("attention", &scsi.Command{CDB: testUnitReady}, lun, 0)
		}
		submit("attention", &scsi.Command{CDB: testUnitReady}, 0, 0)
		log = nil
		submit("first", reads(1, 1)[0], lun, 1)
		submit("second", reads(1, 1)[0], lun, 2)
		submit("third", reads(1, 1)[0], lun, 3)
		ordered := reads(1, 1)[0]
		ordered.Attr = scsi.Ordered
		submit("ordered", ordered, lun, 4)
		submit("other unit", reads(1, 1)[0], 0, 5)
		if got := target.QueryTask(0, lun, 3); got != scsi.FunctionSucceeded {
			t.Errorf("QUERY TASK: %v", got)
		}
		if got := target.AbortTask(0, lun, 3); got != scsi.FunctionComplete {
			t.Errorf("ABORT TASK: %v", got)
		}
		time.Sleep(time.Minute)
		submit("again", reads(1, 1)[0], lun, 6)
		submit("detached", reads(1, 1)[0], lun, 7)
		if err := target.Detach(lun); err != nil {
			t.Fatal(err)
		}
		want := []string{"first after 0s", "other unit after 0s", "third aborted after 0s", "second after 1s",
			"ordered after 2s", "again after 1m0s", "detached aborted after 1m0s"}
		if !slices.Equal(log, want) {
			t.Errorf("%q\nwant %q", log, want)
		}
	})
}

func TestLimitRefused(t *testing.T) {
	for _, cfg := range []scsi.UnitConfig{{IOPS: block.Limit{Burst: 1}}, {Bandwidth: block.Limit{Burst: 1}}} {
		cfg.Backend, cfg.Serial = block.NewMem(blocks*blockSize), "s"
		if _, err := scsi.NewUnit(cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
}
