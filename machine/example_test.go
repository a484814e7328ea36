package machine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"

	"gvm/guest/embedded"
	"gvm/guestmem"
	"gvm/machine"
	"gvm/machine/disk"
	"gvm/vmm/boot"
)

// The embedded guest tests the virtual hardware from the inside and powers itself off.
func ExampleStart() {
	var console bytes.Buffer
	m, err := machine.Start(context.Background(), machine.Spec{
		Memory:  guestmem.Config{Size: 512 << 20},
		Console: machine.Output(&console),
	})
	if err != nil {
		log.Fatal(err)
	}
	outcome, err := m.Wait()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(outcome.Ending, strings.Contains(console.String(), "PASS"))
	// Output: powered off true
}

// An ELF kernel boots with a disk that Start creates.
func ExampleStart_kernel() {
	dir, err := os.MkdirTemp("", "machine")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "vmlinux")
	if err := os.WriteFile(path, embedded.Image, 0o600); err != nil {
		log.Fatal(err)
	}
	kernel, err := boot.Open(context.Background(), path)
	if err != nil {
		log.Fatal(err)
	}
	defer kernel.Close()
	root, err := disk.Parse(filepath.Join(dir, "disk.img") + ",size=1G,cache=writethrough")
	if err != nil {
		log.Fatal(err)
	}
	var console bytes.Buffer
	m, err := machine.Start(context.Background(), machine.Spec{
		Memory:      guestmem.Config{Size: 512 << 20},
		Kernel:      kernel,
		CmdLine:     "write",
		BareCmdLine: true,
		Disks:       []disk.Spec{root},
		Console:     machine.Output(&console),
	})
	if err != nil {
		log.Fatal(err)
	}
	outcome, err := m.Wait()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(outcome.Ending, strings.Contains(console.String(), "write cache off"))
	// Output: powered off true
}

// A running machine gets a disk, and is stopped.
func ExampleMachine_AddDisk() {
	screen := newScreen() // a console
	m, err := machine.Start(context.Background(), machine.Spec{
		Memory:    guestmem.Config{Size: 512 << 20},
		GuestArgs: []string{"spin"},
		Console:   screen,
	})
	if err != nil {
		log.Fatal(err)
	}
	screen.shows("spinning", 1)
	scratch, err := disk.Parse("mem:64M,serial=SCRATCH")
	if err != nil {
		log.Fatal(err)
	}
	change, err := m.AddDisk(context.Background(), scratch)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("added LUN", change.Disk.LUN, change.Disk.Serial)
	m.Stop(errors.New("no more work"), 0)
	outcome, err := m.Wait()
	fmt.Println(outcome.Ending, outcome.Err, err)
	// Output:
	// added LUN 1 SCRATCH
	// stopped no more work <nil>
}
