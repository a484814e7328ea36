package sandbox

import (
	"math"
	"slices"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data (linux/seccomp.h).
const (
	offsetNumber = 0
	offsetArch   = 4
	offsetArgs   = 16
)

// Opcodes of the filter's machine (linux/bpf_common.h).
const (
	load        = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	and         = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	jump        = unix.BPF_JMP | unix.BPF_JA
	jumpEqual   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jumpAtLeast = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	answer      = unix.BPF_RET | unix.BPF_K
)

// compile makes a filter of rows, which answers all other calls with other. It finds the rows of a
// call by a binary search: each system call of the process passes through it.
func compile(rows []Call, other uint32) []unix.SockFilter {
	for i := range rows { // stable, as the first row of a call that applies counts
		for ; i > 0 && rows[i-1].Number > rows[i].Number; i-- {
			rows[i-1], rows[i] = rows[i], rows[i-1]
		}
	}
	p := make(program, 0, 8*len(rows)) // the kernel translates it while the guest waits for its start
	p.search(spans(rows), other)
	p.put(load, offsetNumber, 0, 0)
	p.put(answer, other, 0, 0)
	p.put(jumpEqual, unix.AUDIT_ARCH_X86_64, 1, 0)
	p.put(load, offsetArch, 0, 0)
	slices.Reverse(p)
	return p
}

// program is a program from its end to its begin: the distance of a jump is known when it is put.
type program []unix.SockFilter

// put puts an instruction before the others.
func (p *program) put(code uint16, k uint32, jt, jf int) {
	*p = append(*p, unix.SockFilter{Code: code, K: k, Jt: uint8(jt), Jf: uint8(jf)})
}

// putSkip puts instructions that skip n others if the comparison of the accumulator with k has the
// result.
func (p *program) putSkip(comparison uint16, k uint32, result bool, n int) {
	if n > math.MaxUint8 {
		p.put(jump, uint32(n), 0, 0)
		n, result = 1, !result
	}
	if result {
		p.put(comparison, k, n, 0)
	} else {
		p.put(comparison, k, 0, n)
	}
}

// span is a range of numbers that have the same rows, up to the next span.
type span struct {
	first int
	rows  []Call // the first one that applies counts; none: all is refused
}

// plain reports whether all calls of the span are allowed.
func (s *span) plain() bool {
	return len(s.rows) > 0 && len(s.rows[0].Args) == 0 && s.rows[0].Errno == 0
}

// spans divides all numbers. rows are in the order of theirs.
func spans(rows []Call) (list []span) {
	next := 0 // the first number behind the list
	for i, c := range rows {
		n, one := int(c.Number), span{int(c.Number), rows[i : i+1]}
		if n > next {
			list = append(list, span{first: next})
		}
		last := &span{}
		if len(list) > 0 {
			last = &list[len(list)-1]
		}
		switch {
		case n < next: // another row of the last call
			if !last.plain() {
				last.rows = rows[i-len(last.rows) : i+1]
			}
		case !last.plain() || !one.plain():
			list = append(list, one)
		}
		next = n + 1
	}
	return append(list, span{first: next})
}

// search puts instructions that find the span of the number in the accumulator.
func (p *program) search(list []span, other uint32) {
	if half := len(list) / 2; half > 0 {
		p.search(list[half:], other)
		end := len(*p)
		p.search(list[:half], other)
		p.putSkip(jumpAtLeast, uint32(list[half].first), true, len(*p)-end)
		return
	}
	if !list[0].plain() {
		p.put(answer, other, 0, 0)
	}
	for _, c := range slices.Backward(list[0].rows) {
		p.row(&c)
	}
}

// row puts instructions that answer the call if its arguments are those of the row.
func (p *program) row(c *Call) {
	end, reply := len(*p), uint32(unix.SECCOMP_RET_ALLOW)
	if c.Errno != 0 {
		reply = unix.SECCOMP_RET_ERRNO | uint32(c.Errno)
	}
	p.put(answer, reply, 0, 0)
	for _, a := range slices.Backward(c.Args) {
		last, match := len(a.Values)-1, len(*p)
		if last < 0 { // no value is allowed
			*p = (*p)[:end]
			return
		}
		p.putSkip(jumpEqual, a.Values[last], false, match-end)
		for _, v := range slices.Backward(a.Values[:last]) {
			p.put(jumpEqual, v, len(*p)-match, 0)
		}
		if a.Mask != 0 {
			p.put(and, a.Mask, 0, 0)
		}
		off := offsetArgs + 8*uint32(a.Index)
		if a.High {
			off += 4
		}
		p.put(load, off, 0, 0)
	}
}
