package gvm_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// may lists, for each package or tree ("/..."), the packages of this module that its non-test files
// may import; the first entry that matches a package counts. DESIGN.md gives the reasons.
var may = []struct{ pkg, imports string }{
	{"kvmapi/eventfd", ""},
	{"kvmapi/nowait", ""},
	{"kvmapi/tracefs", ""},
	{"kvmapi/...", "kvmapi/eventfd"},
	{"guestmem", ""},
	{"gdbstub", ""},
	{"inspect", "text"},
	{"vmm/bus", ""},
	{"vmm/acpi", "devices/acpipm devices/pvpanic devices/rtc devices/serial"},
	{"vmm/boot/...", "guestmem kvmapi/nowait text"},
	{"vmm/x86", "kvmapi text"},
	{"vmm/vmcore", "guestmem vmm/x86"},
	{"vmm", "kvmapi/... vmm/... devices/... gdbstub guestmem inspect verdict/klog"},
	{"devices/block", "devices/internal/durable devices/iovec kvmapi/nowait text"},
	{"devices/block/blocktest", "devices/block"},
	{"devices/internal/durable/durabletest", "devices/internal/durable"},
	{"devices/internal/every", ""},
	{"devices/scsi/sidecar", "devices/scsi devices/block kvmapi/nowait"},
	{"devices/scsi/lio", "devices/scsi devices/block devices/scsi/trace kvmapi/tracefs text"},
	{"devices/scsi/trace/traceplot", "devices/scsi/trace plot"},
	{"devices/scsi/trace", "devices/scsi kvmapi/nowait text"},
	{"devices/scsi/scsitest", "devices/scsi devices/block"},
	{"devices/scsi", "devices/block devices/iovec inspect"},
	{"devices/i6300esb", "devices/pci inspect"},
	{"devices/pci/...", "devices/pci kvmapi/eventfd inspect"},
	{"devices/virtio/virtq", "guestmem inspect"},
	{"devices/virtio/virtqtest", "devices/virtio devices/virtio/virtq guestmem kvmapi/eventfd"},
	{"devices/virtio/virtiotest", "devices/virtio devices/virtio/virtqtest guestmem"},
	{"devices/virtio/vpci", "devices/virtio devices/virtio/virtq devices/pci guestmem inspect kvmapi/eventfd"},
	{"devices/virtio/vscsi",
		"devices/iovec devices/virtio devices/virtio/virtq devices/scsi devices/scsi/trace guestmem inspect"},
	{"devices/virtio/replay/equivalence", "devices/virtio/replay devices/scsi devices/scsi/trace"},
	{"devices/virtio/replay",
		"devices/virtio devices/virtio/virtqtest devices/scsi devices/scsi/trace kvmapi/eventfd guestmem"},
	{"devices/virtio/ringbench", "devices/scsi/trace devices/virtio devices/virtio/virtqtest kvmapi/eventfd guestmem"},
	{"devices/virtio/vhostring", "devices/virtio devices/virtio/virtq kvmapi/vhost kvmapi/eventfd guestmem inspect"},
	{"devices/virtio/vhostscsi", "devices/virtio devices/virtio/vhostring kvmapi/vhost inspect"},
	{"devices/virtio/vhostvsock", "devices/virtio devices/virtio/vhostring devices/virtio/virtq kvmapi/vhost inspect"},
	{"devices/virtio/rng", "devices/virtio devices/virtio/virtq guestmem inspect"},
	{"devices/virtio/balloon", "devices/virtio devices/virtio/virtq guestmem inspect"},
	{"devices/virtio/console", "devices/virtio devices/virtio/virtq inspect"},
	{"devices/virtio/vsock", "devices/virtio devices/virtio/virtq inspect"},
	{"devices/virtio/vhostnet", "devices/virtio devices/virtio/vhostring inspect kvmapi/vhost"},
	{"devices/virtio/net/tap", "devices/virtio/net"},
	{"devices/virtio/net", "devices/iovec devices/virtio devices/virtio/virtq inspect kvmapi/eventfd"},
	{"devices/virtio/fs/hostfs", "devices/iovec kvmapi/nowait"},
	{"devices/virtio/fs/hostfs/hostfstest", ""},
	{"devices/virtio/fs", "devices/virtio devices/virtio/virtq devices/virtio/fs/hostfs inspect"},
	{"devices/virtio/example", "devices/virtio devices/virtio/virtq inspect"},
	{"devices/virtio", "devices/virtio/virtq guestmem inspect kvmapi/eventfd"},
	{"devices/...", "inspect"},
	{"guest/embedded/...", ""},
	{"guest/kernel", "vmm/boot kvmapi/nowait text"},
	{"guest/agent/wire", "text"},
	{"guest/agent/archive", ""},
	{"guest/agent", "guest/agent/archive guest/agent/wire devices/statusport text"},
	{"guest/initramfs/initramfstest", ""},
	{"guest/initramfs", "guest/kernel vmm/boot kvmapi/nowait text"},
	{"guest/bootinit", "guest/initramfs"},
	{"guest/diskload", ""},
	{"guest/vsockecho", ""},
	{"guest-tests/...", "guest-tests/... guest/... guestmem machine machine/disk vmm vmm/boot"},
	{"verdict/klog", ""},
	{"verdict/ktap", "verdict/klog"},
	{"verdict", "verdict/klog verdict/ktap"},
	{"packaging/...", ""},
	{"control", "inspect text"},
	{"broker",
		"control devices/block devices/scsi devices/scsi/lio devices/scsi/sidecar kvmapi/nowait machine/disk text"},
	{"jail", "text"},
	{"panics", ""},
	{"sandbox", ""},
	{"text", ""},
	{"plot/draw", "plot text"},
	{"plot", ""},
	{"cmd/gvm-plot", "plot plot/draw"},
	{"usernet", "kvmapi/nowait"},
	{"cmd/gvm-net", "usernet"},
	{"cmd/gvm-agent", "guest/agent"},
	{"machine/disk", "devices/... control inspect text"},
	{"machine",
		"machine/disk control vmm/... devices/... gdbstub kvmapi kvmapi/tracefs guestmem guest/embedded inspect sandbox " +
			"text"},
	{"testrun",
		"devices/statusport devices/virtio/console devices/virtio/vsock guest/agent/wire machine text " +
			"verdict verdict/klog vmm"},
	{"testrun/matrix", "testrun text verdict verdict/ktap"},
	{"testrun/kubernetes", "testrun testrun/matrix text"},
	{"cmd/gvm",
		"machine/... vmm/... devices/... kvmapi/... guestmem broker control inspect jail plot sandbox text " +
			"guest/embedded " +
			"guest/bootinit " +
			"guest/kernel guest/agent guest/agent/wire guest/initramfs testrun testrun/matrix testrun/kubernetes " +
			"verdict/... guest/agent/archive"},
}

func matches(pattern, pkg string) bool {
	tree, ok := strings.CutSuffix(pattern, "/...")
	return pkg == pattern || ok && (pkg == tree || strings.HasPrefix(pkg, tree+"/"))
}

// TestLayering checks every import of the module's own packages against the table, and allows
// unsafe only in files named for it.
func TestLayering(t *testing.T) {
	seen := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg := filepath.Dir(path)
		i := slices.IndexFunc(may, func(row struct{ pkg, imports string }) bool { return matches(row.pkg, pkg) })
		if i < 0 && pkg != "." {
			t.Errorf("%s: package %s has no row in the table", path, pkg)
			return nil
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
			if !ok || test || own == "panics" { // all may use it
				continue
			}
			seen[may[i].pkg] = true
			if !slices.ContainsFunc(strings.Fields(may[i].imports), func(p string) bool { return matches(p, own) }) {
				t.Errorf("%s imports %s, which %s may not", path, own, pkg)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range may {
		if row.imports != "" && !seen[row.pkg] {
			t.Errorf("the row of %s matches no import", row.pkg)
		}
	}
}

// TestGoroutines checks that every goroutine of gvm is started through package panics, so that its
// panic ends the machine, and does not leave the terminal raw, and that no function unlocks a mutex
// whose Unlock it has deferred. Programs in guests and of tests end as Go ends them.
func TestGoroutines(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && slices.Contains([]string{"guest", "guest-tests", "panics"}, path) {
			return fs.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s: start the goroutine with panics.Go", set.Position(n.Pos()))
			case *ast.FuncDecl:
				if n.Body != nil {
					unlocks(t, set, n.Body)
				}
			case *ast.FuncLit:
				unlocks(t, set, n.Body)
			case *ast.CallExpr:
				of, ok := n.Fun.(*ast.SelectorExpr)
				if !ok || of.Sel.Name != "AfterFunc" && of.Sel.Name != "Go" || isPanics(of, "Go") {
					break
				}
				if f, ok := n.Args[len(n.Args)-1].(*ast.CallExpr); !ok || !isPanics(f.Fun, "Func") {
					t.Errorf("%s: give %s a panics.Func", set.Position(n.Pos()), of.Sel.Name)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// unlocks checks a function that defers Unlock: a mutex is unlocked for a while by panics.Unlocked.
func unlocks(t *testing.T, set *token.FileSet, body *ast.BlockStmt) {
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
					t.Errorf("%s: the Unlock is deferred already: use panics.Unlocked", set.Position(n.Pos()))
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
