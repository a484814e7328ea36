package acpi

import (
	"encoding/binary"
	"strings"
)

// An aml is a piece of AML byte code: a term, an object, a name, a resource descriptor. The
// functions of this file implement the part of its grammar (ACPI 6.4, 20.2) that the DSDT needs;
// each is named as in ASL.
type aml []byte

var le = binary.LittleEndian

func join(parts ...aml) aml {
	var b aml
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// pkg prepends an opcode and the PkgLength (20.2.4), which counts itself, to a body.
func pkg(op aml, body ...aml) aml {
	b := join(body...)
	n := len(b) + 1
	if n < 1<<6 {
		return join(op, aml{byte(n)}, b)
	}
	extra := 1
	for n = len(b) + 2; n >= 1<<(4+8*extra); n++ {
		extra++
	}
	length := aml{byte(extra<<6 | n&0xf)}
	for n >>= 4; extra > 0; extra-- {
		length = append(length, byte(n))
		n >>= 8
	}
	return join(op, length, b)
}

// seg is a NameSeg (20.2.2): up to four characters, padded.
func seg(s string) aml { return aml((s + "____")[:4]) }

func integer(v uint64) aml {
	switch {
	case v <= 1:
		return aml{byte(v)} // ZeroOp, OneOp
	case v < 1<<8:
		return aml{0x0a, byte(v)}
	case v < 1<<16:
		return le.AppendUint16(aml{0x0b}, uint16(v))
	case v < 1<<32:
		return le.AppendUint32(aml{0x0c}, uint32(v))
	}
	return le.AppendUint64(aml{0x0e}, v)
}

func str(s string) aml { return append(append(aml{0x0d}, s...), 0) }

// eisaID is a compressed EISA type ID (19.3.4): three letters, four hex digits.
func eisaID(s string) aml {
	v := uint32(s[0]-'@')<<26 | uint32(s[1]-'@')<<21 | uint32(s[2]-'@')<<16
	for i, c := range s[3:7] {
		v |= uint32(strings.IndexRune("0123456789ABCDEF", c)) << (12 - 4*i)
	}
	return binary.BigEndian.AppendUint32(aml{0x0c}, v)
}

// toUUID is a Buffer in the byte order of ToUUID (19.6.142).
func toUUID(s string) aml {
	order := [16]int{6, 4, 2, 0, 11, 9, 16, 14, 19, 21, 24, 26, 28, 30, 32, 34}
	b := make(aml, 16)
	for i, at := range order {
		for _, c := range s[at : at+2] {
			b[i] = b[i]<<4 | byte(strings.IndexRune("0123456789ABCDEF", c))
		}
	}
	return buffer(b)
}

func buffer(b aml) aml { return pkg(aml{0x11}, integer(uint64(len(b))), b) }

func packageOf(elems ...aml) aml {
	return pkg(aml{0x12}, aml{byte(len(elems))}, join(elems...))
}

func name(n string, value aml) aml         { return join(aml{0x08}, seg(n), value) }
func scope(n string, body ...aml) aml      { return pkg(aml{0x10}, seg(n), join(body...)) }
func device(n string, body ...aml) aml     { return pkg(aml{0x5b, 0x82}, seg(n), join(body...)) }
func returns(v aml) aml                    { return join(aml{0xa4}, v) }
func store(v, target aml) aml              { return join(aml{0x70}, v, target) }
func and(a, b, target aml) aml             { return join(aml{0x7b}, a, b, target) }
func or(a, b, target aml) aml              { return join(aml{0x7d}, a, b, target) }
func equal(a, b aml) aml                   { return join(aml{0x93}, a, b) }
func not(a aml) aml                        { return join(aml{0x92}, a) }
func ifElse(cond, then, otherwise aml) aml { return join(when(cond, then), pkg(aml{0xa1}, otherwise)) }
func when(cond aml, then ...aml) aml       { return pkg(aml{0xa0}, cond, join(then...)) }

// method is a serialized method: one that creates names must not run twice at a time.
func method(n string, args byte, body ...aml) aml {
	const serialized = 1 << 3
	return pkg(aml{0x14}, seg(n), aml{args | serialized}, join(body...))
}

func createDWordField(buf aml, at uint64, n string) aml {
	return join(aml{0x8a}, buf, integer(at), seg(n))
}

var local0 = aml{0x60}

func arg(i byte) aml { return aml{0x68 + i} }

// resources is a Buffer of resource descriptors (6.4) and the end tag, with checksum zero: not
// used.
func resources(descs ...aml) aml { return buffer(append(join(descs...), 0x79, 0)) }

// io is a fixed range of I/O ports, decoding 16-bit addresses (6.4.2.5).
func io(base uint16, size byte) aml {
	return append(le.AppendUint16(le.AppendUint16(aml{0x47, 1}, base), base), 1, size)
}

// irqNoFlags is an edge-triggered, active-high ISA interrupt (6.4.2.1).
func irqNoFlags(irq byte) aml { return le.AppendUint16(aml{0x22}, 1<<irq) }

// memory32Fixed is a writable range of memory (6.4.3.4).
func memory32Fixed(base, size uint32) aml {
	return le.AppendUint32(le.AppendUint32(aml{0x86, 9, 0, 1}, base), size)
}

// Resource types of an address space descriptor (6.4.3.5).
const (
	memoryRange = 0
	ioRange     = 1
	busRange    = 2
)

// window is an address space descriptor of a resource producer, with fixed minimum and maximum,
// positively decoded (6.4.3.5). Its fields are width bytes: 2, 4 or 8. Memory is writable and not
// prefetchable: Linux puts a non-prefetchable BAR into no other window.
func window(kind byte, width int, base, size uint64) aml {
	tag := map[int]byte{2: 0x88, 4: 0x87, 8: 0x8a}[width]
	specific := map[byte]byte{memoryRange: 1, ioRange: 3, busRange: 0}[kind] // _RW; _RNG EntireRange
	b := aml{tag, byte(3 + 5*width), 0, kind, 1<<2 | 1<<3, specific}
	for _, v := range []uint64{0, base, base + size - 1, 0, size} { // granularity, min, max, translation, length
		b = append(b, le.AppendUint64(nil, v)[:width]...)
	}
	return b
}
