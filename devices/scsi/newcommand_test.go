package scsi_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
	"gvm/devices/scsi/trace"
)

// TestNewCommand adds a command by a row and a function, with these vectors. All that reads rows
// knows it then.
func TestNewCommand(t *testing.T) {
	cdb := cdb12(0xc0, 0x08, 3, 2)
	r := trace.Record{Kind: trace.Command, CDB: cdb}
	limit := block.Limit{Rate: 1, Burst: block.MaxRate}
	target := attach(t, scsi.UnitConfig{IOPS: limit, Bandwidth: limit})
	expect(t, target, cdb, filled(1, 2), 0, "CHECK 5/20/00")
	expect(t, target, cdb10(0x2a, 0, 0, 1), filled(0, 1), 0, "GOOD") // the limits' time begins
	if r.Op() != "operation code c0h" || r.Detail() != hex.EncodeToString(cdb[:1])+" 08 00 00 00 03 00 00 00 02 00 00" {
		t.Errorf("before: %s %s", r.Op(), r.Detail())
	}
	if strings.Contains(scsi.CommandTable(), "INVERTED") {
		t.Error("documented before it is there")
	}

	scsi.AddCommand(t)
	commands, counted := scsi.Counted(target.Unit(0))
	scsitest.Check(t, target, 0, []scsitest.Vector{
		{Name: "two blocks", CDB: "c0 08 00000003 00000002 00 00", Out: hex.EncodeToString(filled(1, 2)), Want: "GOOD"},
		{Name: "across the end", CDB: "c0 00 000007ff 00000002 00 00", OutLen: 1024, Want: "CHECK 5/21/00",
			Residual: 1024},
		{Name: "too little data", CDB: "c0 00 00000003 00000002 00 00", OutLen: 512,
			Want: "CHECK 5/0e/03", Residual: 512},
		{Name: "too many blocks", CDB: "c0 00 00000000 00010001 00 00", OutLen: 512,
			Want: "CHECK 5/21/00", Residual: 512},
		{Name: "a short CDB", CDB: "c0 00 00000003", OutLen: 512, Want: "CHECK 5/0e/03", Residual: 512},
		{Name: "NACA", CDB: "c0 00 00000003 00000002 00 04", OutLen: 512, Want: "CHECK 5/24/00", Residual: 512},
		{Name: "its usage data", CDB: "a3 0c 01 c0 0000 00000100 00 00", InLen: 256, Want: "GOOD", Residual: 240,
			Data: "00 03 000c c0 08 ffffffff ffffffff 00 00"},
	})
	if c, b := scsi.Counted(target.Unit(0)); c != commands+1 || b != counted+2*blockSize {
		t.Errorf("limits count %d commands and %d bytes", c-commands, b-counted)
	}
	want := filled(1, 2)
	for i := range want {
		want[i] = ^want[i]
	}
	if a := expect(t, target, cdb10(0x28, 0, 3, 2), nil, 2*blockSize, "GOOD"); !bytes.Equal(a.Data, want) {
		t.Error("the blocks are not the complement of the written ones")
	}
	all := expect(t, target, cdb12(0xa3, 0x0c, 0, 4096), nil, 4096, "GOOD")
	if !bytes.Contains(all.Data, []byte{0xc0, 0, 0, 0, 0, 0, 0, 12}) {
		t.Error("REPORT SUPPORTED OPERATION CODES lists it not")
	}
	if r.Op() != "WRITE INVERTED(12)" || r.Detail() != "3+2 FUA" || scsi.ParameterList(cdb) {
		t.Errorf("a trace shows %s %s, parameter list %v", r.Op(), r.Detail(), scsi.ParameterList(cdb))
	}
	if length, dir, ok := scsi.CommandInfo(cdb); length != 12 || dir != scsi.DataOut || !ok {
		t.Errorf("CDB of %d bytes, direction %d, %v", length, dir, ok)
	}
	line := "| c0 | WRITE INVERTED(12) | 12 | 2-5 | 6-9 |  | blocks out | blocks | all |  |\n"
	if !strings.Contains(scsi.CommandTable(), line) {
		t.Errorf("the documentation lacks %q", line)
	}
	probes := map[string]bool{}
	for _, p := range scsi.Probes(blockSize, blocks-1) {
		if p.CDB[0] == 0xc0 {
			probes[fmt.Sprintf("%x %d %d %v", p.CDB, p.In, p.Out, p.Writes)] = true
		}
	}
	for _, want := range []string{
		"c00000000000000000010000 0 512 true", // the first block
		"c00000000007000000030000 0 1536 true",
		"c000000007f8000000080000 0 4096 true", // the last ones
		"c000000007ff000000020000 0 1024 true", // past them
		"c00000000800000000010000 0 512 true",
		"c000ffffffff000000010000 0 512 true",
		"c00000000800000000000000 0 0 true",
		"c00000000010000000010000 0 0 true", // buffers that do not fit
		"c00000000010000000010000 0 256 true",
		"c00000000010000000010000 0 2048 true",
	} {
		if !probes[want] {
			t.Errorf("no probe is %s", want)
		}
	}
	readOnly := attach(t, scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize), ReadOnly: true})
	expect(t, readOnly, cdb, filled(1, 2), 0, "CHECK 7/27/00")
	c := newCluster(t, scsi.UnitConfig{})
	c.keys(2)
	c.out(1, prReserve, we, 0x11, 0, "GOOD")
	c.do(2, cdb, filled(1, 2), 0, "CONFLICT")
}
