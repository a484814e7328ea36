package initramfs

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"gvm/guest/kernel"
	"gvm/vmm/boot"
)

// Module is a module of a kernel.
type Module struct {
	Name string // the kernel's spelling, as lsmod prints it
	Path string // in the directory of the modules
	Data []byte // the ELF file, decompressed, with its signature if it has one
}

// moduleDir is the directory of modules in an initramfs.
const moduleDir = "/gvm/modules"

// AddModules adds modules and returns their names, in the same order.
func (b *Builder) AddModules(modules []Module) (names []string) {
	for _, m := range modules {
		name := path.Join(moduleDir, m.Name+".ko")
		b.File(name, 0o644, m.Data)
		names = append(names, name)
	}
	return names
}

// Missing is a module that a kernel does not have.
type Missing struct {
	Name   string
	Option string // of the kernel's configuration, such as CONFIG_VIRTIO_FS; "": unknown
	Value  string // of Option: "m", "n"; "": unknown
}

// MissingError reports modules that a kernel has neither as modules nor built in.
type MissingError struct {
	Kernel  *kernel.Kernel
	Modules []Missing
}

func (e *MissingError) Error() string {
	name, mend := e.Kernel.Image.Name, "build them, or give another kernel"
	var all []string
	for _, m := range e.Modules {
		s := m.Name
		if m.Option != "" {
			s += " (" + m.Option
			if m.Value != "" {
				s += "=" + m.Value
			}
			s += ")"
		}
		all = append(all, s)
	}
	if e.Kernel.Modules.Path == "" {
		name += ", whose modules are not found,"
		mend = "give its tree or its package, or the release of an installed kernel"
	}
	return fmt.Sprintf("%s has neither built in nor as modules %s: %s", name, strings.Join(all, ", "), mend)
}

// Modules reads the named modules of a kernel, and those that they depend on, in the order in which
// a guest loads them. A name is that of a module, with - or _, or an alias such as
// "virtio:d00000008v00001AF4". Those built into the kernel are left out. If the kernel lacks some,
// the error is a *MissingError, and the others are returned with it. Modules of soft dependencies
// are returned if there are any. Other errors are *boot.ImageError, or the cause of ctx.
//
// A package is read to its end, which takes seconds for a large one, unless k.Cache has its
// modules.
func Modules(ctx context.Context, k *kernel.Kernel, names ...string) ([]Module, error) {
	path, err := cachePath(ctx, k, names)
	if err != nil {
		return nil, err
	}
	var modules []Module
	var missing []string
	cached := false
	if path != "" {
		modules, missing, cached = load(boot.Cached(path))
	}
	if !cached {
		if modules, missing, err = readModules(ctx, k, names); err != nil {
			return nil, err
		}
		if path != "" {
			store(path, modules, missing)
		}
	}
	lacks := &MissingError{Kernel: k}
	for _, name := range missing {
		if option, value := optionOf(k.Config, name); value != "y" {
			lacks.Modules = append(lacks.Modules, Missing{name, option, value})
		}
	}
	if lacks.Modules != nil {
		return modules, lacks
	}
	return modules, nil
}

// readModules reads modules. Names of missing are neither modules nor in modules.builtin.
func readModules(ctx context.Context, k *kernel.Kernel, names []string) (_ []Module, missing []string, err error) {
	t, err := openTree(ctx, k, names)
	if err != nil {
		return nil, nil, err
	}
	defer t.close()
	r := &resolver{tree: t, state: map[string]int{}}
	for _, name := range names {
		found, builtIn := []string(nil), false
		for now := spelling(name); now != "" && found == nil && !builtIn; now = kernel.ModuleBefore(now) {
			if found, err = t.find(now, true); err != nil {
				return nil, nil, err
			}
			builtIn = t.builtIn(now)
		}
		if found == nil && !builtIn {
			missing = append(missing, name)
		}
		for _, name := range found {
			if err := r.load(name, nil); err != nil {
				return nil, nil, err
			}
		}
	}
	modules, err := t.read(r.order)
	return modules, missing, err
}

// optionOf returns the option that makes a module, and its value; "" if unknown.
func optionOf(c kernel.Config, name string) (option, value string) {
	name = spelling(name)
	for _, o := range kernel.Options {
		if o.Module == "" || spelling(o.Module) != name {
			continue
		}
		if c.Text != nil {
			value = c.Has(o)
		}
		return "CONFIG_" + o.Symbol, value
	}
	for _, symbol := range []string{strings.ToUpper(name), strings.ToUpper(name) + "_FS"} {
		if value := c.Value(symbol); value != "" {
			return "CONFIG_" + symbol, value
		}
	}
	return "", ""
}

// resolver finds the order in which modules are loaded.
type resolver struct {
	*tree
	order []string       // names, each once
	state map[string]int // loading or loaded
}

const (
	loading = iota + 1
	loaded
)

// maxModules bounds the modules that a list of names leads to.
const maxModules = 1000

// load appends a module after those it depends on. by are the modules that lead to it.
func (r *resolver) load(name string, by []string) error {
	switch r.state[name] {
	case loaded:
		return nil
	case loading:
		at := slices.Index(by, name)
		return r.fault(r.paths[name], fmt.Errorf("it depends on itself: %s", strings.Join(append(by[at:], name), ", ")),
			"build the modules again")
	}
	if !r.there(name) {
		if r.builtIn(name) {
			return nil
		}
		need := by[len(by)-1]
		return r.fault(r.paths[need], fmt.Errorf("it depends on %s, which is neither there nor built in", name),
			"install all modules of the kernel")
	}
	if len(r.state) >= maxModules {
		return r.fault(r.paths[name], fmt.Errorf("it and the modules needed before are more than %d", maxModules),
			"name fewer modules")
	}
	info, err := r.info(name)
	if err != nil {
		return err
	}
	r.state[name] = loading
	by = append(slices.Clone(by), name)
	if err := r.soft(info.pre, by); err != nil {
		return err
	}
	for _, other := range info.depends {
		if err := r.load(other, by); err != nil {
			return err
		}
	}
	r.state[name] = loaded
	r.order = append(r.order, name)
	return r.soft(info.post, by)
}

// soft loads the modules of soft dependencies, as far as they and their dependencies are there, and
// do not need a module that is being loaded.
func (r *resolver) soft(names, by []string) error {
	for _, name := range names {
		found, err := r.find(name, false)
		if err != nil {
			return err
		}
		for _, name := range found {
			ok, err := r.loadable(name)
			if err != nil {
				return err
			}
			if ok {
				if err := r.load(name, by); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// loadable reports whether a module and all that it depends on are there and not being loaded. So a
// loop of dependencies that load finds has no soft ones.
func (r *resolver) loadable(name string) (bool, error) {
	seen := map[string]bool{}
	for todo := []string{name}; len(todo) > 0; todo = todo[1:] {
		at := todo[0]
		if seen[at] || r.state[at] == loaded {
			continue
		}
		seen[at] = true
		if !r.there(at) {
			if r.builtIn(at) {
				continue
			}
			return false, nil
		}
		if r.state[at] == loading || len(r.state)+len(seen) >= maxModules {
			return false, nil
		}
		info, err := r.info(at)
		if err != nil {
			return false, err
		}
		todo = append(todo, info.depends...)
	}
	return true, nil
}

// fault reports a module or a list of modules.
func (t *tree) fault(file string, err error, mend string) error {
	if t.ctx.Err() != nil {
		return fmt.Errorf("%w while the modules of %s were read", context.Cause(t.ctx), t.from)
	}
	return &boot.ImageError{Name: path.Join(t.from, file), What: fmt.Sprintf("cannot be used (%v)", err), Mend: mend}
}
