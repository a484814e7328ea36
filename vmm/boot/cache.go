package boot

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"gvm/kvmapi/nowait"
)

// The cache holds decompressed kernels, and modules from packages: files named by the hash and size
// of their source, each followed by a footer. The footer's checksum detects damaged files. Both
// hashes are XXH64, because a boot waits for them and they are no protection: a user who can write
// to the cache can boot any kernel. No failure of the cache is an error: the kernel is then
// decompressed.
const (
	cacheLimit  = 512 << 20 // bytes of kernels to keep, the latest used ones
	cacheSuffix = ".vmlinux"
	// ModulesSuffix ends the names of files that package initramfs keeps in the cache.
	ModulesSuffix = ".modules"
	cacheTemp     = ".tmp"
	footerSize    = 8 + 8 + 8
	footerMagic   = "gvmELF02"
)

// CacheDir returns the directory of a user's decompressed kernels, $XDG_CACHE_HOME/gvm/kernels, or
// "" if the user has no cache directory.
func CacheDir() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "gvm", "kernels")
}

// CachePath returns the path in the cache directory of a file that is made from another. Its name
// ends in suffix.
func CachePath(dir string, from *File, suffix string) (string, error) {
	h := xxhash.New()
	buf := make([]byte, 256<<10)
	for off := int64(0); off < from.Size; off += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), from.Size-off)]
		if err := from.ReadFull(buf, off); err != nil {
			return "", err
		}
		_, _ = h.Write(buf)
	}
	return filepath.Join(dir, fmt.Sprintf("%016x-%x%s", h.Sum64(), from.Size, suffix)), nil
}

// footer is the end of a cache file: magic, size of the ELF file, XXH64 of it.
func footer(image []byte) []byte {
	b := binary.LittleEndian.AppendUint64([]byte(footerMagic), uint64(len(image)))
	return binary.LittleEndian.AppendUint64(b, xxhash.Sum64(image))
}

// cached maps a kernel in the cache, or returns nil. The caller unmaps it with Munmap.
func cached(path string) (image, mapping []byte) {
	f, err := nowait.Open(path, os.O_RDONLY, 0, nowait.Regular)
	if err != nil {
		return nil, nil
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() <= footerSize || st.Size() > maxVmlinux+footerSize {
		return nil, nil
	}
	mapping, err = unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		return nil, nil
	}
	image = mapping[:len(mapping)-footerSize]
	if string(mapping[len(image):]) != string(footer(image)) {
		_ = unix.Munmap(mapping)
		return nil, nil
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // prune keeps the latest used ones
	return image, mapping
}

// Cached returns the contents of a file that Store put into the cache, or nil.
func Cached(path string) []byte {
	data, mapping := cached(path)
	if data == nil {
		return nil
	}
	defer unix.Munmap(mapping)
	return bytes.Clone(data)
}

// Store puts a file into the cache, whole or not at all.
func Store(path string, image []byte) {
	dir := filepath.Dir(path)
	if os.MkdirAll(dir, 0o700) != nil {
		return
	}
	f, err := nowait.CreateTemp(dir, "", cacheTemp)
	if err != nil {
		return
	}
	_, err = f.Write(image)
	if err == nil {
		_, err = f.Write(footer(image))
	}
	err = cmp.Or(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return
	}
	prune(dir, cacheLimit)
}

// prune removes the least recently used kernels until the rest take at most limit bytes, and the
// leftovers of interrupted stores.
func prune(dir string, limit int64) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	var kernels []fs.FileInfo
	for _, e := range entries {
		st, err := e.Info()
		switch {
		case err != nil:
		case strings.HasSuffix(e.Name(), cacheSuffix), strings.HasSuffix(e.Name(), ModulesSuffix):
			kernels = append(kernels, st)
		case strings.HasSuffix(e.Name(), cacheTemp) && time.Since(st.ModTime()) > time.Hour:
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
	sort.SliceStable(kernels, func(i, j int) bool { return kernels[i].ModTime().After(kernels[j].ModTime()) })
	for i, st := range kernels {
		// The newest stays even if it is larger than the limit.
		if limit -= st.Size(); limit < 0 && i > 0 {
			_ = os.Remove(filepath.Join(dir, st.Name()))
		}
	}
}
