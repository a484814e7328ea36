// Package lab is a machine with a real /dev/kvm, /dev/vhost-scsi and LIO, made
// of software emulation: tests that need such a machine run in it where this
// one cannot do. Package documentation is for those who write guest tests;
// README.md shows the command.
//
// # The machines
//
// L0 is this machine. It needs no virtualization hardware, no privileges, and
// Debian's apt. L1 is a stock Debian kernel on QEMU's emulated AMD processor,
// which has SVM: kvm_amd loads in it and gives a true /dev/kvm. L2 is what the
// command under test boots with that.
//
// L1's root is L0's root, read-only, by 9p: programs of L0 run without being
// copied, and a path means the same on both sides. /tmp, /run, /dev, /proc and
// /sys are L1's own; directories in Command.Writable can be written to. The
// agent that mounts all this, starts the command and moves its output is not a
// program of its own: a Run puts the executable that calls it into L1's
// initramfs as /init, where the hook in agent.go takes over. Everything that
// comes back (output, exit status, a sign of life every two seconds) goes over
// one virtio-serial port, apart from the kernel's console.
//
// An L1 that gives no sign of life for 40 s is wedged. That happens, for reasons
// that lie in the emulation; it is ErrWedged, is tried once more, and is neither
// a pass nor a skip.
//
// # A package of guest tests
//
//	func TestMain(m *testing.M) {
//		os.Exit(lab.Main(m, lab.Options{Direct: canRunLinux, Build: []string{"gvm/cmd/gvm"}}))
//	}
//
//	func TestBoot(t *testing.T) {
//		l, err := lab.Setup(t.Context(), lab.Log(t)) // in L1: finds what L0 has prepared
//		…
//		initrd := filepath.Join(t.TempDir(), "initrd")
//		err = lab.Initramfs{
//			Kernel:  l.Cloud,
//			Modules: []string{"virtio_pci", "virtio_scsi", "sd_mod", "ext4"},
//			Init:    "sha256sum /dev/sda",
//		}.Build(initrd)
//		…
//		cmd := exec.Command(lab.Program("gvm"), "run", "--kernel", l.Cloud.BZImage, "--initrd", initrd, "--disk", disk)
//	}
//
// # The cache
//
// Setup keeps everything in gvm-lab in the user's cache directory, or where
// GVM_LAB_CACHE says: one directory per version of a kernel package, links to
// them by the names they were asked for, and files whose names contain a hash
// of what they were made from. Any of it may be deleted at any time that no lab
// runs; a kernel is looked for anew when its link is gone.
package lab
