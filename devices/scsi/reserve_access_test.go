package scsi_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"gvm/devices/scsi"
)

// access is table 66 of SPC-5 and table 13 of SBC-4: which commands are allowed
// (A) and which conflict (C). The columns are a reservation of another I_T nexus
// of type Write Exclusive and of type Exclusive Access; a registered nexus, with
// the types for registrants; one that is not registered, with those that are
// Write Exclusive and those that are Exclusive Access; and RESERVE(6), by table
// 10 of SPC-2.
var access = []struct {
	name  string
	cdb   []byte
	out   []byte
	table string
}{
	{"TEST UNIT READY", testUnitReady, nil, "AAAAA C"},
	{"REQUEST SENSE", []byte{0x03, 0, 0, 0, 18, 0}, nil, "AAAAA A"},
	{"INQUIRY", []byte{0x12, 0, 0, 0, 36, 0}, nil, "AAAAA A"},
	{"REPORT LUNS", cdb12(0xa0, 0, 0, 16), nil, "AAAAA A"},
	{"LOG SENSE", []byte{0x4d, 0, 0x40, 0, 0, 0, 0, 0, 64, 0}, nil, "AAAAA A"},
	{"READ CAPACITY(10)", cdb10(0x25, 0, 0, 0), nil, "AAAAA A"},
	{"READ CAPACITY(16)", cdb16(0x9e, 0x10, 0, 32), nil, "AAAAA A"},
	{"START STOP UNIT, stop", []byte{0x1b, 0, 0, 0, 0, 0}, nil, "CCACC C"},
	{"START STOP UNIT, active", []byte{0x1b, 0, 0, 0, 0x10, 0}, nil, "CCACC C"},
	{"START STOP UNIT, start", []byte{0x1b, 0, 0, 0, 1, 0}, nil, "AAAAA A"},
	{"PREVENT", []byte{0x1e, 0, 0, 0, 1, 0}, nil, "CCACC C"},
	{"ALLOW", []byte{0x1e, 0, 0, 0, 0, 0}, nil, "AAAAA A"},
	{"READ(6)", []byte{0x08, 0, 0, 0, 1, 0}, nil, "ACAAC C"},
	{"READ(10)", cdb10(0x28, 0, 0, 1), nil, "ACAAC C"},
	{"READ(12)", cdb12(0xa8, 0, 0, 1), nil, "ACAAC C"},
	{"READ(16)", cdb16(0x88, 0, 0, 1), nil, "ACAAC C"},
	{"VERIFY(10)", cdb10(0x2f, 0, 0, 1), nil, "ACAAC C"},
	{"VERIFY(12)", cdb12(0xaf, 0, 0, 1), nil, "ACAAC C"},
	{"VERIFY(16)", cdb16(0x8f, 0, 0, 1), nil, "ACAAC C"},
	{"PRE-FETCH(10)", cdb10(0x34, 0, 0, 1), nil, "ACAAC C"},
	{"PRE-FETCH(16)", cdb16(0x90, 0, 0, 1), nil, "ACAAC C"},
	{"GET LBA STATUS(16)", cdb16(0x9e, 0x12, 0, 24), nil, "ACAAC C"},
	{"READ DEFECT DATA(10)", cdb10(0x37, 0, 0x1d000000, 8), nil, "ACAAC C"},
	{"READ DEFECT DATA(12)", cdb12(0xb7, 0x08, 0, 8), nil, "ACAAC C"},
	{"MODE SENSE(6)", modeSense8, nil, "ACAAC C"},
	{"MODE SENSE(10)", []byte{0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 255, 0}, nil, "ACAAC C"},
	{"REPORT SUPPORTED OPERATION CODES", cdb12(0xa3, 0x0c, 0, 64), nil, "ACAAC C"},
	{"REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", cdb12(0xa3, 0x0d, 0, 4), nil, "ACAAC C"},
	{"MODE SELECT(6)", []byte{0x15, 0x10, 0, 0, 0, 0}, nil, "CCACC C"},
	{"MODE SELECT(10)", []byte{0x55, 0x10, 0, 0, 0, 0, 0, 0, 0, 0}, nil, "CCACC C"},
	{"SYNCHRONIZE CACHE(10)", syncCache, nil, "CCACC C"},
	{"SYNCHRONIZE CACHE(16)", cdb16(0x91, 0, 0, 0), nil, "CCACC C"},
	{"WRITE(6)", []byte{0x0a, 0, 0, 0, 1, 0}, filled(0, 1), "CCACC C"},
	{"WRITE(10)", cdb10(0x2a, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"WRITE(12)", cdb12(0xaa, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"WRITE(16)", cdb16(0x8a, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"WRITE AND VERIFY(10)", cdb10(0x2e, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"WRITE AND VERIFY(12)", cdb12(0xae, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"WRITE AND VERIFY(16)", cdb16(0x8e, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"WRITE SAME(10)", cdb10(0x41, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"WRITE SAME(16)", cdb16(0x93, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"UNMAP", cdb10(0x42, 0, 0, 24), append([]byte{1: 22, 3: 16, 19: 1}, 0, 0, 0, 0), "CCACC C"},
	{"COMPARE AND WRITE", []byte{0x89, 13: 1, 15: 0}, make([]byte, 2*blockSize), "CCACC C"},
	{"ORWRITE(16)", cdb16(0x8b, 0, 0, 1), filled(0, 1), "CCACC C"},
	{"SANITIZE, OVERWRITE", sanitizeCDB(1, 5), []byte{1, 0, 0, 1, 0}, "CCACC C"},
	{"SANITIZE, BLOCK ERASE", sanitizeCDB(2, 0), nil, "CCACC C"},
	{"SANITIZE, EXIT FAILURE MODE", sanitizeCDB(0x1f, 0), nil, "CCACC C"},
	{"EXTENDED COPY(LID1)", cdb16(0x83, 0, 0, 0), nil, "CCACC C"},
	{"RECEIVE COPY STATUS(LID1)", cdb16(0x84, 0, 0, 32), nil, "AAAAA C"},
	{"RECEIVE COPY DATA(LID1)", cdb16(0x84, 1, 0, 32), nil, "AAAAA C"},
	{"RECEIVE COPY OPERATING PARAMETERS", cdb16(0x84, 3, 0, 64), nil, "AAAAA C"},
	{"RECEIVE COPY FAILURE DETAILS(LID1)", cdb16(0x84, 4, 0, 64), nil, "AAAAA C"},
}

// TestAccess does every command from a holder, a registered and an unregistered
// I_T nexus while each type of reservation is there.
func TestAccess(t *testing.T) {
	const holder, registrant, other = 1, 2, 3
	try := func(c *cluster, n scsi.NexusID, column int) {
		t.Helper()
		for _, row := range access {
			want := "GOOD"
			switch {
			case column >= 0 && row.table[column] == 'C':
				want = "CONFLICT"
			case strings.Contains(row.name, "LID1") && row.cdb[0] == 0x84:
				want = "CHECK 5/24/00" // there was no copy
			}
			c.do(n, row.cdb, row.out, 512, want)
		}
	}
	for column, typ := range []byte{we, ea, wero, earo, wear, eaar} {
		t.Run(fmt.Sprintf("type %d", typ), func(t *testing.T) {
			c := newCluster(t, scsi.UnitConfig{})
			c.keys(2)
			c.out(holder, prReserve, typ, 0x11, 0, "GOOD")
			try(c, holder, -1)
			if column < 2 {
				try(c, registrant, column)
				try(c, other, column)
				return
			}
			try(c, registrant, 2)
			try(c, other, 3+column%2)
		})
	}
	t.Run("RESERVE(6)", func(t *testing.T) {
		c := newCluster(t, scsi.UnitConfig{})
		c.do(holder, []byte{0x16, 0, 0, 0, 0, 0}, nil, 0, "GOOD")
		try(c, holder, -1)
		try(c, other, 6)
	})
	// The table knows every command there is, but for those that reserve.
	known := map[string]bool{}
	for _, row := range access {
		name := scsi.OpcodeName(row.cdb)
		if !strings.HasPrefix(row.name, name) && !strings.Contains("PREVENT ALLOW MEDIUM REMOVAL", row.name) {
			t.Errorf("%s: CDB of %s", row.name, name)
		}
		known[name] = true
	}
	for op := range 256 {
		for action := range 32 {
			cdb := []byte{byte(op), byte(action)}
			name := scsi.OpcodeName(cdb)
			if _, _, ok := scsi.CommandInfo(cdb); ok && !known[name] && !strings.Contains(name, "RESERVE") &&
				!strings.HasPrefix(name, "RELEASE") {
				t.Errorf("%s is not in the table", name)
			}
		}
	}
}

// TestConflictOrder has the other reasons that could end a conflicting command.
func TestConflictOrder(t *testing.T) {
	c := newCluster(t, scsi.UnitConfig{})
	c.keys(1)
	c.out(1, prReserve, ea, 0x11, 0, "GOOD")
	read := cdb10(0x28, 0, 0, 1)
	// ILLEGAL REQUEST comes first.
	c.do(3, []byte{0xff, 0, 0, 0, 0, 0}, nil, 0, "CHECK 5/20/00")
	c.do(3, []byte{0x9e, 0x1f, 15: 0}, nil, 0, "CHECK 5/24/00")
	c.do(3, []byte{0x28, 0, 0, 0}, nil, 0, "CHECK 5/0e/03")
	c.do(3, []byte{0x28, 9: 4}, nil, 0, "CHECK 5/24/00")
	// So do a reset and the loss of the nexus, and nothing else (SAM-5 5.3.3).
	cdb, out := control(0x04, 0)
	c.do(1, cdb, out, 0, "GOOD")
	c.do(3, read, nil, blockSize, "CONFLICT")
	c.NexusReset(3)
	c.do(3, read, nil, blockSize, "CHECK 6/29/07")
	c.do(3, read, nil, blockSize, "CONFLICT")
	cdb, out = control(0, 0)
	c.do(1, cdb, out, 0, "GOOD")
	c.do(3, read, nil, blockSize, "CONFLICT")
	c.do(3, testUnitReady, nil, 0, "CHECK 6/2a/01")
	// A unit that is stopped or write protected comes after.
	c.do(1, []byte{0x1b, 0, 0, 0, 0, 0}, nil, 0, "GOOD")
	c.do(1, read, nil, blockSize, "CHECK 2/04/02")
	c.do(3, read, nil, blockSize, "CONFLICT")
	c.do(3, testUnitReady, nil, 0, "CHECK 2/04/02")
	c.do(1, []byte{0x1b, 0, 0, 0, 1, 0}, nil, 0, "GOOD")
	// Nothing was transferred.
	if a := c.do(3, read, nil, blockSize, "CONFLICT"); a.Residual != blockSize || len(a.Sense) != 0 ||
		!bytes.Equal(a.Data, make([]byte, blockSize)) {
		t.Errorf("conflict with residual %d, sense % x", a.Residual, a.Sense)
	}
}
