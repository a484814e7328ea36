package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// qemuMajor and qemuMinor are the oldest version of QEMU for the lab. In older ones a processor
// that exits its guest changes its set of pending interrupts without a lock, and loses one that
// comes at the same moment: L1 sleeps for ever, or a guest of it does. That happened every few
// minutes, and always to a guest with a busy console on an L1 of one processor.
const qemuMajor, qemuMinor = 10, 2

const qemuName = "qemu-system-x86_64"

// qemuSuites are the releases of Debian that have such a QEMU and its dependencies, for a system
// whose own is older.
var qemuSuites = []string{"trixie", "trixie-backports"}

// qemuWrapper runs a QEMU that is unpacked with all of its libraries.
const qemuWrapper = `#!/bin/sh
root=$(dirname "$0")/..
exec "$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" \
	"$root/usr/bin/` + qemuName + `" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
`

// qemuPath returns the path of a lab's QEMU: in the cache, or through a link there to the system's.
func qemuPath(cache string) string { return filepath.Join(cache, "qemu", "bin", qemuName) }

// qemu makes the link to a QEMU: the system's, if it is new enough, else one unpacked into the
// cache.
func (s *setup) qemu() error {
	system, err := hostTool(qemuName)
	if err != nil {
		return err
	}
	if system, err = filepath.EvalSymlinks(system); err != nil {
		return err
	}
	has, err := qemuVersion(s.ctx, system)
	if err != nil {
		return err
	}
	if err := newEnough(has); err != nil {
		dir, err := s.newerQEMU()
		if err == nil {
			return s.link("qemu", dir)
		}
		if s.ctx.Err() != nil {
			return err
		}
		s.say("QEMU %d.%d can wedge the lab, and no newer one is to be had: %v; to try again, remove %s",
			has[0], has[1], err, filepath.Join(s.cache, "qemu"))
	}
	return s.link("qemu", filepath.Dir(filepath.Dir(system)))
}

func newEnough(v [2]int) error {
	if slices.Compare(v[:], []int{qemuMajor, qemuMinor}) < 0 {
		return fmt.Errorf("QEMU %d.%d is older than %d.%d", v[0], v[1], qemuMajor, qemuMinor)
	}
	return nil
}

// link makes a link in the cache, and replaces an existing one.
func (s *setup) link(name, target string) error {
	link := filepath.Join(s.cache, name)
	if err := os.Remove(link); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.Symlink(target, link)
}

var versionLine = regexp.MustCompile(`QEMU emulator version (\d+)\.(\d+)`)

// qemuVersion returns the version of a QEMU, major and minor.
func qemuVersion(ctx context.Context, path string) (v [2]int, err error) {
	out, err := runCtx(ctx, "", path, "--version")
	if err != nil {
		return v, err
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return v, fmt.Errorf("%s --version prints %q", path, lastLine(out))
	}
	for i := range v {
		if v[i], err = strconv.Atoi(string(m[1+i])); err != nil {
			return v, err
		}
	}
	return v, nil
}

// QEMU is a program to compare with.
type QEMU struct {
	Path         string
	Major, Minor int // of its version
}

// QEMUs returns this machine's QEMU and, if that is of another version, the one that runs L1.
func (l *Lab) QEMUs(ctx context.Context) (all []QEMU, err error) {
	system, err := hostTool(qemuName)
	if err != nil {
		return nil, err
	}
	for _, path := range []string{system, l.qemu} {
		v, err := qemuVersion(ctx, path)
		if err != nil {
			return nil, err
		}
		if len(all) == 0 || v != [2]int{all[0].Major, all[0].Minor} {
			all = append(all, QEMU{path, v[0], v[1]})
		}
	}
	return all, nil
}

// newerQEMU unpacks the QEMU of qemuSuites and its dependencies into the cache, and returns the
// directory's name there.
func (s *setup) newerQEMU() (string, error) {
	tmp, err := os.MkdirTemp(s.cache, "qemu.tmp")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	newest := qemuSuites[len(qemuSuites)-1]
	s.say("fetching QEMU from %s", newest)
	options, err := s.suites(filepath.Join(tmp, "lists"), qemuSuites)
	if err != nil {
		return "", err
	}
	debs, err := s.closure(tmp, append(options, "-t", newest), "qemu-system-x86")
	if err != nil {
		return "", err
	}
	root := filepath.Join(tmp, "root")
	name := ""
	for _, deb := range debs {
		if _, err := runCtx(s.ctx, "", "dpkg-deb", "-x", deb, root); err != nil {
			return "", err
		}
		if base := filepath.Base(deb); strings.HasPrefix(base, "qemu-system-x86_") {
			name = strings.TrimSuffix(base, ".deb")
		}
	}
	program := filepath.Join(root, "bin", qemuName)
	if err := errors.Join(os.MkdirAll(filepath.Dir(program), 0o755),
		os.WriteFile(program, []byte(qemuWrapper), 0o755)); err != nil {
		return "", err
	}
	has, err := qemuVersion(s.ctx, program)
	if err == nil {
		err = newEnough(has)
	}
	if err != nil {
		return "", err
	}
	dir := filepath.Join(s.cache, name)
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	return name, os.Rename(root, dir)
}

var codename = regexp.MustCompile(`(?m)^VERSION_CODENAME="?([a-z]+)"?$`)

// release returns the name of this machine's release of Debian, and the mirror that it uses.
func (s *setup) release() (name, mirror string, err error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", "", err
	}
	m := codename.FindSubmatch(release)
	if m == nil {
		return "", "", errors.New("/etc/os-release names no release of Debian")
	}
	name = string(m[1])
	out, err := runCtx(s.ctx, "", "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages",
		"Component: main", "Release: "+name)
	if err != nil {
		return "", "", err
	}
	mirror, _, _ = strings.Cut(string(out), "\n")
	if mirror == "" {
		return "", "", fmt.Errorf("apt has no source for %s", name)
	}
	return name, mirror, nil
}

// suites fetches the package lists of releases of Debian into dir, from the mirror that
// this machine uses, and returns apt's options for them.
func (s *setup) suites(dir string, releases []string) ([]string, error) {
	_, mirror, err := s.release()
	if err != nil {
		return nil, err
	}
	if err := makeAptDirs(dir); err != nil {
		return nil, err
	}
	list := filepath.Join(dir, "sources.list")
	var text strings.Builder
	for _, suite := range releases {
		fmt.Fprintf(&text, "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", mirror, suite)
	}
	if err := os.WriteFile(list, []byte(text.String()), 0o644); err != nil {
		return nil, err
	}
	options := append(aptDirs(dir), "-o", "Dir::Etc::sourcelist="+list, "-o", "Dir::Etc::sourceparts=-")
	_, err = runCtx(s.ctx, "", slices.Concat([]string{"apt-get"}, options, []string{"update", "-q"})...)
	return options, err
}
