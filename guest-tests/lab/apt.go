package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// run runs a program of this machine in dir, and returns its standard output.
func run(dir string, args ...string) ([]byte, error) {
	return runCtx(context.Background(), dir, args...)
}

func runCtx(ctx context.Context, dir string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.Output()
	if err == nil {
		return out, nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", args[0], context.Cause(ctx))
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if last := lastLine(exit.Stderr); last != "" {
			return nil, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, last)
		}
	}
	return nil, fmt.Errorf("%s: %w", strings.Join(args, " "), err)
}

func lastLine(b []byte) string {
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(lines[len(lines)-1])
}

// hostTool finds a program of this machine, even outside the user's PATH.
func hostTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, d := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if p, err := exec.LookPath(filepath.Join(d, name)); err == nil {
			return p, nil
		}
	}
	if p, ok := hostPackages[name]; ok {
		return "", fmt.Errorf("no program %s on this machine; install %s", name, p)
	}
	return "", fmt.Errorf("no program %s on this machine", name)
}

// hostPackages are the Debian packages of the programs that the lab runs here.
var hostPackages = map[string]string{
	qemuName:  "qemu-system-x86",
	"busybox": "busybox-static",
	"mke2fs":  "e2fsprogs",
	"depmod":  "kmod",
}

// hostTools installs the missing hostPackages, if it may.
func (s *setup) hostTools() error {
	for _, p := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := hostTool(p); err != nil {
			return fmt.Errorf("the lab needs a Debian system: %w", err)
		}
	}
	var missing []string
	for tool, pkg := range hostPackages {
		if _, err := hostTool(tool); err != nil {
			missing = append(missing, pkg)
		}
	}
	return s.install(missing)
}

// need installs those of the packages that this machine lacks, if it may.
func (s *setup) need(packages []string) error {
	dpkg, err := runCtx(s.ctx, "", "dpkg-query", "-W", "-f", "${Package} ${Status}\n")
	if err != nil {
		return err
	}
	var missing []string
	for _, p := range packages {
		if !strings.Contains("\n"+string(dpkg), "\n"+p+" install ok installed\n") {
			missing = append(missing, p)
		}
	}
	return s.install(missing)
}

// install installs packages on this machine, if it may.
func (s *setup) install(missing []string) error {
	if len(missing) == 0 {
		return nil
	}
	slices.Sort(missing)
	install := append([]string{"apt-get", "install", "-y", "--no-install-recommends"}, missing...)
	by := "sudo " + strings.Join(install, " ")
	var sudo []string
	if os.Geteuid() != 0 {
		if _, err := run("", "sudo", "-n", "true"); err != nil {
			return fmt.Errorf("programs are missing; install them with: %s", by)
		}
		sudo = []string{"sudo", "-n"}
	}
	s.say("installing %s", strings.Join(missing, " "))
	if _, err := runCtx(s.ctx, "", append(sudo, install...)...); err == nil {
		return nil
	}
	if _, err := runCtx(s.ctx, "", append(sudo, "apt-get", "update")...); err != nil {
		return err
	}
	if _, err := runCtx(s.ctx, "", append(sudo, install...)...); err != nil {
		return fmt.Errorf("%w; try: %s", err, by)
	}
	return nil
}

// A client runs apt with the system's package lists, or, if those lack a package, with its own
// lists in the cache: that takes no privileges, and changes nothing outside the cache.
type client struct{ options []string }

// aptDirs returns the options that make apt keep its lists and archives in dir.
func aptDirs(dir string) []string {
	return []string{
		"-o", "Dir::State::lists=" + filepath.Join(dir, "lists"),
		"-o", "Dir::Cache=" + dir,
		"-o", "Debug::NoLocking=1",
		"-o", "APT::Sandbox::User=",
	}
}

func makeAptDirs(dir string) error {
	for _, d := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// ownLists fetches package lists into the cache.
func (s *setup) ownLists() error {
	dir := filepath.Join(s.cache, "apt")
	if err := makeAptDirs(dir); err != nil {
		return err
	}
	s.apt.options = aptDirs(dir)
	s.say("fetching package lists")
	_, err := runCtx(s.ctx, "", slices.Concat([]string{"apt-get"}, s.apt.options, []string{"update", "-q"})...)
	return err
}

// withLists calls f, and once more with fresh package lists if it fails: the system may have no
// lists, or obsolete ones.
func (s *setup) withLists(f func() error) error {
	err := f()
	if err == nil || s.ctx.Err() != nil || len(s.apt.options) > 0 {
		return err
	}
	if updateErr := s.ownLists(); updateErr != nil {
		return errors.Join(err, updateErr)
	}
	return f()
}

// resolve returns the package of the kernel itself for a name such as linux-image-amd64: the
// package that the metapackage depends on, or else the newest package whose version begins like the
// name.
func (s *setup) resolve(apt client, name string) (string, error) {
	out, err := runCtx(s.ctx, "", slices.Concat([]string{"apt-cache"}, apt.options,
		[]string{"depends", "--important", name})...)
	if err == nil {
		if p := imageDependency(string(out)); p != "" {
			return p, nil
		}
	}
	prefix := strings.TrimSuffix(name, "-amd64")
	out, err = runCtx(s.ctx, "", slices.Concat([]string{"apt-cache"}, apt.options, []string{"pkgnames", prefix})...)
	if err != nil {
		return "", err
	}
	if p := newest(prefix, strings.Fields(string(out))); p != "" {
		return p, nil
	}
	return "", fmt.Errorf("no package is, or begins as, %s", name)
}

var dependency = regexp.MustCompile(`(?m)^ *\|?(?:Pre)?Depends: (linux-image-[0-9]\S*)$`)

// imageDependency finds the kernel in the output of apt-cache depends.
func imageDependency(out string) string {
	if m := dependency.FindStringSubmatch(out); m != nil {
		return m[1]
	}
	return ""
}

var imageName = regexp.MustCompile(`^linux-image-([0-9]+(?:\.[0-9]+)*)(?:-([0-9]+))?(?:\+[a-z0-9.]+)?-amd64$`)

// newest returns the signed kernel for PCs with the highest version among the packages whose names
// begin with prefix and a dot.
func newest(prefix string, names []string) string {
	version := func(name string) []int {
		m := imageName.FindStringSubmatch(name)
		if m == nil {
			return nil
		}
		var v []int
		for _, n := range strings.Split(m[1]+"."+cmp.Or(m[2], "0"), ".") {
			i, err := strconv.Atoi(n)
			if err != nil {
				return nil
			}
			v = append(v, i)
		}
		return v
	}
	best := ""
	for _, n := range names {
		if v := version(n); v != nil && strings.HasPrefix(n, prefix+".") && slices.Compare(v, version(best)) > 0 {
			best = n
		}
	}
	return best
}

var part = regexp.MustCompile(`(?m)^ *Depends: (linux-(?:base|binary|modules)-[0-9]\S*)$`)

// parts returns the other packages with files of an image: since Linux 7.0, Debian has the kernel,
// its modules and its configuration in separate packages.
func (s *setup) parts(apt client, image string) (names []string, err error) {
	out, err := runCtx(s.ctx, "", slices.Concat([]string{"apt-cache"}, apt.options,
		[]string{"depends", "--important", image})...)
	if err != nil {
		return nil, err
	}
	for _, m := range part.FindAllStringSubmatch(string(out), -1) {
		names = append(names, m[1])
	}
	return names, nil
}

// download fetches the .deb of a package into dir and returns its path.
func (s *setup) download(apt client, pkg, dir string) (string, error) {
	download := slices.Concat([]string{"apt-get"}, apt.options, []string{"-q", "download", pkg})
	if _, err := runCtx(s.ctx, dir, download...); err != nil {
		return "", err
	}
	return one(filepath.Join(dir, pkg+"_*.deb"))
}
