package initramfs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"gvm/guest/kernel"
	"gvm/kvmapi/nowait"
	"gvm/vmm/boot"
)

// Bounds of the files of a kernel's modules. Lists have less than 2 MiB, and modules with debug
// information some tens.
const (
	maxList   = 32 << 20
	maxModule = 256 << 20
	maxPaths  = 1 << 17 // modules of a kernel
)

// maxKept bounds the memory for the modules that a list of names leads to, and maxWords that for
// the words of .modinfo sections, of which all modules of Linux have some MiB; tests change them.
var maxKept, maxWords = 1 << 30, 256 << 20

// tree is the modules of a kernel.
type tree struct {
	ctx      context.Context
	from     string              // Modules.Path
	paths    map[string]string   // of the modules, by their names
	builtin  map[string]bool     // names
	aliases  map[string][]string // patterns to names; nil: not read yet
	infos    map[string]moduleInfo
	contents map[string][]byte   // of modules, perhaps compressed
	kept     int                 // bytes of modules that are needed
	words    int                 // bytes of infos and aliases
	root     *os.Root            // nil: a package
	files    map[string]*os.File // modules of a directory that are open, by their names
	built    bool                // a build directory
	again    func(want map[string]bool) error
}

// openTree reads the lists of a kernel's modules. Of a package it reads all modules, and keeps some
// of them, at least those in names.
func openTree(ctx context.Context, k *kernel.Kernel, names []string) (*tree, error) {
	t := &tree{ctx: ctx, from: k.Modules.Path, paths: map[string]string{}, builtin: map[string]bool{},
		infos: map[string]moduleInfo{}, contents: map[string][]byte{}, files: map[string]*os.File{}}
	if t.from == "" {
		return t, nil
	}
	if k.Modules.Kind == kernel.Packed {
		return t, t.unpack(k.Modules, names)
	}
	t.built = k.Modules.Kind == kernel.Built
	var err error
	if t.root, err = os.OpenRoot(t.from); err != nil {
		return nil, t.fault("", err, "check the directory")
	}
	if err := t.list(); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *tree) close() {
	if t.root != nil {
		t.root.Close()
	}
	t.closeFiles()
}

func (t *tree) closeFiles() {
	for _, f := range t.files {
		f.Close()
	}
	clear(t.files)
}

// list reads the names of the modules in a directory.
func (t *tree) list() error {
	text, err := t.text("modules.builtin")
	if err != nil {
		return err
	}
	t.addBuiltIn(text)
	name := "modules.dep"
	if t.built {
		name = "modules.order"
	}
	if text, err = t.text(name); err != nil {
		return err
	}
	if text == nil && !t.built { // no depmod has run
		return t.walk()
	}
	for _, path := range listed(text) {
		t.add(path)
	}
	return nil
}

// listed returns the paths in a modules.dep, which has a colon and dependencies behind each, or a
// modules.order, whose files end in .o since Linux 6.2. Paths that leave the tree are left out.
func listed(text []byte) (paths []string) {
	for line := range bytes.Lines(text) {
		file, _, _ := bytes.Cut(bytes.TrimSpace(line), []byte(":"))
		name := string(file)
		if rest, ok := strings.CutSuffix(name, ".o"); ok {
			name = rest + ".ko"
		}
		if filepath.IsLocal(name) && strings.HasSuffix(uncompressed(name), ".ko") && len(paths) < maxPaths {
			paths = append(paths, path.Clean(name))
		}
	}
	return paths
}

// add adds the path of a module. Those in updates take the place of others, as for depmod.
func (t *tree) add(file string) {
	name := moduleName(file)
	if old, ok := t.paths[name]; !ok || !strings.HasPrefix(old, "updates/") && strings.HasPrefix(file, "updates/") {
		t.paths[name] = file
	}
}

func (t *tree) addBuiltIn(text []byte) {
	for line := range bytes.Lines(text) {
		t.builtin[moduleName(string(bytes.TrimSpace(line)))] = true
	}
}

// walk finds the modules of a directory without lists.
func (t *tree) walk() error {
	err := fs.WalkDir(t.root.FS(), ".", func(file string, d fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(t.ctx)
		}
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(uncompressed(file), ".ko") {
			if len(t.paths) == maxPaths {
				return fmt.Errorf("it has more than %d modules", maxPaths)
			}
			t.add(file)
		}
		return err
	})
	if err != nil {
		return t.fault("", err, "check the directory")
	}
	return nil
}

// text reads a list; nil if there is none.
func (t *tree) text(name string) ([]byte, error) {
	f, err := nowait.OpenIn(t.root, name, nowait.Regular)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, t.fault(name, cause(err), "run depmod")
	}
	defer f.Close()
	b, err := kernel.ReadAll(f, maxList)
	if err != nil {
		return nil, t.fault(name, cause(err), "run depmod")
	}
	return b, nil
}

// cause returns the cause of an error of a file, whose name a message has already.
func cause(err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return pe.Err
	}
	if kind := (*nowait.KindError)(nil); errors.As(err, &kind) {
		return fmt.Errorf("it is %v", kind.Is)
	}
	return err
}

// maxOpen bounds the open modules of a directory; tests change it.
var maxOpen = 64

// file opens a module in a directory, whose path has many parts, once. The next call may close the
// file.
func (t *tree) file(name string) (*os.File, error) {
	if f := t.files[name]; f != nil {
		return f, nil
	}
	if len(t.files) >= maxOpen {
		t.closeFiles()
	}
	f, err := t.open(t.paths[name])
	if err == nil {
		t.files[name] = f
	}
	return f, err
}

// open opens a module in a directory. The modules.order of Linux before 5.3 has paths below
// kernel/.
func (t *tree) open(file string) (*os.File, error) {
	f, err := nowait.OpenIn(t.root, file, nowait.Regular)
	if rest, ok := strings.CutPrefix(file, "kernel/"); ok && t.built && errors.Is(err, fs.ErrNotExist) {
		f, err = nowait.OpenIn(t.root, rest, nowait.Regular)
	}
	return f, err
}

// content returns the ELF file of a module.
func (t *tree) content(name string) (b []byte, err error) {
	file := t.paths[name]
	b, ok := t.contents[name]
	if err = context.Cause(t.ctx); err == nil && !ok {
		var f *os.File
		if f, err = t.file(name); err == nil {
			b, err = kernel.ReadAll(io.NewSectionReader(f, 0, maxModule+1), maxModule)
		}
	}
	if err == nil && uncompressed(file) != file {
		b, err = decompress(b)
	}
	if err != nil {
		return nil, t.fault(file, cause(err), "build or install the modules again")
	}
	return b, nil
}

func decompress(b []byte) ([]byte, error) {
	r, err := boot.Decompress(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return kernel.ReadAll(r, maxModule)
}

// info returns the dependencies of a module.
func (t *tree) info(name string) (moduleInfo, error) {
	if info, ok := t.infos[name]; ok {
		return info, nil
	}
	if t.root == nil && t.contents[name] == nil {
		if err := t.again(map[string]bool{name: true}); err != nil {
			return moduleInfo{}, err
		}
	}
	info, err := t.infoOf(name)
	if ie := (*boot.ImageError)(nil); errors.As(err, &ie) {
		return moduleInfo{}, err
	} else if err != nil {
		return moduleInfo{}, t.fault(t.paths[name], cause(err), "build or install the modules again")
	}
	t.infos[name] = info
	return info, t.count(name, info)
}

// count counts memory for the words of a module.
func (t *tree) count(name string, info moduleInfo) error {
	if t.words += info.size; t.words > maxWords {
		return t.fault(t.paths[name], fmt.Errorf("its section .modinfo and those read before have more than %d MiB",
			maxWords>>20), "build or install the modules again")
	}
	return nil
}

// read reads modules.
func (t *tree) read(names []string) (modules []Module, err error) {
	if t.root == nil {
		missing := map[string]bool{}
		for _, name := range names {
			if t.contents[name] == nil {
				missing[name] = true
			}
		}
		if len(missing) > 0 {
			if err := t.again(missing); err != nil {
				return nil, err
			}
		}
	}
	for _, name := range names {
		b, err := t.content(name)
		if err != nil {
			return nil, err
		}
		if file := t.paths[name]; t.root != nil || uncompressed(file) != file { // else it was counted
			if err := t.keep(file, len(b)); err != nil {
				return nil, err
			}
		}
		modules = append(modules, Module{name, t.paths[name], b})
	}
	return modules, nil
}

// keep counts memory for a module that is needed.
func (t *tree) keep(file string, n int) error {
	if t.kept += n; t.kept > maxKept {
		return t.fault(file, fmt.Errorf("it and the modules needed with it have more than %d MiB", maxKept>>20),
			"name fewer modules, or strip their debug information")
	}
	return nil
}

func (t *tree) builtIn(name string) bool { return t.builtin[name] }

// there reports whether there is a module. A list may have modules that were not built.
func (t *tree) there(name string) bool {
	if _, ok := t.paths[name]; !ok || t.root == nil {
		return ok
	}
	_, err := t.file(name)
	return !errors.Is(err, fs.ErrNotExist)
}

// find returns the modules with a name or an alias. If several have an alias and all is false, it
// returns one, preferably the one that works on any CPU.
func (t *tree) find(name string, all bool) ([]string, error) {
	if t.there(name) {
		return []string{name}, nil
	}
	if t.builtIn(name) {
		return nil, nil
	}
	if t.aliases == nil {
		if err := t.readAliases(); err != nil {
			return nil, err
		}
	}
	var found []string
	for pattern, names := range t.aliases {
		if ok, _ := path.Match(pattern, name); ok {
			for _, name := range names {
				if t.there(name) {
					found = append(found, name)
				}
			}
		}
	}
	slices.Sort(found)
	found = slices.Compact(found)
	if !all && len(found) > 1 {
		i := max(slices.IndexFunc(found, func(s string) bool { return strings.HasSuffix(s, "_generic") }), 0)
		found = found[i : i+1]
	}
	return found, nil
}

// readAliases reads modules.alias, or the aliases in all modules of a directory.
func (t *tree) readAliases() error {
	t.aliases = map[string][]string{}
	text, err := []byte(nil), error(nil)
	if t.root != nil && !t.built {
		if text, err = t.text("modules.alias"); err != nil {
			return err
		}
	}
	if text != nil {
		for line := range bytes.Lines(text) {
			if f := strings.Fields(string(line)); len(f) == 3 && f[0] == "alias" {
				t.addAlias(spelling(f[1]), spelling(f[2]))
			}
		}
		return nil
	}
	for name, file := range t.paths {
		if err := context.Cause(t.ctx); err != nil {
			return t.fault(file, err, "")
		}
		if info, err := t.infoOf(name); err == nil { // one that cannot be read counts only if it is needed
			if err := t.count(name, info); err != nil {
				return err
			}
			t.addAliases(name, info)
		}
	}
	return nil
}

// infoOf reads the section of a module alone, where it is in a directory and not compressed.
func (t *tree) infoOf(name string) (moduleInfo, error) {
	file := t.paths[name]
	if t.root != nil && uncompressed(file) == file {
		f, err := t.file(name)
		if err != nil {
			return moduleInfo{}, err
		}
		return readInfo(f)
	}
	b, err := t.content(name)
	if err != nil {
		return moduleInfo{}, err
	}
	return readInfo(bytes.NewReader(b))
}

func (t *tree) addAlias(pattern, name string) { t.aliases[pattern] = append(t.aliases[pattern], name) }

func (t *tree) addAliases(name string, info moduleInfo) {
	for _, pattern := range info.aliases {
		t.addAlias(pattern, name)
	}
}

// Modules of a package that may turn out to be needed are kept up to these sizes, so that most
// packages are read once.
const (
	maxSpare  = 1 << 20 // of a module
	maxSpares = 256 << 20
)

// unpack reads the modules of a package.
func (t *tree) unpack(m kernel.Modules, names []string) error {
	t.aliases = map[string][]string{}
	want, spares := map[string]bool{}, 0
	for _, name := range names {
		want[spelling(name)] = true
	}
	t.again = func(want map[string]bool) error { return t.reread(m, want) }
	var buf bytes.Buffer
	return m.Packed(t.ctx, func(file string, r io.Reader) error {
		isModule := strings.HasSuffix(uncompressed(file), ".ko")
		if !isModule && file != "modules.builtin" || len(file) > maxName || len(t.paths) == maxPaths {
			return nil
		}
		buf.Reset()
		limit := int64(maxModule)
		if !isModule {
			limit = maxList
		}
		if n, err := buf.ReadFrom(io.LimitReader(r, limit+1)); err != nil || n > limit {
			return t.fault(file, cmp.Or(err, fmt.Errorf("it is larger than %d MiB", limit>>20)), mendPackage)
		}
		if !isModule {
			t.addBuiltIn(buf.Bytes())
			return nil
		}
		t.add(file)
		name := moduleName(file)
		if t.paths[name] != file { // another takes its place
			return nil
		}
		delete(t.contents, name)
		delete(t.infos, name)
		if uncompressed(file) == file && spares < maxSpares {
			if info, err := readInfo(bytes.NewReader(buf.Bytes())); err == nil {
				t.infos[name] = info
				t.addAliases(name, info)
				spares += info.size
				for _, other := range info.depends {
					want[other] = want[other] || want[name]
				}
			}
		}
		if n := buf.Len(); want[name] {
			if err := t.keep(file, n); err != nil {
				return err
			}
			t.contents[name] = bytes.Clone(buf.Bytes())
		} else if n <= maxSpare && spares+n <= maxSpares {
			spares += n
			t.contents[name] = bytes.Clone(buf.Bytes())
		}
		return nil
	})
}

const mendPackage = "download the package again"

// reread reads some modules of a package.
func (t *tree) reread(m kernel.Modules, want map[string]bool) error {
	left := len(want)
	return m.Packed(t.ctx, func(file string, r io.Reader) (err error) {
		name := moduleName(file)
		if !want[name] || t.paths[name] != file {
			return nil
		}
		if t.contents[name], err = kernel.ReadAll(r, maxModule); err != nil {
			return t.fault(file, err, mendPackage)
		}
		if err := t.keep(file, len(t.contents[name])); err != nil {
			return err
		}
		if left--; left == 0 {
			return io.EOF
		}
		return nil
	})
}
