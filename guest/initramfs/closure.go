package initramfs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"gvm/vmm/boot"
)

// Host is the file system in which Closure finds programs and libraries. Its zero value is that of
// gvm itself.
type Host struct {
	Root        string // the directory that is / for programs; "" is /
	Path        string // PATH, for the program that a script runs by env(1); "": DefaultPath
	LibraryPath string // LD_LIBRARY_PATH
}

// DefaultPath is the PATH of a Host that has none.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Closure returns a program with the files that it needs to start: the symbolic links and
// directories on the way to each, its dynamic linker and shared libraries, and if it is a script
// its interpreters. name is an absolute path below Root. Files keep their names, permissions and
// owners.
//
// Libraries are found as by ld.so(8) of glibc or by that of musl: DT_RPATH, LD_LIBRARY_PATH,
// DT_RUNPATH, /etc/ld.so.cache, and the default directories. Not found are the libraries that a
// program opens by dlopen(3), except those that glibc itself opens, and any other file that it
// reads: the modules of Python, the data of a database, the programs that a script runs. A file
// that is no program for x86 and no script is returned alone: the guest's kernel tells whether it
// runs.
//
// Errors are *boot.ImageError, or the cause of ctx. One names all libraries that are missing. The
// entries' files are open, and belong to the caller or to the Builder that they are added to.
func (h Host) Closure(ctx context.Context, name string) (entries []Entry, err error) {
	c := &closure{Host: h, ctx: ctx, seen: map[string]*boot.File{}}
	defer func() {
		if err != nil {
			for _, e := range c.entries {
				if e.Content != nil {
					e.Content.Close()
				}
			}
		}
	}()
	if err := c.program(name, 0); err != nil {
		return nil, err
	}
	if c.missing != nil {
		return nil, &boot.ImageError{Name: c.host(name),
			What: "needs libraries that are not found: " + strings.Join(c.missing, ", "),
			Mend: "install them, or set LD_LIBRARY_PATH"}
	}
	return c.entries, nil
}

// closure is the state of one Closure.
type closure struct {
	Host
	ctx     context.Context
	entries []Entry
	seen    map[string]*boot.File // the contents of entries, by their names
	missing []string
	cache   []byte // ld.so.cache; nil: not read yet
}

// host returns the path of a file on the host.
func (c *closure) host(name string) string { return filepath.Join("/", c.Root, name) }

// resolve returns the name of the file that name leads to below Root, without symbolic links. It
// calls visit with each directory and link on the way.
func (c *closure) resolve(name string, visit func(at string, st fs.FileInfo, target string)) (string, error) {
	return follow(name, func(at string) (target string, err error) {
		st, err := os.Lstat(c.host(at))
		if err != nil {
			return "", err
		}
		isLink := st.Mode().Type() == fs.ModeSymlink
		if isLink {
			target, err = os.Readlink(c.host(at))
		}
		if err == nil && (isLink || st.IsDir()) {
			visit(at, st, target)
		}
		return target, err
	})
}

// add adds the file that name leads to, and the links and directories on the way. It returns the
// file's name without links, and its content, which is nil if it is empty.
func (c *closure) add(name string) (real string, content *boot.File, err error) {
	real, err = c.resolve(name, func(at string, st fs.FileInfo, target string) {
		if _, ok := c.seen[at]; !ok {
			e := hostEntry(at, st)
			e.Target = target
			c.seen[at] = nil
			c.entries = append(c.entries, e)
		}
	})
	if err != nil {
		return "", nil, c.fault(name, err)
	}
	if content, ok := c.seen[real]; ok && content != nil {
		return real, content, nil
	}
	e, err := hostFile(c.ctx, real, c.host(real))
	if err != nil {
		return "", nil, err
	}
	c.seen[real] = e.Content
	c.entries = append(c.entries, e)
	return real, e.Content, nil
}

func (c *closure) fault(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &boot.ImageError{Name: c.host(name), What: "does not exist", Mend: "check the path, or install it"}
	}
	return &boot.ImageError{Name: c.host(name), What: fmt.Sprintf("cannot be read (%v)", cause(err)),
		Mend: "check the path"}
}

// maxScripts is the number of interpreters that Linux follows (exec_binprm in fs/exec.c).
const maxScripts = 5

// program adds a program that a script runs, or that the user named if depth is 0.
func (c *closure) program(name string, depth int) error {
	real, content, err := c.add(name)
	if err != nil {
		return err
	}
	if content == nil {
		return nil
	}
	head := make([]byte, min(content.Size, 256)) // BINPRM_BUF_SIZE
	if err := content.ReadFull(head, 0); err != nil {
		return err
	}
	if line, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		words := strings.Fields(string(line))
		if len(words) == 0 || depth == maxScripts {
			return nil
		}
		if err := c.program(words[0], depth+1); err != nil {
			return err
		}
		if word := envProgram(words); word != "" {
			found := c.lookPath(word)
			if found == "" {
				return &boot.ImageError{Name: c.host(name), What: fmt.Sprintf("is a script for %s, which is not in PATH", word),
					Mend: "install it"}
			}
			return c.program(found, depth+1)
		}
		return nil
	}
	o := readObject(content)
	if c.ctx.Err() != nil {
		return fmt.Errorf("%w while %s was read", context.Cause(c.ctx), c.host(name))
	}
	if o == nil || o.interpreter == "" { // no program, or a static one
		return nil
	}
	o.name, o.origin = real, path.Dir(real)
	if _, _, err := c.add(o.interpreter); err != nil {
		return err
	}
	return c.libraries(o)
}

// envProgram returns the program in the first line of a script that env(1) runs, or "".
func envProgram(words []string) string {
	if path.Base(words[0]) != "env" {
		return ""
	}
	for _, word := range words[1:] {
		if !strings.HasPrefix(word, "-") && !strings.Contains(word, "=") {
			return word
		}
	}
	return ""
}

// lookPath finds a program in PATH, or returns "".
func (c *closure) lookPath(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for dir := range strings.SplitSeq(cmp.Or(c.Path, DefaultPath), ":") {
		file := path.Join("/", dir, name)
		if real, err := c.resolve(file, func(string, fs.FileInfo, string) {}); err == nil {
			st, err := os.Stat(c.host(real))
			if err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
				return file
			}
		}
	}
	return ""
}
