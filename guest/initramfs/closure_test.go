package initramfs

import (
	"bytes"
	"compress/zlib"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gvm/vmm/boot"
)

// spec describes a program or library: words such as "interp=/lib/ld.so needed=libc.so.6 rpath=/x".
type spec string

// build returns the ELF file.
func (s spec) build() string {
	machine, kind, interp := elf.EM_X86_64, elf.ET_DYN, ""
	dynstr := []byte{0}
	var dynamic []elf.Dyn64
	for word := range strings.FieldsSeq(string(s)) {
		key, value, _ := strings.Cut(word, "=")
		tag := map[string]elf.DynTag{"needed": elf.DT_NEEDED, "rpath": elf.DT_RPATH, "runpath": elf.DT_RUNPATH}[key]
		switch {
		case tag != 0:
			dynamic = append(dynamic, elf.Dyn64{Tag: int64(tag), Val: uint64(len(dynstr))})
			dynstr = append(append(dynstr, value...), 0)
		case key == "interp":
			interp = value + "\x00"
		case key == "386":
			machine = elf.EM_386
		case key == "arm":
			machine = elf.EM_AARCH64
		case key == "object":
			kind = elf.ET_REL
		}
	}
	names := []byte("\x00.dynamic\x00.dynstr\x00.shstrtab\x00")
	const start = 64 + 56
	at := func(parts ...int) (sum uint64) {
		for _, n := range parts {
			sum += uint64(n)
		}
		return start + sum
	}
	dynSize := 16 * len(dynamic)
	h := elf.Header64{Type: uint16(kind), Machine: uint16(machine), Version: 1, Ehsize: 64, Phoff: 64, Phentsize: 56,
		Shentsize: 64, Shnum: 4, Shstrndx: 3, Shoff: at(len(interp), dynSize, len(dynstr), len(names))}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	if interp != "" {
		h.Phnum = 1
	}
	var b bytes.Buffer
	for _, v := range []any{h, elf.Prog64{Type: uint32(elf.PT_INTERP), Off: start, Filesz: uint64(len(interp))},
		[]byte(interp), dynamic, dynstr, names, elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_DYNAMIC), Off: at(len(interp)), Size: uint64(dynSize), Link: 2},
		elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: at(len(interp), dynSize), Size: uint64(len(dynstr))},
		elf.Section64{Name: 18, Type: uint32(elf.SHT_STRTAB), Off: at(len(interp), dynSize, len(dynstr)),
			Size: uint64(len(names))},
	} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return b.String()
}

// makeCache returns the contents of ld.so.cache: pairs of a library and its path. A name that ends
// in "+" is one for a special CPU.
func makeCache(pairs ...string) string {
	le := binary.LittleEndian
	n := len(pairs) / 2
	b := append([]byte("glibc-ld.so.cache1.1"), make([]byte, 28+24*n)...)
	le.PutUint32(b[20:], uint32(n))
	for i, word := range pairs {
		e := b[48+24*(i/2):]
		if i%2 == 0 {
			var special bool
			if word, special = strings.CutSuffix(word, "+"); special {
				le.PutUint64(e[16:], 1<<62)
			}
		}
		le.PutUint32(e[4+4*(i%2):], uint32(len(b)))
		b = append(append(b, word...), 0)
	}
	return string(b)
}

// hostTree makes the files of a host. A text "->x" is a symbolic link, and a spec is built.
func hostTree(t testing.TB, files map[string]any) string {
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch text := text.(type) {
		case spec:
			err = os.WriteFile(path, []byte(text.build()), 0o755)
		case string:
			if target, ok := strings.CutPrefix(text, "->"); ok {
				err = os.Symlink(target, path)
			} else {
				err = os.WriteFile(path, []byte(text), 0o755)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestClosure finds the files of programs and scripts.
func TestClosure(t *testing.T) {
	const ld, muslLd = "interp=/lib64/ld.so ", "interp=/lib/ld-musl-x86_64.so.1 "
	debian := map[string]any{
		"lib": "->usr/lib", "lib64": "->/usr/lib64", "bin": "->usr/bin",
		"usr/lib64/ld.so":                            "->/lib/x86_64-linux-gnu/ld-2.so",
		"usr/lib/x86_64-linux-gnu/ld-2.so":           spec(""),
		"usr/lib/x86_64-linux-gnu/libc.so.6":         spec("needed=ld-2.so"),
		"usr/lib/x86_64-linux-gnu/libnss_files.so.2": spec("needed=libc.so.6"),
		"usr/lib/x86_64-linux-gnu/liba.so.1":         "->liba.so.1.2",
		"usr/lib/x86_64-linux-gnu/liba.so.1.2":       spec("needed=libb.so needed=libc.so.6"),
		"usr/lib/x86_64-linux-gnu/libb.so":           spec("needed=liba.so.1"),
		"usr/lib/x86_64-linux-gnu/libother.so":       spec("386"),
		"usr/lib/libother.so":                        spec(""),
		"usr/bin/a":                                  spec(ld + "needed=liba.so.1"),
		"usr/bin/static":                             spec(""),
		"usr/bin/script":                             "#!/bin/sh -e\ntrue\n",
		"usr/bin/sh":                                 "->static",
		"usr/bin/env":                                spec(""),
		"usr/bin/py":                                 "#! /usr/bin/env -S X=1 static -u\n",
		"usr/bin/py2":                                "#!/usr/bin/env none\n",
		"usr/bin/deep":                               "#!/bin/deep\n",
		"usr/bin/empty":                              "",
		"usr/bin/text":                               "true\n",
		"usr/bin/nothing":                            "#!\n",
		"usr/bin/arm":                                spec("arm"),
		"usr/bin/object":                             spec("object"),
		"usr/bin/cut":                                spec(ld).build()[:80],
		"usr/bin/other":                              spec(ld + "needed=libother.so"),
		"usr/bin/lacks":                              spec(ld + "needed=libx.so needed=liblacks.so needed=/opt/liby.so"),
		"usr/lib/liblacks.so":                        spec("needed=libz.so"),
		"usr/bin/nold":                               spec("interp=/lib64/none.so"),
		"loop":                                       "->loop",
		"opt/bin/run": spec(ld + "runpath=$ORIGIN/../lib:${ORIGIN} " +
			"needed=libp.so needed=libq.so"),
		"opt/bin/old":           spec(ld + "rpath=/opt/lib needed=libr.so"),
		"opt/bin/new":           spec(ld + "runpath=/opt/lib needed=libr.so"),
		"opt/lib/libp.so":       spec(""),
		"opt/lib/libr.so":       spec("needed=libp.so"),
		"opt/bin/libq.so":       spec(""),
		"srv/libs/libcached.so": spec(""),
		"usr/bin/cached":        spec(ld + "needed=libcached.so"),
		"etc/ld.so.cache": "ld.so-1.7.0" +
			makeCache("libcached.so+", "/no.so", "libcached.so", "/srv/libs/libcached.so"),
		"usr/lib/ld-musl-x86_64.so.1": spec(""),
		"usr/bin/musl":                spec(muslLd + "runpath=$ORIGIN needed=libc.so needed=libm.so.1"),
		"usr/bin/musl2":               spec(muslLd + "needed=libcmusl.so"),
		"srv/musl/libcmusl.so":        spec("needed=libc.musl-x86_64.so.1"),
		"etc/ld-musl-x86_64.path":     "/none:/srv/musl\n",
		"usr/bin/linked":              "->../../opt/bin/run",
	}
	root := hostTree(t, debian)
	const (
		start = "/lib64>/usr/lib64 /usr/lib64 /usr/lib64/ld.so>/lib/x86_64-linux-gnu/ld-2.so /lib>usr/lib /usr /usr/lib " +
			"/usr/lib/x86_64-linux-gnu /usr/lib/x86_64-linux-gnu/ld-2.so"
		lib = " /usr/lib/x86_64-linux-gnu/"
	)
	for _, tt := range []struct{ name, libraryPath, want string }{
		{"/bin/static", "", "/bin>usr/bin /usr /usr/bin /usr/bin/static"},
		{"/usr/bin/../bin/static", "", "/usr /usr/bin /usr/bin/static"},
		{"/bin/a", "", "/bin>usr/bin /usr/bin /usr/bin/a " + start + lib + "liba.so.1>liba.so.1.2" + lib +
			"liba.so.1.2" + lib + "libb.so" + lib + "libc.so.6" + lib + "libnss_files.so.2"},
		{"/bin/script", "", "/bin>usr/bin /usr /usr/bin /usr/bin/script /usr/bin/sh>static /usr/bin/static"},
		{"/usr/bin/py", "", "/usr /usr/bin /usr/bin/py /usr/bin/env /usr/bin/static"},
		{"/usr/bin/other", "", "/usr/bin /usr/bin/other " + start + " /usr/lib/libother.so"},
		{"/opt/bin/run", "", "/opt /opt/bin /opt/bin/run " + start + " /opt/lib /opt/lib/libp.so /opt/bin/libq.so"},
		{"/bin/linked", "", "/bin>usr/bin /usr/bin /usr/bin/linked>../../opt/bin/run /opt /opt/bin /opt/bin/run " + start +
			" /opt/lib /opt/lib/libp.so /opt/bin/libq.so"},
		{"/opt/bin/old", "", "/opt /opt/bin /opt/bin/old " + start + " /opt/lib /opt/lib/libr.so /opt/lib/libp.so"},
		{"/opt/bin/new", "", "!libp.so (of /opt/lib/libr.so): install"},
		{"/opt/bin/new", "x:/opt/lib", "/opt /opt/bin /opt/bin/new " + start + " /opt/lib /opt/lib/libr.so /opt/lib/libp.so"},
		{"/usr/bin/cached", "", "/usr/bin /usr/bin/cached " + start + " /srv /srv/libs /srv/libs/libcached.so"},
		{"/usr/bin/musl", "", "/usr /usr/bin /usr/bin/musl /lib>usr/lib /usr/lib /usr/lib/ld-musl-x86_64.so.1"},
		{"/usr/bin/musl2", "", "/usr /usr/bin /usr/bin/musl2 /lib>usr/lib /usr/lib /usr/lib/ld-musl-x86_64.so.1 " +
			"/srv /srv/musl /srv/musl/libcmusl.so"},
		{"/usr/bin/lacks", "", "!%/usr/bin/lacks needs libraries that are not found: libx.so (of /usr/bin/lacks), " +
			"/opt/liby.so (of /usr/bin/lacks), libz.so (of /lib/liblacks.so): install them"},
		{"/usr/bin/py2", "", "!py2 is a script for none, which is not in PATH"},
		{"/usr/bin/deep", "", "/usr /usr/bin /usr/bin/deep /bin>usr/bin"},
		{"/usr/bin/empty", "", "/usr /usr/bin /usr/bin/empty"},
		{"/usr/bin/text", "", "/usr /usr/bin /usr/bin/text"},
		{"/usr/bin/nothing", "", "/usr /usr/bin /usr/bin/nothing"},
		{"/usr/bin/arm", "", "/usr /usr/bin /usr/bin/arm"},
		{"/usr/bin/object", "", "/usr /usr/bin /usr/bin/object"},
		{"/usr/bin/cut", "", "/usr /usr/bin /usr/bin/cut"},
		{"/usr/bin/nold", "", "!/lib64/none.so does not exist"},
		{"/usr/bin/none", "", "!none does not exist"},
		{"/usr/bin", "", "!is a directory"},
		{"/loop", "", "!too many levels of symbolic links"},
	} {
		entries, err := Host{Root: root, LibraryPath: tt.libraryPath}.Closure(t.Context(), tt.name)
		if want, bad := strings.CutPrefix(tt.want, "!"); bad {
			var ie *boot.ImageError
			if want = strings.ReplaceAll(want, "%", root); !errors.As(err, &ie) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %s", tt.name, err, want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		var got []string
		for _, e := range entries {
			s := e.Name
			if e.Target != "" {
				s += ">" + e.Target
			}
			got = append(got, s)
			if e.UID != uint32(os.Getuid()) || e.Mode.IsRegular() && e.Mode.Perm() != 0o755 {
				t.Errorf("%+v", e)
			}
		}
		want := strings.Fields(tt.want)
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: %s\nwant %s", tt.name, got, want)
		}
		b := New()
		b.Add(entries...)
		if n := len(read(t, image(t, b))); n < len(want) {
			t.Errorf("%s: %d files in the archive of %d", tt.name, n, len(want))
		}
	}
	cause := errors.New("asked to end")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := (Host{Root: root}).Closure(ctx, "/bin/static"); !errors.Is(err, cause) {
		t.Error(err)
	}
}

// TestCompressedLibraries: no table of a program is decompressed, as that could have any size. A
// link may lead to a section of any type.
func TestCompressedLibraries(t *testing.T) {
	const dynamic, dynstr = 1, 2
	le := binary.LittleEndian
	for _, section := range []uint64{dynamic, dynstr} {
		b := []byte(spec("interp=/lib/ld.so needed=liba.so").build())
		if o := readObject(bytes.NewReader(b)); o == nil || !slices.Equal(o.needed, []string{"liba.so"}) {
			t.Fatalf("%+v", o)
		}
		header := b[le.Uint64(b[40:])+section*64:][:64]
		off, size := le.Uint64(header[24:]), le.Uint64(header[32:])
		var zip bytes.Buffer
		if err := binary.Write(&zip, le, elf.Chdr64{Type: uint32(elf.COMPRESS_ZLIB), Size: size, Addralign: 1}); err != nil {
			t.Fatal(err)
		}
		z := zlib.NewWriter(&zip)
		_, _ = z.Write(b[off:][:size]) // a Buffer takes all
		_ = z.Close()
		if section == dynstr {
			le.PutUint32(header[4:], uint32(elf.SHT_PROGBITS))
		}
		le.PutUint64(header[8:], uint64(elf.SHF_COMPRESSED))
		le.PutUint64(header[24:], uint64(len(b)))
		le.PutUint64(header[32:], uint64(zip.Len()))
		if o := readObject(bytes.NewReader(append(b, zip.Bytes()...))); o != nil {
			t.Errorf("section %d: %+v", section, o)
		}
	}
}

// FuzzObject reads arbitrary programs and searches arbitrary contents of ld.so.cache.
func FuzzObject(f *testing.F) {
	f.Add([]byte(spec("interp=/lib/ld.so needed=a needed=b runpath=$ORIGIN:/x rpath=y").build()), "a")
	f.Add([]byte(makeCache("a+", "/x", "a", "/y")), "a")
	f.Fuzz(func(t *testing.T, data []byte, name string) {
		if o := readObject(bytes.NewReader(data)); o != nil && len(o.interpreter) > maxName {
			t.Errorf("%d bytes", len(o.interpreter))
		}
		for _, file := range inCache(data, name) {
			if len(file) > maxName || strings.Contains(file, "\x00") {
				t.Errorf("%q", file)
			}
		}
	})
}
