// Package equivalence has the differences between gvm's own SCSI target and the kernel's that
// docs/backends.md lists, as rules: one for each row.
package equivalence

import (
	"fmt"
	"slices"
	"strings"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/replay"
)

// code is the sense key and additional sense of an answer, "" for none.
func code(a *replay.Answer) string {
	s, ok := trace.ParseSense(a.Sense)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%x/%02x/%02x", s.Key, s.ASC, s.ASCQ)
}

// answers names both answers in a word: "5/24/00>good", or with a response that is
// not OK, "R1:5/0e/03>good".
func answers(d *replay.Difference) string {
	name := func(a *replay.Answer) string {
		s := code(a)
		switch {
		case s == "" && a.Status != scsi.Good:
			s = fmt.Sprintf("status%02x", uint8(a.Status))
		case s == "":
			s = "good"
		}
		if a.Response != 0 {
			s = fmt.Sprintf("R%d:%s", a.Response, s)
		}
		return s
	}
	return name(&d.A) + ">" + name(&d.B)
}

func failed(a *replay.Answer) bool { return a.Response != 0 || a.Status != scsi.Good }

// Sense of the answers that rules are about.
const (
	notReady         = "2/04/02"
	communication    = "2/08/00"
	invalidOpcode    = "5/20/00"
	invalidField     = "5/24/00"
	savingImpossible = "5/39/00"
	invalidIU        = "5/0e/03"
	writeProtected   = "7/27/00"
)

const overrun = 1 // VIRTIO_SCSI_S_OVERRUN

// request is a Difference with the facts that rules look at. A is the answer of gvm's target, B the
// kernel's.
type request struct {
	*replay.Difference
	name        string // of the operation
	cdb         []byte // padded with zeros
	lba, blocks uint64
	a, b        string // codes
	readOnly    bool   // the disk
	corpus      bool   // the request is one of replay.Corpus
}

func (r *request) op(names ...string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return r.name == n || strings.HasPrefix(r.name, n+"(") })
}

// bytes reports whether only these offsets of the data differ, given as first and last ones.
func (r *request) bytes(spans ...int) bool {
	return !slices.ContainsFunc(r.Data, func(n int) bool {
		for i := 0; i < len(spans); i += 2 {
			if n >= spans[i] && n <= spans[i+1] {
				return false
			}
		}
		return true
	})
}

// rule is a row of the list.
type rule struct {
	id string
	// fields are the parts that the rule explains in a request that matches; nil is all.
	fields []string
	match  func(*request) bool
	// answers are the pairs of answers, as the function answers has them, that the
	// row is about; "" is any, of what match has looked at.
	answers string
}

// rules are tried in their order, until nothing is left to explain.
var rules = []rule{
	// Of failures in general.
	{"residual-of-failures", []string{"residual"}, func(r *request) bool { return failed(&r.A) && failed(&r.B) }, ""},
	{"sense-details", []string{"sense"}, func(r *request) bool { return r.a != "" && r.a == r.b }, ""},
	{"unit-attention", nil, func(r *request) bool {
		return strings.HasPrefix(r.a, "6/29/")
	}, "6/29/01>good 6/29/01>5/25/00 6/29/07>good"},

	// Of the transport.
	{"target-and-lun", nil, func(r *request) bool {
		return r.Record.LUN != [8]byte{1, 0, 0x40} && r.Record.LUN != [8]byte{1}
	}, "5/20/00>5/25/00 5/20/00>R3:good 5/24/00>5/25/00 5/24/00>good 5/25/00>good R12:good>R11:good R3:good>good " +
		"good>5/25/00 good>R11:good good>R3:good good>good R3:good>R3:good"},
	{"task-management", []string{"response"}, func(r *request) bool {
		return r.Record.Kind == trace.TaskManagement
	}, "good>R11:good good>R10:good R12:good>R11:good R3:good>good"},
	{"both-ways", nil, func(r *request) bool { return r.Record.In > 0 && r.Record.Out > 0 }, "R9:good>good"},
	{"overrun", nil, func(r *request) bool {
		return r.A.Response == overrun && r.B.Response == 0
	}, "R1:5/0e/03>2/08/00 R1:5/0e/03>5/0e/03 R1:5/0e/03>5/1a/00 R1:5/0e/03>5/20/00 R1:5/0e/03>5/24/00 R1:5/0e/03>good " +
		"R1:good>2/08/00 R1:good>5/20/00 R1:good>5/24/00 R1:good>good R1:good>status28"},
	{"underrun", nil, func(r *request) bool {
		return !failed(&r.A) && r.A.Residual > 0 && (r.b == invalidIU || r.b == communication)
	}, ""},
	{"task-attribute-aca", []string{"sense"}, func(r *request) bool {
		return r.Record.Attr == scsi.ACA && r.a == invalidIU && r.b == invalidField
	}, ""},
	{"residual-without-data", []string{"residual"}, func(r *request) bool {
		return r.op("SYNCHRONIZE CACHE", "VERIFY") && r.A.Residual == 0 && !failed(&r.A) && !failed(&r.B)
	}, ""},

	// Of commands that one target lacks.
	{"opcodes-of-gvm", nil, func(r *request) bool {
		return r.b == invalidOpcode && (r.cdb[0] == 0x48 || r.op("PRE-FETCH", "PREVENT ALLOW MEDIUM REMOVAL",
			"VERIFY(12)", "WRITE AND VERIFY(12)", "ORWRITE", "LOG SENSE", "READ DEFECT DATA"))
	}, "good>5/20/00 5/21/00>5/20/00 5/24/00>5/20/00 7/27/00>5/20/00 e/1d/00>5/20/00"},
	{"opcodes-of-the-kernel", nil, func(r *request) bool {
		return r.a == invalidOpcode && slices.Contains([]byte{0x01, 0x0b, 0x2b, 0x7f}, r.cdb[0])
	}, "5/20/00>good 5/20/00>5/24/00"},
	{"third-party-copy", nil, func(r *request) bool {
		return r.cdb[0] == 0x83 || r.cdb[0] == 0x84
	}, "good>5/20/00 5/24/00>5/20/00 5/1a/00>5/20/00 7/27/00>5/20/00 good>5/24/00 good>good good>status28"},
	{"reservations", nil, func(r *request) bool {
		return (r.cdb[0] == 0x5e || r.cdb[0] == 0x5f) && (failed(&r.B) || r.bytes(2, 3))
	}, "good>good good>5/1a/00 good>5/24/00 5/1a/00>2/08/00 5/24/00>5/1a/00 5/24/00>status18 status18>2/08/00 " +
		"status18>5/1a/00 status18>5/24/00 status18>good"},
	{"get-lba-status", nil, func(r *request) bool { return r.op("GET LBA STATUS") },
		"good>5/24/00 good>5/20/00 5/21/00>5/24/00 5/21/00>5/20/00"},
	{"service-actions", nil, func(r *request) bool {
		return r.a == invalidField && (r.cdb[0] == 0xa3 && r.cdb[1] != 0x0c && r.cdb[1] != 0x0d ||
			r.cdb[0] == 0x9e && r.b == invalidOpcode)
	}, "5/24/00>5/20/00 5/24/00>good"},
	{"report-supported", nil, func(r *request) bool {
		return r.cdb[0] == 0xa3 && (r.cdb[1]&0x1f == 0x0c || r.cdb[1]&0x1f == 0x0d)
	}, "5/24/00>5/20/00 5/24/00>good good>5/20/00 good>good"},

	// Of the unit's state.
	{"read-only", nil, func(r *request) bool {
		return r.readOnly && r.a == writeProtected
	}, "7/27/00>2/08/00 7/27/00>5/0e/03 7/27/00>5/21/00 7/27/00>5/24/00 7/27/00>e/1d/00 7/27/00>good"},
	{"start-stop", nil, func(r *request) bool {
		return r.a == notReady && !failed(&r.B) || r.op("START STOP UNIT") && !failed(&r.A) && r.b == invalidField
	}, ""},
	{"naca", nil, func(r *request) bool { return r.op("READ(10)") && r.cdb[9]&4 != 0 && r.a == invalidField }, ""},
	{"dpo", nil, func(r *request) bool {
		return r.op("READ", "WRITE") && r.cdb[1]&0x18 != 0 && r.readOnly && r.b == invalidField
	}, ""},

	// Of the answers of commands.
	{"inquiry", []string{"data"}, func(r *request) bool {
		return r.op("INQUIRY") && r.cdb[1] == 0 && r.bytes(3, 3, 5, 5, 60, 60, 62, 63, 66, 66)
	}, ""},
	{"inquiry-cmddt", nil, func(r *request) bool { return r.op("INQUIRY") && r.cdb[1] == 2 && r.a == invalidField }, ""},
	{"vpd-00", nil, func(r *request) bool { return r.vpd(0x00) && r.bytes(3, 3, 8, 11) }, ""},
	{"vpd-80", nil, func(r *request) bool { return r.vpd(0x80) && r.bytes(3, 3) }, ""},
	{"vpd-83", nil, func(r *request) bool { return r.vpd(0x83) && r.bytes(2, 251) }, ""},
	{"vpd-86", nil, func(r *request) bool { return r.vpd(0x86) && r.readOnly && r.bytes(6, 6) }, ""},
	{"vpd-b0", nil, func(r *request) bool {
		return r.vpd(0xb0) && r.bytes(3, 3, 5, 5, 9, 10, 14, 14, 21, 21, 32, 32, 41, 43)
	}, ""},
	{"vpd-b1", nil, func(r *request) bool { return r.vpd(0xb1) && r.bytes(7, 7) }, ""},
	{"vpd-b2", nil, func(r *request) bool { return r.vpd(0xb2) && r.bytes(6, 6) }, ""},
	{"vpd-b3", nil, func(r *request) bool { return r.vpd(0xb3) && r.a == invalidField }, ""},
	{"request-sense", nil, func(r *request) bool { return r.op("REQUEST SENSE") }, "good>good good>2/08/00 good>5/24/00"},
	{"read-capacity", nil, func(r *request) bool {
		return r.op("READ CAPACITY(10)") && r.cdb[5] == 1 && r.b == invalidField
	}, ""},
	{"report-luns", nil, func(r *request) bool { return r.op("REPORT LUNS") && r.cdb[2] != 0 }, "good>good 5/24/00>good"},
	{"mode-sense", []string{"data"}, func(r *request) bool { return r.op("MODE SENSE") && r.modeBytes() }, ""},
	{"mode-saved", nil, func(r *request) bool {
		return r.op("MODE SENSE") && r.cdb[2]>>6 == 3 && r.a == savingImpossible
	}, ""},
	{"mode-subpages", nil, func(r *request) bool { return r.op("MODE SENSE") && r.cdb[3] != 0 }, "good>5/24/00"},
	{"mode-select", nil, func(r *request) bool {
		return r.op("MODE SELECT")
	}, "5/1a/00>5/26/00 5/24/00>5/1a/00 5/24/00>5/26/00 5/24/00>good " +
		"5/26/00>5/1a/00 5/26/00>5/24/00 good>5/1a/00 good>5/24/00 good>5/26/00"},

	// Of the effects of commands.
	{"verify", nil, func(r *request) bool { return r.op("VERIFY") && r.cdb[1]&6 != 0 }, "5/24/00>good e/1d/00>good"},
	{"compare-and-write", nil, func(r *request) bool {
		return r.op("COMPARE AND WRITE") && (r.cdb[13] != 1 || r.cdb[1]&0xe0 != 0 || r.b == invalidField)
	}, "5/21/00>5/24/00 5/24/00>good good>5/24/00 e/1d/00>5/24/00"},
	{"write-same-unmap", []string{"data"}, func(r *request) bool {
		return r.op("READ") && r.corpus && r.lba == 1024 && r.Record.Device == 0
	}, ""},
	{"write-same", nil, func(r *request) bool {
		return r.op("WRITE SAME")
	}, "5/0e/03>5/24/00 5/0e/03>good 5/21/00>5/24/00 5/24/00>5/20/00 good>5/24/00"},
}

func (r *request) vpd(page byte) bool { return r.op("INQUIRY") && r.cdb[1] == 1 && r.cdb[2] == page }

// modeBytes reports whether only those bytes of mode pages differ that the list
// has, wherever the pages are in the data.
func (r *request) modeBytes() bool {
	changeable := r.cdb[2]>>6 == 1
	at := 4
	if r.op("MODE SENSE(10)") {
		at = 8
	}
	var ok []int
	add := func(n ...int) {
		for _, n := range n {
			ok = append(ok, at+n)
		}
	}
	if r.cdb[1]&8 == 0 { // a block descriptor
		if r.op("MODE SENSE(10)") && r.cdb[1]&0x10 != 0 {
			add(1, 2, 3, 4, 5, 6, 7)
			at += 16
		} else {
			add(0, 1, 2, 3)
			at += 8
		}
	}
	lengths := map[byte]int{0x01: 12, 0x08: 20, 0x0a: 12, 0x1c: 12}
	for _, page := range []byte{0x01, 0x08, 0x0a, 0x1c} {
		if r.cdb[2]&0x3f != 0x3f && r.cdb[2]&0x3f != page {
			continue
		}
		switch {
		case page == 0x08 && changeable:
			add(2)
		case page == 0x08:
			add(2, 12)
		case page == 0x0a && changeable:
			add(2, 4)
		case page == 0x0a:
			add(2, 4, 5, 8, 9, 11)
		case page == 0x1c:
			add(2)
		}
		at += lengths[page]
	}
	ok = append(ok, 2, 3) // the device-specific parameter: write protection and DPOFUA
	return !slices.ContainsFunc(r.Data, func(n int) bool { return !slices.Contains(ok, n) })
}

// List is the list in use. Its methods are for one run over a trace, at both backends.
type List struct {
	// Used counts the differences that each row has explained, by its name.
	Used map[string]int

	header trace.Header
	corpus bool
	// written are blocks that the targets have written differently, by device,
	// because one of them refused to.
	written map[uint8][][2]uint64
}

// NewList returns the list for requests of a trace with the header, or of the corpus. No row has
// been used.
func NewList(h trace.Header, corpus bool) *List {
	l := &List{Used: map[string]int{}, header: h, corpus: corpus, written: map[uint8][][2]uint64{}}
	for _, r := range rules {
		l.Used[r.id] = 0
	}
	l.Used[consequence] = 0
	return l
}

// consequence is the row of blocks that differ since one target refused to write
// them.
const consequence = "blocks-after-a-refusal"

// Explain returns the rows that are about a difference, and what of it no row explains: it is
// known if there is none. Differences come in the order of their requests.
func (l *List) Explain(d *replay.Difference) (rows, left []string) {
	r := &request{Difference: d, name: d.Record.Op(), a: code(&d.A), b: code(&d.B), readOnly: l.readOnly(d.Record),
		corpus: l.corpus}
	r.cdb = append(slices.Clone(d.Record.CDB), make([]byte, 16)...)
	if d.Record.Kind == trace.Command {
		r.lba, r.blocks, _ = scsi.Extent(d.Record.CDB)
	}
	left = slices.Clone(d.What)
	use := func(id string, fields []string) {
		rest := slices.DeleteFunc(slices.Clone(left), func(f string) bool {
			return fields == nil || slices.Contains(fields, f)
		})
		if len(rest) < len(left) {
			l.Used[id]++
			rows, left = append(rows, id), rest
		}
	}
	device := d.Record.Device
	blocks := [2]uint64{r.lba, r.lba + max(r.blocks, 1)}
	if r.op("READ") && slices.ContainsFunc(l.written[device], func(w [2]uint64) bool {
		return w[0] < blocks[1] && blocks[0] < w[1]
	}) {
		use(consequence, []string{"data"})
	}
	if r.op("WRITE SAME") && failed(&d.A) != failed(&d.B) {
		l.written[device] = append(l.written[device], blocks)
	}
	for _, rule := range rules {
		if len(left) > 0 && rule.match(r) &&
			(rule.answers == "" || slices.Contains(strings.Fields(rule.answers), answers(d))) {
			use(rule.id, rule.fields)
		}
	}
	return rows, left
}

// readOnly reports whether the disk that a request is for is read-only.
func (l *List) readOnly(r *trace.Record) bool {
	n, ok := r.UnitNumber()
	return ok && int(r.Device) < len(l.header.Devices) &&
		slices.ContainsFunc(l.header.Devices[r.Device].Disks, func(d trace.Disk) bool {
			return d.LUN == n && d.ReadOnly
		})
}

// Rows returns the names of the rows of docs/backends.md's tables, which begin
// with a name in backquotes.
func Rows(doc string) []string {
	var rows []string
	for line := range strings.Lines(doc) {
		if id, _, ok := strings.Cut(strings.TrimPrefix(line, "| `"), "` |"); ok && strings.HasPrefix(line, "| `") {
			rows = append(rows, id)
		}
	}
	return rows
}
