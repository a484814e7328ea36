// Package packaging_test builds gvm's Debian package and checks its files.
package packaging_test

import (
	"bytes"
	"compress/gzip"
	"debug/buildinfo"
	"debug/elf"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gvm/machine/disk"
)

// output runs a program at the top of the repository.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	return outputIn(t, "..", nil, name, args...)
}

// outputIn runs a program in a directory.
func outputIn(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	c := exec.Command(name, args...)
	c.Dir = dir
	c.Env = append(os.Environ(), env...)
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(c.Args, " "), err, out, &errs)
	}
	return string(out)
}

// files returns the modes of the files below a directory.
func files(t *testing.T, dir string) map[string]fs.FileMode {
	t.Helper()
	modes := map[string]fs.FileMode{}
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		modes[name] = fi.Mode()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return modes
}

// manPage returns the source of an installed man page.
func manPage(t *testing.T, prefix, name string) string {
	t.Helper()
	f, err := os.Open(filepath.Join(prefix, "share/man/man1", name+".1.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	page, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

// names returns the names of commands in a page of help.
func names(help string) (all []string) {
	_, list, _ := strings.Cut(help, "\nCOMMANDS:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	for _, m := range regexp.MustCompile(`(?m)^   ([a-z-]+)`).FindAllStringSubmatch(list, -1) {
		all = append(all, m[1])
	}
	return all
}

// sources calls source for each Go file of the module but tests. It reads the directories, so that
// go test's cache depends on them.
func sources(t *testing.T, source func(path string)) {
	t.Helper()
	if err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != ".." && (d.Name()[0] == '.' || d.Name() == "bin"):
			return fs.SkipDir
		case strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go"):
			source(path)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// copyTree copies the files of the module, without those of version control and of builds.
func copyTree(t *testing.T, to string) {
	t.Helper()
	if err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		dest := filepath.Join(to, strings.TrimPrefix(path, ".."))
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != ".." && (d.Name()[0] == '.' || d.Name() == "bin" || d.Name() == "bench"):
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(dest, 0o777)
		case !d.Type().IsRegular():
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		return os.WriteFile(dest, text, fi.Mode())
	}); err != nil {
		t.Fatal(err)
	}
}

// deb builds the Debian package from a tree, with more words for make, and returns its path.
func deb(t *testing.T, dir, bin, umask string, env []string, words ...string) string {
	t.Helper()
	outputIn(t, dir, env, "sh", append([]string{"-c", `umask "$1"; shift; exec make deb "$@"`, "sh", umask, "BIN=" + bin,
		"SOURCE_DATE_EPOCH=1700000000", "MAINTAINER=gvm <gvm@example.org>",
		"DEBFLAGS=-Znone"}, words...)...) // xz would take most of the time
	found, err := filepath.Glob(filepath.Join(bin, "gvm_*_amd64.deb"))
	if err != nil || len(found) != 1 {
		t.Fatalf("packages %q: %v", found, err)
	}
	return found[0]
}

// TestSameBytes builds the Debian package twice, the second time from a copy of the tree without
// version control, with another time zone and umask: the bytes are the same. It compiles gvm and
// the library with the flags of a release, which no other test of every day does.
func TestSameBytes(t *testing.T) {
	sources(t, func(string) {})
	work := t.TempDir()
	another := filepath.Join(work, "another/directory")
	copyTree(t, another)
	one, err := os.ReadFile(deb(t, "..", filepath.Join(work, "one"), "022", []string{"GOFLAGS=-buildvcs=auto", "TZ=UTC"}))
	if err != nil {
		t.Fatal(err)
	}
	two, err := os.ReadFile(deb(t, another, filepath.Join(another, "bin"), "077", []string{"TZ=Asia/Kolkata"}))
	if err != nil || !bytes.Equal(one, two) {
		t.Errorf("the second package differs from the first: %v", err)
	}
}

// plain takes the place of the Makefile's flags for releases: packages compile as in the other
// tests.
const plain = "BUILDFLAGS=-buildvcs=false -ldflags=-s"

// TestPackage builds the Debian package and unpacks it: gvm runs, each command and each option of a
// disk is in a man page, and shells load the completion. The list of contents and
// docs/dependencies.md have the modules of the programs. Then install, with a PREFIX and a DESTDIR,
// copies the same files, and uninstall removes no others.
func TestPackage(t *testing.T) {
	environment := map[string]bool{}
	sources(t, func(path string) {
		if strings.HasPrefix(path, "../guest-tests/") || strings.HasPrefix(path, "../packaging/") ||
			path == "../cmd/gvm/man.go" {
			return
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`os\.(?:Getenv|LookupEnv)\("([A-Z_]+)"\)`).FindAllSubmatch(text, -1) {
			environment[string(m[1])] = true
		}
	})

	work := t.TempDir()
	one := deb(t, "..", filepath.Join(work, "one"), "022", nil, plain)
	root := filepath.Join(work, "root")
	output(t, "dpkg-deb", "--extract", one, root)
	usr := filepath.Join(root, "usr")
	gvm := filepath.Join(usr, "bin/gvm")
	version := strings.TrimSpace(strings.TrimPrefix(output(t, gvm, "--version"), "gvm version"))
	field := func(name string) string {
		return strings.TrimSpace(output(t, "dpkg-deb", "--field", one, name))
	}
	if field := field("Version"); version == "" || field != strings.Replace(version, "-", "~", 1) {
		t.Errorf("the package has version %q, gvm %q", field, version)
	}
	if field := field("Depends"); field != "" {
		t.Errorf("static programs depend on %q", field)
	}
	for name, mode := range files(t, usr) {
		want := fs.FileMode(0o644)
		if filepath.Dir(name) == "bin" {
			want = 0o755
		}
		if mode != want {
			t.Errorf("%s has mode %v, want %v", name, mode, want)
		}
	}

	programs := map[string]*buildinfo.BuildInfo{}
	for _, name := range []string{"gvm", "gvm-agent", "gvm-plot", "gvm-net"} {
		path := filepath.Join(usr, "bin", name)
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		programs[name] = info
		program, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(program.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
			t.Errorf("%s is not static", name)
		}
		program.Close()
	}
	t.Run("contents", func(t *testing.T) { testContents(t, filepath.Join(usr, "bin"), programs) })
	t.Run("dependencies", func(t *testing.T) { testDependencies(t, programs) })

	t.Run("man", func(t *testing.T) {
		top := manPage(t, usr, "gvm")
		commands := names(output(t, gvm, "help"))
		for _, name := range commands {
			page := manPage(t, usr, "gvm-"+name)
			if !strings.Contains(top, strings.ReplaceAll("gvm-"+name, "-", `\-`)+`\fR(1)`) {
				t.Errorf("gvm(1) does not name gvm-%s(1)", name)
			}
			help := output(t, gvm, "help", name)
			pages := []string{help}
			for _, sub := range names(help) {
				if !strings.Contains(page, `.SS "\fBgvm `+name+" "+sub+`\fR`) {
					t.Errorf("gvm-%s(1) lacks %s", name, sub)
				}
				pages = append(pages, output(t, gvm, "help", name, sub))
			}
			flags := regexp.MustCompile(`(?m)^   --([a-z-]+)`)
			for _, m := range flags.FindAllStringSubmatch(strings.Join(pages, ""), -1) {
				flag := "\n" + `\fB\-\-` + strings.ReplaceAll(m[1], "-", `\-`) + `\fR`
				if m[1] != "help" && !strings.Contains(page, flag) {
					t.Errorf("gvm-%s(1) lacks --%s", name, m[1])
				}
			}
		}
		if len(commands) < 15 {
			t.Errorf("gvm help has the commands %q", commands)
		}
		manPage(t, usr, "gvm-agent")
		manPage(t, usr, "gvm-plot")
		manPage(t, usr, "gvm-net")
		options := manPage(t, usr, "gvm-disk")
		for _, o := range disk.Options() {
			if !strings.Contains(options, "\n"+`\fB`+strings.ReplaceAll(o.Word(), "-", `\-`)+`\fR`+"\n") {
				t.Errorf("gvm-disk(1) lacks %s", o.Word())
			}
		}
		for name := range environment {
			if !strings.Contains(top, "\n"+`\fB`+name+`\fR`+"\n") {
				t.Errorf("gvm(1) lacks the environment variable %s", name)
			}
		}
		if len(environment) < 2 {
			t.Errorf("the sources read the environment variables %q", slices.Sorted(maps.Keys(environment)))
		}
	})

	t.Run("lint", func(t *testing.T) {
		mandoc, err := exec.LookPath("mandoc")
		if err != nil {
			t.Skipf("the man pages are not checked: %v", err)
		}
		pages, err := filepath.Glob(filepath.Join(work, "one/man/*.1"))
		if err != nil || len(pages) == 0 {
			t.Fatalf("man pages %q: %v", pages, err)
		}
		output(t, mandoc, append([]string{"-T", "lint", "-W", "style"}, pages...)...)
	})

	// Each shell loads the file by its place and name, and completes "gvm ru".
	for _, tt := range []struct{ shell, script string }{
		{"bash", `source "$1/share/bash-completion/completions/gvm"
			COMP_WORDS=(gvm ru) COMP_CWORD=1; _gvm; echo "${COMPREPLY[@]}"`},
		{"zsh", `fpath=("$1/share/zsh/vendor-completions"); autoload -Uz _gvm
			compdef() { }; _describe() { print -l ${(P)2} }
			words=(gvm ru) CURRENT=2; _gvm`},
		{"fish", `set -p fish_complete_path $argv[1]/share/fish/vendor_completions.d; complete -C "gvm ru"`},
	} {
		t.Run(tt.shell, func(t *testing.T) {
			shell, err := exec.LookPath(tt.shell)
			if err != nil {
				t.Skipf("its completion is not tried: %v", err)
			}
			args := []string{"-c", tt.script, "shell", usr}
			if tt.shell == "fish" {
				args = []string{"-c", tt.script, usr}
			}
			c := exec.Command(shell, args...)
			c.Env = append(os.Environ(), "PATH="+filepath.Dir(gvm)+":"+os.Getenv("PATH"), "HOME="+t.TempDir())
			out, err := c.CombinedOutput()
			if err != nil || !slices.Contains(strings.Fields(string(out)), "run") {
				t.Errorf("%v: completes %q", err, out)
			}
		})
	}

	t.Run("install", func(t *testing.T) {
		dest := filepath.Join(work, "dest")
		prefix := filepath.Join(dest, "opt/gvm")
		top, err := filepath.Abs("..")
		if err != nil {
			t.Fatal(err)
		}
		relative, err := filepath.Rel(top, dest)
		if err != nil {
			t.Fatal(err)
		}
		words := []string{"BIN=" + filepath.Join(work, "one"), "PREFIX=/opt/gvm", "DESTDIR=" + relative, plain}
		foreign := filepath.Join(prefix, "share/man/man1/gvm-foreign.1.gz")
		if err := os.MkdirAll(filepath.Dir(foreign), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(foreign, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		output(t, "make", append([]string{"install"}, words...)...)
		want := map[string]fs.FileMode{"share/man/man1/gvm-foreign.1.gz": 0o644}
		for name, mode := range files(t, usr) {
			want[strings.Replace(name, "vendor-completions", "site-functions", 1)] = mode
		}
		if got := files(t, prefix); !maps.Equal(got, want) {
			t.Errorf("installed are %v\nwant %v", got, want)
		}
		if got := output(t, filepath.Join(prefix, "bin/gvm"), "--version"); !strings.Contains(got, version) {
			t.Errorf("gvm --version: %q", got)
		}
		output(t, "make", append([]string{"uninstall"}, words...)...)
		if got := files(t, dest); len(got) != 1 {
			t.Errorf("left are %v", slices.Sorted(maps.Keys(got)))
		}
		if _, err := os.Stat(filepath.Join(prefix, "share/doc/gvm")); !os.IsNotExist(err) {
			t.Errorf("the directory of the documents is left: %v", err)
		}
	})
}
