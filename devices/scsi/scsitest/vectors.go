package scsitest

import (
	"encoding/hex"
	"strings"
	"testing"

	"gvm/devices/scsi"
)

// Vector is a command with the answer that it must get.
type Vector struct {
	Name     string
	CDB      string // hexadecimal, spaces allowed
	Out      string // data-out, likewise
	OutLen   int    // if not 0, Out is followed by zeroes up to this length
	InLen    int    // size of the data-in buffer
	Want     string // as Answer.String has it
	Data     string // the data-in that was transferred; "*" is not looked at
	Residual uint32
}

// unhex decodes hexadecimal with spaces.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Check sends every vector in order to lun and compares the answers.
func Check(t *testing.T, target *scsi.Target, lun scsi.LUN, vectors []Vector) {
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			out := unhex(t, v.Out)
			if v.OutLen > len(out) {
				out = append(out, make([]byte, v.OutLen-len(out))...)
			}
			a := Do(target, lun, unhex(t, v.CDB), out, v.InLen)
			if a.String() != v.Want || a.Residual != v.Residual {
				t.Errorf("%s: %v, residual %d; want %s, residual %d",
					scsi.OpcodeName(unhex(t, v.CDB)), a, a.Residual, v.Want, v.Residual)
			}
			if v.Data != "*" && hex.EncodeToString(a.Data) != strings.ReplaceAll(v.Data, " ", "") {
				t.Errorf("data\n%x, want\n%s", a.Data, v.Data)
			}
		})
	}
}

// Refusals are commands that every unit must refuse. The unit has 2048 blocks of 512 bytes.
var Refusals = []Vector{
	{Name: "unknown operation code", CDB: "ff 00 00 00 00 00", Want: "CHECK 5/20/00"},
	{Name: "unknown service action", CDB: "9e 1f 0000000000000000 00000020 00 00", InLen: 32,
		Want: "CHECK 5/24/00", Residual: 32},
	{Name: "no CDB", CDB: "", Want: "CHECK 5/0e/03"},
	{Name: "short CDB", CDB: "28 00 00 00", InLen: 512, Want: "CHECK 5/0e/03", Residual: 512},
	{Name: "NACA", CDB: "00 00 00 00 00 04", Want: "CHECK 5/24/00"},
	{Name: "READ(10) one past the end", CDB: "28 00 00000800 00 0001 00", InLen: 512,
		Want: "CHECK 5/21/00", Residual: 512},
	{Name: "READ(10) across the end", CDB: "28 00 000007ff 00 0002 00", InLen: 1024, Want: "CHECK 5/21/00",
		Residual: 1024},
	{Name: "READ(6) across the end", CDB: "08 00 0701 00 00", InLen: 131072, Want: "CHECK 5/21/00", Residual: 131072},
	{Name: "READ(16) whose sum overflows", CDB: "88 00 ffffffffffffffff 00000002 00 00", InLen: 1024,
		Want: "CHECK 5/21/00", Residual: 1024},
	{Name: "READ(16) whose byte offset overflows", CDB: "88 00 0080000000000001 00000001 00 00", InLen: 512,
		Want: "CHECK 5/21/00", Residual: 512},
	{Name: "WRITE(16) far out", CDB: "8a 00 7fffffffffffffff 00000001 00 00", OutLen: 512,
		Want: "CHECK 5/21/00", Residual: 512},
	{Name: "READ(10) of no blocks past the end", CDB: "28 00 00000801 00 0000 00", Want: "CHECK 5/21/00"},
	{Name: "RDPROTECT", CDB: "28 20 00000000 00 0001 00", InLen: 512, Want: "CHECK 5/24/00", Residual: 512},
	{Name: "WRPROTECT", CDB: "2a 20 00000000 00 0001 00", OutLen: 512, Want: "CHECK 5/24/00", Residual: 512},
	{Name: "WRITE(10) with too little data", CDB: "2a 00 00000000 00 0002 00", OutLen: 1023, Want: "CHECK 5/0e/03",
		Residual: 1023},
	{Name: "VERIFY(10) BYTCHK 2", CDB: "2f 04 00000000 00 0001 00", OutLen: 512, Want: "CHECK 5/24/00", Residual: 512},
	{Name: "VERIFY(16) across the end", CDB: "8f 00 0000000000000700 00000101 00 00", Want: "CHECK 5/21/00"},
	{Name: "WRITE SAME(10) of no blocks", CDB: "41 00 00000000 00 0000 00", OutLen: 512,
		Want: "CHECK 5/24/00", Residual: 512},
	{Name: "WRITE SAME(16) ANCHOR", CDB: "93 10 0000000000000000 00000001 00 00", OutLen: 512,
		Want: "CHECK 5/24/00", Residual: 512},
	{Name: "WRITE SAME(16) with two blocks of data", CDB: "93 00 0000000000000000 00000001 00 00", OutLen: 1024,
		Want: "CHECK 5/0e/03", Residual: 1024},
	{Name: "COMPARE AND WRITE with one block of data", CDB: "89 00 0000000000000000 000000 01 00 00", OutLen: 512,
		Want: "CHECK 5/0e/03", Residual: 512},
	{Name: "COMPARE AND WRITE with three blocks of data", CDB: "89 00 0000000000000000 000000 01 00 00", OutLen: 1536,
		Want: "CHECK 5/0e/03", Residual: 1536},
	{Name: "COMPARE AND WRITE across the end", CDB: "89 00 00000000000007ff 000000 02 00 00", OutLen: 2048,
		Want: "CHECK 5/21/00", Residual: 2048},
	{Name: "SYNCHRONIZE CACHE(16) across the end", CDB: "91 00 00000000000007ff 00000002 00 00", Want: "CHECK 5/21/00"},
	{Name: "PRE-FETCH(10) past the end", CDB: "34 00 00000801 00 0000 00", Want: "CHECK 5/21/00"},
	{Name: "INQUIRY page without EVPD", CDB: "12 00 80 0060 00", InLen: 96, Want: "CHECK 5/24/00", Residual: 96},
	{Name: "INQUIRY CMDDT", CDB: "12 02 00 0060 00", InLen: 96, Want: "CHECK 5/24/00", Residual: 96},
	{Name: "INQUIRY unknown page", CDB: "12 01 c9 0060 00", InLen: 96, Want: "CHECK 5/24/00", Residual: 96},
	{Name: "MODE SENSE(6) saved values", CDB: "1a 00 c8 00 ff 00", InLen: 255, Want: "CHECK 5/39/00", Residual: 255},
	{Name: "MODE SENSE(6) unknown page", CDB: "1a 00 05 00 ff 00", InLen: 255, Want: "CHECK 5/24/00", Residual: 255},
	{Name: "MODE SENSE(10) unknown subpage", CDB: "5a 00 0a 05 00 00 00 00ff 00", InLen: 255,
		Want: "CHECK 5/24/00", Residual: 255},
	{Name: "MODE SELECT(6) save pages", CDB: "15 11 00 00 04 00", Out: "00000000", Want: "CHECK 5/24/00", Residual: 4},
	{Name: "MODE SELECT(6) truncated header", CDB: "15 10 00 00 03 00", Out: "000000", Want: "CHECK 5/1a/00"},
	{Name: "MODE SELECT(6) truncated page", CDB: "15 10 00 00 06 00", Out: "00000000 0812", Want: "CHECK 5/1a/00"},
	{Name: "MODE SELECT(6) unknown page", CDB: "15 10 00 00 06 00", Out: "00000000 0500", Want: "CHECK 5/26/00"},
	{Name: "MODE SELECT(6) unchangeable bit", CDB: "15 10 00 00 18 00", Out: "00000000 0812 05 00", OutLen: 24,
		Want: "CHECK 5/26/00"},
	{Name: "MODE SELECT(6) other block length", CDB: "15 10 00 00 0c 00", Out: "00000008 00000000 00001000",
		Want: "CHECK 5/26/00"},
	{Name: "MODE SELECT(6) list longer than the data", CDB: "15 10 00 00 18 00", Out: "00000000",
		Want: "CHECK 5/0e/03", Residual: 4},
	{Name: "REPORT LUNS unknown select report", CDB: "a0 00 03 000000 00000010 00 00", InLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "opcodes, unknown reporting option", CDB: "a3 0c 04 00 0000 00000010 00 00", InLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "opcodes, option 1 of a service action", CDB: "a3 0c 01 9e 0010 00000010 00 00", InLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "opcodes, option 2 of a plain command", CDB: "a3 0c 02 28 0000 00000010 00 00", InLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "LOG SENSE save parameters", CDB: "4d 01 00 00 00 0000 00ff 00", InLen: 255,
		Want: "CHECK 5/24/00", Residual: 255},
	{Name: "LOG SENSE unknown page", CDB: "4d 00 0d 00 00 0000 00ff 00", InLen: 255,
		Want: "CHECK 5/24/00", Residual: 255},
	{Name: "LOG SENSE unknown subpage", CDB: "4d 00 2f 01 00 0000 00ff 00", InLen: 255,
		Want: "CHECK 5/24/00", Residual: 255},
	{Name: "LOG SENSE parameter pointer", CDB: "4d 00 2f 00 00 0001 00ff 00", InLen: 255,
		Want: "CHECK 5/24/00", Residual: 255},
	{Name: "READ DEFECT DATA(10) unknown format", CDB: "37 00 1e 00000000 0008 00", InLen: 8,
		Want: "CHECK 5/24/00", Residual: 8},
	{Name: "READ DEFECT DATA(12) unknown format", CDB: "b7 0f 00000000 00000010 00 00", InLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "GET LBA STATUS(16) past the end", CDB: "9e 12 0000000000000800 00000018 00 00", InLen: 24,
		Want: "CHECK 5/21/00", Residual: 24},
	{Name: "GET LBA STATUS(16) of some", CDB: "9e 12 0000000000000000 00000018 01 00", InLen: 24,
		Want: "CHECK 5/24/00", Residual: 24},
	{Name: "ORWRITE(16) across the end", CDB: "8b 00 00000000000007ff 00000002 00 00", OutLen: 1024,
		Want: "CHECK 5/21/00", Residual: 1024},
	{Name: "ORWRITE(16) ORPROTECT", CDB: "8b 20 0000000000000000 00000001 00 00", OutLen: 512,
		Want: "CHECK 5/24/00", Residual: 512},
	{Name: "ORWRITE(16) with too little data", CDB: "8b 00 0000000000000000 00000002 00 00", OutLen: 512,
		Want: "CHECK 5/0e/03", Residual: 512},
	{Name: "RECEIVE COPY STATUS(LID1) of no copy", CDB: "84 00 05 00000000000000 00000010 00 00", InLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "RECEIVE COPY DATA(LID1) of no copy", CDB: "84 01 05 00000000000000 00000010 00 00", InLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "RECEIVE COPY FAILURE DETAILS(LID1) of no copy", CDB: "84 04 05 00000000000000 00000010 00 00", InLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "EXTENDED COPY with less than a header", CDB: "83 00 0000000000000000 0000000f 00 00", OutLen: 15,
		Want: "CHECK 5/1a/00", Residual: 15},
	{Name: "EXTENDED COPY of service action 1", CDB: "83 01 0000000000000000 00000010 00 00", OutLen: 16,
		Want: "CHECK 5/24/00", Residual: 16},
	{Name: "START STOP UNIT LOEJ", CDB: "1b 00 00 00 02 00", Want: "CHECK 5/24/00"},
	{Name: "START STOP UNIT standby", CDB: "1b 00 00 00 30 00", Want: "CHECK 5/24/00"},
	{Name: "PREVENT ALLOW reserved", CDB: "1e 00 00 00 02 00", Want: "CHECK 5/24/00"},
}

// ThinRefusals are commands that a unit with provisioning management must refuse.
var ThinRefusals = []Vector{
	{Name: "UNMAP ANCHOR", CDB: "42 01 00000000 00 0018 00", OutLen: 24, Want: "CHECK 5/24/00", Residual: 24},
	{Name: "UNMAP short header", CDB: "42 00 00000000 00 0004 00", OutLen: 4, Want: "CHECK 5/1a/00", Residual: 4},
	{Name: "UNMAP across the end", CDB: "42 00 00000000 00 0018 00",
		Out: "0016 0010 00000000 00000000000007ff 00000002 00000000", Want: "CHECK 5/21/00"},
	{Name: "UNMAP list longer than the data", CDB: "42 00 00000000 00 0018 00", Out: "0016 0010 00000000",
		Want: "CHECK 5/0e/03", Residual: 8},
}

// Answers are commands of discovery with their whole answer, for a unit of 2048
// blocks of 512 bytes with the serial number "S-0042", the default strings and
// write-back cache, on a backend with a discard granularity of 4096, alone at
// LUN 0, with no unit attention pending.
var Answers = []Vector{
	{Name: "TEST UNIT READY", CDB: "00 00 00 00 00 00", Want: "GOOD"},
	{Name: "REQUEST SENSE fixed", CDB: "03 00 00 00 ff 00", InLen: 255, Want: "GOOD", Residual: 237,
		Data: "70 00 00 00000000 0a 00000000 00 00 00 000000"},
	{Name: "REQUEST SENSE descriptor", CDB: "03 01 00 00 ff 00", InLen: 255, Want: "GOOD", Residual: 247,
		Data: "72 00 00 00 000000 00"},
	{Name: "INQUIRY", CDB: "12 00 00 0060 00", InLen: 96, Want: "GOOD",
		Data: "00 00 06 12 5b 08 00 02" + "47564d2020202020" + "4449534b202020202020202020202020" + "31202020" +
			"0000000000000000000000000000000000000000 0000" + "00a0 0460 05c0 04c0 0600" + "000000000000" +
			"00000000000000000000000000000000000000000000"},
	{Name: "INQUIRY allocation length 5", CDB: "12 00 00 0005 00", InLen: 96, Want: "GOOD", Residual: 91,
		Data: "000006125b"},
	{Name: "INQUIRY buffer of 5", CDB: "12 00 00 0060 00", InLen: 5, Want: "GOOD", Data: "000006125b"},
	{Name: "INQUIRY without a buffer", CDB: "12 00 00 0060 00", Want: "GOOD"},
	{Name: "VPD 00", CDB: "12 01 00 00ff 00", InLen: 255, Want: "GOOD", Residual: 243,
		Data: "00 00 0008 00 80 83 86 8f b0 b1 b2"},
	{Name: "VPD 80", CDB: "12 01 80 00ff 00", InLen: 255, Want: "GOOD", Residual: 245, Data: "00 80 0006 532d30303432"},
	{Name: "VPD 83", CDB: "12 01 83 00ff 00", InLen: 255, Want: "GOOD", Residual: 205,
		Data: "00 83 002e" + "01 03 00 08 3344fed177602f27" +
			"02 01 00 1e 47564d2020202020 4449534b202020202020202020202020 532d30303432"},
	{Name: "VPD 86", CDB: "12 01 86 00ff 00", InLen: 255, Want: "GOOD", Residual: 191,
		Data: "00 86 003c 00 07 01" + strings.Repeat("00", 57)},
	{Name: "VPD 8F", CDB: "12 01 8f 00ff 00", InLen: 255, Want: "GOOD", Residual: 151, Data: "00 8f 0064" +
		"0001 000c 09 83 01 00 84 04 00 01 03 04 0000" + "0004 001c 00000000 0010 0040 00000900" +
		strings.Repeat("00", 16) +
		"0008 0004 02 02 e4 00" + "000c 0004 0000 0000" + "8001 0020 00000001 00000001 01fffe00 09" +
		strings.Repeat("00", 19)},
	{Name: "VPD B0", CDB: "12 01 b0 00ff 00", InLen: 255, Want: "GOOD", Residual: 191,
		Data: "00 b0 003c 01 ff 0001 00010000 00000800 00000000 00100000 00000100 00000008 80000000 0000000000100000" +
			strings.Repeat("00", 20)},
	{Name: "VPD B1", CDB: "12 01 b1 00ff 00", InLen: 255, Want: "GOOD", Residual: 191,
		Data: "00 b1 003c 0001 00 40" + strings.Repeat("00", 56)},
	{Name: "VPD B2", CDB: "12 01 b2 00ff 00", InLen: 255, Want: "GOOD", Residual: 247, Data: "00 b2 0004 00 e4 02 00"},
	{Name: "READ CAPACITY(10)", CDB: "25 00 00000000 0000 00 00", InLen: 8, Want: "GOOD", Data: "000007ff 00000200"},
	{Name: "READ CAPACITY(16)", CDB: "9e 10 0000000000000000 00000020 00 00", InLen: 32, Want: "GOOD",
		Data: "00000000000007ff 00000200 00 00 c000" + strings.Repeat("00", 16)},
	{Name: "READ CAPACITY(16) allocation length 13", CDB: "9e 10 0000000000000000 0000000d 00 00", InLen: 32,
		Want: "GOOD", Residual: 19,
		Data: "00000000000007ff 00000200 00"},
	{Name: "REPORT LUNS", CDB: "a0 00 00 000000 00001000 00 00", InLen: 4096, Want: "GOOD", Residual: 4080,
		Data: "00000008 00000000 0000000000000000"},
	{Name: "REPORT LUNS well-known", CDB: "a0 00 01 000000 00001000 00 00", InLen: 16, Want: "GOOD",
		Data: "00000008 00000000 c101000000000000"},
	{Name: "REPORT LUNS all", CDB: "a0 00 02 000000 00001000 00 00", InLen: 24, Want: "GOOD",
		Data: "00000010 00000000 0000000000000000 c101000000000000"},
	{Name: "REPORT LUNS administrative", CDB: "a0 00 10 000000 00001000 00 00", InLen: 8, Want: "GOOD",
		Data: "00000000 00000000"},
	{Name: "MODE SENSE(6) caching", CDB: "1a 08 08 00 ff 00", InLen: 255, Want: "GOOD", Residual: 231,
		Data: "17 00 10 00 08 12 04" + strings.Repeat("00", 17)},
	{Name: "MODE SENSE(6) caching, changeable", CDB: "1a 08 48 00 ff 00", InLen: 255, Want: "GOOD", Residual: 231,
		Data: "17 00 10 00 08 12 04" + strings.Repeat("00", 17)},
	{Name: "MODE SENSE(6) caching, first 4 bytes", CDB: "1a 08 08 00 04 00", InLen: 4, Want: "GOOD",
		Data: "17 00 10 00"},
	{Name: "MODE SENSE(6) control with descriptor", CDB: "1a 00 0a 00 ff 00", InLen: 255, Want: "GOOD", Residual: 231,
		Data: "17 00 10 08 00000800 00000200 0a 0a 02 10 00000000 0000 0000"},
	{Name: "MODE SENSE(6) control, changeable", CDB: "1a 08 4a 00 ff 00", InLen: 16, Want: "GOOD",
		Data: "0f 00 10 00 0a 0a 04 00 08 000000 0000 0000"},
	{Name: "MODE SENSE(10) all pages and subpages, long descriptor", CDB: "5a 10 3f ff 00 00 00 00ff 00", InLen: 255,
		Want: "GOOD", Residual: 175,
		Data: "004e 00 10 01 00 0010 0000000000000800 00000000 00000200" + "010a" + strings.Repeat("00", 10) +
			"081204" + strings.Repeat("00", 17) +
			"0a0a0210" + strings.Repeat("00", 8) + "1c0a08" + strings.Repeat("00", 9)},
	{Name: "opcodes, READ(10)", CDB: "a3 0c 01 28 0000 000000ff 00 00", InLen: 255, Want: "GOOD", Residual: 241,
		Data: "00 03 000a 28 f8 ffffffff 00 ffff 00"},
	{Name: "opcodes, READ CAPACITY(16) with timeouts", CDB: "a3 0c 82 9e 0010 000000ff 00 00", InLen: 255,
		Want: "GOOD", Residual: 223,
		Data: "00 83 0010 9e 10 0000000000000000 ffffffff 00 00" + "000a 0000 00000000 00000000"},
	{Name: "opcodes, option 3, WRITE SAME(16)", CDB: "a3 0c 03 93 0000 000000ff 00 00", InLen: 20, Want: "GOOD",
		Data: "00 03 0010 93 ff ffffffffffffffff ffffffff 00 00"},
	{Name: "opcodes, option 3, unknown", CDB: "a3 0c 03 a4 0000 000000ff 00 00", InLen: 20, Want: "GOOD", Residual: 16,
		Data: "00 01 0000"},
	{Name: "opcodes, option 2, unknown service action", CDB: "a3 0c 02 9e 0013 000000ff 00 00", InLen: 20, Want: "GOOD",
		Residual: 16, Data: "00 01 0000"},
	{Name: "LOG SENSE supported pages", CDB: "4d 00 40 00 00 0000 00ff 00", InLen: 255, Want: "GOOD", Residual: 249,
		Data: "00 00 0002 00 2f"},
	{Name: "LOG SENSE supported subpages", CDB: "4d 00 40 ff 00 0000 00ff 00", InLen: 255, Want: "GOOD", Residual: 245,
		Data: "40 ff 0006 0000 00ff 2f00"},
	{Name: "LOG SENSE informational exceptions", CDB: "4d 00 6f 00 00 0000 00ff 00", InLen: 255, Want: "GOOD",
		Residual: 243, Data: "2f 00 0008 0000 03 04 00 00 ff ff"},
	{Name: "LOG SENSE allocation length 4", CDB: "4d 00 6f 00 00 0000 0004 00", InLen: 255, Want: "GOOD", Residual: 251,
		Data: "2f 00 0008"},
	{Name: "READ DEFECT DATA(10)", CDB: "37 00 1d 00000000 0008 00", InLen: 8, Want: "GOOD", Residual: 4,
		Data: "00 1d 0000"},
	{Name: "READ DEFECT DATA(12)", CDB: "b7 08 00000000 00000010 00 00", InLen: 16, Want: "GOOD", Residual: 8,
		Data: "00 08 0000 00000000"},
	{Name: "EXTENDED COPY of nothing", CDB: "83 00 0000000000000000 00000000 00 00", Want: "GOOD"},
	{Name: "RECEIVE COPY OPERATING PARAMETERS", CDB: "84 03 0000000000000000 000000ff 00 00", InLen: 255,
		Want: "GOOD", Residual: 209,
		Data: "0000002a 01 000000 0010 0040 00000900 01fffe00 00000000 00000000 00000000" +
			" 0000 0001 01 09 00 00 000000 02 02 e4"},
	{Name: "ORWRITE(16) of no blocks at the end", CDB: "8b 00 0000000000000800 00000000 00 00", Want: "GOOD"},
	{Name: "task management functions", CDB: "a3 0d 00 000000 00000010 00 00", InLen: 16, Want: "GOOD", Residual: 12,
		Data: "dc 03 00 00"},
	{Name: "PREVENT", CDB: "1e 00 00 00 01 00", Want: "GOOD"},
	{Name: "SYNCHRONIZE CACHE(10) to the end", CDB: "35 00 00000000 00 0000 00", Want: "GOOD"},
	{Name: "PRE-FETCH(16)", CDB: "90 00 0000000000000000 00000010 00 00", Want: "GOOD"},
	{Name: "READ(10) of no blocks", CDB: "28 00 00000000 00 0000 00", InLen: 512, Want: "GOOD", Residual: 512},
	{Name: "WRITE(10) of no blocks at the end", CDB: "2a 00 00000800 00 0000 00", OutLen: 512,
		Want: "GOOD", Residual: 512},
}
