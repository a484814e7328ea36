package sandbox

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the tables of docs/security.md")

var useNames = []string{"`--share`", "vhost", "`--net tap`", "`--vsock unix`", "a child", "the broker"}

// with returns the devices of a use in words.
func (u Use) with() string {
	var names []string
	for i, name := range useNames {
		if u&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

// condition returns a row's condition and answer in words.
func (c *Call) condition() string {
	if c.Errno != 0 {
		return "answered " + unix.ErrnoName(unix.Errno(c.Errno))
	}
	switch c.Number {
	case unix.SYS_MMAP, unix.SYS_MPROTECT:
		return "without PROT_EXEC"
	case unix.SYS_CLONE:
		return "threads"
	case unix.SYS_TGKILL:
		return "to itself"
	case unix.SYS_KILL:
		return "to its process group"
	case unix.SYS_FCNTL:
		return "flags, locks, F_DUPFD_CLOEXEC, F_GET_SEALS"
	case unix.SYS_SCHED_SETAFFINITY:
		return "of the calling thread"
	case unix.SYS_SOCKET:
		return "AF_UNIX"
	case unix.SYS_MKNODAT:
		return "no devices"
	case unix.SYS_PRCTL:
		return "PR_SET_VMA"
	case unix.SYS_PRLIMIT64:
		return "of itself, to read"
	}
	if len(c.Args) > 0 {
		return "?"
	}
	return ""
}

// rowComments returns the comments at the ends of the rows of a table in table.go.
func rowComments(t *testing.T, table string) (list []string) {
	t.Helper()
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, "table.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	at := map[int]string{}
	for _, group := range f.Comments {
		for _, c := range group.List {
			at[set.Position(c.Pos()).Line] = strings.TrimPrefix(c.Text, "// ")
		}
	}
	rows := f.Scope.Lookup(table).Decl.(*ast.ValueSpec).Values[0].(*ast.CompositeLit).Elts
	for _, row := range rows {
		text := at[set.Position(row.End()).Line]
		if text == "" {
			t.Errorf("%s: the row has no comment", set.Position(row.Pos()))
		}
		list = append(list, text)
	}
	return list
}

// TestDocs compares the tables of docs/security.md with those of the code.
func TestDocs(t *testing.T) {
	var list, rows, requests strings.Builder
	list.WriteString("| attack | answer |\n|---|---|\n")
	for _, a := range attacks {
		answer := "ends: " + callName(int(a.nr))
		if a.err != 0 {
			answer = unix.ErrnoName(a.err)
		}
		fmt.Fprintf(&list, "| %s | %s |\n", a.what, answer)
	}
	rows.WriteString("| system call | only | with | for |\n|---|---|---|---|\n")
	for i, why := range rowComments(t, "table") {
		c := &table[i]
		name := callName(int(c.Number))
		if c.condition() == "?" {
			t.Errorf("%s: say its condition", name)
		}
		fmt.Fprintf(&rows, "| %s | %s | %s | %s |\n", name, c.condition(), c.Use.with(), why)
	}
	var groups []Use
	for _, r := range ioctls {
		if !slices.Contains(groups, r.Use) {
			groups = append(groups, r.Use)
		}
	}
	requests.WriteString("| with | requests |\n|---|---|\n")
	for _, use := range groups {
		var names []string
		for i, name := range rowComments(t, "ioctls") {
			if ioctls[i].Use == use {
				names = append(names, name)
			}
		}
		fmt.Fprintf(&requests, "| %s | %s |\n", use.with(), strings.Join(names, ", "))
	}
	const path = "../docs/security.md"
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := string(b)
	for name, text := range map[string]string{"attacks": list.String(), "calls": rows.String(),
		"ioctls": requests.String()} {
		part := regexp.MustCompile(`(?s)<!-- ` + name + ` -->\n.*?<!-- end -->`)
		want = part.ReplaceAllLiteralString(want, "<!-- "+name+" -->\n"+text+"<!-- end -->")
	}
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if want != string(b) {
		t.Errorf("%s differs: go test -run TestDocs ./sandbox -update", path)
	}
}
