package gvm_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// TestLayering holds the tables of DESIGN.md against the imports of the files that are not tests.
// Each package has a row; its last column names every package of this module that it imports, but
// panics, which all may import. A package imports only packages below it. -update writes that
// column. The test also allows unsafe only in files named for it.
func TestLayering(t *testing.T) {
	imports, err := importsOfAll(t)
	if err != nil {
		t.Fatal(err)
	}
	const path = "DESIGN.md"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(text), "\n## Packages\n")
	section, after, found := strings.Cut(rest, "\n## ")
	if !found {
		t.Fatalf("%s has no section Packages with another one after it", path)
	}
	at := map[string]int{} // the row of a package
	lines := strings.Split(section, "\n")
	for i, line := range lines {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.HasPrefix(line, "|--") || strings.HasPrefix(line, "| package |") {
			continue
		}
		names := strings.Split(strings.TrimSpace(cells[1]), ", ")
		for j, name := range names {
			if j > 0 { // a row of several has them without their directory, which is that of the first
				name = filepath.Join(filepath.Dir(names[0]), name)
			}
			switch of, ok := imports[name]; {
			case !ok:
				t.Errorf("%s has a row of %s, which is no package", path, name)
			case at[name] != 0:
				t.Errorf("%s has two rows of %s", path, name)
			default:
				if want := shortNames(imports, of); strings.TrimSpace(cells[3]) != want {
					t.Errorf("%s: %s imports %q, and its row has %q: go test -run TestLayering . -update", path, name, want,
						strings.TrimSpace(cells[3]))
					lines[i] = strings.ReplaceAll(fmt.Sprintf("|%s|%s| %s |", cells[1], cells[2], want), "|  |", "| |")
				}
			}
			at[name] = i + 1
		}
	}
	for name, of := range imports {
		if at[name] == 0 {
			t.Errorf("%s has no row of %s", path, name)
		}
		for _, own := range of {
			if at[own] != 0 && at[own] <= at[name] {
				t.Errorf("%s imports %s, whose row is not below its own: imports point down", name, own)
			}
		}
	}
	if *update {
		text := before + "\n## Packages\n" + strings.Join(lines, "\n") + "\n## " + after
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// shortNames returns the names of packages, each by as few of its last parts as tell it apart.
func shortNames(all map[string][]string, of []string) string {
	var list []string
	for _, name := range of {
		parts := strings.Split(name, "/")
		for i := range slices.Backward(parts) {
			short := strings.Join(parts[i:], "/")
			same := 0
			for other := range all {
				if other == short && short != name {
					same = 2 // that one has no shorter name
				} else if strings.HasSuffix("/"+other, "/"+short) {
					same++
				}
			}
			if same == 1 || i == 0 {
				list = append(list, short)
				break
			}
		}
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

// importsOfAll returns the imports of every package of this module but that of this file.
func importsOfAll(t *testing.T) (map[string][]string, error) {
	imports := map[string][]string{}
	return imports, filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != "." {
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
				return fs.SkipDir // another module
			}
		}
		pkg := filepath.Dir(path)
		if err != nil || !strings.HasSuffix(path, ".go") || pkg == "." {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		if imports[pkg] == nil {
			imports[pkg] = []string{}
		}
		test := strings.HasSuffix(path, "_test.go")
		for _, spec := range f.Imports {
			name := strings.Trim(spec.Path.Value, `"`)
			if name == "unsafe" && !strings.HasSuffix(strings.TrimSuffix(path, ".go"), "_unsafe") &&
				!strings.HasSuffix(path, "_unsafe_test.go") {
				t.Errorf("%s imports unsafe; only *_unsafe.go may", path)
			}
			if strings.HasPrefix(name, "github.com/prometheus/") && !test {
				t.Errorf("%s imports %s, which takes 2 MB: only tests may", path, name)
			}
			own, ok := strings.CutPrefix(name, "gvm/")
			if ok && !test && own != "panics" && !slices.Contains(imports[pkg], own) {
				imports[pkg] = append(imports[pkg], own)
			}
		}
		return nil
	})
}

// TestGoroutines checks that every goroutine of gvm is started through package panics, so that its
// panic ends the machine, and does not leave the terminal raw, and that no function unlocks a mutex
// whose Unlock it has deferred. Programs in guests and of tests end as Go ends them.
func TestGoroutines(t *testing.T) {
	for _, src := range sources(t, "guest", "guest-tests", "panics") {
		ast.Inspect(src.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s: start the goroutine with panics.Go", src.position(n))
			case *ast.FuncDecl:
				if n.Body != nil {
					unlocks(t, src, n.Body)
				}
			case *ast.FuncLit:
				unlocks(t, src, n.Body)
			case *ast.CallExpr:
				of, ok := n.Fun.(*ast.SelectorExpr)
				if !ok || of.Sel.Name != "AfterFunc" && of.Sel.Name != "Go" || isPanics(of, "Go") {
					break
				}
				if f, ok := n.Args[len(n.Args)-1].(*ast.CallExpr); !ok || !isPanics(f.Fun, "Func") {
					t.Errorf("%s: give %s a panics.Func", src.position(n), of.Sel.Name)
				}
			}
			return true
		})
	}
}

// TestCauses checks that an operation whose context has ended reports the cause of that, such as a
// signal or the end of the machine: ctx.Err says "context canceled" to a user.
func TestCauses(t *testing.T) {
	for _, src := range sources(t, "guest-tests") {
		compared := map[ast.Expr]bool{}
		ast.Inspect(src.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.BinaryExpr:
				if types.ExprString(n.Y) == "nil" {
					compared[n.X] = true
				}
			case *ast.CallExpr:
				of, ok := n.Fun.(*ast.SelectorExpr)
				if !ok || of.Sel.Name != "Err" || len(n.Args) != 0 || compared[n] {
					break
				}
				from := types.ExprString(of.X)
				if name := from[strings.LastIndexByte(from, '.')+1:]; slices.Contains([]string{"ctx", "life", "over"}, name) ||
					strings.HasSuffix(from, "Context()") {
					t.Errorf("%s: report context.Cause(%s)", src.position(n), from)
				}
			}
			return true
		})
	}
}

// source is a parsed file that is no test.
type source struct {
	path string
	file *ast.File
	set  *token.FileSet
}

func (s source) position(n ast.Node) token.Position { return s.set.Position(n.Pos()) }

// sources returns the files of this module that are no tests, but those in some directories.
func sources(t *testing.T, without ...string) (some []source) {
	t.Helper()
	all, err := allSources()
	if err != nil {
		t.Fatal(err)
	}
	for _, src := range all {
		if !slices.ContainsFunc(without, func(dir string) bool { return strings.HasPrefix(src.path, dir+"/") }) {
			some = append(some, src)
		}
	}
	return some
}

// allSources parses each file once for all tests.
var allSources = sync.OnceValues(func() (all []source, err error) {
	set := token.NewFileSet()
	err = filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		all = append(all, source{path, f, set})
		return err
	})
	return all, err
})

// otherOpens are the sources that open files by package os, which TestOpens lets them do.
var otherOpens = map[string]string{
	"cmd/gvm/abi.go":                        "of sysfs",
	"cmd/gvm/benchfootprint.go":             "of the kernel's control groups",
	"cmd/gvm/doctor.go":                     "devices",
	"cmd/gvm/man.go":                        "of the build",
	"control/client.go":                     "a directory",
	"devices/block/lock.go":                 "of /proc",
	"devices/block/space.go":                "of sysfs",
	"devices/block/use.go":                  "of sysfs",
	"devices/internal/durable/durable.go":   "a directory",
	"devices/scsi/lio/tree.go":              "of configfs",
	"devices/scsi/lio/unit.go":              "of sysfs",
	"devices/virtio/vhostscsi/vhostscsi.go": "of configfs",
	"guest/agent/agent.go":                  "in a guest",
	"guest/agent/connect.go":                "in a guest",
	"guest/agent/disks.go":                  "in a guest",
	"guest/diskload/main.go":                "in a guest",
	"jail/limits.go":                        "of the kernel's control groups",
	"jail/root.go":                          "in the tmpfs of the jail",
	"kvmapi/nowait/open.go":                 "in a root, without openat2(2)",
	"kvmapi/tracefs/tracefs.go":             "of tracefs",
	"usernet/dns.go":                        "/etc/resolv.conf",
}

// TestOpens checks that package nowait opens the files which a user, a client or a file can choose.
// The functions of package os put a regular file into the poller of Go's runtime, by a system call
// in which a FUSE server may stop all goroutines. No directory, block device or O_PATH descriptor
// can be polled, and the kernel's own files answer.
func TestOpens(t *testing.T) {
	found := map[string]bool{}
	for _, src := range sources(t, "guest-tests", "packaging") {
		ast.Inspect(src.file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || !opens(call) {
				return true
			}
			if found[src.path] = true; otherOpens[src.path] == "" {
				t.Errorf("%s: open the file with package nowait", src.position(n))
			}
			return true
		})
	}
	for path := range otherOpens {
		if !found[path] {
			t.Errorf("%s opens no files: take it out of otherOpens", path)
		}
	}
}

// opens reports whether a call may put a file into the runtime's poller that is no file of the
// kernel's with a constant path.
func opens(call *ast.CallExpr) bool {
	of, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || len(call.Args) == 0 {
		return false
	}
	from := types.ExprString(of.X)
	names := []string{"Open", "OpenFile", "Create", "CreateTemp", "ReadFile", "WriteFile", "CopyFS"}
	switch {
	case from == "os" && slices.Contains(names, of.Sel.Name), (from == "elf" || from == "buildinfo") &&
		(of.Sel.Name == "Open" || of.Sel.Name == "ReadFile"), from != "boot" && of.Sel.Name == "OpenFile":
	default:
		return false
	}
	for _, arg := range call.Args[1:] {
		if flags := types.ExprString(arg); strings.Contains(flags, "O_PATH") || strings.Contains(flags, "O_DIRECTORY") {
			return false
		}
	}
	name := strings.TrimPrefix(types.ExprString(call.Args[0]), "fmt.Sprintf(")
	kernels := []string{"os.DevNull", `"/proc/`, `"/sys/`, `"/dev/`, `"/etc/machine-id"`}
	return strings.HasPrefix(name, `"/proc/self/fd/`) ||
		!slices.ContainsFunc(kernels, func(s string) bool { return strings.HasPrefix(name, s) })
}

// unlocks checks a function that defers Unlock: a mutex is unlocked for a while by panics.Unlocked.
func unlocks(t *testing.T, src source, body *ast.BlockStmt) {
	deferred := map[string]bool{}
	for _, s := range body.List {
		if s, ok := s.(*ast.DeferStmt); ok {
			if of, ok := s.Call.Fun.(*ast.SelectorExpr); ok && of.Sel.Name == "Unlock" {
				deferred[types.ExprString(of.X)] = true
			}
		}
		ast.Inspect(s, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncLit, *ast.DeferStmt:
				return false
			case *ast.CallExpr:
				if of, ok := n.Fun.(*ast.SelectorExpr); ok && of.Sel.Name == "Unlock" && deferred[types.ExprString(of.X)] {
					t.Errorf("%s: the Unlock is deferred already: use panics.Unlocked", src.position(n))
				}
			}
			return true
		})
	}
}

// isPanics reports whether e is the function of package panics.
func isPanics(e ast.Expr, function string) bool {
	of, ok := e.(*ast.SelectorExpr)
	if !ok || of.Sel.Name != function {
		return false
	}
	pkg, ok := of.X.(*ast.Ident)
	return ok && pkg.Name == "panics"
}
