package scsi

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/commands.md anew")

// span is the bytes of a CDB that f stands in.
func (f field) span() string {
	switch last := int(f.at) + (int(f.bits)+7)/8 - 1; {
	case f == field{}:
		return ""
	case last == int(f.at):
		return fmt.Sprint(f.at)
	default:
		return fmt.Sprintf("%d-%d", f.at, last)
	}
}

var dataWords = [...]string{
	noData: "", listIn: "parameters in", listOut: "parameters out", blocksIn: "blocks in", blocksOut: "blocks out",
	compared: "blocks to compare", oneBlock: "one block out",
}

// CommandTable returns the table of docs/commands.md: a line for each row of opcodes.
func CommandTable() string {
	var b strings.Builder
	b.WriteString("| code | command | CDB | address | blocks | bytes | data | limits | reservations | units |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|---|---|\n")
	line := func(code int, o *opcode) {
		counted := ""
		switch {
		case o.flags&countsTwice != 0:
			counted = "blocks twice"
		case o.data.ofBlocks():
			counted = "blocks"
		case o.flags&counts != 0:
			counted = "command"
		case o.flags&countsSegments != 0:
			counted = "segments"
		}
		conflicts := map[access]string{freeAccess: "", readAccess: "EA",
			writeAccess: "all"}[o.access(o.usageData(byte(code)))]
		switch {
		case o.exempt != nil:
			conflicts += " but some"
		case o.flags&conflictsWithReserve != 0:
			conflicts = "RESERVE"
		}
		number, units := fmt.Sprintf("%02x", code), ""
		if o != &opcodes[code] {
			number += fmt.Sprintf("/%02x", o.action())
		}
		switch {
		case o.flags&onWLUN != 0:
			units = "W-LUN too"
		case o.flags&thinOnly != 0:
			units = "thin"
		}
		fmt.Fprintf(&b, "| %s | %s | %d | %s | %s | %s | %s | %s | %s | %s |\n", number, o.name, o.length(),
			o.extent.lba.span(), o.extent.blocks.span(), o.list.span(), dataWords[o.data], counted, conflicts, units)
	}
	for code := range opcodes {
		row := &opcodes[code]
		for i := range row.actions {
			line(code, &row.actions[i])
		}
		if row.run != nil {
			line(code, row)
		}
	}
	return b.String()
}

// senseTable is the other table of docs/commands.md: a line for each sense that the target returns.
func senseTable() string {
	list := slices.Clone(returned)
	slices.SortFunc(list, func(a, b namedSense) int {
		return bytes.Compare([]byte{a.asc, a.ascq, byte(a.key)}, []byte{b.asc, b.ascq, byte(b.key)})
	})
	b := "| sense | key | additional sense |\n|---|---|---|\n"
	for _, s := range list {
		b += fmt.Sprintf("| %x/%02x/%02x | %s | %s |\n", uint8(s.key), s.asc, s.ascq, s.key.Name(), s.name)
	}
	return b
}

// TestDocs holds the tables of docs/commands.md against the rows. -update writes them.
func TestDocs(t *testing.T) {
	const path = "../../docs/commands.md"
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text, tables := "", []string{CommandTable(), senseTable()}
	for line := range strings.Lines(string(was)) {
		switch {
		case !strings.HasPrefix(line, "|"):
			text += line
		case strings.HasPrefix(line, "|---") && len(tables) > 0:
			text += tables[0]
			tables = tables[1:]
		}
	}
	switch {
	case len(tables) > 0:
		t.Fatalf("%s has too few tables", path)
	case text == string(was):
	case *update:
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		got, want := strings.Split(string(was), "\n"), strings.Split(text, "\n")
		i := 0
		for i < min(len(got), len(want)) && got[i] == want[i] {
			i++
		}
		t.Errorf("%s differs from the rows from line %d on: go test -run TestDocs ./devices/scsi -update", path, i+1)
	}
}
