package lio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Kinds of failure, for errors.Is. Each error is one line that names the object and the mend.
// ErrUnit is about the caller's request; the others are about the host.
var (
	ErrNoConfigfs  = errors.New("configfs is not mounted")
	ErrNoCore      = errors.New("target_core_mod is not there")
	ErrNoFabric    = errors.New("vhost_scsi is not there")
	ErrNoBackstore = errors.New("backstore is not there")
	ErrPermission  = errors.New("no permission")
	ErrBusy        = errors.New("in use")            // a target, an image, or the lock
	ErrNoTarget    = errors.New("no such target")    // Lookup
	ErrNoNexus     = errors.New("no nexus")          // Lookup
	ErrNoLUN       = errors.New("no LUN")            // Lookup, Remove
	ErrUnit        = errors.New("unsuitable option") // LIO cannot serve such a Unit
)

// failure is one line for the user that is also a kind, and perhaps a system
// error.
type failure struct {
	kind  error
	text  string
	cause error
}

func (e *failure) Unwrap() []error { return []error{e.kind, e.cause} }

func (e *failure) Error() string {
	if e.cause != nil {
		return e.text + ": " + e.cause.Error()
	}
	return e.text
}

func fail(kind, cause error, format string, a ...any) error {
	return &failure{kind, fmt.Sprintf(format, a...), bare(cause)}
}

// bare is the system error inside err: the path is in the text already.
func bare(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

const needsRoot = "the kernel's SCSI target needs root: run gvm as root, or use backend=process"

// explain makes err of an operation on the object at path a line with the mend, if err is about the
// host.
func explain(err error, path string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrPermission):
		return fail(ErrPermission, err, "%s: %s", path, needsRoot)
	case errors.Is(err, unix.EBUSY):
		return fail(ErrBusy, err, "%s: still in use by a process that serves a guest, or linked elsewhere", path)
	}
	return fmt.Errorf("%s: %w", path, bare(err))
}

// noRoot explains why the target directory cannot be listed.
func noRoot(root string, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return explain(err, root)
	}
	const configfsMagic = 0x62656570
	mount := filepath.Dir(root)
	var st unix.Statfs_t
	if unix.Statfs(mount, &st) == nil && st.Type == configfsMagic {
		return fail(ErrNoCore, nil, "%s is not there: modprobe target_core_mod (CONFIG_TARGET_CORE)", root)
	}
	if _, err := os.Stat(mount); err != nil {
		return fail(ErrNoConfigfs, nil,
			"%s is not there: modprobe configfs (CONFIG_CONFIGFS_FS); mount -t configfs configfs %[1]s", mount)
	}
	return fail(ErrNoConfigfs, nil, "configfs is not mounted: mount -t configfs configfs %s", mount)
}

// backstores are the kinds of storage under a disk that this package uses.
var backstores = map[string]struct{ module, config string }{
	fileio: {"target_core_file", "CONFIG_TCM_FILEIO"},
	iblock: {"target_core_iblock", "CONFIG_TCM_IBLOCK"},
}

const (
	fileio = "fileio" // regular files
	iblock = "iblock" // block devices
)

func noBackstore(plugin string, err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return explain(err, "core")
	}
	b := backstores[plugin]
	return fail(ErrNoBackstore, unlessInvalid(err), "no backstore %s: modprobe %s (%s)", plugin, b.module, b.config)
}

func noFabric(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return explain(err, fabric)
	}
	return fail(ErrNoFabric, unlessInvalid(err),
		"no vhost in the kernel's SCSI target: modprobe vhost_scsi (CONFIG_VHOST_SCSI)")
}

// unlessInvalid drops EINVAL, which configfs returns if a name has no module.
func unlessInvalid(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}
