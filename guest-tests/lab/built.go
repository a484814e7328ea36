package lab

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// builtConfig names all options of the kernel "built", kunitConfig those that "kunit" has besides.
var (
	//go:embed built.config
	builtConfig string
	//go:embed kunit.config
	kunitConfig string
)

// builds are the kernels that BuildKernels makes, by their configurations.
var builds = []string{builtConfig, builtConfig + kunitConfig}

// built returns the row of a configuration's kernel. Another configuration is another kernel.
func built(config string) stock {
	return stock{name: "built", packages: []string{"linux-built-" + hash(config)}}
}

// buildTools are Debian's packages for building a kernel.
var buildTools = []string{"bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "make", "xz-utils"}

// Built returns the small kernel made by BuildKernels. Its drivers are built in, and its VMLinux
// has symbols.
func (l *Lab) Built() (*Kernel, error) { return l.built(builtConfig) }

// KUnit returns the kernel made by BuildKernels that has KUnit's tests besides.
func (l *Lab) KUnit() (*Kernel, error) { return l.built(builtConfig + kunitConfig) }

func (l *Lab) built(config string) (*Kernel, error) {
	k, err := openKernel(l.Cache, built(config))
	if err != nil {
		return nil, fmt.Errorf("the lab lacks a built kernel; ./dev kernel builds it: %w", err)
	}
	return k, nil
}

// BuildKernels builds small kernels from Debian's linux-source, with features for tests that
// Debian's own kernels lack: see built.config and kunit.config. It takes minutes, and a gigabyte
// meanwhile. It does nothing if the kernels exist.
func (l *Lab) BuildKernels(ctx context.Context, progress io.Writer) error {
	unlock, err := lock(ctx, filepath.Join(l.Cache, "lock"), progress)
	if err != nil {
		return err
	}
	defer unlock()
	missing := slices.Clone(builds)
	missing = slices.DeleteFunc(missing, func(config string) bool {
		_, err := l.built(config)
		return err == nil
	})
	if len(missing) == 0 {
		return nil
	}
	s := setup{ctx: ctx, cache: l.Cache, progress: progress}
	if err := s.build(missing); err != nil {
		return fmt.Errorf("build kernels in %s: %w", l.Cache, err)
	}
	return nil
}

// build builds kernels in one tree, in which a second one takes less time.
func (s *setup) build(configs []string) error {
	if err := s.need(buildTools); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(s.cache, "built.tmp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := s.withLists(func() error { return s.source(tmp) }); err != nil {
		return err
	}
	archive, err := one(filepath.Join(tmp, "deb/usr/src/linux-source-*.tar.xz"))
	if err != nil {
		return err
	}
	s.say("unpacking %s", filepath.Base(archive))
	tree := filepath.Join(tmp, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	if _, err := runCtx(s.ctx, "", "tar", "-x", "-C", tree, "--strip-components=1", "-f", archive); err != nil {
		return err
	}
	for _, config := range configs {
		if err := s.buildIn(tree, config); err != nil {
			return err
		}
	}
	return nil
}

// buildIn builds the kernel of a configuration in an unpacked tree.
func (s *setup) buildIn(tree, config string) error {
	tmp, err := os.MkdirTemp(s.cache, "built.tmp")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	file := filepath.Join(tmp, "config")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return err
	}
	if _, err := runCtx(s.ctx, tree, "make", "KCONFIG_ALLCONFIG="+file, "allnoconfig"); err != nil {
		return err
	}
	made, err := os.ReadFile(filepath.Join(tree, ".config"))
	if err != nil {
		return err
	}
	if lost := lostOptions(config, string(made)); len(lost) > 0 {
		return fmt.Errorf("this kernel does not take %s", strings.Join(lost, ", "))
	}
	s.say("building the kernel")
	jobs := "-j" + strconv.Itoa(runtime.NumCPU())
	if _, err := runCtx(s.ctx, tree, "make", jobs, "bzImage", "modules.builtin"); err != nil {
		return err
	}
	release, err := os.ReadFile(filepath.Join(tree, "include/config/kernel.release"))
	if err != nil {
		return err
	}
	return s.keepBuilt(tree, filepath.Join(tmp, "kernel"), strings.TrimSpace(string(release)), built(config))
}

var sourcePackage = regexp.MustCompile(`(?m)^ *Depends: (linux-source-[0-9.]+)$`)

// source unpacks the package behind the metapackage linux-source.
func (s *setup) source(dir string) error {
	out, err := runCtx(s.ctx, "", slices.Concat([]string{"apt-cache"}, s.apt.options,
		[]string{"depends", "--important", "linux-source"})...)
	if err != nil {
		return err
	}
	m := sourcePackage.FindSubmatch(out)
	if m == nil {
		return errors.New("apt has no linux-source")
	}
	s.say("fetching %s", m[1])
	deb, err := s.download(s.apt, string(m[1]), dir)
	if err != nil {
		return err
	}
	_, err = runCtx(s.ctx, "", "dpkg-deb", "-x", deb, filepath.Join(dir, "deb"))
	return err
}

// lostOptions returns the lines of a configuration that are missing from the one made from it.
func lostOptions(want, made string) (lost []string) {
	for line := range strings.Lines(want) {
		if strings.HasPrefix(line, "CONFIG_") && !strings.Contains("\n"+made, "\n"+line) {
			lost = append(lost, strings.TrimSpace(line))
		}
	}
	return lost
}

// keepBuilt moves the parts of a built kernel that tests use to the cache, laid out like a stock
// kernel's packages.
func (s *setup) keepBuilt(tree, dir, release string, k stock) error {
	modules := filepath.Join(dir, "lib", "modules", release)
	err := errors.Join(os.MkdirAll(modules, 0o755), os.Mkdir(filepath.Join(dir, "boot"), 0o755))
	for _, f := range []string{"dep", "softdep", "alias"} { // there are no modules
		err = errors.Join(err, os.WriteFile(filepath.Join(modules, "modules."+f), nil, 0o644))
	}
	for to, from := range map[string]string{
		filepath.Join(modules, "modules.builtin"):      "modules.builtin",
		filepath.Join(dir, "vmlinux"):                  "vmlinux",
		filepath.Join(dir, "boot", "vmlinuz-"+release): "arch/x86/boot/bzImage",
	} {
		err = errors.Join(err, os.Rename(filepath.Join(tree, from), to))
	}
	if err != nil {
		return err
	}
	// The link's name, and so this one, identifies the configuration.
	final := filepath.Join(s.cache, k.link())
	return errors.Join(os.RemoveAll(final), os.Rename(dir, final))
}
