package scsi_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/scsi/scsitest"
)

// Service actions and types of persistent reservations.
const (
	prRegister, prReserve, prRelease, prClear, prPreempt, prAbort, prIgnore = 0, 1, 2, 3, 4, 5, 6

	we, ea, wero, earo, wear, eaar = 1, 3, 5, 6, 7, 8
)

// cluster is a target with I_T nexuses 1 to 3, past their unit attentions.
type cluster struct {
	*scsi.Target
	t testing.TB
}

func newCluster(t testing.TB, cfg scsi.UnitConfig) *cluster {
	t.Helper()
	c := &cluster{attach(t, cfg), t}
	c.ready()
	return c
}

// ready takes the unit attention of every nexus.
func (c *cluster) ready() {
	c.t.Helper()
	for n := scsi.NexusID(1); n <= 3; n++ {
		if a := asNexus(c.Target, n, testUnitReady, nil, 0); a.String() != "CHECK 6/29/01" {
			c.t.Errorf("nexus %d: %v", n, a)
		}
	}
}

// do does a command of nexus n and checks how it ended.
func (c *cluster) do(n scsi.NexusID, cdb, out []byte, inLen int, want string) scsitest.Answer {
	c.t.Helper()
	a := asNexus(c.Target, n, cdb, out, inLen)
	if want == "CONFLICT" {
		want = "STATUS 18"
	}
	if a.String() != want {
		c.t.Errorf("nexus %d: %s % x: %v, want %s", n, scsi.OpcodeName(cdb), cdb, a, want)
	}
	return a
}

// parameters is the parameter list of PERSISTENT RESERVE OUT.
func parameters(key, newKey uint64, flags byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, key)
	b = binary.BigEndian.AppendUint64(b, newKey)
	return append(b, 0, 0, 0, 0, flags, 0, 0, 0)
}

// out does a PERSISTENT RESERVE OUT.
func (c *cluster) out(n scsi.NexusID, action, scopeType byte, key, newKey uint64, want string) {
	c.t.Helper()
	c.do(n, []byte{0x5f, action, scopeType, 0, 0, 0, 0, 0, 24, 0}, parameters(key, newKey, 0), 0, want)
}

// in does a PERSISTENT RESERVE IN and checks the data, in hexadecimal.
func (c *cluster) in(n scsi.NexusID, action byte, want string) {
	c.t.Helper()
	a := c.do(n, []byte{0x5e, action, 0, 0, 0, 0, 0, 1, 0, 0}, nil, 256, "GOOD")
	if got := hex.EncodeToString(a.Data[:256-int(a.Residual)]); got != strings.ReplaceAll(want, " ", "") {
		c.t.Errorf("nexus %d: PERSISTENT RESERVE IN %d: %s, want %s", n, action, got, want)
	}
}

// attention checks the unit attention conditions of each nexus, "" for none.
func (c *cluster) attention(want ...string) {
	c.t.Helper()
	for i, list := range want {
		for _, w := range append(strings.Fields(list), "") {
			if w == "" {
				w = "GOOD"
			} else {
				w = "CHECK 6/" + w
			}
			c.do(scsi.NexusID(i+1), testUnitReady, nil, 0, w)
		}
	}
}

// keys registers nexus 1 with key 11h and so on, up to n.
func (c *cluster) keys(n int) {
	c.t.Helper()
	for i := 1; i <= n; i++ {
		c.out(scsi.NexusID(i), prRegister, 0, 0, uint64(i)*0x11, "GOOD")
	}
}

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
	{"UNMAP", cdb10(0x42, 0, 0, 0), nil, "CCACC C"},
	{"COMPARE AND WRITE", cdb16(0x89, 0, 0, 0), nil, "CCACC C"},
	{"ORWRITE(16)", cdb16(0x8b, 0, 0, 1), filled(0, 1), "CCACC C"},
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
			if _, _, ok := scsi.CommandInfo(cdb); ok && !known[name] && !strings.Contains(name, "RESERVE") && !strings.HasPrefix(name, "RELEASE") {
				t.Errorf("%s is not in the table", name)
			}
		}
	}
}

// TestConflictOrder has what else could end a command that conflicts.
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
	c.do(3, read, nil, block, "CONFLICT")
	c.NexusReset(3)
	c.do(3, read, nil, block, "CHECK 6/29/07")
	c.do(3, read, nil, block, "CONFLICT")
	cdb, out = control(0, 0)
	c.do(1, cdb, out, 0, "GOOD")
	c.do(3, read, nil, block, "CONFLICT")
	c.do(3, testUnitReady, nil, 0, "CHECK 6/2a/01")
	// A unit that is stopped or write protected comes after.
	c.do(1, []byte{0x1b, 0, 0, 0, 0, 0}, nil, 0, "GOOD")
	c.do(1, read, nil, block, "CHECK 2/04/02")
	c.do(3, read, nil, block, "CONFLICT")
	c.do(3, testUnitReady, nil, 0, "CHECK 2/04/02")
	c.do(1, []byte{0x1b, 0, 0, 0, 1, 0}, nil, 0, "GOOD")
	// Nothing was transferred.
	if a := c.do(3, read, nil, block, "CONFLICT"); a.Residual != block || len(a.Sense) != 0 || !bytes.Equal(a.Data, make([]byte, block)) {
		t.Errorf("conflict with residual %d, sense % x", a.Residual, a.Sense)
	}
}
