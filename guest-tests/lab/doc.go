// Package lab is a machine with a real /dev/kvm, /dev/vhost-scsi and LIO, made by software
// emulation. Tests that need such a machine run in it if this one does not qualify. This
// documentation is for authors of guest tests; README.md shows the command.
//
// # The machines
//
// L0 is this machine. It needs no virtualization hardware, no privileges, and Debian's apt. L1 is a
// stock Debian kernel on QEMU's emulated AMD processor, which has SVM: kvm_amd loads in it and
// provides a real /dev/kvm. L2 is the guest that the command under test boots with it.
//
// L1's root is L0's root, read-only, by 9p: programs of L0 run without being copied, and a path
// means the same on both sides. /tmp, /run, /dev, /proc and /sys are L1's own; directories in
// Command.Writable can be written to. The agent that mounts all this, starts the command and moves
// its output is not a program of its own: a Run puts the executable that calls it into L1's
// initramfs as /init, where the hook in agent.go takes over. Output, exit status and a sign of life
// every two seconds go over one virtio-serial port, apart from the kernel's console.
//
// An L1 that gives no sign of life for 40 s is wedged. That happens because of faults of the
// emulation. It is ErrWedged, is tried once more, and is neither a pass nor a skip.
//
// # A package of guest tests
//
//	func TestMain(m *testing.M) {
//		os.Exit(lab.Main(m, lab.Options{Direct: canRunLinux, Build: []string{"gvm/cmd/gvm"}}))
//	}
//
//	func TestBoot(t *testing.T) {
//		l, err := lab.Setup(t.Context(), lab.Log(t)) // in L1: finds the files of L0
//		…
//		initrd := filepath.Join(t.TempDir(), "initrd")
//		err = lab.Initramfs{
//			Kernel:  l.Cloud,
//			Modules: []string{"virtio_pci", "virtio_scsi", "sd_mod", "ext4"},
//			Init:    "sha256sum /dev/sda",
//		}.Build(initrd)
//		…
//		cmd := exec.Command(lab.Program("gvm"), "run", "--kernel", l.Cloud.BZImage,
//			"--initrd", initrd, "--disk", disk)
//	}
//
// # The cache
//
// Setup keeps everything in gvm-lab in the user's cache directory, or in GVM_LAB_CACHE: one
// directory per version of a kernel package, links to them by the requested names, and files whose
// names contain a hash of their inputs. Any of it may be deleted while no lab runs; a kernel
// without its link is looked up again.
package lab
