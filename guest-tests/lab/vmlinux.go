package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"gvm/guestmem"
	"gvm/vmm/boot"
)

// unpackKernel writes the ELF kernel inside a bzImage to the file elf. Booting it instead of the
// bzImage halves the start of L1, which would otherwise unpack itself under emulation.
func unpackKernel(bzImage, elf string) error {
	f, err := boot.OpenFile(context.Background(), bzImage)
	if err != nil {
		return err
	}
	defer f.Close()
	k, err := boot.ExtractELF(f)
	if err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	return os.WriteFile(elf, k, 0o644)
}

// KernelCache is a directory of the lab's kernels as gvm decompresses them (boot.Config.Cache),
// which Main fills before L1 starts: an emulated processor takes ten seconds for one.
func (l *Lab) KernelCache() string { return filepath.Join(l.Cache, "gvm", "kernels") }

func (l *Lab) fillKernelCache(ctx context.Context) error {
	for _, k := range l.kernels {
		if err := decompress(ctx, k.BZImage, l.KernelCache()); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
	}
	return nil
}

// openKernelCache lets every user read the cache, which package boot keeps for its owner.
func (l *Lab) openKernelCache() error {
	dir := l.KernelCache()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	err = errors.Join(err, os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o755))
	for _, f := range files {
		if e := os.Chmod(f, 0o644); !errors.Is(e, os.ErrNotExist) { // removed meanwhile
			err = errors.Join(err, e)
		}
	}
	return err
}

// decompress loads a kernel, so that the cache has it.
func decompress(ctx context.Context, bzImage, cache string) error {
	mem, err := guestmem.Map(guestmem.Config{Size: 256 << 20})
	if err != nil {
		return err
	}
	k, err := boot.Open(ctx, bzImage)
	if err != nil {
		return errors.Join(err, mem.Close())
	}
	_, err = boot.Load(mem, boot.Config{Kernel: k, Mode: boot.ELF, Cache: cache})
	return errors.Join(err, k.Close(), mem.Close())
}
