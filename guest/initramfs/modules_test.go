package initramfs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"

	"gvm/guest/initramfs/initramfstest"
	"gvm/guest/kernel"
	"gvm/vmm/boot"
)

func makeModule(words ...string) string { return string(initramfstest.Module(words...)) }

func gzipped(s string) string {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	_, _ = z.Write([]byte(s)) // a Buffer takes all
	_ = z.Close()
	return out.String()
}

func xzipped(s string) string {
	var out bytes.Buffer
	w, err := xz.NewWriter(&out)
	if err != nil {
		panic(err)
	}
	_, _ = w.Write([]byte(s))
	_ = w.Close()
	return out.String()
}

// modules is a small kernel's, by their paths.
var modules = map[string]string{
	"kernel/drivers/virtio/virtio.ko":      makeModule("name=virtio", "depends="),
	"kernel/drivers/virtio/virtio_ring.ko": makeModule("depends=virtio"),
	"kernel/drivers/virtio/virtio-pci.ko": makeModule("alias=pci:v00001AF4d*sv*sd*bc*sc*i*",
		"depends=virtio-ring,virtio"),
	"kernel/fs/ext4/ext4.ko": makeModule("alias=fs-ext4", "depends=jbd2,mbcache",
		"softdep=pre: crypto-crc32c nosuch post: late"),
	"kernel/fs/jbd2.ko.xz":                   xzipped(makeModule("depends=")),
	"kernel/fs/mbcache.ko.gz":                gzipped(makeModule("depends=")),
	"kernel/crypto/crc32c_generic.ko":        makeModule("alias=crypto-crc32c", "depends="),
	"kernel/arch/x86/crypto/crc32c-intel.ko": makeModule("alias=crypto-crc32c", "depends="),
	"kernel/late.ko":                         makeModule("depends=ext4"),
	"kernel/softloop1.ko":                    makeModule("depends=", "softdep=pre: softloop2 lacking damaged2"),
	"kernel/softloop2.ko":                    makeModule("depends=softloop1"),
	"kernel/loop1.ko":                        makeModule("depends=loop2"),
	"kernel/loop2.ko":                        makeModule("depends=loop3", "softdep=pre: virtio"),
	"kernel/loop3.ko":                        makeModule("depends=loop2"),
	"kernel/lacking.ko":                      makeModule("depends=virtio,nosuch"),
	"kernel/damaged.ko":                      "text",
	"kernel/needsbuiltin.ko":                 makeModule("depends=unix"),
	"updates/virtio_ring.ko":                 makeModule("depends=virtio", "version=2"),
	"kernel/drivers/net/of.ko":               makeModule("alias=of:N*T*Cx,y-z", "depends="),
	"kernel/drivers/scsi/virtio_scsi.ko":     makeModule("alias=virtio:d00000008v*", "depends=virtio"),
	"kernel/big.ko": makeModule("depends=", "x="+strings.Repeat("x", 1<<19)) +
		strings.Repeat("\x00", 2<<20),
	"kernel/drivers/misc/pvpanic.ko": makeModule("depends="), // before Linux 5.13
	"kernel/needsbig.ko":             makeModule("depends=big"),
}

const builtin = "kernel/net/unix/unix.ko\nkernel/drivers/tty/tty-core.ko\n"

func write(t *testing.T, path, text string) {
	t.Helper()
	err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600))
	if err != nil {
		t.Fatal(err)
	}
}

// kernels returns the small kernel with its modules in every form.
func kernels(t *testing.T) map[string]*kernel.Kernel {
	dir := t.TempDir()
	write := func(name, text string) { write(t, filepath.Join(dir, name), text) }
	var dep, order, alias strings.Builder
	for path, text := range modules {
		write("installed/"+path, text)
		write("plain/"+path, text)
		fmt.Fprintf(&dep, "%s: %s\n", path, "kernel/ignored.ko")
		if !strings.HasPrefix(path, "updates/") && !strings.Contains(path, ".ko.") {
			write("old/"+strings.TrimPrefix(path, "kernel/"), text)
			write("built/"+path, text)
			fmt.Fprintf(&order, "%s.o\n", strings.TrimSuffix(path, ".ko"))
		}
		for word := range strings.SplitSeq(text, "\x00") {
			if a, ok := strings.CutPrefix(word, "alias="); ok {
				fmt.Fprintf(&alias, "alias %s %s\n", a, moduleName(path))
			}
		}
	}
	for _, name := range []string{"jbd2", "mbcache"} {
		write("built/kernel/fs/"+name+".ko", makeModule("depends="))
		write("old/fs/"+name+".ko", makeModule("depends="))
		fmt.Fprintf(&order, "kernel/fs/%s.o\n", name)
	}
	write("installed/modules.dep", dep.String())
	write("installed/modules.alias", "# Aliases\n"+alias.String())
	write("built/modules.order", order.String())
	write("old/modules.order", strings.ReplaceAll(order.String(), ".o\n", ".ko\n"))
	for _, form := range []string{"installed", "plain", "built", "old"} {
		write(form+"/modules.builtin", builtin)
	}
	write("k.deb", deb(t))
	all := map[string]*kernel.Kernel{}
	for form, kind := range map[string]kernel.ModulesKind{"installed": kernel.Installed, "plain": kernel.Installed,
		"built": kernel.Built, "old": kernel.Built} {
		all[form] = fakeKernel(filepath.Join(dir, form), kind)
	}
	k, err := kernel.Finder{}.Find(t.Context(), filepath.Join(dir, "k.deb"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	all["packed"] = k
	return all
}

func fakeKernel(dir string, kind kernel.ModulesKind) *kernel.Kernel {
	return &kernel.Kernel{Image: &boot.Image{File: &boot.File{Name: "bzImage"}},
		Modules: kernel.Modules{Path: dir, Kind: kind}}
}

// deb returns a Debian package of the small kernel.
func deb(t *testing.T) string {
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Entry: 0x200000,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	var image, data bytes.Buffer
	for _, v := range []any{h, elf.Prog64{Type: uint32(elf.PT_LOAD), Off: 120, Vaddr: 0x200000, Paddr: 0x200000, Filesz: 8,
		Memsz: 8}, uint64(0)} {
		if err := binary.Write(&image, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	w := tar.NewWriter(&data)
	add := func(name, text string) {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(text)), Typeflag: tar.TypeReg}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	add("./boot/vmlinuz-1.2", image.String())
	paths := make([]string, 0, len(modules))
	for path := range modules {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		add("./lib/modules/1.2/"+path, modules[path])
	}
	add("./lib/modules/1.2/modules.builtin", builtin)
	add("./lib/modules/1.3/kernel/other.ko", makeModule("depends="))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	packed := gzipped(data.String())
	return fmt.Sprintf("!<arch>\n%-16s%-12d%-6d%-6d%-8o%-10d`\n%s", "data.tar.gz", 0, 0, 0, 0o100644, len(packed),
		packed)
}

// TestModules reads modules of every form of kernel.
func TestModules(t *testing.T) {
	for form, k := range kernels(t) {
		for _, tt := range []struct{ names, want string }{
			{"", ""},
			{"virtio_pci", "virtio virtio_ring virtio_pci"},
			{"virtio-pci virtio", "virtio virtio_ring virtio_pci"},
			{"virtio tty_core unix virtio_ring", "virtio virtio_ring"},
			{"ext4", "crc32c_generic jbd2 mbcache ext4 late"},
			{"virtio:d00000008v00001AF4", "virtio virtio_scsi"},
			{"pci:v00001AF4d00001048sv00001AF4sd00001100bc01sc00i00", "virtio virtio_ring virtio_pci"},
			{"of:NsocT(null)Cx,y-z", "of"},
			{"crypto-crc32c", "crc32c_generic crc32c_intel"},
			{"pvpanic-mmio", "pvpanic"},
			{"needsbuiltin", "needsbuiltin"},
			{"needsbig", "big needsbig"},
			{"softloop1", "softloop1"},
			{"softloop2", "softloop1 softloop2"},
			{"loop1", "!loop2.ko cannot be used (it depends on itself: loop2, loop3, loop2): build"},
			{"lacking", "!lacking.ko cannot be used (it depends on nosuch, which is neither there nor built in)"},
			{"damaged", "!damaged.ko cannot be used (it is no ELF file)"},
			{"nosuch virtio other", "!has neither built in nor as modules nosuch, other: "},
		} {
			got, err := Modules(t.Context(), k, strings.Fields(tt.names)...)
			if want, bad := strings.CutPrefix(tt.want, "!"); bad {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%s, %s: %v, want %s", form, tt.names, err, want)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s, %s: %v", form, tt.names, err)
			}
			var names []string
			for _, m := range got {
				names = append(names, m.Name)
				if !strings.HasPrefix(string(m.Data), "\x7fELF") || !bytes.Contains(m.Data, []byte("signature appended~\n")) {
					t.Errorf("%s: %s begins with %.20q", form, m.Name, m.Data)
				}
				if v2 := strings.Contains(string(m.Data), "version=2"); m.Name == "virtio_ring" &&
					v2 != (form != "built" && form != "old") {
					t.Errorf("%s: virtio_ring from %s", form, m.Path)
				}
			}
			if s := strings.Join(names, " "); s != tt.want {
				t.Errorf("%s, %s: %s, want %s", form, tt.names, s, tt.want)
			}
		}
	}
}

// TestMissing names the option of a module that a kernel lacks, and returns the modules that it
// has.
func TestMissing(t *testing.T) {
	k := kernels(t)["installed"]
	k.Config.Text = []byte("\nCONFIG_OVERLAY_FS=y\n# CONFIG_VIRTIO_FS is not set\nCONFIG_XFS_FS=m\n")
	mods, err := Modules(t.Context(), k, "virtiofs", "virtio", "overlay", "xfs", "virtio-console", "odd")
	var missing *MissingError
	if !errors.As(err, &missing) || len(mods) != 1 || mods[0].Name != "virtio" {
		t.Fatalf("%v, %v", mods, err)
	}
	want := []Missing{{"virtiofs", "CONFIG_VIRTIO_FS", "n"}, {"xfs", "CONFIG_XFS_FS", "m"},
		{"virtio-console", "CONFIG_VIRTIO_CONSOLE", "n"}, {"odd", "", ""}}
	if !slices.Equal(missing.Modules, want) {
		t.Errorf("%v, want %v", missing.Modules, want)
	}
	const text = "bzImage has neither built in nor as modules virtiofs (CONFIG_VIRTIO_FS=n), xfs (CONFIG_XFS_FS=m), " +
		"virtio-console (CONFIG_VIRTIO_CONSOLE=n), odd: build them, or give another kernel"
	if err.Error() != text {
		t.Errorf("%q, want\n%q", err, text)
	}
	_, err = Modules(t.Context(), fakeKernel("", 0), "fuse")
	if err == nil || err.Error() != "bzImage, whose modules are not found, has neither built in nor as modules "+
		"fuse (CONFIG_FUSE_FS): give its tree or its package, or the release of an installed kernel" {
		t.Error(err)
	}
}

// TestCache takes the modules of a package out of the cache: even if the package can no longer be
// read, but not if it, or the list of names, is another one.
func TestCache(t *testing.T) {
	k := kernels(t)["packed"]
	k.Cache = t.TempDir()
	k.Config.Text = []byte("\nCONFIG_TTY_CORE=y\n# CONFIG_FUSE_FS is not set\n")
	read := func(names ...string) string {
		mods, err := Modules(t.Context(), k, names...)
		var s []string
		for _, m := range mods {
			s = append(s, fmt.Sprintf("%s %s %x", m.Name, m.Path, xxhash.Sum64(m.Data)))
		}
		return fmt.Sprint(s, err)
	}
	files := func() int { return len(must(os.ReadDir(k.Cache))) }
	first := read("virtio-pci", "tty_core", "fuse", "ext4")
	if !strings.Contains(first, "CONFIG_FUSE_FS=n") || !strings.Contains(first, "virtio_pci kernel/") || files() != 1 {
		t.Fatalf("%s, %d files", first, files())
	}
	path := filepath.Join(k.Cache, must(os.ReadDir(k.Cache))[0].Name())
	data := must(os.ReadFile(path))
	mods, missing, ok := load(boot.Cached(path))
	if !ok || len(missing) != 1 {
		t.Fatalf("%v, %v, %v", mods, missing, ok)
	}
	mods[0].Data[7] ^= 1 // a mark of the cache
	store(path, mods, missing)
	second := read("virtio-pci", "tty_core", "fuse", "ext4")
	if second == first || len(second) != len(first) {
		t.Errorf("%s, and then %s", first, second)
	}
	if err := os.WriteFile(path, data[:len(data)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if got := read("virtio-pci", "tty_core", "fuse", "ext4"); got != first {
		t.Errorf("with a damaged cache %s, want %s", got, first)
	}
	if got := read("virtio-pci"); strings.Contains(got, "ext4") || files() != 2 {
		t.Errorf("%s, %d files", got, files())
	}
	if err := os.WriteFile(k.Modules.Path, append(must(os.ReadFile(k.Modules.Path)), "\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := read("virtio-pci"); strings.Contains(got, "ext4") || files() != 3 {
		t.Errorf("with another package %s, %d files", got, files())
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestHostileTree: nothing outside of a tree is read, and nothing in it holds gvm up.
func TestHostileTree(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret.ko")
	tree := filepath.Join(dir, "tree")
	for name, text := range map[string]string{
		"modules.dep": "../secret.ko:\n" + secret + ":\nlink.ko:\nfifo.ko:\ngone.ko:\nb.ko:\ninside.ko:\nzip.ko.gz: x\n" +
			"/etc/passwd:\n\n:\nx\n",
		"a.ko": makeModule("depends=", "softdep=pre: gone"), "b.ko": makeModule("depends=gone"),
		"../secret.ko": makeModule("depends="), "zip.ko.gz": "\x1f\x8b\x08",
	} {
		write(t, filepath.Join(tree, name), text)
	}
	if err := errors.Join(os.Symlink("../secret.ko", filepath.Join(tree, "link.ko")),
		os.Symlink("a.ko", filepath.Join(tree, "inside.ko")),
		unix.Mkfifo(filepath.Join(tree, "fifo.ko"), 0o600)); err != nil {
		t.Fatal(err)
	}
	k := fakeKernel(tree, kernel.Installed)
	for name, want := range map[string]string{"secret": "neither built in", "link": "escapes", "fifo": "it is a pipe",
		"gone": "neither built in", "b": "depends on gone", "zip": "EOF", "inside": ""} {
		mods, err := Modules(t.Context(), k, name)
		if want == "" && (err != nil || len(mods) != 1) ||
			want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, %v", name, mods, err)
		}
	}
	cause := errors.New("asked to end")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := Modules(ctx, k, "inside"); !errors.Is(err, cause) {
		t.Error(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(tree, "modules.dep")),
		unix.Mkfifo(filepath.Join(tree, "modules.dep"), 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err := Modules(t.Context(), k, "inside")
	if err == nil || !strings.Contains(err.Error(), "modules.dep cannot be used") {
		t.Error(err)
	}
}

// TestManyModules bounds the modules that a name leads to.
func TestManyModules(t *testing.T) {
	dir := t.TempDir()
	for i := range maxModules + 1 {
		m := makeModule(fmt.Sprintf("depends=m%d", i+1))
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("m%d.ko", i)), []byte(m), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, err := Modules(t.Context(), fakeKernel(dir, kernel.Installed), "m0")
	if err == nil || !strings.Contains(err.Error(), "more than 1000): name fewer modules") {
		t.Error(err)
	}
}

// TestLargeModules bounds the memory for the modules that a name leads to, in every form.
func TestLargeModules(t *testing.T) {
	defer func(n int) { maxKept = n }(maxKept)
	maxKept = 2 << 20
	for form, k := range kernels(t) {
		if _, err := Modules(t.Context(), k, "ext4"); err != nil {
			t.Errorf("%s: %v", form, err)
		}
		for _, name := range []string{"big", "needsbig"} {
			_, err := Modules(t.Context(), k, name)
			if err == nil || !strings.Contains(err.Error(), "have more than 2 MiB): name fewer modules") {
				t.Errorf("%s, %s: %v", form, name, err)
			}
		}
	}
}

// TestManyWords bounds the memory for the words about modules in a directory: for aliases, of all
// modules where no list has them, and for dependencies.
func TestManyWords(t *testing.T) {
	defer func(n int) { maxWords = n }(maxWords)
	maxWords = 1 << 20
	dir := t.TempDir()
	for i := range 16 {
		words := slices.Repeat([]string{"alias=a"}, 1<<10)
		next := fmt.Sprintf("m%d,", i+1)
		write(t, filepath.Join(dir, fmt.Sprintf("m%d.ko", i)),
			makeModule(append(words, "depends="+strings.Repeat(next, 1<<10))...))
	}
	for _, name := range []string{"m1", "nosuch"} {
		_, err := Modules(t.Context(), fakeKernel(dir, kernel.Installed), name)
		if err == nil || !strings.Contains(err.Error(), "those read before have more than 1 MiB") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOneFile: modules are the same if one file at a time is open.
func TestOneFile(t *testing.T) {
	defer func(n int) { maxOpen = n }(maxOpen)
	for form, k := range kernels(t) {
		want, err := Modules(t.Context(), k, "ext4")
		if err != nil {
			t.Fatal(err)
		}
		maxOpen = 1
		k.Cache = ""
		if got, err := Modules(t.Context(), k, "ext4"); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, %v", form, got, err)
		}
		maxOpen = 64
	}
}

// TestCompressedNames: a table of section names that would be decompressed to any size is not.
func TestCompressedNames(t *testing.T) {
	names := append([]byte("\x00.modinfo\x00.shstrtab\x00"), make([]byte, 1<<20)...)
	var zip bytes.Buffer
	if err := binary.Write(&zip, binary.LittleEndian, elf.Chdr64{Type: uint32(elf.COMPRESS_ZLIB),
		Size: uint64(len(names)), Addralign: 1}); err != nil {
		t.Fatal(err)
	}
	z := zlib.NewWriter(&zip)
	_, _ = z.Write(names) // a Buffer takes all
	_ = z.Close()
	b := []byte(makeModule("depends="))
	section := b[binary.LittleEndian.Uint64(b[40:])+2*64:] // the last one
	binary.LittleEndian.PutUint64(section[8:], uint64(elf.SHF_COMPRESSED))
	binary.LittleEndian.PutUint64(section[24:], uint64(len(b)))
	binary.LittleEndian.PutUint64(section[32:], uint64(zip.Len()))
	if _, err := readInfo(bytes.NewReader(append(b, zip.Bytes()...))); err == nil {
		t.Error("it is decompressed")
	}
}

// FuzzListed reads arbitrary lists of modules. No path leaves the tree.
func FuzzListed(f *testing.F) {
	f.Add([]byte("kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko\nkernel/a.ko.xz:\n"))
	f.Add([]byte("fs/ext4/ext4.o\n/etc/x.ko\n../x.ko\na/../../b.ko\n.ko\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, path := range listed(text) {
			if !filepath.IsLocal(path) || strings.Contains(moduleName(path), "/") {
				t.Errorf("%q", path)
			}
		}
	})
}

// FuzzLoad reads arbitrary files of the cache.
func FuzzLoad(f *testing.F) {
	f.Add([]byte(`{"Modules":[{"Name":"a","Path":"b","Size":3}],"Missing":["c"]}` + "\nabc"))
	f.Fuzz(func(t *testing.T, b []byte) {
		modules, _, ok := load(b)
		for _, m := range modules {
			if ok && len(m.Data) > len(b) {
				t.Errorf("%+v", m)
			}
		}
	})
}

// FuzzInfo reads arbitrary modules and arbitrary sections .modinfo.
func FuzzInfo(f *testing.F) {
	f.Add([]byte(makeModule("depends=a,b-c,,", "softdep=pre: d-e post: f", "alias=x-*", "softdep=z")))
	f.Add([]byte("depends=a\x00softdep=pre:\x00=\x00alias"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, info := range []func() (moduleInfo, error){
			func() (moduleInfo, error) { return readInfo(bytes.NewReader(data)) },
			func() (moduleInfo, error) { return parseInfo(data), nil },
		} {
			m, err := info()
			for _, name := range slices.Concat(m.depends, m.pre, m.post, m.aliases) {
				if err != nil || strings.ContainsAny(name, "\x00-") {
					t.Errorf("%q, %v", name, err)
				}
			}
		}
	})
}
