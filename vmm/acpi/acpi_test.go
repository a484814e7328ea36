package acpi

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func ids(n int) []uint32 {
	v := make([]uint32, n)
	for i := range v {
		v[i] = uint32(i)
	}
	return v
}

// find walks the tables as a guest does, checks every signature, length, checksum and alignment on
// the way, and returns them by signature.
func find(t *testing.T, base uint64, image []byte, rsdp uint64) map[string][]byte {
	t.Helper()
	at := func(addr uint64, n int) []byte {
		if addr < base || addr-base > uint64(len(image)) || len(image)-int(addr-base) < n {
			t.Fatalf("%#x+%d is outside the image", addr, n)
		}
		return image[addr-base:][:n]
	}
	sum := func(what string, b []byte) {
		var s byte
		for _, v := range b {
			s += v
		}
		if s != 0 {
			t.Errorf("%s: bytes sum to %#x", what, s)
		}
	}
	r := at(rsdp, 36)
	if string(r[:8]) != "RSD PTR " || r[15] != 2 || le.Uint32(r[16:]) != 0 || le.Uint32(r[20:]) != 36 || rsdp%16 != 0 {
		t.Fatalf("RSDP at %#x: % x", rsdp, r)
	}
	sum("RSDP, first 20 bytes", r[:20])
	sum("RSDP", r)
	tables := map[string][]byte{}
	get := func(addr uint64) []byte {
		b := at(addr, int(le.Uint32(at(addr, 8)[4:])))
		sig := string(b[:4])
		if sig != "FACS" {
			sum(sig, b)
		}
		tables[sig] = b
		return b
	}
	x := get(le.Uint64(r[24:]))
	if string(x[:4]) != "XSDT" {
		t.Fatalf("XSDT's signature is %q", x[:4])
	}
	for x = x[36:]; len(x) > 0; x = x[8:] {
		get(le.Uint64(x))
	}
	f := tables["FACP"]
	if len(f) != 276 {
		t.Fatalf("FADT has %d bytes", len(f))
	}
	facs, dsdt := le.Uint64(f[132:]), le.Uint64(f[140:])
	if get(facs); facs%64 != 0 {
		t.Errorf("FACS at %#x", facs)
	}
	get(dsdt)
	want32 := [2]uint32{uint32(facs), uint32(dsdt)}
	if base >= 1<<32 {
		want32 = [2]uint32{}
	}
	if got := [2]uint32{le.Uint32(f[36:]), le.Uint32(f[40:])}; got != want32 {
		t.Errorf("32-bit FACS and DSDT addresses %#x, want %#x", got, want32)
	}
	for _, sig := range []string{"XSDT", "FACP", "FACS", "DSDT", "APIC", "MCFG"} {
		if tables[sig] == nil {
			t.Fatalf("no %s", sig)
		}
	}
	return tables
}

func build(t *testing.T, cfg Config) map[string][]byte {
	t.Helper()
	image, rsdp, err := Build(cfg)
	if err != nil {
		t.Fatal(err)
	}
	base := cfg.Area.Base
	if base == 0 {
		base = 0xe0000
	}
	if rsdp != base {
		t.Errorf("RSDP at %#x, want %#x", rsdp, base)
	}
	return find(t, base, image, rsdp)
}

var mmio64 = Range{0x240000000, 0x4000000000}

func TestFADT(t *testing.T) {
	f := build(t, Config{APICIDs: ids(1)})["FACP"]
	for _, c := range []struct {
		name string
		off  int
		want []byte
	}{
		{"revision", 8, []byte{6}},
		{"SCI_INT", 46, []byte{9, 0}},
		{"SMI_CMD, ACPI_ENABLE", 48, []byte{0, 0, 0, 0, 0}},
		{"PM1a_EVT_BLK", 56, []byte{0x00, 0x06, 0, 0}},
		{"PM1a_CNT_BLK", 64, []byte{0x04, 0x06, 0, 0}},
		{"PM_TMR_BLK", 76, []byte{0x08, 0x06, 0, 0}},
		{"GPE0_BLK, GPE1_BLK", 80, make([]byte, 8)},
		{"block lengths", 88, []byte{4, 2, 0, 4, 0, 0}},
		{"CENTURY", 108, []byte{0x32}},
		{"IAPC_BOOT_ARCH: legacy devices, no 8042, no VGA", 109, []byte{0x05, 0}},
		{"Flags: the alarm is in the PM1 registers", 112, []byte{0x25, 0x05, 0, 0}},
		{"RESET_REG, RESET_VALUE", 116, []byte{1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6}},
		{"X_PM1a_EVT_BLK", 148, []byte{1, 32, 0, 2, 0x00, 0x06, 0, 0, 0, 0, 0, 0}},
		{"X_PM1a_CNT_BLK", 172, []byte{1, 16, 0, 2, 0x04, 0x06, 0, 0, 0, 0, 0, 0}},
		{"X_PM_TMR_BLK", 208, []byte{1, 32, 0, 3, 0x08, 0x06, 0, 0, 0, 0, 0, 0}},
	} {
		if got := f[c.off:][:len(c.want)]; !bytes.Equal(got, c.want) {
			t.Errorf("%s: % x, want % x", c.name, got, c.want)
		}
	}
}

func TestMADT(t *testing.T) {
	got := build(t, Config{APICIDs: []uint32{0, 2, 254, 255, 0x1234}, INTx: []uint8{10, 5, 10}})["APIC"][36:]
	want := bytes.Join([][]byte{
		{0, 0, 0xe0, 0xfe, 1, 0, 0, 0},
		{0, 8, 0, 0, 1, 0, 0, 0},
		{0, 8, 1, 2, 1, 0, 0, 0},
		{0, 8, 2, 254, 1, 0, 0, 0},
		{9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0},
		{9, 16, 0, 0, 0x34, 0x12, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0},
		{1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0},
		{2, 10, 0, 0, 2, 0, 0, 0, 0, 0},
		{2, 10, 0, 9, 9, 0, 0, 0, 13, 0},
		{2, 10, 0, 10, 10, 0, 0, 0, 15, 0},
		{2, 10, 0, 5, 5, 0, 0, 0, 15, 0},
		{4, 6, 0xff, 0, 0, 1},
		{10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0},
	}, nil)
	if !bytes.Equal(got, want) {
		t.Errorf("MADT\n% x, want\n% x", got, want)
	}
	if few := build(t, Config{APICIDs: ids(2)})["APIC"]; bytes.Contains(few, want[len(want)-12:]) {
		t.Error("an x2APIC NMI without x2APIC CPUs")
	}
}

// TestMADTCounts: every CPU has one entry, of the type that its ID requires, with the UID of its
// device in the DSDT.
func TestMADTCounts(t *testing.T) {
	for _, list := range [][]uint32{ids(2), ids(8), ids(64), ids(255), ids(256), ids(300), ids(1024), {0, 300},
		{3, 254, 255, 32767}} {
		tables := build(t, Config{APICIDs: list, MMIO64: mmio64})
		var got []uint32
		b := tables["APIC"][44:]
		for ; len(b) > 0; b = b[b[1]:] {
			uid, id, enabled := uint32(b[2]), uint32(b[3]), b[4] == 1
			switch {
			case b[0] == 9:
				uid, id, enabled = le.Uint32(b[12:]), le.Uint32(b[4:]), b[8] == 1
			case b[0] != 0:
				continue
			}
			if (b[0] == 9) != (id > 254) || !enabled || uid != uint32(len(got)) {
				t.Errorf("%d CPUs: CPU %d: type %d, UID %d, ID %d, enabled %v", len(list), len(got), b[0], uid, id, enabled)
			}
			got = append(got, id)
			if name := fmt.Sprintf("C%03X", uid); !bytes.Contains(tables["DSDT"], []byte(name)) {
				t.Errorf("%d CPUs: no %s in the DSDT", len(list), name)
			}
		}
		if !slices.Equal(got, list) {
			t.Errorf("%d CPUs: IDs %d", len(list), got)
		}
	}
}

func TestMCFG(t *testing.T) {
	got := build(t, Config{APICIDs: ids(1), ECAM: 0x1_8000_0000, Buses: 3})["MCFG"][36:]
	want := []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0}
	if !bytes.Equal(got, want) {
		t.Errorf("% x, want % x", got, want)
	}
}

func TestArea(t *testing.T) {
	build(t, Config{APICIDs: ids(1024), MMIO64: mmio64})
	build(t, Config{APICIDs: ids(4096), Area: Range{0x3ffc0000, 0x40000}})
	build(t, Config{APICIDs: ids(1), Area: Range{0x1_0000_0000, 0x10000}})
}

func TestErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"no CPUs", Config{}, "no CPUs"},
		{"more CPUs than names", Config{APICIDs: ids(4097)}, "4097 CPUs"},
		{"equal IDs", Config{APICIDs: []uint32{0, 1, 1}}, "APIC ID 0x1 of CPU 2"},
		{"descending IDs", Config{APICIDs: []uint32{4, 3}}, "APIC ID 0x3 of CPU 1"},
		{"broadcast ID", Config{APICIDs: []uint32{0, 0xffffffff}}, "APIC ID 0xffffffff"},
		{"257 buses", Config{APICIDs: ids(1), Buses: 257}, "257 PCI buses"},
		{"-1 buses", Config{APICIDs: ids(1), Buses: -1}, "-1 PCI buses"},
		{"SCI past the ISA interrupts", Config{APICIDs: ids(1), SCI: 16}, "SCI 16"},
		{"PCI has COM1's interrupt", Config{APICIDs: ids(1), INTx: []uint8{10, 4}}, "PCI cannot have interrupt 4"},
		{"PCI has COM2's interrupt", Config{APICIDs: ids(1), COM2: true, INTx: []uint8{3}}, "PCI cannot have interrupt 3"},
		{"PCI past the ISA interrupts", Config{APICIDs: ids(1), INTx: []uint8{16}}, "PCI cannot have interrupt 16"},
		{"area too small", Config{APICIDs: ids(1024), Area: Range{0xe0000, 0x4000}}, "tables for 1024 CPUs take"},
		{"area not aligned", Config{APICIDs: ids(1), Area: Range{0xe0010, 0x10000}}, "table area"},
		{"ECAM not aligned", Config{APICIDs: ids(1), ECAM: 0xe0080000}, "ECAM"},
		{"window wraps", Config{APICIDs: ids(1), MMIO64: Range{0xfffffffffffff000, 0x2000}}, "64-bit MMIO window"},
		{"window past 4 GiB", Config{APICIDs: ids(1), MMIO32: Range{0xc0000000, 0x40001000}}, "32-bit MMIO window"},
		{"ports past 64 KiB", Config{APICIDs: ids(1), COM1: 0xfffa}, "COM1 ports"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, _, err := Build(c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestPkgLength(t *testing.T) {
	for _, c := range []struct {
		body int
		want []byte
	}{
		{0, []byte{0x01}}, {62, []byte{0x3f}},
		{63, []byte{0x41, 0x04}}, {4093, []byte{0x4f, 0xff}},
		{4094, []byte{0x81, 0x00, 0x01}}, {0xffffc, []byte{0x8f, 0xff, 0xff}},
		{0xffffd, []byte{0xc1, 0x00, 0x00, 0x01}},
	} {
		b := pkg(aml{0x10}, make(aml, c.body))
		if got := b[1 : len(b)-c.body]; !bytes.Equal(got, c.want) {
			t.Errorf("%d bytes: PkgLength % x, want % x", c.body, got, c.want)
		}
	}
}

// TestGenerationID: the ID is where ADDR says, 8-byte aligned.
func TestGenerationID(t *testing.T) {
	id := [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	for _, base := range []uint64{0xe0000, 0x3_4000_0000} {
		area := Range{base, 0x20000}
		image, rsdp, err := Build(Config{APICIDs: ids(1), Area: area, GenerationID: &id})
		if err != nil {
			t.Fatal(err)
		}
		dsdt := find(t, base, image, rsdp)["DSDT"]
		_, addr, ok := bytes.Cut(dsdt, []byte("\x08ADDR\x12")) // Name (ADDR, Package
		if !ok {
			t.Fatalf("no ADDR in % x", dsdt)
		}
		at := uint64(le.Uint32(addr[3:])) // after PkgLength, the number of elements and DWordPrefix
		if base > 1<<32 {
			at |= uint64(addr[8]) << 32 // after BytePrefix
		}
		if addr[1] != 2 || at%8 != 0 || at < base || !bytes.Equal(image[at-base:][:16], id[:]) {
			t.Errorf("base %#x: ADDR % x, %#x", base, addr[:10], at)
		}
	}
}

// tool runs one of the reference implementation's programs in dir and returns its output.
func tool(t *testing.T, dir string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Skipf("%s is missing: it is in Debian's package acpica-tools", args[0])
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

var complaint = regexp.MustCompile(`(?im)^.*\b(error|warning|invalid|firmware bug|exception|AE_[A-Z_]+)\b.*$`)

// complain fails the test for each line that reports a problem. iasl's summary also matches, with
// counts of zero.
func complain(t *testing.T, what, out string) {
	t.Helper()
	for _, line := range complaint.FindAllString(out, -1) {
		if !strings.Contains(line, "0 Errors, 0 Warnings") {
			t.Errorf("%s: %s", what, line)
		}
	}
}

// write puts the tables into files and returns the directory.
func write(t *testing.T, tables map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for sig, b := range tables {
		if err := os.WriteFile(filepath.Join(dir, sig+".aml"), b, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestDisassemble(t *testing.T) {
	for _, cfg := range []Config{
		{APICIDs: ids(2), MMIO64: mmio64, INTx: []uint8{10, 11, 5}},
		{APICIDs: ids(1), COM2: true, GenerationID: new([16]byte)},
		{APICIDs: ids(300), ECAM: 0x1_8000_0000, Area: Range{0x3ffc0000, 0x40000}},
	} {
		t.Run(fmt.Sprint(len(cfg.APICIDs), " CPUs"), func(t *testing.T) {
			tables := build(t, cfg)
			dir := write(t, tables)
			for sig := range tables {
				complain(t, sig, tool(t, dir, "iasl", "-d", sig+".aml"))
				dsl, err := os.ReadFile(filepath.Join(dir, sig+".dsl"))
				if err != nil {
					t.Fatal(err)
				}
				complain(t, sig, string(dsl))
			}
		})
	}
}

// TestRecompile has the reference compiler compile the DSDT's source, and compares the bytes.
func TestRecompile(t *testing.T) {
	tables := build(t, Config{APICIDs: ids(2), MMIO64: mmio64, INTx: []uint8{10, 11, 5}, COM2: true,
		GenerationID: new([16]byte)})
	dir := write(t, tables)
	tool(t, dir, "iasl", "-d", "DSDT.aml")
	complain(t, "DSDT.dsl", tool(t, dir, "iasl", "-p", "again", "DSDT.dsl"))
	dsl, err := os.ReadFile(filepath.Join(dir, "DSDT.dsl"))
	if err != nil {
		t.Fatal(err)
	}
	source := strings.Join(strings.Fields(regexp.MustCompile(`/\*.*?\*/|//.*`).ReplaceAllString(string(dsl), "")), " ")
	for _, want := range []string{
		`Name (_HID, EisaId ("PNP0A08") ) Name (_CID, EisaId ("PNP0A03") )`,
		`WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0x0000, 0x0000, 0x00FF, 0x0000, 0x0100,`,
		`IO (Decode16, 0x0CF8, 0x0CF8, 0x01, 0x08, )`,
		`WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, 0x0000, 0x1000, 0xFFFF, 0x0000, 0xF000,`,
		`DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, ` +
			`0x00000000, 0xC0000000, 0xDFFFFFFF, 0x00000000, 0x20000000,`,
		`QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, ` +
			`0x0000000000000000, 0x0000000240000000, 0x000000423FFFFFFF, 0x0000000000000000, 0x0000004000000000,`,
		`Name (_PRT, Package (0x1F) { Package (0x04) { 0x0001FFFF, Zero, Zero, 0x0A }, ` +
			`Package (0x04) { 0x0002FFFF, Zero, Zero, 0x0B }, ` +
			`Package (0x04) { 0x0003FFFF, Zero, Zero, 0x05 }, Package (0x04) { 0x0004FFFF, Zero, Zero, 0x0A },`,
		`Name (_HID, EisaId ("PNP0C02") ) Name (_UID, Zero) ` +
			`Name (_CRS, ResourceTemplate () { IO (Decode16, 0x0600, 0x0600, 0x01, 0x0C, ) ` +
			`Memory32Fixed (ReadWrite, 0xE0000000, 0x10000000, ) })`,
		`Name (_HID, EisaId ("PNP0501") ) Name (_UID, One) ` +
			`Name (_CRS, ResourceTemplate () { IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, ) IRQNoFlags () {4} })`,
		`Name (_HID, EisaId ("PNP0501") ) Name (_UID, 0x02) ` +
			`Name (_CRS, ResourceTemplate () { IO (Decode16, 0x02F8, 0x02F8, 0x01, 0x08, ) IRQNoFlags () {3} })`,
		`Name (_HID, EisaId ("PNP0B00") ) ` +
			`Name (_CRS, ResourceTemplate () { IO (Decode16, 0x0070, 0x0070, 0x01, 0x02, ) IRQNoFlags () {8} })`,
		`Name (_HID, "QEMU0001") Name (_CRS, ResourceTemplate () { IO (Decode16, 0x0505, 0x0505, 0x01, 0x01, ) })`,
		`Name (_CID, "VM_Gen_Counter") Name (_DDN, "VM_Gen_Counter") ` +
			`Name (ADDR, Package (0x02) { 0x000E0080, Zero })`,
		`Device (C001) { Name (_HID, "ACPI0007" ) Name (_UID, One) }`,
	} {
		if !strings.Contains(source, want) {
			t.Errorf("the DSDT lacks %s\n%s", want, source)
		}
	}
	again, err := os.ReadFile(filepath.Join(dir, "again.aml"))
	if err != nil {
		t.Fatal(err)
	}
	// The header differs in the compiler's ID, and therefore in the checksum.
	if !bytes.Equal(again[36:], tables["DSDT"][36:]) {
		t.Errorf("recompiled DSDT differs:\n% x\n% x", again[36:], tables["DSDT"][36:])
	}
}

// TestEvaluate has the reference interpreter load and run the tables.
func TestEvaluate(t *testing.T) {
	const uuid = "(5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66)"
	tables := build(t, Config{APICIDs: ids(300), MMIO64: mmio64})
	dir := write(t, tables)
	cases := []struct{ name, expr, want string }{
		{"soft off", `\_S5`, "[Package] Contains 4 Elements: [Integer] = 0000000000000005 " +
			"[Integer] = 0000000000000005 [Integer] = 0000000000000000 [Integer] = 0000000000000000"},
		{"CPU by name and number", `\_SB.C12B._UID`, "[Integer] = 000000000000012B"},
		{"_OSC query of all", `\_SB.PCI0._OSC ` + uuid + ` 1 3 (01 00 00 00 1F 00 00 00 FF 01 00 00)`,
			"0000: 11 00 00 00 1F 00 00 00 3C 00 00 00"},
		{"_OSC of the granted features", `\_SB.PCI0._OSC ` + uuid + ` 1 3 (00 00 00 00 1F 00 00 00 18 00 00 00)`,
			"0000: 00 00 00 00 1F 00 00 00 18 00 00 00"},
		{"_OSC of an unknown revision", `\_SB.PCI0._OSC ` + uuid + ` 2 3 (00 00 00 00 1F 00 00 00 10 00 00 00)`,
			"0000: 08 00 00 00 1F 00 00 00 10 00 00 00"},
		{"_OSC of an unknown UUID", `\_SB.PCI0._OSC (00 01 02 03 04 05 06 07 08 09 0A 0B 0C 0D 0E 0F)` +
			` 1 3 (00 00 00 00 1F 00 00 00 FF 01 00 00)`,
			"0000: 04 00 00 00 1F 00 00 00 FF 01 00 00"},
	}
	commands := []string{`resources \_SB.PCI0`} // all in one run: ending takes a second
	for _, c := range cases {
		commands = append(commands, "evaluate "+c.expr)
	}
	out := tool(t, dir, "acpiexec", "-b", strings.Join(commands, ";"), "DSDT.aml")
	answers := strings.Split(out, "\nEvaluating \\_S")
	if len(answers) != 1+len(cases) {
		t.Fatalf("%d answers, want %d\n%s", len(answers)-1, len(cases), out)
	}
	for _, want := range []string{"Bus Number Range", "Address Maximum : 00FF", "Address Minimum : C0000000",
		"Address Maximum : 000000423FFFFFFF", "[05] EndTag Resource"} {
		if !strings.Contains(answers[0], want) {
			t.Errorf("_CRS of the host bridge: no %q in\n%s", want, answers[0])
		}
	}
	for i, c := range cases {
		complain(t, c.name, answers[1+i])
		if !strings.Contains(strings.Join(strings.Fields(answers[1+i]), " "), c.want) {
			t.Errorf("%s: %s: no %q in\n%s", c.name, c.expr, c.want, answers[1+i])
		}
	}
}
