package main

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"gvm/devices/block"
	"gvm/guest/embedded"
)

// bzImage makes a minimal bzImage of a 64-bit kernel (Documentation/arch/x86/boot.rst); set changes
// its header.
func bzImage(set func(b []byte)) []byte {
	b := make([]byte, 1024+4096)
	le := binary.LittleEndian
	b[0x1f1] = 1                     // setup_sects
	le.PutUint32(b[0x1f4:], 4096/16) // syssize
	le.PutUint16(b[0x1fe:], 0xaa55)
	b[0x200], b[0x201] = 0xeb, 0x6a
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x20f)
	b[0x211] = 1 // LOADED_HIGH
	le.PutUint32(b[0x22c:], 0x7fffffff)
	le.PutUint32(b[0x230:], 0x200000)
	b[0x234] = 1
	le.PutUint16(b[0x236:], 3) // XLF_KERNEL_64, CAN_BE_LOADED_ABOVE_4G
	le.PutUint32(b[0x238:], 2047)
	le.PutUint64(b[0x258:], 0x200000)
	le.PutUint32(b[0x260:], 0x100000)
	if set != nil {
		set(b)
	}
	return b
}

// badFiles makes a directory with the files that TestBadInput names.
func badFiles(t *testing.T) string {
	dir := t.TempDir()
	guest := func(set func(b []byte)) []byte {
		b := bytes.Clone(embedded.Image)
		set(b)
		return b
	}
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	w.Write(embedded.Image)
	w.Close()
	head := func(text string, size int) []byte { return append([]byte(text), make([]byte, size-len(text))...) }
	le := binary.LittleEndian
	for name, data := range map[string][]byte{
		"empty":       nil,
		"text":        []byte("not a kernel\n"),
		"guest.elf":   embedded.Image,
		"cut.elf":     embedded.Image[:300],
		"arm64.elf":   guest(func(b []byte) { le.PutUint16(b[18:], uint16(elf.EM_AARCH64)) }),
		"i386.elf":    guest(func(b []byte) { b[4] = byte(elf.ELFCLASS32); le.PutUint16(b[18:], uint16(elf.EM_386)) }),
		"module.ko":   guest(func(b []byte) { le.PutUint16(b[16:], uint16(elf.ET_REL)) }),
		"program":     guest(func(b []byte) { le.PutUint16(b[16:], uint16(elf.ET_DYN)) }),
		"bigend.elf":  guest(func(b []byte) { b[5] = byte(elf.ELFDATA2MSB) }),
		"vmlinux.gz":  gz.Bytes(),
		"initrd":      head("070701", 512),
		"package":     head("!<arch>\ndebian-binary", 512),
		"bz":          bzImage(nil),
		"cut.bz":      bzImage(nil)[:2000],
		"head.bz":     append([]byte("MZ"), bzImage(nil)[2:0x210]...),
		"old.bz":      bzImage(func(b []byte) { le.PutUint16(b[0x206:], 0x204) }),
		"i386.bz":     bzImage(func(b []byte) { le.PutUint16(b[0x236:], 0) }),
		"wrong.allow": []byte("BUG: known\n(\n"),
		"disk":        make([]byte, 1<<20),
		"disk2":       make([]byte, 1<<20),
		"twice":       make([]byte, 1<<20),
		"twice2":      make([]byte, 1<<20),
		"twice3":      make([]byte, 1<<20),
		"twice4":      make([]byte, 1<<20),
		"twice5":      make([]byte, 1<<20),
		"twice6":      make([]byte, 1<<20),
		"large":       make([]byte, 1<<20),
		"serial":      make([]byte, 1<<20),
		"serial2":     make([]byte, 1<<20),
		"grow":        make([]byte, 1<<20),
		"locked":      make([]byte, 1<<20),
		"odd":         make([]byte, 1000),
		"odd4096":     make([]byte, 4096+512),
		"small":       make([]byte, 512),
		"disk.qcow2":  head("QFI\xfb\x00\x00\x00\x03", 1<<16),
		"same.qcow2":  head("QFI\xfb\x00\x00\x00\x03", 1<<16),
		"disk.vmdk":   head("KDMV", 1<<16),
		"disk.vhdx":   head("vhdxfile", 1<<16),
		"whole.tr":    head("gvm-trace 1\n{}\n", 1<<20),
		"larger.tr":   head("gvm-trace 1\n{}\n", 1<<20),
		"bench.tr":    head("gvm-trace 1\n{}\n", 1<<20),
		"cut.tr":      []byte("gvm-trace 1\n{\"gvm"),
		"resized.tr":  []byte("gvm-trace 1\n{\"gvm"),
		"overlay.tr":  []byte("gvm-trace 1\n{\"gvm"),
		"plain":       make([]byte, 1<<20),
		"disk.gz":     head("\x1f\x8b\x08", 512),
		"comma,file":  []byte("x"),
		"otherpi":     make([]byte, 1<<20),
		"page":        make([]byte, 4096),
		"otherpi.pi":  []byte("notes"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"tree/Kbuild", "tree/MAINTAINERS", "tree/arch/x86/Makefile"} {
		f = filepath.Join(dir, f)
		if err := errors.Join(os.MkdirAll(filepath.Dir(f), 0o700), os.WriteFile(f, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(
		os.Mkdir(filepath.Join(dir, "dir"), 0o700),
		os.Symlink("loop", filepath.Join(dir, "loop")),
		os.Link(filepath.Join(dir, "twice3"), filepath.Join(dir, "hardlink3")),
		os.Link(filepath.Join(dir, "twice4"), filepath.Join(dir, "hardlink4")),
		os.Link(filepath.Join(dir, "twice5"), filepath.Join(dir, "hardlink5")),
		os.Link(filepath.Join(dir, "twice6"), filepath.Join(dir, "hardlink6")),
		os.Symlink("nowhere", filepath.Join(dir, "dangling")),
		syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600),
		os.WriteFile(filepath.Join(dir, "secret"), embedded.Image, 0o000),
	); err != nil {
		t.Fatal(err)
	}
	return dir
}

// contents lists every file under dir, with enough detail to notice a change.
func contents(t *testing.T, dir string) string {
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprint(&b, path[len(dir):], " ", fi.Mode(), " ", fi.Size())
		if fi.Mode().IsRegular() && fi.Mode().Perm() != 0 && fi.Size() <= 64<<20 {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %x", sha256.Sum256(data))
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestBadInput gives gvm bad input. Each case gives one line on standard error that names the
// fault, an exit status, and no change to any file.
func TestBadInput(t *testing.T) {
	dir := badFiles(t)
	holder, err := block.Open(filepath.Join(dir, "locked"), block.Options{})
	if err != nil {
		t.Fatal(err)
	}
	pid := strconv.Itoa(os.Getpid())
	long := strings.Repeat("x", 3000)
	run := func(args ...string) []string { return append([]string{"run"}, args...) }
	wantAllBad(t, dir, []badInput{
		{"unknown flag", run("--nosuch"), "unknown flag --nosuch", ""},
		{"unknown global flag", []string{"--nosuch"}, "unknown flag --nosuch", ""},
		{"unknown command", []string{"nosuch"}, `unknown command "nosuch"`, ""},
		{"empty command", []string{""}, `unknown command ""`, ""},
		{"stray argument", run("vmlinux"), `"vmlinux"|--kernel`, ""},
		{"stray argument after --", run("--", "--cpus"), `"--cpus"`, ""},
		{"flag without a value", run("--kernel"), "--kernel: want a value, KERNEL", ""},
		{"help for nothing", []string{"help", "nosuch"}, "nosuch", ""},
		{"help for nothing of run", run("help", "nosuch"), "nosuch", ""},
		{"doctor with an argument", []string{"doctor", "kvm"}, `doctor|"kvm"`, ""},
		{"doctor with a flag", []string{"doctor", "--fix"}, "-fix", ""},
		{"bench of nothing there is", []string{"bench", "net"}, `unknown command "net" of gvm bench`, ""},
		{"bench with an unknown flag", []string{"bench", "disk", "--nosuch"}, "-nosuch", ""},
		{"bench with an argument", []string{"bench", "disk", "x"}, `unexpected argument "x"`, ""},
		{"bench without rounds", []string{"bench", "disk", "--rounds", "0"}, "--rounds 0|1 or more", ""},
		{"bench in no time", []string{"bench", "disk", "--time", "1ns"}, "--time 1ns|1ms to 1h", ""},
		{"bench of odd sizes", []string{"bench", "disk", "--size", "4K,700"}, "--size 700|4096", ""},
		{"bench too deep", []string{"bench", "disk", "--depth", "1,257"}, "--depth 257|1 to 256", ""},
		{"bench without a queue", []string{"bench", "disk", "--queues", ","}, "--queues|number", ""},
		{"bench of an unknown driver", []string{"bench", "disk", "--driver", "poll,hope"},
			"--driver hope|interrupt or poll", ""},
		{"bench that polls too long", []string{"bench", "disk", "--poll", "1s"}, "--poll 1s|10ms", ""},
		{"guest bench with an argument", []string{"bench", "guest", "x"}, `unexpected argument "x"`, ""},
		{"guest bench without rounds", []string{"bench", "guest", "--rounds", "0"}, "--rounds 0|1 or more", ""},
		{"guest bench in no time", []string{"bench", "guest", "--time", "1us"}, "--time 1µs|1ms to 1m", ""},
		{"guest bench over a user's disk", []string{"bench", "guest", "--disk", "page", "--write"},
			"--write|--disk", ""},
		{"footprint of too many", []string{"bench", "footprint", "--guests", "10001"}, "--guests 10001|0 to 10000", ""},
		{"footprint in no time", []string{"bench", "footprint", "--time", "1ms"}, "--time 1ms|10ms to 1h", ""},
		{"footprint of nothing", []string{"bench", "footprint", "--rounds", "0"}, "--rounds 0|1 or more", ""},
		{"plot of no kind", []string{"bench", "disk", "--plot", "x.pdf"}, `--plot "x.pdf"|.svg or .png`, ""},
		{"plot nowhere", []string{"bench", "guest", "--plot", "missing/x.svg"}, "--plot|missing", ""},
		{"boot bench without rounds", []string{"bench", "boot", "--rounds", "0"}, "--rounds 0|1 or more", ""},
		{"boot bench until nothing", []string{"bench", "boot", "--kernel", "k", "--until", ""}, "--until|empty", ""},
		{"boot bench in no time", []string{"bench", "boot", "--timeout", "0s"}, "--timeout 0s|90s", ""},
		{"boot bench without a kernel", []string{"bench", "boot", "--initrd", "page"}, "--initrd|--kernel", ""},
		{"boot bench until when", []string{"bench", "boot", "--kernel", "k", "--initrd", "page"},
			"--initrd|--until", ""},
		{"boot bench of no kernel", []string{"bench", "boot", "--kernel", "missing", "--initrd", "page",
			"--until", "x"}, "missing does not exist", ""},
		{"bench of no file", []string{"bench", "disk", "--disk", "missing.img"}, "missing.img", ""},
		{"bench of a small disk", []string{"bench", "disk", "--disk", "page", "--size", "8K"},
			"page|4096 bytes|request of 8192", ""},
		{"bench into a directory", []string{"bench", "disk", "--json", "dir"}, "dir", ""},
		{"completion of nothing", []string{"completion"}, "want bash, fish or zsh", ""},
		{"completion of an unknown shell", []string{"completion", "tcsh"}, `completion tcsh|want bash, fish or zsh`, ""},
		{"completion of two shells", []string{"completion", "bash", "zsh"}, "want bash, fish or zsh", ""},

		{"no CPU", run("--cpus", "0"), "--cpus 0", ""},
		{"negative CPUs", run("--cpus", "-1"), "--cpus -1", ""},
		{"many CPUs", run("--cpus", "100000"), "100000 CPUs", ""},
		{"CPUs of letters", run("--cpus", "abc"), "-cpus|abc", ""},
		{"no memory", run("--memory", "0"), "--memory 0|16 MiB", ""},
		{"little memory", run("--memory", "1M"), "--memory 1M|16 MiB", ""},
		{"memory of letters", run("--memory", "12X"), "--memory|12X", ""},
		{"negative memory", run("--memory=-512M"), "--memory|-512M", ""},
		{"empty memory", run("--memory="), "--memory", ""},
		{"memory past 64 bits", run("--memory", "99999999999T"), "--memory|99999999999T|too large", ""},
		{"more memory than the host", run("--memory", "7T"), "--memory 7T|this host has|--overcommit", ""},
		{"more memory than a guest has", run("--memory", "9T", "--overcommit"), "--memory 9T|8 TiB at most", ""},
		{"memory of odd pages", run("--memory", "20000001K"), "--memory 20000001K", ""},
		{"an unknown watchdog", run("--watchdog", "rest"), `--watchdog rest|did you mean reset?`, ""},
		{"a balloon of huge pages", run("--balloon", "--hugepages"), "--balloon and --hugepages|leave one of them out", ""},
		{"hugepages of odd size", run("--memory", "33M", "--hugepages"), "--memory 33M|2 MiB", ""},
		{"timeout 0", run("--timeout", "0"), "--timeout 0s", ""},
		{"negative timeout", run("--timeout", "-5s"), "--timeout -5s", ""},
		{"timeout of letters", run("--timeout", "abc"), "-timeout|abc", ""},
		{"timeout without unit", run("--timeout", "90"), "-timeout|90", ""},
		{"boot", run("--boot", "foo"), `--boot|"foo"`, ""},
		{"entry", run("--entry", "foo"), "--entry foo", ""},
		{"entry of the embedded guest", run("--entry", "64"), "gvm: --entry 64: not for", ""},
		{"on-reset", run("--on-reset", "foo"), "--on-reset foo", ""},
		{"share without a directory", run("--share", "src"), "--share src|want TAG=DIR", ""},
		{"share without a tag", run("--share", "=/tmp"), `--share =/tmp|tag ""|1 to 36`, ""},
		{"share of nothing", run("--kernel", "guest.elf", "--share", "a=none"), "share a|none: no such file", ""},
		{"share for the embedded guest", run("--share", "a=/tmp"),
			"gvm: --share: not for the embedded guest|name a kernel with --kernel", ""},
		{"words of a kernel for the embedded guest", run("--cmdline", "quiet", "--initrd", "i", "--net", "none"),
			"gvm: --initrd, --cmdline: not for", ""},
		{"vsock of another kind", run("--vsock", "unx"), `--vsock unx: want unix or vhost; did you mean unix?`, ""},
		{"vsock without a kind", run("--vsock", ""), `--vsock "": want unix`, ""},
		{"vsock without an option", run("--vsock", "unix,"), `--vsock unix,: want cid or path`, ""},
		{"vsock's unknown option", run("--vsock", "unix,cd=3"), "--vsock cd: want cid or path; did you mean cid?", ""},
		{"reserved CID", run("--vsock", "cid=2"), "--vsock cid=2: want a number from 3 to 4294967294", ""},
		{"CID of letters", run("--vsock", "unix,cid=x"), "--vsock cid=x|3 to 4294967294", ""},
		{"CID twice", run("--vsock", "cid=3,cid=4"), "--vsock: cid= is given twice", ""},
		{"vsock without a path", run("--vsock", "path="), "--vsock path=: the path is empty", ""},
		{"vsock at a file", run("--vsock", "path=disk"), "--vsock|disk: it exists and is no socket", ""},
		{"vsock at a directory", run("--vsock", "unix,path=."), "--vsock|it exists and is no socket", ""},
		{"vsock in no directory", run("--vsock", "path=none/vsock"), "--vsock|none/vsock|no directory|make it first", ""},
		{"vhost-vsock without a CID", run("--vsock", "vhost"), "--vsock vhost: want cid=N", ""},
		{"vhost-vsock with a path", run("--vsock", "vhost,cid=3,path=a"), "--vsock vhost,path=", ""},
		{"vsock nowhere", run("--vsock", "path=none/a,b"), "--vsock|none/a,b: no such file or directory", ""},
		{"no APIC ID", run("--apic-ids", ""), `--apic-ids|""`, ""},
		{"APIC ID of letters", run("--apic-ids", "0,x"), `--apic-ids|"x"|32767`, ""},
		{"APIC ID without end", run("--apic-ids", "0,32768"), `--apic-ids|"32768"|32767`, ""},
		{"APIC ID twice", run("--apic-ids", "0,2,2"), "--apic-ids|2 after 2|ascending", ""},
		{"APIC IDs for other CPUs", run("--apic-ids", "0,2", "--cpus", "3"), "--apic-ids|2 IDs|--cpus 3", ""},
		{"feature without sign", run("--cpu-features", "avx"), `--cpu-features|"avx"`, ""},
		{"unknown feature hidden", run("--cpu-features=-nosuch"), `--cpu-features|"nosuch"`, ""},
		{"unknown feature demanded", run("--cpu-features=+nosuch"), `--cpu-features|"nosuch"`, ""},
		{"no queue", run("--queues", "0"), "--queues 0|64", ""},
		{"stopped without gdb", run("-S"), "-S needs --gdb|--gdb :1234", ""},
		{"gdb nowhere", run("--gdb", ""), "--gdb|:1234, HOST:PORT, unix:PATH or stdio", ""},
		{"gdb at a word", run("--gdb", "localhost"), `--gdb localhost|"localhost" is no port`, ""},
		{"gdb at port 0", run("--gdb", ":0"), `--gdb :0|"0" is no port`, ""},
		{"gdb at a high port", run("--gdb", "[::1]:65536"), `--gdb [::1]:65536|"65536" is no port`, ""},
		{"gdb at a path", run("--gdb", "/tmp/gdb"), "--gdb /tmp/gdb|unix:/tmp/gdb", ""},
		{"gdb at no path", run("--gdb", "unix:"), "--gdb unix:|the path is empty", ""},
		{"gdb at a long path", run("--gdb", "unix:"+strings.Repeat("a", 108)), "--gdb|108 bytes|107 at most", ""},
		{"gdb at a file", run("--gdb", "unix:guest.elf"), "--gdb unix:guest.elf: it exists and is no socket|remove it", ""},
		{"gdb in no directory", run("--gdb", "unix:none/gdb"), "--gdb|none/gdb|no directory none: make it first", ""},
		{"polling before the start", run("--poll", "-1us"), "--poll -1µs|0 to 10ms", ""},
		{"many queues", run("--queues", "1000"), "--queues 1000|64", ""},
		{"initrd without kernel", run("--initrd", "initrd"), "--initrd|--kernel", ""},
		{"cmdline without kernel", run("--cmdline", "quiet"), "--cmdline|--kernel", ""},
		{"bare-cmdline without kernel", run("--bare-cmdline"), "--bare-cmdline|--kernel", ""},
		{"guest-arg with kernel", run("--kernel", "guest.elf", "--guest-arg", "hang"), "--guest-arg|--cmdline", ""},
		{"newline in guest-arg", run("--guest-arg", "a\nb"), `--guest-arg: unknown word "a\nb"`, ""},
		{"unknown word for the guest", run("--guest-arg", "wriet"),
			`--guest-arg: unknown word "wriet"; did you mean write? See gvm help run`, ""},
		{"unknown word of two", run("--guest-arg", "write crash=tripple"),
			`unknown word "crash=tripple"; did you mean crash=triple?`, ""},
		{"number for the guest", run("--guest-arg", "bench-ms=0"), `unknown word "bench-ms=0"`, ""},

		{"empty kernel", run("--kernel", ""), "--kernel|empty", ""},
		{"kernel missing", run("--kernel", "none"), "none|does not exist", ""},
		{"kernel is a directory", run("--kernel", "dir"), "dir is a directory without a kernel", ""},
		{"kernel is not installed", run("--kernel", "0.0.1-none"), "0.0.1-none does not exist|installed kernel", ""},
		{"kernel of no bytes", run("--kernel", "empty"), "empty is empty", ""},
		{"kernel under a file", run("--kernel", "text/x"), "text/x|not a directory", ""},
		{"kernel in a loop", run("--kernel", "loop"), "loop|symbolic links", ""},
		{"kernel name too long", run("--kernel", long), "name too long", ""},
		{"kernel of text", run("--kernel", "text"), "text is neither a bzImage nor an ELF file", ""},
		{"truncated ELF", run("--kernel", "cut.elf"), "cut.elf|truncated", ""},
		{"ELF for arm64", run("--kernel", "arm64.elf"), "arm64.elf|AARCH64", ""},
		{"32-bit ELF", run("--kernel", "i386.elf"), "i386.elf|32-bit", ""},
		{"big-endian ELF", run("--kernel", "bigend.elf"), "bigend.elf|big-endian", ""},
		{"module", run("--kernel", "module.ko"), "module.ko is a relocatable object", ""},
		{"shared object", run("--kernel", "program"), "program is a shared object", ""},
		{"compressed vmlinux", run("--kernel", "vmlinux.gz"), "vmlinux.gz is compressed with gzip", ""},
		{"initrd as kernel", run("--kernel", "initrd"), "initrd is a cpio archive", ""},
		{"package as kernel", run("--kernel", "package"), "package is a package that cannot be read|ar header", ""},
		{"disk as kernel", run("--kernel", "disk.qcow2"), "disk.qcow2 is a disk image", ""},
		{"truncated bzImage", run("--kernel", "cut.bz"), "cut.bz|truncated", ""},
		{"bzImage's first sectors", run("--kernel", "head.bz"), "head.bz|truncated", ""},
		{"old bzImage", run("--kernel", "old.bz"), "old.bz|2.04", ""},
		{"32-bit bzImage", run("--kernel", "i386.bz"), "i386.bz|32-bit", ""},
		{"kernel tree without kernel", run(), "kernel tree|bzImage|--kernel", "tree"},
		{"initrd missing", run("--kernel", "guest.elf", "--initrd", "none"), "none does not exist", ""},
		{"initrd is a directory", run("--kernel", "guest.elf", "--initrd", "dir"), "dir is a directory", ""},
		{"second initrd of no bytes", run("--kernel", "guest.elf", "--initrd", "initrd",
			"--initrd", "empty"), "empty is empty", ""},

		{"empty disk", run("--disk", ""), `--disk ""|no path`, ""},
		{"disk of options", run("--disk", ",readonly"), "--disk|no path", ""},
		{"disk missing", run("--disk", "none"), "none|does not exist|size", ""},
		{"readonly disk missing", run("--disk", "none,readonly,size=1M"), "none|no such file", ""},
		{"disk is a directory", run("--disk", "dir"), "dir|directory", ""},
		{"disk is a FIFO", run("--disk", "fifo"), "fifo|is a pipe", ""},
		{"disk is a character device", run("--disk", "/dev/null"), "/dev/null|is a character device", ""},
		{"kernel is a FIFO", run("--kernel", "fifo"), "fifo is a pipe that no program writes", ""},
		{"initrd is a FIFO", run("--kernel", "guest.elf", "--initrd", "fifo"),
			"fifo is a pipe that no program writes", ""},
		{"initrd without an end", run("--kernel", "guest.elf", "--initrd", "/dev/zero"),
			"/dev/zero is a character device", ""},
		{"overlay is a FIFO", run("--disk", "disk,overlay=fifo"), "fifo|is a pipe", ""},
		{"overlay is a directory", run("--disk", "disk,overlay=dir"), "dir|is a directory", ""},
		{"trace of a FIFO", []string{"trace", "show", "fifo"}, "fifo|not a trace", ""},
		{"trace of a device", []string{"trace", "stat", "/dev/tty"}, "/dev/tty|is a character device", ""},
		{"replay of a FIFO", []string{"replay", "fifo"}, "fifo|not a trace", ""},
		{"facts of a FIFO", []string{"abi", "diff", "fifo", "fifo"}, "fifo: not the output of gvm abi", ""},
		{"facts without an end", []string{"abi", "diff", "/dev/zero", "text"}, "/dev/zero|is a character device", ""},
		{"benchmark into a FIFO", []string{"bench", "disk", "--json", "fifo"}, "fifo|no program reads", ""},
		{"benchmark into a disk", []string{"bench", "disk", "--json", "locked"}, "locked|in use", ""},
		{"image from a FIFO", []string{"image", "info", "fifo"}, "fifo|is a pipe", ""},
		{"FIFO as image", []string{"image", "resize", "fifo", "1M"}, "fifo|is a pipe", ""},
		{"image in place of a FIFO", []string{"image", "create", "fifo", "1M"}, "fifo|exists", ""},
		{"trace in place of a disk", run("--trace", "locked"), "locked|holds something other", ""},
		{"trace in place of a disk's overlay", run("--disk", "disk,overlay=on", "--trace", "disk"),
			"disk|holds something other", ""},
		{"overlay twice", run("--disk", "disk,overlay=new.ovl", "--disk", "disk2,overlay=new.ovl"),
			"new.ovl|given twice", ""},
		{"overlay that is a new disk", run("--disk", "new6,size=1M", "--disk", "disk,overlay=new6"),
			"new6|not an overlay", ""},
		{"new disk that is an overlay", run("--disk", "disk,overlay=new7", "--disk", "new7"), "new7|given twice", ""},
		{"new overlay, then a missing disk", run("--disk", "disk,overlay=new8", "--disk", "none"), "none", ""},
		{"overlay that is its image", run("--disk", "disk,overlay=disk"), "disk|not an overlay", ""},
		{"disk under a file", run("--disk", "text/x"), "text/x|not a directory", ""},
		{"disk in a loop", run("--disk", "loop"), "loop|symbolic links", ""},
		{"disk behind a dangling link", run("--disk", "dangling,size=1M"),
			"dangling: is a symbolic link to nowhere, which does not exist", ""},
		{"disk behind a dangling link, no size", run("--disk", "dangling"),
			"dangling: is a symbolic link to nowhere", ""},
		{"overlay in a missing directory", run("--disk", "disk,overlay=none/new"),
			"none/new|there is no directory none", ""},
		{"trace in a missing directory", run("--trace", "none/new"), "none/new|there is no directory none", ""},
		{"trace to a FIFO that no program reads", run("--trace", "fifo"), "fifo|no program reads", ""},
		{"crash directory that is missing", run("--crash-dir", "none"), "--crash-dir: none: no such file|check the path", ""},
		{"crash directory that is a file", run("--crash-dir", "text"), "--crash-dir|text|want a directory", ""},
		{"crash directory that is a FIFO", run("--crash-dir", "fifo"), "--crash-dir|fifo|want a directory", ""},
		{"resize of a missing image", []string{"image", "resize", "none", "1M"}, "none|gvm image create", ""},
		{"image in place of a file", []string{"image", "create", "disk", "1M"},
			"disk: file exists; name another file", ""},
		{"disk name too long", run("--disk", long+",size=1M"), "name too long", ""},
		{"disk in a missing directory", run("--disk", "none/new,size=1M"), "none/new|no such file", ""},
		{"disk is a running program", run("--disk", strings.ReplaceAll(self(t), ",", ",,")),
			filepath.Base(self(t)), ""},
		{"disk of no bytes", run("--disk", "empty"), "empty|is empty", ""},
		{"disk of odd size", run("--disk", "odd"), "odd|1000 bytes|512", ""},
		{"disk of odd size for 4096", run("--disk", "odd4096,block_size=4096"), "odd4096|4608 bytes|4096", ""},
		{"qcow2", run("--disk", "disk.qcow2"), "disk.qcow2|qcow2 image|qemu-img convert", ""},
		{"vmdk", run("--disk", "disk.vmdk,readonly"), "disk.vmdk|VMDK image|qemu-img convert", ""},
		{"vhdx", run("--disk", "disk.vhdx"), "disk.vhdx|VHDX image|qemu-img convert", ""},
		{"gzip as disk", run("--disk", "disk.gz"), "disk.gz|gzip -dc", ""},
		{"disk of another gvm", run("--disk", "locked"), "locked|in use by process " + pid, ""},
		{"readonly disk of another gvm", run("--disk", "locked,readonly"), "locked|in use by process " + pid, ""},
		{"same disk twice", run("--disk", "twice", "--disk", "./twice"), "twice|given twice", ""},
		{"same disk twice, readonly once", run("--disk", "twice2,readonly", "--disk", "twice2"),
			"twice2|given twice", ""},
		{"same disk by a hard link", run("--disk", "twice3", "--disk", "hardlink3"), "hardlink3: given twice: twice3", ""},
		{"same disk by a hard link, without locks", run("--disk", "twice4,lock=off", "--disk", "hardlink4,lock=off"),
			"hardlink4: given twice: twice4", ""},
		{"same disk, the first without a lock", run("--disk", "twice5,lock=off", "--disk", "hardlink5"),
			"hardlink5: given twice: twice5", ""},
		{"same disk, the second without a lock", run("--disk", "hardlink6,readonly", "--disk", "twice6,lock=off"),
			"twice6: given twice: hardlink6", ""},
		{"overlay twice, without locks", run("--disk", "disk,overlay=new9,lock=off",
			"--disk", "disk2,overlay=new9,lock=off"), "new9|given twice", ""},
		{"trace as disk", run("--disk", "whole.tr"), "whole.tr: trace of gvm's|gvm trace show whole.tr", ""},
		{"trace as a larger disk", run("--disk", "larger.tr,size=2M"), "larger.tr: trace of gvm's", ""},
		{"cut trace as a larger disk", run("--disk", "cut.tr,size=1M"), "cut.tr: trace of gvm's", ""},
		{"resized trace", []string{"image", "resize", "resized.tr", "1M"}, "resized.tr: trace of gvm's", ""},
		{"overlay in place of a trace", run("--disk", "disk,overlay=overlay.tr"), "overlay.tr|not an overlay", ""},
		{"benchmark of a trace", []string{"bench", "disk", "--disk", "bench.tr"}, "bench.tr: trace of gvm's", ""},
		{"same lun twice", run("--disk", "disk,lun=5", "--disk", "disk2,lun=5"), "disk2|lun=5|disk", ""},
		{"lun past the last", run("--disk", "disk,lun=16384"), "disk|lun=16384|16383", ""},
		{"negative lun", run("--disk", "disk,lun=-1"), "disk|lun=-1", ""},
		{"lun of letters", run("--disk", "disk,lun=a"), "disk|lun=a", ""},
		{"cache", run("--disk", "disk,cache=foo"), "disk|cache=foo|writethrough", ""},
		{"backend", run("--disk", "disk,backend=foo"), "disk|backend=foo|process, vhost or auto", ""},
		{"workers without vhost", run("--disk", "disk,workers=2"), "disk|workers=|backend=vhost", ""},
		{"workers", run("--disk", "disk,backend=vhost,workers=none"), "disk|workers=none|shared", ""},
		{"target without a name", run("--disk", "wwn="), "wwn=|gvm lio list", ""},
		{"target without vhost", run("--disk", "wwn=naa.1"), "wwn=naa.1|backend=vhost", ""},
		{"target with an option of a disk", run("--disk", "wwn=naa.1,backend=vhost,readonly"),
			"wwn=naa.1|readonly|its maker chose the rest", ""},
		{"vhost ABI", run("--vhost-abi", "one"), "--vhost-abi|one|any", ""},
		{"vhost, LUN twice", run("--disk", "disk,backend=vhost,lun=1", "--disk", "disk2,backend=vhost,lun=1"),
			"disk2|lun=1|disk", ""},
		{"block_size", run("--disk", "disk,block_size=1024"), "disk|block_size=1024|4096", ""},
		{"physical_block_size", run("--disk", "disk,physical_block_size=big"), "disk|physical_block_size=big", ""},
		{"physical blocks that are too small", run("--disk", "disk,block_size=4096,physical_block_size=512"),
			"disk|physical_block_size=512|4096", ""},
		{"physical blocks of odd size", run("--disk", "disk,physical_block_size=1536"),
			"disk|physical_block_size=1536|power of 2", ""},
		{"pi", run("--disk", "disk,pi=yes"), "disk|pi=yes|0 or 1", ""},
		{"pi by vhost", run("--disk", "disk,pi=1,backend=vhost"), "disk|pi=1|backend=process", ""},
		{"pi of an overlay", run("--disk", "disk,pi=1,overlay=on"), "disk|pi=1|overlay=", ""},
		{"pi of nothing", run("--disk", "null:1M,pi=1"), "null:1M|pi=1|mem:", ""},
		{"pi of another disk", run("--disk", "otherpi,pi=1"), "otherpi.pi|not the protection information", ""},
		{"error", run("--disk", "disk,error=ignore"), "disk|error=ignore|enospc-stop", ""},
		{"error by vhost", run("--disk", "disk,error=stop,backend=vhost"), "disk|error=|backend=process", ""},
		{"iops", run("--disk", "disk,iops=0"), "disk|iops=0|1000:5000", ""},
		{"iops with an empty burst", run("--disk", "disk,iops=5:"), "disk|iops=5:|1000:5000", ""},
		{"bps", run("--disk", "disk,bps=2T"), "disk|bps=2T|to 1T", ""},
		{"bps by vhost", run("--disk", "disk,bps=1M,backend=auto"), "disk|bps=|backend=process", ""},
		{"size 0", run("--disk", "disk,size=0"), "disk|size=0", ""},
		{"size of letters", run("--disk", "disk,size=big"), "disk|big", ""},
		{"size smaller than the image", run("--disk", "large,size=512K"), "large|1048576 bytes|524288", ""},
		{"size of odd blocks", run("--disk", "new,size=1000"), "new|1000|512", ""},
		{"size past 63 bits", run("--disk", "new,size=8388608T"), "new|8388608T|too large", ""},
		{"size on a readonly disk", run("--disk", "small,readonly,size=1M"), "small|512 bytes|readonly", ""},
		{"size on a qcow2", run("--disk", "same.qcow2,readonly,size=64K"), "same.qcow2|qcow2 image", ""},
		{"long serial", run("--disk", "serial,serial="+long[:65]), "serial|serial|64", ""},
		{"serial in other letters", run("--disk", "serial2,serial=ä"), "serial2|serial|ASCII", ""},
		{"empty serial", run("--disk", "disk,serial="), `disk|"serial="`, ""},
		{"memory disk without a size", run("--disk", "mem:"), "mem:|such as mem:1G|./mem:", ""},
		{"null disk of letters", run("--disk", "null:big"), "null:big|such as null:1G", ""},
		{"memory disk of odd blocks", run("--disk", "mem:1M,block_size=4096", "--disk", "mem:512,block_size=4096"),
			"mem:512|4096", ""},
		{"readonly memory disk", run("--disk", "mem:1M,readonly"), "mem:1M|is for images", ""},
		{"memory disk by vhost", run("--disk", "mem:1M,backend=vhost"), "mem:1M|backend=process", ""},
		{"lock", run("--disk", "disk,lock=maybe"), "disk|lock=maybe|on or off", ""},
		{"lock of memory", run("--disk", "mem:1M,lock=off"), "mem:1M|is for images", ""},
		{"overlay by vhost", run("--disk", "disk,overlay=on,backend=auto"), "disk|backend=process", ""},
		{"overlay and readonly", run("--disk", "disk,readonly,overlay=on"), "disk|overlay=|readonly", ""},
		{"overlay and size", run("--disk", "disk,overlay=on,size=2M"), "disk|overlay=|size=", ""},
		{"overlay that is a disk", run("--disk", "disk,overlay=plain"), "plain|not an overlay of gvm's", ""},
		{"overlay in a missing directory", run("--disk", "disk,overlay=none/new"), "none/new|no such file", ""},
		{"unknown disk option", run("--disk", "disk,colour=red"), `disk|"colour"|gvm help disk`, ""},
		{"disk option without value", run("--disk", "disk,lun"), `disk|"lun"`, ""},
		{"readonly with value", run("--disk", "disk,readonly=yes"), `disk|"readonly=yes"`, ""},
		{"comma at the end", run("--disk", "disk,"), `disk|""`, ""},
		{"one serial for two disks", run("--disk", "serial,serial=S", "--disk", "serial2,serial=S,lun=3"),
			`serial2|serial "S"|LUN 0, serial,|serial=`, ""},
		{"comma in a path, written once", run("--disk", "comma,file"),
			`unknown option "file"; a comma in a path is written twice: --disk comma,,file`, ""},
		{"comma in a path and an option", run("--disk", "comma,file,lun=1"), "--disk comma,,file", ""},
		{"word that is no option", run("--disk", "disk,b.img"), "--disk disk,,b.img", ""},
		{"option given twice", run("--disk", "disk,lun=1,lun=2"), "disk|lun= is given twice", ""},
		{"option without a value given twice", run("--disk", "disk,readonly,readonly"),
			"disk|readonly is given twice", ""},
		{"option of a target given twice", run("--disk", "wwn=naa.1,backend=vhost,workers=1,workers=2"),
			"naa.1|workers= is given twice", ""},
		{"comma in a path", run("--disk", "comma,,file"), "comma,file|1 bytes|512", ""},

		{"unknown action for a fault", run("--oops", "stop"), "--oops stop|fail or ignore", ""},
		{"a list of faults for nothing", run("--allow", "text"), "--allow needs --oops=fail or --strict", ""},
		{"a missing list of faults", run("--strict", "--allow", "none"), "--allow|none: no such file", ""},
		{"a wrong list of faults", run("--strict", "--allow", "wrong.allow"),
			"--allow wrong.allow: line 2|missing closing", ""},
		{"results over a disk", run("--results", "disk"), "--results|disk: has something that gvm did not write", ""},
		{"results twice", run("--results", "both", "--junit", "both"), "--results|both: in use by another gvm", ""},
		{"results nowhere", run("--junit", "nowhere/f"), "--junit|nowhere", ""},

		// A disk that size= made or grew is restored after another error.
		{"new disk, bad serial", run("--disk", "new,size=1M,serial=ä"), "new|serial", ""},
		{"new disk, then a missing one", run("--disk", "new2,size=1M", "--disk", "none"), "none", ""},
		{"new disk, many CPUs", run("--disk", "new3,size=1M", "--cpus", "100000"), "100000 CPUs", ""},
		{"grown disk, many CPUs", run("--disk", "grow,size=2M", "--cpus", "100000"), "100000 CPUs", ""},
		{"new disk given twice", run("--disk", "new5,size=1M", "--disk", "new5"), "new5|given twice", ""},
	})
	if err := holder.Close(); err != nil {
		t.Error(err)
	}
}

// TestBadBoot: gvm has opened /dev/kvm when it finds these.
func TestBadBoot(t *testing.T) {
	dir := badFiles(t)
	if err := os.Truncate(filepath.Join(dir, "large"), 20<<20); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 3000)
	run := func(args ...string) []string { return append([]string{"run"}, args...) }
	wantAllBad(t, dir, []badInput{
		{"long guest-arg", run("--guest-arg", strings.Repeat("write ", 500)), "command line|3006 bytes|2047", ""},
		{"bzimage mode for the embedded guest", run("--boot", "bzimage"), "embedded guest|ELF", ""},
		{"bzImage without payload in mode elf", run("--kernel", "bz", "--boot", "elf"), "bz has no payload", ""},
		{"PVH entry of a bzImage", run("--kernel", "bz", "--boot", "bzimage", "--entry", "pvh"), "bz|PVH", ""},
		{"long cmdline for a bzImage", run("--kernel", "bz", "--boot", "bzimage", "--cmdline", long),
			"command line|2047", ""},
		{"long cmdline for an ELF kernel", run("--kernel", "guest.elf", "--cmdline", long), "command line|2047", ""},
		{"newline in cmdline", run("--kernel", "guest.elf", "--cmdline", "a\nb"), "command line|newline", ""},
		{"initrd larger than memory", run("--kernel", "guest.elf", "--memory", "16M", "--initrd", "large"),
			"large does not fit as initrd", ""},
		{"new disk, long guest-arg", run("--disk", "new4,size=1M", "--guest-arg", strings.Repeat("write ", 500)),
			"command line", ""},
	})
}

// badInput is a command line that gvm refuses.
type badInput struct {
	name string
	args []string
	want string // parts of the message, apart by |
	dir  string
}

// wantAllBad runs gvm in dir for each of the tests, and compares the files there.
func wantAllBad(t *testing.T, dir string, tests []badInput) {
	t.Helper()
	before := contents(t, dir)
	t.Run("each", func(t *testing.T) {
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				t.Parallel()
				c := command(t, tt.args...)
				c.Dir = filepath.Join(dir, tt.dir)
				wantBad(t, gvmRuns(t, c), tt.want)
			})
		}
	})
	if after := contents(t, dir); after != before {
		t.Errorf("files changed from\n%sto\n%s", before, after)
	}
}

// TestFileSystemLimit asks for a disk larger than the file system can store.
func TestFileSystemLimit(t *testing.T) {
	c := command(t, "run", "--disk", "new,size=4194304T")
	probe := filepath.Join(c.Dir, "probe")
	if err := os.WriteFile(probe, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if os.Truncate(probe, 1<<62) == nil {
		t.Skip("the file system of the temporary directory takes files of 4 EiB")
	}
	wantBad(t, gvmRuns(t, c), "new|file too large; give a smaller size")
	if _, err := os.Lstat(filepath.Join(c.Dir, "new")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the disk was left: %v", err)
	}
}

// TestHugepages asks for more huge pages than the host has.
func TestHugepages(t *testing.T) {
	free := 0
	if b, err := os.ReadFile("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"); err == nil {
		if free, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			t.Fatal(err)
		}
	}
	r := gvmRuns(t, command(t, "run", "--hugepages", "--memory", strconv.Itoa(2*free+64)))
	wantBad(t, r, "--memory|the host's pool has|sysctl vm.nr_hugepages=")
}

// TestOvercommit gives a guest more memory than the host has, which the kernel refuses with
// vm.overcommit_memory=2.
func TestOvercommit(t *testing.T) {
	mode, err := os.ReadFile("/proc/sys/vm/overcommit_memory")
	if err != nil {
		t.Fatal(err)
	}
	r := gvmRuns(t, command(t, "run", "--overcommit", "--memory", strconv.FormatUint(hostMemory()>>20+1024, 10)))
	if string(mode) == "2\n" {
		wantBad(t, r, "--memory|vm.overcommit_memory is 2")
		return
	}
	if r.status != 0 || !strings.Contains(r.out, "\nPASS\r\n") || !strings.HasPrefix(r.errs, "gvm: --overcommit: ") {
		t.Errorf("status %d: %s%s", r.status, r.out, r.errs)
	}
}

// wantBad checks the end of a gvm with bad input: status 2, and one line with every part of want.
func wantBad(t *testing.T, r result, want string) {
	t.Helper()
	if r.status != exitUsage {
		t.Errorf("status %d, want %d", r.status, exitUsage)
	}
	if r.out != "" {
		t.Errorf("standard output %q", r.out)
	}
	if !strings.HasPrefix(r.errs, "gvm: ") || strings.Index(r.errs, "\n") != len(r.errs)-1 ||
		strings.Contains(r.errs, "%!") {
		t.Errorf("want one line that begins with gvm, not %q", r.errs)
	}
	for part := range strings.SplitSeq(want, "|") {
		if !strings.Contains(r.errs, part) {
			t.Errorf("%q lacks %q", r.errs, part)
		}
	}
}

// TestUnreadable gives gvm files that it may not read. Permissions apply to root too without the
// capabilities to override them (capabilities(7)).
func TestUnreadable(t *testing.T) {
	dir := badFiles(t)
	unreadable := func(args ...string) result {
		c := command(t, args...)
		c.Dir = dir
		if os.Getuid() == 0 {
			setpriv, err := exec.LookPath("setpriv") // of util-linux, which every Debian has
			if err != nil {
				t.Fatal(err)
			}
			c.Args = append([]string{"setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search",
				"--", c.Path}, c.Args[1:]...)
			c.Path = setpriv
		}
		return gvmRuns(t, c)
	}
	for _, args := range [][]string{{"--kernel", "secret"}, {"--disk", "secret"}, {"--disk", "secret,readonly"}} {
		wantBad(t, unreadable(append([]string{"run"}, args...)...), "secret|permi")
	}
	closed := filepath.Join(dir, "tree/closed")
	if err := errors.Join(os.MkdirAll(closed, 0), os.WriteFile(dir+"/kernel", embedded.Image, 0o644)); err != nil {
		t.Fatal(err)
	}
	r := unreadable("test", "--kernel", "kernel", "--file", "tree", "--", "/bin/true")
	if want := "gvm: " + closed + ": permission denied; change its permissions or those of its directory, or name " +
		"another\n"; r.status != exitUntested || !strings.HasSuffix(r.errs, want) {
		t.Errorf("--file: status %d: %s, want %s", r.status, r.errs, want)
	}
}

// TestReadOnlyFileSystem gives gvm disks on a read-only file system.
func TestReadOnlyFileSystem(t *testing.T) {
	img := image(t, "disk", 1, 1<<20)
	inReadOnly := func(disk string) result {
		c := command(t, "run", "--disk", disk)
		c.Dir = filepath.Dir(img)
		c.Env = append(c.Env, readOnlyEnv+"="+c.Dir)
		c.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
		if os.Getuid() != 0 {
			c.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
			c.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
			c.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
			c.SysProcAttr.AmbientCaps = []uintptr{21} // CAP_SYS_ADMIN
		}
		r := gvmRuns(t, c)
		if r.status == 99 {
			t.Fatal(r.out)
		}
		return r
	}
	wantBad(t, inReadOnly("disk"), "disk|readonly may work|read-only file system")
	wantBad(t, inReadOnly("new,size=1M"), "new|read-only file system")
	if r := inReadOnly("disk,readonly"); r.status != 0 || !strings.Contains(r.out, "PASS") {
		t.Errorf("readonly: status %d\n%s%s", r.status, r.out, r.errs)
	}
}
