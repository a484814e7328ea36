package scsi_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
)

// TestSenseNames has a trace name all sense data that the target returns, and the source make none
// but by sense, which wants a name.
func TestSenseNames(t *testing.T) {
	for _, s := range scsi.ReturnedSense() {
		r := trace.Record{Kind: trace.Command, Status: scsi.CheckCondition, Sense: s.Fixed()}
		text := r.Outcome()
		if _, name, ok := strings.Cut(text, ", "); !ok || name == "" || strings.Contains(text, "additional sense ") {
			t.Errorf("%x/%02x/%02x has no name: %s", uint8(s.Key), s.ASC, s.ASCQ, text)
		}
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	made := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		isCode := func(e ast.Expr) bool {
			switch e := e.(type) {
			case *ast.Ident:
				return e.Name == "ASC" || e.Name == "ASCQ"
			case *ast.SelectorExpr:
				return e.Sel.Name == "ASC" || e.Sel.Name == "ASCQ"
			}
			return false
		}
		for _, d := range f.Decls {
			if d, ok := d.(*ast.FuncDecl); ok && d.Name.Name == "sense" && d.Recv == nil {
				made++
				continue
			}
			ast.Inspect(d, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.KeyValueExpr:
					if isCode(n.Key) {
						t.Errorf("%s: sense data without a name", set.Position(n.Pos()))
					}
				case *ast.AssignStmt:
					for _, e := range n.Lhs {
						if isCode(e) {
							t.Errorf("%s: sense data without a name", set.Position(n.Pos()))
						}
					}
				}
				return true
			})
		}
	}
	if made != 1 {
		t.Errorf("func sense is there %d times", made)
	}
}
