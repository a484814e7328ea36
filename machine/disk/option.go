package disk

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/virtio/vhostscsi"
	"gvm/text"
)

// Option is an option of a disk: a row that parsing, help, errors, String, completion, the control
// socket and the table of docs/storage.md use. A new option is a new row.
type Option struct {
	Key     string
	Value   string // the value as help shows it; "": the option has none
	Meaning string // for help

	goesWith uses
	set      func(s *Spec, val string) error // the error describes a valid value
	get      func(s *Spec) string            // the value, "" for the default
}

// Word returns the option as help shows it.
func (o *Option) Word() string { return o.name() + o.Value }

// name is how messages name the option.
func (o *Option) name() string {
	if o.Value == "" {
		return o.Key
	}
	return o.Key + "="
}

// uses is the set of disks that an option goes with.
type uses int

const (
	image  uses = 1 << iota
	memory      // mem: and temp:
	null        // null:
	target      // wwn=

	byProcess // backend=process
	byVhost   // backend=vhost or auto
	overlaid  // overlay=

	anything = image | memory | null | byProcess | byVhost | overlaid
)

// MaxQueues is the most request queues that a device has. With the control and event queues and the
// configuration interrupt, it keeps MSI-X vectors in proportion to CPUs.
const MaxQueues = 64

// Options returns the options of a disk, in the order of help. The caller must not change them.
func Options() []Option { return options() }

// The table is made on first use, so that gvm starts without it.
var options = sync.OnceValue(func() []Option {
	return []Option{
		{"readonly", "", "the guest sees a write-protected disk; the image is opened read-only",
			image | byProcess | byVhost, func(s *Spec, _ string) error { s.ReadOnly = true; return nil },
			func(s *Spec) string { return nameIf(s.ReadOnly, "readonly") }},
		{"serial", "S", "unit serial number; the default is derived from the image's path",
			anything, func(s *Spec, val string) error { s.Serial = val; return nil },
			func(s *Spec) string { return s.Serial }},
		{"lun", "N", "logical unit number, 0 to 16383; the default is the next free one",
			anything, setLUN, func(s *Spec) string { return nameIf(s.LUN >= 0, strconv.Itoa(s.LUN)) }},
		{"cache", "writeback|writethrough|unsafe", "writeback, the default: data is durable when the guest's " +
			"flush or FUA write is answered; writethrough: when the write is; unsafe: flushes do nothing",
			anything, word(cacheModes, func(s *Spec) *scsi.CacheMode { return &s.Cache }),
			func(s *Spec) string { return nameIf(s.Cache != scsi.WriteBack, cacheModes.of(s.Cache)) }},
		{"size", "SIZE", "create the image, sparse, or grow it to SIZE; it never shrinks",
			image | byProcess | byVhost, setSize,
			func(s *Spec) string { return nameIf(s.Storage == Image && s.Size > 0, strconv.FormatInt(s.Size, 10)) }},
		{"block_size", "512|4096", "bytes in a logical block",
			anything, word(blockSizes, func(s *Spec) *int { return &s.BlockSize }),
			func(s *Spec) string { return nameIf(s.BlockSize != 512, strconv.Itoa(s.BlockSize)) }},
		{"physical_block_size", "N", "bytes in a block of the medium, as the guest is told",
			anything &^ byVhost, setPhysical,
			func(s *Spec) string { return nameIf(s.Physical != 0, strconv.Itoa(s.Physical)) }},
		{"pi", "0|1", "1: protection information (T10-PI type 1), kept in IMAGE.pi",
			image | memory | byProcess, word(zeroOne, func(s *Spec) *bool { return &s.PI }),
			func(s *Spec) string { return nameIf(s.PI, "1") }},
		{"error", "report|stop|enospc-stop", "report, the default: a failure of the image is the guest's; stop: the " +
			"machine pauses, and repeats the request after gvm resume; enospc-stop: so only where the host has no room",
			anything &^ byVhost, word(errorPolicies, func(s *Spec) *ErrorPolicy { return &s.OnError }),
			func(s *Spec) string { return nameIf(s.OnError != Report, errorPolicies.of(s.OnError)) }},
		{"iops", "N[:BURST]", "limit of requests in a second, with a burst",
			anything &^ byVhost, limit("1000 or 1000:5000", func(s *Spec) *block.Limit { return &s.IOPS }),
			func(s *Spec) string { return limitWord(s.IOPS) }},
		{"bps", "SIZE[:BURST]", "limit of bytes in a second, with a burst",
			anything &^ byVhost, limit("10M or 10M:100M", func(s *Spec) *block.Limit { return &s.BPS }),
			func(s *Spec) string { return limitWord(s.BPS) }},
		{"overlay", "on|FILE",
			"the image stays as it is; the guest's writes are gone with the machine, or kept in FILE",
			image | byProcess | overlaid, func(s *Spec, val string) error { s.Overlay = val; return nil },
			func(s *Spec) string { return s.Overlay }},
		{"lock", "on|off", "off: go on without a lock on a file system that has none",
			image | byProcess | byVhost | overlaid, func(s *Spec, val string) error {
				on := true
				err := word(switches, func(*Spec) *bool { return &on })(s, val)
				s.NoLock = !on
				return err
			}, func(s *Spec) string { return nameIf(s.NoLock, "off") }},
		{"backend", "process|vhost|auto", "process, the default: gvm's SCSI target serves the disk; vhost: the " +
			"kernel's does; auto: the kernel's where it can",
			anything | target, word(backends, func(s *Spec) *Backend { return &s.Backend }),
			func(s *Spec) string { return nameIf(s.Backend != Process, backends.of(s.Backend)) }},
		{"workers", "N|shared", "kernel threads for the request queues of backend=vhost",
			image | target | byVhost, setWorkers, workersWord},
	}
})

// nameIf returns name if is is true, else "".
func nameIf(is bool, name string) string {
	if is {
		return name
	}
	return ""
}

// errWord reports a value that is not listed in Option.Value.
var errWord = errors.New("unknown word")

// word sets a field to the value of one of the words of Option.Value.
func word[V comparable](n names[V], field func(*Spec) *V) func(*Spec, string) error {
	return func(s *Spec, val string) error {
		v, ok := n.value(val)
		if !ok {
			return errWord
		}
		*field(s) = v
		return nil
	}
}

func setLUN(s *Spec, val string) error {
	n, err := strconv.Atoi(val)
	if _, ok := scsi.EncodeLUN(n); err != nil || !ok {
		return errors.New("want a number from 0 to 16383")
	}
	s.LUN = n
	return nil
}

func setSize(s *Spec, val string) error {
	n, err := text.ParseSize(val, 1)
	bad := (*text.SizeError)(nil)
	switch {
	case errors.As(err, &bad):
		return errors.New(bad.Why)
	case n == 0:
		return errors.New("a disk cannot be empty")
	}
	s.Size = int64(n)
	return nil
}

func setPhysical(s *Spec, val string) (err error) {
	if s.Physical, err = strconv.Atoi(val); err != nil {
		return errors.New("want a number of bytes")
	}
	return nil
}

// limit sets a field to RATE or RATE:BURST; such has examples.
func limit(such string, field func(*Spec) *block.Limit) func(*Spec, string) error {
	return func(s *Spec, val string) (err error) {
		if *field(s), err = parseLimit(val); err != nil {
			return fmt.Errorf("%w, such as %s", err, such)
		}
		return nil
	}
}

func limitWord(l block.Limit) string {
	switch {
	case l.Rate == 0:
		return ""
	case l.Burst == 0:
		return strconv.FormatUint(l.Rate, 10)
	}
	return fmt.Sprintf("%d:%d", l.Rate, l.Burst)
}

func setWorkers(s *Spec, val string) error {
	n, err := strconv.Atoi(val)
	switch {
	case val == "shared":
		n = vhostscsi.SharedWorker
	case err != nil || n < 1 || n > MaxQueues:
		return fmt.Errorf("want a number from 1 to %d, or shared%s", MaxQueues, text.Suggest(val, []string{"shared"}))
	}
	s.Workers = n
	return nil
}

func workersWord(s *Spec) string {
	switch {
	case s.Workers == vhostscsi.SharedWorker:
		return "shared"
	case s.Workers > 0:
		return strconv.Itoa(s.Workers)
	}
	return ""
}

// parseLimit reads RATE or RATE:BURST.
func parseLimit(s string) (l block.Limit, err error) {
	rate, burst, has := strings.Cut(s, ":")
	if l.Rate, err = text.ParseSize(rate, 1); err == nil && has {
		l.Burst, err = text.ParseSize(burst, 1)
	}
	if err != nil || l.Rate == 0 || has && l.Burst == 0 || max(l.Rate, l.Burst) > block.MaxRate {
		err = errors.New("want RATE or RATE:BURST per second, each from 1 to 1T")
	}
	return l, err
}
