package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Lab is the result of Setup: stock kernels, and everything needed to boot L1. It holds no
// resources; any number of Runs may be active at a time.
type Lab struct {
	// Cache is the directory that holds everything below.
	Cache string
	// Debian is the kernel of linux-image-amd64, and Cloud that of linux-image-cloud-amd64. Kernel
	// returns others.
	Debian, Cloud *Kernel
	// Tree is a small Debian system as a directory: for its programs and
	// libraries, with Tree as Initramfs.Root. RootImage is the same as an ext4
	// image whose /sbin/init runs the shell script /init.sh if there is one,
	// else a shell on the console.
	Tree, RootImage string

	kernels []*Kernel // a kernel for each of stocks
	qemu    string    // the program that runs L1
}

// Kernel is one stock Debian kernel.
type Kernel struct {
	Package string // the requested name, such as linux-image-amd64
	Release string // the output of uname -r in it
	BZImage string // path of the compressed image
	VMLinux string // path of the ELF file from BZImage
	Modules string // path of its modules: the directory of modules.dep
}

// CacheEnv names the environment variable for the directory of the lab's files, instead of gvm-lab
// in the user's cache directory.
const CacheEnv = "GVM_LAB_CACHE"

// InLabEnv is set to 1 for commands that run in a lab.
const InLabEnv = "GVM_IN_LAB"

func cacheDir() (string, error) {
	if d := os.Getenv(CacheEnv); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory, set %s: %w", CacheEnv, err)
	}
	return filepath.Join(d, "gvm-lab"), nil
}

// Setup prepares the lab, or finds it prepared. It writes a line to progress for each step that
// takes time. It fetches everything with Debian's own clients into the cache directory, one
// finished piece at a time: after being killed it continues where it was, and two at once wait for
// each other. In a lab it only finds the files that the host has prepared.
func Setup(ctx context.Context, progress io.Writer) (*Lab, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	if l, err := open(cache); err == nil || os.Getenv(InLabEnv) == "1" {
		return l, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, filepath.Join(cache, "lock"), progress)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s := setup{ctx: ctx, cache: cache, progress: progress}
	if err := s.all(); err != nil {
		return nil, fmt.Errorf("set up the lab in %s: %w", cache, err)
	}
	return open(cache)
}

// lock takes an exclusive lock that ends at the latest with this process.
func lock(ctx context.Context, name string, progress io.Writer) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		fmt.Fprintf(progress, "lab: another process prepares the lab; waiting for it\n")
		got := make(chan error, 1)
		go func() { got <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
		select {
		case err = <-got:
		case <-ctx.Done():
			go func() { <-got; f.Close() }()
			return nil, ctx.Err()
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}

// open finds a prepared lab. The cache has a directory for each package version, and a link for
// each kernel. A link is made last, when its target is complete.
func open(cache string) (*Lab, error) {
	var ks []*Kernel
	for _, s := range stocks {
		k, err := openKernel(cache, s)
		if err != nil {
			return nil, fmt.Errorf("the lab in %s is not set up: %w", cache, err)
		}
		ks = append(ks, k)
	}
	root := filepath.Join(cache, "root-"+rootVersion())
	l := &Lab{
		Cache: cache, Debian: ks[0], Cloud: ks[1], kernels: ks,
		Tree: filepath.Join(root, "tree"), RootImage: filepath.Join(root, "root.ext4"),
		qemu: qemuPath(cache),
	}
	for _, f := range []string{l.RootImage, l.qemu} {
		if _, err := os.Stat(f); err != nil {
			return nil, fmt.Errorf("the lab in %s is not set up: %w", cache, err)
		}
	}
	return l, nil
}

// one returns the single path that matches a pattern.
func one(pattern string) (string, error) {
	m, err := filepath.Glob(pattern)
	if err != nil {
		return "", err
	}
	if len(m) != 1 {
		return "", fmt.Errorf("%d files match %s, want 1", len(m), pattern)
	}
	return m[0], nil
}

// l1Modules are loaded by every L1: first those for the connection to its host, then those for gvm,
// those for tests of the kernel's SCSI target, and KVM, which waits: see calibratedTSC.
var l1Modules = []string{"virtio_pci", "virtio_console", "9pnet_virtio", "9p", "vhost_scsi", "vhost_net",
	"target_core_file", "target_core_iblock", "loop", "kvm_amd"}

// hash shortens a description to a part of a file name.
func hash(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:6])
}
