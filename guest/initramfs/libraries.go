package initramfs

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"gvm/elffile"
	"gvm/guest/kernel"
	"gvm/kvmapi/nowait"
)

// object is a program or a shared library.
type object struct {
	name        string // for messages
	origin      string // $ORIGIN
	interpreter string
	class       elf.Class
	machine     elf.Machine
	needed      []string
	rpath       []string // DT_RPATH, which counts without runpath
	runpath     []string
	by          *object // the one that needs it first
}

// Bounds of what tells of libraries: the section .dynamic, of which the largest known have some
// KiB, a list of directories, and other tables, of which the largest known have a few MiB.
const (
	maxDynamic = 64 << 10
	maxPath    = 64 << 10
	maxTable   = 64 << 20
)

// readObject reads the ELF headers of a program or library for x86; nil if r is none.
func readObject(r io.ReaderAt) *object {
	f, err := elffile.Open(r)
	if err != nil || f.Machine != elf.EM_X86_64 && f.Machine != elf.EM_386 ||
		f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return nil
	}
	o := &object{class: f.Class, machine: f.Machine}
	for _, p := range f.Progs {
		if elf.ProgType(p.Type) == elf.PT_INTERP && p.Filesz <= maxName {
			b := make([]byte, p.Filesz)
			if f.ReadFull(b, p.Off) != nil {
				return nil
			}
			o.interpreter = string(bytes.TrimRight(b, "\x00"))
		}
	}
	s := f.SectionOf(elf.SHT_DYNAMIC)
	if s == nil {
		return o
	}
	entries, err := f.Data(s, maxDynamic)
	if err != nil {
		return nil
	}
	words, err := f.Table(s.Link, maxTable)
	if err != nil {
		return nil
	}
	size, le := 8, binary.LittleEndian // elf.Dyn32
	if f.Class == elf.ELFCLASS64 {
		size = 16
	}
	for ; len(entries) >= size; entries = entries[size:] {
		tag, at := uint64(le.Uint32(entries)), uint64(le.Uint32(entries[4:]))
		if f.Class == elf.ELFCLASS64 {
			tag, at = le.Uint64(entries), le.Uint64(entries[8:])
		}
		switch elf.DynTag(tag) {
		case elf.DT_NEEDED:
			if name, ok := elffile.Word(words, at, maxName); ok {
				o.needed = append(o.needed, string(name))
			}
		case elf.DT_RPATH:
			o.rpath = paths(o.rpath, words, at)
		case elf.DT_RUNPATH:
			o.runpath = paths(o.runpath, words, at)
		}
	}
	return o
}

// paths returns the directories of the list at an offset of a table, unless there is a list.
func paths(list []string, table []byte, at uint64) []string {
	if list == nil {
		if b, ok := elffile.Word(table, at, maxPath); ok {
			return strings.Split(string(b), ":")
		}
	}
	return list
}

// libraries adds the libraries of a program: breadth first, as ld.so does, each name once.
func (c *closure) libraries(program *object) error {
	musl := strings.HasPrefix(path.Base(program.interpreter), "ld-musl-")
	names := map[string]bool{}
	for todo := []*object{program}; len(todo) > 0; todo = todo[1:] {
		needed := todo[0].needed
		if slices.Contains(needed, "libc.so.6") && !names["libc.so.6"] {
			needed = slices.Concat(needed, glibcOpens)
		}
		for _, name := range needed {
			if names[name] || musl && ofMusl(name) {
				continue
			}
			names[name] = true
			lib, err := c.library(name, todo[0], musl)
			if err != nil {
				return err
			}
			if lib == nil && !slices.Contains(glibcOpens, name) {
				c.missing = append(c.missing, fmt.Sprintf("%s (of %s)", name, todo[0].name))
			}
			if lib != nil {
				todo = append(todo, lib)
			}
		}
	}
	return nil
}

// glibcOpens are the libraries that glibc opens by dlopen(3) for any program: to look up names of
// users and hosts, and to end threads.
var glibcOpens = []string{"libnss_files.so.2", "libnss_dns.so.2", "libgcc_s.so.1"}

// ofMusl reports whether musl's dynamic linker itself is a library (load_library in
// ldso/dynlink.c).
func ofMusl(name string) bool {
	rest, ok := strings.CutPrefix(name, "lib")
	word, _, dot := strings.Cut(rest, ".")
	return ok && dot && slices.Contains([]string{"c", "pthread", "rt", "m", "dl", "util", "xnet"}, word)
}

// library adds the library that an object needs. It is nil if there is none.
func (c *closure) library(name string, by *object, musl bool) (*object, error) {
	for _, file := range c.candidates(name, by, musl) {
		real, err := c.resolve(file, func(string, fs.FileInfo, string) {})
		if err != nil {
			continue
		}
		f, err := nowait.Open(c.host(real), os.O_RDONLY, 0, nowait.Regular)
		if err != nil {
			continue
		}
		lib := readObject(f)
		f.Close()
		if lib == nil || lib.class != by.class || lib.machine != by.machine {
			continue // ld.so skips it too
		}
		if _, _, err := c.add(file); err != nil {
			return nil, err
		}
		lib.name, lib.origin, lib.by = file, path.Dir(file), by
		return lib, nil
	}
	return nil, nil
}

// candidates returns the paths where a library may be, in the order of ld.so(8).
func (c *closure) candidates(name string, by *object, musl bool) (files []string) {
	if strings.Contains(name, "/") {
		if path.IsAbs(name) {
			files = []string{name}
		}
		return files
	}
	var dirs []string
	add := func(o *object, list []string) {
		for _, dir := range list {
			dirs = append(dirs, expand(dir, o)...)
		}
	}
	if musl { // it takes the two for one
		dirs = strings.Split(c.LibraryPath, ":")
		for o := by; o != nil; o = o.by {
			add(o, slices.Concat(o.rpath, o.runpath))
		}
		dirs = append(dirs, c.muslDirs()...)
	} else {
		for o := by; o != nil && by.runpath == nil; o = o.by {
			if o.runpath == nil {
				add(o, o.rpath)
			}
		}
		dirs = append(dirs, strings.Split(c.LibraryPath, ":")...)
		add(by, by.runpath)
	}
	for i := 0; i < 2; i++ {
		for _, dir := range dirs {
			if path.IsAbs(dir) { // others are relative to the directory that the command runs in
				files = append(files, path.Join(dir, name))
			}
		}
		if musl || i > 0 {
			break
		}
		files = append(files, c.cached(name)...)
		dirs = defaultDirs
	}
	return files
}

// defaultDirs are those of glibc on the distributions.
var defaultDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib",
	"/usr/lib", "/lib/i386-linux-gnu", "/usr/lib/i386-linux-gnu", "/lib32", "/usr/lib32", "/usr/local/lib"}

// expand returns the directories that an entry of DT_RPATH or DT_RUNPATH means.
func expand(dir string, o *object) (dirs []string) {
	for _, lib := range []string{"lib/x86_64-linux-gnu", "lib64", "lib"} {
		s := dir
		for word, value := range map[string]string{"ORIGIN": o.origin, "LIB": lib, "PLATFORM": "x86_64"} {
			s = strings.ReplaceAll(s, "${"+word+"}", value)
			s = strings.ReplaceAll(s, "$"+word, value)
		}
		if !slices.Contains(dirs, s) {
			dirs = append(dirs, s)
		}
	}
	return dirs
}

// text reads a file of the dynamic linker; nil if it cannot be read.
func (c *closure) text(name string) []byte {
	real, err := c.resolve(name, func(string, fs.FileInfo, string) {})
	if err != nil {
		return nil
	}
	f, err := nowait.Open(c.host(real), os.O_RDONLY, 0, nowait.Regular)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := kernel.ReadAll(f, maxTable)
	if err != nil {
		return nil
	}
	return b
}

// muslDirs returns the directories of musl's dynamic linker.
func (c *closure) muslDirs() []string {
	text := string(c.text("/etc/ld-musl-x86_64.path"))
	if text == "" {
		text = "/lib:/usr/local/lib:/usr/lib"
	}
	return strings.FieldsFunc(text, func(r rune) bool { return r == ':' || r == '\n' })
}

// cached returns the paths of a library in /etc/ld.so.cache.
func (c *closure) cached(name string) []string {
	if c.cache == nil {
		c.cache = append([]byte{}, c.text("/etc/ld.so.cache")...)
	}
	return inCache(c.cache, name)
}

// inCache returns the paths of a library in the contents of ld.so.cache (struct cache_file_new in
// sysdeps/generic/dl-cache.h of glibc). Libraries for special CPUs are left out: there is one for
// every CPU as well.
func inCache(b []byte, name string) (files []string) {
	const magic, header, entry = "glibc-ld.so.cache1.1", 48, 24
	b = b[max(bytes.Index(b, []byte(magic)), 0):] // it follows an older form
	if !bytes.HasPrefix(b, []byte(magic)) || len(b) < header {
		return nil
	}
	le := binary.LittleEndian
	word := func(at uint32) []byte {
		rest := b[min(uint64(at), uint64(len(b))):]
		word, _, _ := bytes.Cut(rest[:min(len(rest), maxName)], []byte{0})
		return word
	}
	n := min(uint64(le.Uint32(b[len(magic):])), uint64(len(b)-header)/entry)
	for e := b[header:]; n > 0; n, e = n-1, e[entry:] {
		hwcap := le.Uint64(e[16:])
		if hwcap == 0 && len(files) < 16 && string(word(le.Uint32(e[4:]))) == name {
			files = append(files, string(word(le.Uint32(e[8:]))))
		}
	}
	return files
}
