package scsi_test

import (
	"fmt"
	"strings"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
	"gvm/devices/scsi/trace"
)

func TestExtent(t *testing.T) {
	for _, tt := range []struct {
		cdb    []byte
		lba, n uint64
		ok     bool
		detail string
	}{
		{[]byte{0x08, 0xff, 2, 3, 4, 0}, 0x1f0203, 4, true, "2032131+4"},
		{[]byte{0x0a, 0, 0, 9, 0, 0}, 9, 256, true, "9+256"},
		{[]byte{0x28, 0xff, 1, 2, 3, 4, 5, 6, 7, 8}, 0x01020304, 0x0607, true, "16909060+1543 FUA"},
		{[]byte{0x41, 0xff, 0, 0, 0, 4, 5, 0, 7, 8}, 4, 7, true, "4+7 UNMAP"},
		{[]byte{0xaa, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0}, 0x01020304, 0x05060708, true, "16909060+84281096"},
		{[]byte{0x8a, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0}, 0x0102030405060708, 0x090a0b0c, true,
			"72623859790382856+151653132"},
		{[]byte{0x8b, 8, 0, 0, 0, 0, 0, 0, 7, 8, 0, 0, 11, 12, 0, 0}, 0x0708, 0x0b0c, true, "1800+2828 FUA"},
		{[]byte{0x89, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0}, 0x0102030405060708, 12, true,
			"72623859790382856+12"},
		{[]byte{0x28, 0, 1, 2, 3, 4}, 0, 0, false, ""},
		{[]byte{0x12, 0, 1, 2, 3, 4}, 0, 0, false, ""},
		{[]byte{0x9e, 0x12, 15: 0}, 0, 0, false, ""},
		{[]byte{0xc0, 0, 1, 2, 3, 4}, 0, 0, false, "c0 00 01 02 03 04"},
		{nil, 0, 0, false, ""},
	} {
		if lba, n, ok := scsi.Extent(tt.cdb); lba != tt.lba || n != tt.n || ok != tt.ok {
			t.Errorf("% x: %#x+%#x, %v", tt.cdb, lba, n, ok)
		}
		if got := scsi.Detail(tt.cdb); got != tt.detail {
			t.Errorf("% x: %q, want %q", tt.cdb, got, tt.detail)
		}
	}
}

func TestParameterList(t *testing.T) {
	for _, tt := range []struct {
		cdb  []byte
		want bool
	}{
		{nil, false},
		{[]byte{0x42}, true},
		{[]byte{0x15}, true},
		{[]byte{0xc0}, true},
		{[]byte{0x48, 1}, true},
		{[]byte{0x28, 0}, true}, // data-out of a command without any
		{[]byte{0x2a}, false},
		{[]byte{0x8b, 8}, false},
		{[]byte{0x2f, 2}, false},
		{[]byte{0x89, 8}, false},
		{[]byte{0x93}, false},
		{[]byte{0x93, 0}, false},
		{[]byte{0x93, 8}, true},
		{[]byte{0x41, 8}, true},
	} {
		if got := scsi.ParameterList(tt.cdb); got != tt.want {
			t.Errorf("% x: %v", tt.cdb, got)
		}
	}
}

// TestBlockCommands sends every command with numbers that are too large. One that finds its logical
// block address out of range has its extent in a trace.
func TestBlockCommands(t *testing.T) {
	found := 0
	for _, usage := range scsi.UsageData() {
		cdb := make([]byte, len(usage))
		copy(cdb, usage[:1])
		cdb[1] = usage[1] & 0x1f
		if usage[0]>>5 != 0 && scsi.OpcodeName(cdb[:1]) == scsi.OpcodeName(usage) {
			cdb[1] = 0 // no service action
		}
		for i := 2; i < len(cdb)-1; i++ {
			cdb[i] = 0xff
		}
		target := attach(t, scsi.UnitConfig{Backend: block.NewMem(blocks * blockSize)})
		if scsitest.Do(target, 0, cdb, nil, 0).String() != "CHECK 5/21/00" {
			continue
		}
		found++
		r := trace.Record{Kind: trace.Command, CDB: cdb}
		lba, n, ok := scsi.Extent(cdb)
		switch {
		case r.Op() == "GET LBA STATUS(16)": // an address without a number
		case !ok || lba < 1<<21-1 || n < 255:
			t.Errorf("%s: extent %d+%d, %v of % x", r.Op(), lba, n, ok, cdb)
		case r.Detail() != fmt.Sprintf("%d+%d", lba, n):
			t.Errorf("%s: a trace shows %q", r.Op(), r.Detail())
		}
	}
	if found < 23 {
		t.Errorf("only %d commands have a logical block address", found)
	}
}

// TestCounts compares the amounts that limits count for every command with its row.
func TestCounts(t *testing.T) {
	target := attach(t, scsi.UnitConfig{
		Backend: block.NewMem(blocks * blockSize),
		IOPS:    block.Limit{Rate: 1, Burst: block.MaxRate}, Bandwidth: block.Limit{Rate: 1, Burst: block.MaxRate},
	})
	u := target.Unit(0)
	write := []byte{0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0}
	expect(t, target, write, filled(0, 1), 0, "GOOD") // the limits' time begins
	for _, row := range access {
		commands, bytes := scsi.Counted(u)
		want, wantBytes := scsi.Counts(u, row.cdb)
		scsitest.Do(target, 0, row.cdb, row.out, blockSize)
		if c, b := scsi.Counted(u); c-commands != want || b-bytes != wantBytes {
			t.Errorf("%s: %d commands and %d bytes count, want %d and %d",
				row.name, c-commands, b-bytes, want, wantBytes)
		}
	}
}

// TestProbes: each command has probes, with a CDB of its length, and a buffer for the data that it
// transfers.
func TestProbes(t *testing.T) {
	probes, data := map[string]int{}, map[string]bool{}
	for _, p := range scsi.Probes(blockSize, blocks-1) {
		name := scsi.OpcodeName(p.CDB)
		probes[name]++
		length, dir, ok := scsi.CommandInfo(p.CDB)
		if ok && (len(p.CDB) != length || p.In > 0 && dir != scsi.DataIn || p.Out > 0 && dir != scsi.DataOut) {
			t.Errorf("%s: % x, %d bytes in, %d bytes out", name, p.CDB, p.In, p.Out)
		}
		data[name] = data[name] || p.In+p.Out > 0
	}
	for _, usage := range scsi.UsageData() {
		name := scsi.OpcodeName(usage)
		if _, dir, _ := scsi.CommandInfo(usage); probes[name] == 0 ||
			!data[name] && dir != scsi.NoData && name != "READ CAPACITY(10)" && !strings.HasPrefix(name, "VERIFY(") {
			t.Errorf("%s: %d probes, data %v", name, probes[name], data[name])
		}
	}
	if probes["READ(16)"] != 16 || probes["MAINTENANCE IN, service action 00h"] != 1 || probes["UNMAP"] != 11 {
		t.Errorf("%v", probes)
	}
}
