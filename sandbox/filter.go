package sandbox

import "golang.org/x/sys/unix"

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
	return search([]unix.SockFilter{
		{Code: load, K: offsetArch},
		{Code: jumpEqual, K: unix.AUDIT_ARCH_X86_64, Jt: 1},
		{Code: answer, K: other},
		{Code: load, K: offsetNumber},
	}, rows, other)
}

// search adds instructions that find the rows of the number in the accumulator.
func search(program []unix.SockFilter, rows []Call, other uint32) []unix.SockFilter {
	half := len(rows) / 2
	for half > 0 && rows[half].Number == rows[half-1].Number {
		half--
	}
	if half == 0 { // and if the first half is one call
		for half < len(rows) && rows[half].Number == rows[0].Number {
			half++
		}
	}
	if half < len(rows) {
		branch := len(program) + 1
		program = append(program, unix.SockFilter{Code: jumpAtLeast, K: uint32(rows[half].Number), Jf: 1},
			unix.SockFilter{Code: jump})
		program = search(program, rows[:half], other)
		program[branch].K = uint32(len(program) - branch - 1)
		return search(program, rows[half:], other)
	}
	program = append(program, unix.SockFilter{Code: jumpEqual, K: uint32(rows[0].Number), Jt: 1},
		unix.SockFilter{Code: answer, K: other})
	for i := range rows {
		program = rows[i].compile(program)
	}
	return append(program, unix.SockFilter{Code: answer, K: other})
}

// compile adds instructions that answer the call if its arguments are those of the row.
func (c *Call) compile(program []unix.SockFilter) []unix.SockFilter {
	var failed []int
	for _, a := range c.Args {
		off := offsetArgs + 8*uint32(a.Index)
		if a.High {
			off += 4
		}
		program = append(program, unix.SockFilter{Code: load, K: off})
		if a.Mask != 0 {
			program = append(program, unix.SockFilter{Code: and, K: a.Mask})
		}
		for i, v := range a.Values {
			program = append(program, unix.SockFilter{Code: jumpEqual, K: v, Jt: uint8(len(a.Values) - i)})
		}
		failed = append(failed, len(program))
		program = append(program, unix.SockFilter{Code: jump})
	}
	reply := uint32(unix.SECCOMP_RET_ALLOW)
	if c.Errno != 0 {
		reply = unix.SECCOMP_RET_ERRNO | uint32(c.Errno)
	}
	program = append(program, unix.SockFilter{Code: answer, K: reply})
	for _, i := range failed {
		program[i].K = uint32(len(program) - i - 1)
	}
	return program
}
