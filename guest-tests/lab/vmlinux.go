package lab

import (
	"context"
	"fmt"
	"os"

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
