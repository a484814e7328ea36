// Package backends knows in what gvm's own SCSI target and the kernel's differ:
// docs/backends.md lists it for people, Unlisted tells what is not on the list.
package backends

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"gvm/devices/scsi"
	"gvm/devices/scsi/trace"
)

// Answer is one target's answer in a Difference.
type Answer struct {
	Outcome  string
	Response uint8
	Status   scsi.Status
	Sense    string // hexadecimal
	Residual uint32
}

// Difference is a line of `gvm replay --json --backend both`: A is the in-process
// target's answer, B the kernel's.
type Difference struct {
	Number  int
	Request struct {
		Device   int
		Op       string
		CDB      string // hexadecimal
		In, Out  uint32
		Attr     scsi.TaskAttr
		LUN      string `json:"lun_bytes"` // hexadecimal
		Function *uint32
		LBA      uint64
		Blocks   uint64
	}
	What []string
	Data string `json:"data_bytes"` // spans of offsets
	A, B Answer
}

// code is the sense key and additional sense of an answer, "" for none.
func (a *Answer) code() string {
	b, _ := hex.DecodeString(a.Sense)
	s, ok := trace.ParseSense(b)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%x/%02x/%02x", s.Key, s.ASC, s.ASCQ)
}

// answers names both answers in a word: "5/24/00>good", or with a response that is
// not OK, "R1:5/0e/03>good".
func (d *Difference) answers() string {
	name := func(a *Answer) string {
		s := a.code()
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

func (a *Answer) failed() bool { return a.Response != 0 || a.Status != scsi.Good }

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

// request is a Difference with its CDB and codes in hand.
type request struct {
	*Difference
	cdb  []byte // padded with zeros
	a, b string // codes
	data []int  // offsets of the bytes that differ
}

func (r *request) op(names ...string) bool {
	return slices.ContainsFunc(names, func(n string) bool {
		return r.Request.Op == n || strings.HasPrefix(r.Request.Op, n+"(")
	})
}

// bytes tells whether only these offsets of the data differ.
func (r *request) bytes(spans string) bool {
	ok := offsets(spans)
	return !slices.ContainsFunc(r.data, func(n int) bool { return !slices.Contains(ok, n) })
}

func offsets(spans string) (out []int) {
	for word := range strings.FieldsSeq(spans) {
		first, last, many := strings.Cut(word, "-")
		i, _ := strconv.Atoi(first)
		j := i
		if many {
			j, _ = strconv.Atoi(last)
		}
		for ; i <= j; i++ {
			out = append(out, i)
		}
	}
	return out
}

// rule is a row of the list.
type rule struct {
	id string
	// fields are what the rule explains of a request that matches; nil is all.
	fields []string
	match  func(*request) bool
	// answers are the pairs of answers, as Difference.answers has them, that the
	// row is about; "" is any, of what match has looked at.
	answers string
}

const readOnlyDevice = 3 // of the corpus

// rules are tried in their order, until nothing is left to explain.
var rules = []rule{
	// Of failures in general.
	{"residual-of-failures", []string{"residual"}, func(r *request) bool { return r.A.failed() && r.B.failed() }, ""},
	{"sense-details", []string{"sense"}, func(r *request) bool { return r.a != "" && r.a == r.b }, ""},
	{"unit-attention", nil, func(r *request) bool { return strings.HasPrefix(r.a, "6/29/") }, "6/29/01>good 6/29/01>5/25/00 6/29/07>good"},

	// Of the transport.
	{"target-and-lun", nil, func(r *request) bool {
		return r.Request.LUN != "0100400000000000" && r.Request.LUN != "0100000000000000"
	}, "5/20/00>5/25/00 5/20/00>R3:good 5/24/00>5/25/00 5/24/00>good 5/25/00>good R12:good>R11:good R3:good>good good>5/25/00 good>R11:good good>R3:good good>good R3:good>R3:good"},
	{"task-management", []string{"response"}, func(r *request) bool { return r.Request.Function != nil }, "good>R11:good good>R10:good R12:good>R11:good R3:good>good"},
	{"both-ways", nil, func(r *request) bool { return r.Request.In > 0 && r.Request.Out > 0 }, "R9:good>good"},
	{"overrun", nil, func(r *request) bool { return r.A.Response == overrun && r.B.Response == 0 }, "R1:5/0e/03>5/0e/03 R1:5/0e/03>5/24/00 R1:5/0e/03>good R1:good>2/08/00 R1:good>5/24/00 R1:good>good"},
	{"underrun", nil, func(r *request) bool {
		return !r.A.failed() && r.A.Residual > 0 && (r.b == invalidIU || r.b == communication)
	}, ""},
	{"task-attribute-aca", []string{"sense"}, func(r *request) bool { return r.Request.Attr == scsi.ACA && r.a == invalidIU && r.b == invalidField }, ""},
	{"residual-without-data", []string{"residual"}, func(r *request) bool {
		return r.op("SYNCHRONIZE CACHE", "VERIFY") && r.A.Residual == 0 && !r.A.failed() && !r.B.failed()
	}, ""},

	// Of commands that one target lacks.
	{"opcodes-of-gvm", nil, func(r *request) bool {
		return r.b == invalidOpcode && r.op("PRE-FETCH", "PREVENT ALLOW MEDIUM REMOVAL", "VERIFY(12)", "WRITE AND VERIFY(12)", "ORWRITE", "LOG SENSE", "READ DEFECT DATA") || r.b == invalidOpcode && r.cdb[0] == 0x48
	}, "good>5/20/00 5/21/00>5/20/00 5/24/00>5/20/00 7/27/00>5/20/00 e/1d/00>5/20/00"},
	{"opcodes-of-the-kernel", nil, func(r *request) bool {
		return r.a == invalidOpcode && slices.Contains([]byte{0x01, 0x0b, 0x2b, 0x7f}, r.cdb[0])
	}, "5/20/00>good 5/20/00>5/24/00"},
	{"third-party-copy", nil, func(r *request) bool { return r.cdb[0] == 0x83 || r.cdb[0] == 0x84 }, "good>5/20/00 5/24/00>5/20/00 5/1a/00>5/20/00 good>5/24/00 good>good"},
	{"reservations", nil, func(r *request) bool { return (r.cdb[0] == 0x5e || r.cdb[0] == 0x5f) && r.bytes("2-3") }, "good>good good>5/24/00 5/24/00>status18 status18>good"},
	{"get-lba-status", nil, func(r *request) bool { return r.op("GET LBA STATUS") }, "good>5/24/00 good>5/20/00"},
	{"service-actions", nil, func(r *request) bool {
		return r.a == invalidField && (r.cdb[0] == 0xa3 && r.cdb[1] != 0x0c && r.cdb[1] != 0x0d || r.cdb[0] == 0x9e && r.b == invalidOpcode)
	}, "5/24/00>5/20/00 5/24/00>good"},
	{"report-supported", nil, func(r *request) bool { return r.cdb[0] == 0xa3 && (r.cdb[1]&0x1f == 0x0c || r.cdb[1]&0x1f == 0x0d) }, "5/24/00>5/20/00 5/24/00>good good>5/20/00 good>good"},

	// Of the unit's state.
	{"read-only", nil, func(r *request) bool { return r.Request.Device == readOnlyDevice && r.a == writeProtected }, "7/27/00>2/08/00 7/27/00>5/0e/03 7/27/00>5/21/00 7/27/00>5/24/00 7/27/00>e/1d/00 7/27/00>good"},
	{"start-stop", nil, func(r *request) bool {
		return r.a == notReady && !r.B.failed() || r.op("START STOP UNIT") && !r.A.failed() && r.b == invalidField
	}, ""},
	{"naca", nil, func(r *request) bool { return r.op("READ(10)") && r.cdb[9]&4 != 0 && r.a == invalidField }, ""},
	{"dpo", nil, func(r *request) bool {
		return r.op("READ", "WRITE") && r.cdb[1]&0x18 != 0 && r.Request.Device == readOnlyDevice && r.b == invalidField
	}, ""},

	// Of what commands tell.
	{"inquiry", []string{"data"}, func(r *request) bool { return r.op("INQUIRY") && r.cdb[1] == 0 && r.bytes("3 5 60 62-63 66") }, ""},
	{"inquiry-cmddt", nil, func(r *request) bool { return r.op("INQUIRY") && r.cdb[1] == 2 && r.a == invalidField }, ""},
	{"vpd-00", nil, func(r *request) bool { return r.vpd(0x00) && r.bytes("3 8-11") }, ""},
	{"vpd-80", nil, func(r *request) bool { return r.vpd(0x80) && r.bytes("3") }, ""},
	{"vpd-83", nil, func(r *request) bool { return r.vpd(0x83) && r.bytes("2-251") }, ""},
	{"vpd-86", nil, func(r *request) bool { return r.vpd(0x86) && r.Request.Device == readOnlyDevice && r.bytes("6") }, ""},
	{"vpd-b0", nil, func(r *request) bool { return r.vpd(0xb0) && r.bytes("3 5 9-10 14 21 32 41-43") }, ""},
	{"vpd-b1", nil, func(r *request) bool { return r.vpd(0xb1) && r.bytes("7") }, ""},
	{"vpd-b2", nil, func(r *request) bool { return r.vpd(0xb2) && r.bytes("6") }, ""},
	{"vpd-b3", nil, func(r *request) bool { return r.vpd(0xb3) && r.a == invalidField }, ""},
	{"request-sense", nil, func(r *request) bool { return r.op("REQUEST SENSE") }, "good>good good>2/08/00 good>5/24/00"},
	{"read-capacity", nil, func(r *request) bool { return r.op("READ CAPACITY(10)") && r.cdb[5] == 1 && r.b == invalidField }, ""},
	{"report-luns", nil, func(r *request) bool { return r.op("REPORT LUNS") && r.cdb[2] != 0 }, "good>good 5/24/00>good"},
	{"mode-sense", []string{"data"}, func(r *request) bool { return r.op("MODE SENSE") && r.modeBytes() }, ""},
	{"mode-saved", nil, func(r *request) bool { return r.op("MODE SENSE") && r.cdb[2]>>6 == 3 && r.a == savingImpossible }, ""},
	{"mode-subpages", nil, func(r *request) bool { return r.op("MODE SENSE") && r.cdb[3] != 0 }, "good>5/24/00"},
	{"mode-select", nil, func(r *request) bool { return r.op("MODE SELECT") }, "5/1a/00>5/26/00 5/24/00>5/26/00 5/26/00>5/1a/00 5/26/00>5/24/00 good>5/1a/00 good>5/24/00 good>5/26/00"},

	// Of what commands do.
	{"verify", nil, func(r *request) bool { return r.op("VERIFY") && r.cdb[1]&6 != 0 }, "5/24/00>good e/1d/00>good"},
	{"compare-and-write", nil, func(r *request) bool {
		return r.op("COMPARE AND WRITE") && (r.cdb[13] != 1 || r.cdb[1]&0xe0 != 0 || r.b == invalidField)
	}, "5/21/00>5/24/00 5/24/00>good good>5/24/00"},
	{"write-same-unmap", []string{"data"}, func(r *request) bool { return r.op("READ") && r.Request.LBA == 1024 && r.Request.Device == 0 }, ""},
	{"write-same", nil, func(r *request) bool { return r.op("WRITE SAME") }, "5/0e/03>5/24/00 5/0e/03>good 5/21/00>5/24/00 5/24/00>5/20/00 good>5/24/00"},
}

func (r *request) vpd(page byte) bool { return r.op("INQUIRY") && r.cdb[1] == 1 && r.cdb[2] == page }

// modeBytes tells whether only those bytes of mode pages differ that the list
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
	return !slices.ContainsFunc(r.data, func(n int) bool { return !slices.Contains(ok, n) })
}

// List is the list in use. Its methods are for one run of a corpus.
type List struct {
	// Used counts the differences that each row has explained, by its name.
	Used map[string]int
	// written are blocks that the targets have written differently, by device,
	// because one of them refused to.
	written map[int][][2]uint64
}

// NewList returns the list, of which no row has been used.
func NewList() *List {
	l := &List{Used: map[string]int{}, written: map[int][][2]uint64{}}
	for _, r := range rules {
		l.Used[r.id] = 0
	}
	l.Used[consequence] = 0
	return l
}

// consequence is the row of blocks that differ since one target refused to write
// them.
const consequence = "blocks-after-a-refusal"

// Unlisted returns the line of JSON as a Difference, and what of it no row
// explains. Lines come in their order.
func (l *List) Unlisted(line []byte) (*Difference, []string, error) {
	d := &Difference{}
	if err := json.Unmarshal(line, d); err != nil {
		return nil, nil, err
	}
	cdb, err := hex.DecodeString(d.Request.CDB)
	if err != nil {
		return nil, nil, err
	}
	r := &request{Difference: d, cdb: append(cdb, make([]byte, 16)...), a: d.A.code(), b: d.B.code(), data: offsets(d.Data)}
	left := slices.Clone(d.What)
	blocks := [2]uint64{r.Request.LBA, r.Request.LBA + max(r.Request.Blocks, 1)}
	if r.op("READ") && slices.ContainsFunc(l.written[r.Request.Device], func(w [2]uint64) bool { return w[0] < blocks[1] && blocks[0] < w[1] }) {
		left = l.use(consequence, left, []string{"data"})
	}
	if r.op("WRITE SAME") && d.A.failed() != d.B.failed() {
		l.written[r.Request.Device] = append(l.written[r.Request.Device], blocks)
	}
	for _, rule := range rules {
		if len(left) > 0 && rule.match(r) && (rule.answers == "" || slices.Contains(strings.Fields(rule.answers), d.answers())) {
			left = l.use(rule.id, left, rule.fields)
		}
	}
	return d, left, nil
}

// use returns what is left when the row has explained the fields.
func (l *List) use(id string, left, fields []string) []string {
	rest := slices.DeleteFunc(slices.Clone(left), func(f string) bool { return fields == nil || slices.Contains(fields, f) })
	if len(rest) < len(left) {
		l.Used[id]++
	}
	return rest
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
