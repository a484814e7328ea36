package lab

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
)

// module is one kernel module of an initramfs.
type module struct {
	Name string   // with underscores, as lsmod prints it
	Path string   // of the file, under Kernel.Modules
	Deps []string // names of all modules it needs, nearest first
}

// moduleName turns a module's path or either spelling of its name into the kernel's spelling.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// parseDep reads a modules.dep: each line names a module's file, a colon, and
// the files of all modules it depends on.
func parseDep(r io.Reader) (map[string]module, error) {
	mods := make(map[string]module)
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		path, deps, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("modules.dep: no colon in %q", sc.Text())
		}
		m := module{Name: moduleName(path), Path: path}
		for _, d := range strings.Fields(deps) {
			m.Deps = append(m.Deps, moduleName(d))
		}
		mods[m.Name] = m
	}
	return mods, sc.Err()
}

// addSoft adds soft dependencies to modules, which must be loaded before them: ext4, for example,
// needs some crc32c, of which the generic one works on any processor. Lines of modules.softdep are
// "softdep NAME pre: A B post: C"; A and B may be aliases. Names that no module provides are
// dropped, as in modprobe.
func addSoft(mods map[string]module, softdep, alias io.Reader) error {
	provides := make(map[string]string)
	sc := bufio.NewScanner(alias)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) != 3 || f[0] != "alias" {
			continue
		}
		name := moduleName(f[1])
		if provides[name] == "" || strings.HasSuffix(f[2], "_generic") {
			provides[name] = f[2]
		}
	}
	if err := sc.Err(); err != nil {
		return err
	}
	sc = bufio.NewScanner(softdep)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 3 || f[0] != "softdep" {
			continue
		}
		m, ok := mods[moduleName(f[1])]
		if !ok {
			continue
		}
		pre := false
		for _, word := range f[2:] {
			if strings.HasSuffix(word, ":") {
				pre = word == "pre:"
				continue
			}
			name := moduleName(word)
			if _, ok := mods[name]; !ok {
				name = provides[name]
			}
			if _, ok := mods[name]; ok && pre {
				m.Deps = append(m.Deps, name)
			}
		}
		mods[m.Name] = m
	}
	return sc.Err()
}

// order returns the named modules and all their dependencies, each once, and each after its
// dependencies.
func order(mods map[string]module, names []string) ([]module, error) {
	var out []module
	state := make(map[string]int) // 1: being visited, 2: in out
	var visit func(name string) error
	visit = func(name string) error {
		m, ok := mods[name]
		switch {
		case !ok:
			return fmt.Errorf("no module %s", name)
		case state[name] == 2:
			return nil
		case state[name] == 1:
			return fmt.Errorf("module %s depends on itself", name)
		}
		state[name] = 1
		for i := len(m.Deps) - 1; i >= 0; i-- { // depmod lists the deepest last
			if err := visit(m.Deps[i]); err != nil {
				return err
			}
		}
		state[name] = 2
		out = append(out, m)
		return nil
	}
	for _, n := range names {
		if err := visit(moduleName(n)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// modules returns the named modules of the kernel and their dependencies, in the order in which to
// load them. Names built into the kernel are dropped: kernels differ in their sets of modules.
func (k *Kernel) modules(names []string) ([]module, error) {
	text := make(map[string]string)
	for _, n := range []string{"dep", "softdep", "alias", "builtin"} {
		b, err := os.ReadFile(filepath.Join(k.Modules, "modules."+n))
		if err != nil {
			return nil, err
		}
		text[n] = string(b)
	}
	mods, err := parseDep(strings.NewReader(text["dep"]))
	if err != nil {
		return nil, err
	}
	if err := addSoft(mods, strings.NewReader(text["softdep"]), strings.NewReader(text["alias"])); err != nil {
		return nil, err
	}
	isBuiltin := make(map[string]bool)
	for _, p := range strings.Fields(text["builtin"]) {
		isBuiltin[moduleName(p)] = true
	}
	var want []string
	for _, n := range names {
		if n = moduleName(n); !isBuiltin[n] {
			want = append(want, n)
		}
	}
	out, err := order(mods, want)
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", k.Release, err)
	}
	return out, nil
}

// readModule returns a module's plain ELF file, without the parts that make loading it slow under
// emulation: its signature (the kernel would check it) and the name of its BTF section (the kernel
// would parse it).
func readModule(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if b, err = decompress(b); err != nil {
		return nil, fmt.Errorf("module %s: %w", path, err)
	}
	if !bytes.HasPrefix(b, []byte("\x7fELF")) {
		return nil, fmt.Errorf("module %s: not an ELF file", path)
	}
	return bytes.ReplaceAll(dropSignature(b), []byte("\x00.BTF\x00"), []byte("\x00.btf\x00")), nil
}

// dropSignature removes the trailer of the kernel's scripts/sign-file.c: the signature, a struct
// module_signature, and a magic string.
func dropSignature(b []byte) []byte {
	const magic = "~Module signature appended~\n"
	const structLen = 12 // the last four bytes are the signature's length, big endian
	body, ok := bytes.CutSuffix(b, []byte(magic))
	if !ok || len(body) < structLen {
		return b
	}
	n := uint64(binary.BigEndian.Uint32(body[len(body)-4:])) + structLen
	if n > uint64(len(body)) {
		return b
	}
	return body[:uint64(len(body))-n]
}

// decompress reverses the compression of Debian's kernel modules; it returns data of no known
// format unchanged.
func decompress(b []byte) ([]byte, error) {
	var r io.Reader
	var err error
	switch {
	case bytes.HasPrefix(b, []byte("\xfd7zXZ\x00")):
		r, err = xz.NewReader(bytes.NewReader(b), 0)
	case bytes.HasPrefix(b, []byte("\x28\xb5\x2f\xfd")):
		var d *zstd.Decoder
		if d, err = zstd.NewReader(bytes.NewReader(b)); err == nil {
			defer d.Close()
			r = d
		}
	case bytes.HasPrefix(b, []byte("\x1f\x8b")):
		r, err = gzip.NewReader(bytes.NewReader(b))
	default:
		return b, nil
	}
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}
