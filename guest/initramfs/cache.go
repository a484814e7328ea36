package initramfs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/cespare/xxhash/v2"

	"gvm/guest/kernel"
	"gvm/text"
	"gvm/vmm/boot"
)

// index is the first line of a file of the cache, in JSON. The contents of the modules follow.
type index struct {
	Modules []indexed
	Missing []text.Name
}

type indexed struct {
	Name, Path text.Name
	Size       int
}

// cachePath returns the path of the file of the cache for modules of a package; "" if there is
// none. It changes with the package, the names and their order, and the format.
func cachePath(ctx context.Context, k *kernel.Kernel, names []string) (string, error) {
	if k.Cache == "" || k.Modules.Kind != kernel.Packed || k.Modules.Path == "" {
		return "", nil
	}
	f, err := boot.OpenFile(ctx, k.Modules.Path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	hash := xxhash.Sum64String(strings.Join(append([]string{"1"}, names...), "\x00"))
	return boot.CachePath(k.Cache, f, fmt.Sprintf("-%016x%s", hash, boot.ModulesSuffix))
}

// store puts modules, and the names of those that are missing, into the cache.
func store(path string, modules []Module, missing []string) {
	var x index
	for _, m := range modules {
		x.Modules = append(x.Modules, indexed{text.Name(m.Name), text.Name(m.Path), len(m.Data)})
	}
	for _, name := range missing {
		x.Missing = append(x.Missing, text.Name(name))
	}
	b, err := json.Marshal(x)
	if err != nil {
		return // the cache is no matter for an error
	}
	b = append(b, '\n')
	for _, m := range modules {
		b = append(b, m.Data...)
	}
	boot.Store(path, b)
}

// load reads a file of the cache.
func load(b []byte) (modules []Module, missing []string, ok bool) {
	line, data, _ := bytes.Cut(b, []byte("\n"))
	var x index
	if json.Unmarshal(line, &x) != nil {
		return nil, nil, false
	}
	for _, m := range x.Modules {
		if m.Size < 0 || m.Size > len(data) {
			return nil, nil, false
		}
		modules = append(modules, Module{string(m.Name), string(m.Path), data[:m.Size]})
		data = data[m.Size:]
	}
	for _, name := range x.Missing {
		missing = append(missing, string(name))
	}
	return modules, missing, len(data) == 0
}
