package virtio

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// leaveCore moves the thread to another of the cores that it may run on, and returns the one that
// it was on. Without another, or the right to choose, it stays, and -1 is returned.
func leaveCore() int {
	var core uint32
	if _, _, e := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&core)), 0, 0); e != 0 {
		return -1
	}
	if !move(func(cores *unix.CPUSet) { cores.Clear(int(core)) }) {
		return -1
	}
	return int(core)
}

// takeCore moves the thread to a core, if it may run there.
func takeCore(core int) {
	move(func(cores *unix.CPUSet) {
		may := cores.IsSet(core)
		if cores.Zero(); may {
			cores.Set(core)
		}
	})
}

// move moves the thread to one of the cores that choose leaves of those that it may run on, and
// then lets it run on all of them again: the scheduler leaves it where it is.
func move(choose func(cores *unix.CPUSet)) bool {
	var all unix.CPUSet
	if unix.SchedGetaffinity(0, &all) != nil {
		return false
	}
	some := all
	if choose(&some); unix.SchedSetaffinity(0, &some) != nil { // EINVAL: none is left
		return false
	}
	_ = unix.SchedSetaffinity(0, &all)
	return true
}
