package kernel

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"

	"gvm/kvmapi/nowait"
)

// maxConfig bounds a configuration; those of distributions have 300 KiB.
const maxConfig = 4 << 20

// Config is the configuration of a kernel, in the form of .config.
type Config struct {
	Text []byte // nil: unknown. It begins with a newline.
	From string // the file or package that it is from
}

// newConfig returns a configuration, or an unknown one if text has no option.
func newConfig(text []byte, from string) Config {
	text = append([]byte("\n"), text...)
	if !bytes.Contains(text, []byte("\nCONFIG_")) {
		return Config{}
	}
	return Config{text, from}
}

// readConfig reads a configuration, perhaps compressed with gzip. One that cannot be read is
// unknown.
func readConfig(path string) Config {
	f, err := nowait.Open(path, os.O_RDONLY, 0, nowait.Regular)
	if err != nil {
		return Config{}
	}
	defer f.Close()
	b, err := ReadAll(f, maxConfig)
	if err == nil && bytes.HasPrefix(b, gzipMagic) {
		b, err = gunzip(b)
	}
	if err != nil {
		return Config{}
	}
	return newConfig(b, path)
}

var gzipMagic = []byte("\x1f\x8b")

// gunzip decompresses one gzip stream, which more data may follow.
func gunzip(b []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(b)) // a ByteReader: the stream's end is exact
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	return ReadAll(z, maxConfig)
}

// Value returns the value of an option, without CONFIG_: "y", "m", "n" or another text. It is "" if
// the configuration does not mention the option, which then does not exist or cannot be set.
func (c Config) Value(symbol string) string {
	if _, rest, ok := bytes.Cut(c.Text, []byte("\nCONFIG_"+symbol+"=")); ok {
		value, _, _ := bytes.Cut(rest, []byte("\n"))
		return string(bytes.TrimSpace(value))
	}
	if bytes.Contains(c.Text, []byte("\n# CONFIG_"+symbol+" is not set")) {
		return "n"
	}
	return ""
}

// Embedded returns the configuration that the image holds (CONFIG_IKCONFIG), or an unknown one. It
// also finds the release of a vmlinux. A bzImage is decompressed, or taken from the cache directory
// of boot.CacheDir, unless that is "".
func (k *Kernel) Embedded(cache string) (c Config, err error) {
	err = k.Image.Segments(cache, func(b []byte) bool {
		if k.Release == "" {
			k.Release = bannerRelease(b)
		}
		c = ikconfig(b)
		if c.Text != nil {
			c.From = fmt.Sprintf("%s (CONFIG_IKCONFIG)", k.Image.Name)
		}
		return c.Text == nil
	})
	return c, err
}

// ikconfig finds a configuration behind its mark (kernel/configs.c). The mark may be in an image by
// chance, but not often.
func ikconfig(b []byte) Config {
	for range 16 {
		_, rest, ok := bytes.Cut(b, []byte("IKCFG_ST"))
		if !ok {
			break
		}
		if bytes.HasPrefix(rest, gzipMagic) {
			if text, err := gunzip(rest); err == nil {
				if c := newConfig(text, ""); c.Text != nil {
					return c
				}
			}
		}
		b = rest
	}
	return Config{}
}

// bannerRelease finds the release in linux_banner (init/version.c).
func bannerRelease(b []byte) string {
	for {
		_, rest, ok := bytes.Cut(b, []byte("Linux version "))
		if !ok {
			return ""
		}
		word, _, _ := bytes.Cut(rest[:min(len(rest), 80)], []byte(" "))
		if s := release(string(word)); s != "" && s[0] >= '0' && s[0] <= '9' {
			return s
		}
		b = rest
	}
}
