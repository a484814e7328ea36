// Package disk provides a machine's disks: the grammar of their options, their images, locks and
// logical units, on gvm's own SCSI target or one of the kernel's, and changes while the machine
// runs.
package disk

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/text"
)

// Spec is a disk as a user describes it. Parse makes one; String is its inverse.
type Spec struct {
	Path      string // as given; "": an existing target of the kernel
	Storage   Storage
	Overlay   string // "": none; OverlayOn; else the overlay's path
	WWN       string // the WWN of an existing target
	Backend   Backend
	Workers   int // as in vhostscsi.Config
	ReadOnly  bool
	NoLock    bool
	Serial    string // "": derived from the path
	LUN       int    // -1: the next free one
	Cache     scsi.CacheMode
	Size      int64 // in bytes; 0: the image's size
	BlockSize int   // logical, in bytes
	Physical  int   // physical block size in bytes, 0: as BlockSize
	PI        bool  // protection information
	OnError   ErrorPolicy
	IOPS, BPS block.Limit
	Waiting   int // scsi.UnitConfig.Waiting, which is no option of the user's
}

// Name returns the disk's name in messages.
func (s *Spec) Name() string {
	if s.Path == "" {
		return "wwn=" + s.WWN
	}
	return s.Path
}

// Waits reports whether commands wait for the host's storage in threads of this process.
func (s *Spec) Waits() bool {
	return s.Backend != Vhost && (s.Storage == Image || s.Storage == Temporary)
}

// Storage is the kind of storage that holds a disk.
type Storage int

// Kinds of storage. A Path has the prefix "mem:", "null:" or "temp:" for those but the first.
const (
	Image Storage = iota
	Memory
	Null
	Temporary // a file that is gone with the machine
)

// storages are the kinds of storage without a file. A Path has the name and a colon as prefix.
var storages = names[Storage]{{"mem", Memory}, {"null", Null}, {"temp", Temporary}}

// OverlayOn is an overlay that ends with the machine.
const OverlayOn = "on"

// Backend is the implementation that serves a disk.
type Backend int

// Backends of a disk.
const (
	Process Backend = iota // gvm's own SCSI target
	Vhost                  // LIO through vhost-scsi
	Auto                   // Vhost if this host supports it, else Process
)

// ErrorPolicy is the reaction to a failure of a disk's storage.
type ErrorPolicy int

// Error policies.
const (
	Report     ErrorPolicy = iota // the guest gets the error
	Stop                          // the machine pauses, and repeats the request when resumed
	StopOnFull                    // Stop for a lack of space, Report for other errors
)

// Names of the values of options that are words.
var (
	cacheModes = names[scsi.CacheMode]{{"writeback", scsi.WriteBack}, {"writethrough", scsi.WriteThrough},
		{"unsafe", scsi.Unsafe}}
	backends      = names[Backend]{{"process", Process}, {"vhost", Vhost}, {"auto", Auto}}
	errorPolicies = names[ErrorPolicy]{{"report", Report}, {"stop", Stop}, {"enospc-stop", StopOnFull}}
	blockSizes    = names[int]{{"512", 512}, {"4096", 4096}}
	switches      = names[bool]{{"on", true}, {"off", false}}
	zeroOne       = names[bool]{{"0", false}, {"1", true}}
)

// names pairs values with their names. The linker makes such a table; a map would be made at start.
type names[V comparable] []struct {
	name  string
	value V
}

// of returns the name of a value, or "".
func (n names[V]) of(value V) string {
	for _, row := range n {
		if row.value == value {
			return row.name
		}
	}
	return ""
}

// value returns the value of a name.
func (n names[V]) value(name string) (v V, ok bool) {
	for _, row := range n {
		if row.name == name {
			return row.value, true
		}
	}
	return v, false
}

// CacheName returns the word of cache= for a mode.
func CacheName(m scsi.CacheMode) string { return cacheModes.of(m) }

// CacheMode returns the mode for a word of cache=.
func CacheMode(name string) (m scsi.CacheMode, ok bool) { return cacheModes.value(name) }

// splitCommas splits at commas; a doubled comma is part of the text.
func splitCommas(s string) []string {
	var out []string
	word := ""
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != ',':
			word += s[i : i+1]
		case i+1 < len(s) && s[i+1] == ',':
			word += ","
			i++
		default:
			out = append(out, word)
			word = ""
		}
	}
	return append(out, word)
}

// Parse reads a disk's path and options, as `gvm help disk` describes them. An error names the
// disk and what to change.
func Parse(s string) (Spec, error) {
	d, options, err := parse(splitCommas(s))
	if err != nil {
		return d, err
	}
	return d, d.check(options)
}

// given is an option as it is given to a disk.
type given struct {
	*Option
	word      string
	isDefault bool // it is at its default
}

// parse reads the words of a disk. It does not check whether they go with each other.
func parse(words []string) (d Spec, options []given, err error) {
	d = Spec{Path: words[0], LUN: -1, BlockSize: 512}
	if err := d.parsePath(); err != nil {
		return d, nil, err
	}
	for n, w := range words[1:] {
		key, val, has := strings.Cut(w, "=")
		o := option(key)
		if o == nil {
			return d, nil, unknownOption(words, n+1, key)
		}
		if has == (o.Value == "") || has && val == "" {
			return d, nil, fmt.Errorf("--disk %s: %q: want %s; see gvm help disk", d.Name(), w, o.Word())
		}
		if slices.ContainsFunc(options, func(g given) bool { return g.Key == key }) {
			return d, nil, fmt.Errorf("--disk %s: %s is given twice", d.Name(), o.name())
		}
		before := d
		if err := o.set(&d, val); errors.Is(err, errWord) {
			return d, nil, text.OneOfNames("--disk "+d.Name()+": "+o.name(), val, strings.Split(o.Value, "|"))
		} else if err != nil {
			return d, nil, fmt.Errorf("--disk %s: %s%s: %w", d.Name(), o.name(), val, err)
		}
		options = append(options, given{o, w, d == before})
	}
	return d, options, nil
}

// parsePath reads the kind of storage from the path.
func (s *Spec) parsePath() error {
	if name, ok := strings.CutPrefix(s.Path, "wwn="); ok {
		if s.Path, s.WWN = "", name; name == "" {
			return errors.New("--disk wwn=: no name; want one such as wwn=naa.5001405a1b2c3d4e, see gvm lio list")
		}
		return nil
	}
	if s.Path == "" {
		return errors.New(`--disk "": no path; see gvm help disk`)
	}
	for _, kind := range storages {
		prefix := kind.name + ":"
		if word, ok := strings.CutPrefix(s.Path, prefix); ok {
			n, err := ParseSize("--disk "+s.Path, word)
			if err != nil {
				such := ""
				if !strings.ContainsAny(word, "0123456789") {
					such = ", such as " + prefix + "1G"
				}
				return fmt.Errorf("%w%s (./%s is a file of that name)", err, such, s.Path)
			}
			s.Storage, s.Size = kind.value, n
			return nil
		}
	}
	if near := nearPrefix(s.Path); near != "" {
		return fmt.Errorf("--disk %s: did you mean %s? ./%s is a file of that name", s.Path, near, s.Path)
	}
	return nil
}

// nearPrefix returns the probable correction of a path with a mistyped prefix, such as mem:1M for
// men:1M, or "". A path that exists needs none.
func nearPrefix(path string) string {
	i := strings.IndexAny(path, ":=")
	if i < 0 {
		return ""
	}
	near, rest := text.Nearest(path[:i], []string{"mem", "null", "temp", "wwn"}), path[i+1:]
	switch _, err := text.ParseSize(rest, 1); {
	case near == "wwn" && strings.HasPrefix(rest, "naa."):
		near += "="
	case near != "wwn" && near != "" && err == nil:
		near += ":"
	default:
		return ""
	}
	if _, err := os.Lstat(path); err == nil {
		return ""
	}
	return near + rest
}

// check refuses options that do not go with the disk or with each other.
func (s *Spec) check(options []given) error {
	kind, called := s.kind()
	by := byVhost
	if s.Backend == Process {
		by = byProcess
	}
	for _, o := range options {
		switch word := o.word; {
		case o.isDefault:
		case o.goesWith&kind == 0 && kind == target:
			return fmt.Errorf("--disk %s: %s is not for a target that exists: it takes backend=vhost and workers=N; "+
				"its maker chose the rest", s.Name(), word)
		case o.goesWith&kind == 0 && o.goesWith&memory != 0:
			return fmt.Errorf("--disk %s: %s is for images and disks of mem: or temp: alone", s.Name(), word)
		case o.goesWith&kind == 0:
			return fmt.Errorf("--disk %s: %s is for images, not for %s", s.Name(), word, called)
		case o.goesWith&overlaid == 0 && s.Overlay != "":
			return fmt.Errorf("--disk %s: %s does not go with overlay=, "+
				"which leaves the image and its size as they are", s.Name(), word)
		case o.goesWith&by == 0 && by == byVhost:
			return fmt.Errorf("--disk %s: %s is for backend=process", s.Name(), word)
		case o.goesWith&by == 0:
			return fmt.Errorf("--disk %s: %s is for backend=vhost", s.Name(), word)
		}
	}
	switch {
	case kind == target && s.Backend != Vhost:
		return fmt.Errorf("--disk %s: a target of the kernel needs backend=vhost", s.Name())
	case s.Storage != Image && s.Backend != Process:
		return fmt.Errorf("--disk %s: %s is for backend=process", s.Name(), called)
	case s.Physical != 0 && (s.Physical < s.BlockSize || s.Physical > s.BlockSize<<15 ||
		s.Physical&(s.Physical-1) != 0):
		return fmt.Errorf("--disk %s: physical_block_size=%d: want a power of 2 from %d, the block size, to %d",
			s.Path, s.Physical, s.BlockSize, s.BlockSize<<15)
	}
	return nil
}

// kind returns the disk's kind for Option.goesWith, and its name.
func (s *Spec) kind() (kind uses, name string) {
	switch {
	case s.Path == "":
		return target, "wwn="
	case s.Storage == Memory:
		return memory, "mem:"
	case s.Storage == Temporary:
		return memory, "temp:"
	case s.Storage == Null:
		return null, "null:"
	}
	return image, "an image"
}

// String returns the disk in the form that Parse reads, without options at their default.
func (s Spec) String() string {
	double := func(word string) string { return strings.ReplaceAll(word, ",", ",,") }
	b := double(s.Name())
	for _, o := range Options() {
		switch val := o.get(&s); {
		case val == "":
		case o.Value == "":
			b += "," + o.Key
		default:
			b += "," + o.Key + "=" + double(val)
		}
	}
	return b
}

// unknownOption reports that the word at n is not an option. It suggests a path with a comma if
// such a file exists, or if the word does not look like an option.
func unknownOption(words []string, n int, key string) error {
	var names []string
	for _, o := range Options() {
		names = append(names, o.Key)
	}
	thing := fmt.Sprintf("option %q", key)
	path := strings.Join(words[:n+1], ",")
	if _, err := os.Stat(path); err == nil || n == 1 && strings.ContainsAny(words[n], "./ ") &&
		!strings.Contains(words[n], "=") {
		return fmt.Errorf("--disk %s: unknown %s; a comma in a path is written twice: --disk %s",
			words[0], thing, strings.ReplaceAll(path, ",", ",,"))
	}
	return fmt.Errorf("--disk %s: %w", words[0], text.Unknown(thing, text.Nearest(key, names), " disk"))
}

// option returns the row of a key, or nil.
func option(key string) *Option {
	if i := slices.IndexFunc(options(), func(o Option) bool { return o.Key == key }); i >= 0 {
		return &options()[i]
	}
	return nil
}

// ParseSize reads the size of a disk in bytes. Errors have the prefix what.
func ParseSize(what, word string) (int64, error) {
	n, err := text.ParseSize(word, 1)
	switch {
	case err != nil:
		return 0, configError{fmt.Errorf("%s: %w", what, err)}
	case n == 0:
		return 0, configError{fmt.Errorf("%s: size %s: want 512 bytes or more", what, word)}
	}
	return int64(n), nil
}
