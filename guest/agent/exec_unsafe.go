package agent

import (
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// execution has the arguments of a stage's last system calls. A limit may leave this process no
// more memory, which Go's runtime does not survive, in any of its threads. So all that run needs is
// made before, nothing in it allocates, and no collection runs beside it.
type execution struct {
	resources  []int
	limits     []unix.Rlimit // of resources
	files      []*byte       // the candidates
	argv, envv []*byte       // with a nil at the end
	report     []byte        // empty, with room for a notExecuted in JSON
}

// run sets the limits and executes the first of the files that can be executed. It does not return:
// after a failure it reports a notExecuted and ends the process.
func (x *execution) run() {
	file, errno := x.execute()
	x.report = append(x.report, `{"Errno":`...)
	x.report = strconv.AppendInt(x.report, int64(errno), 10)
	x.report = append(x.report, `,"File":`...)
	x.report = strconv.AppendInt(x.report, int64(file), 10)
	x.report = append(x.report, '}')
	unix.RawSyscall(unix.SYS_WRITE, stageOut, uintptr(unsafe.Pointer(&x.report[0])), uintptr(len(x.report)))
	unix.RawSyscall(unix.SYS_EXIT_GROUP, exitNoTest, 0, 0)
}

// execute returns the failure that decides, as execvp(3) does. ELIBACC stands for a file whose
// interpreter is missing.
func (x *execution) execute() (file int, _ unix.Errno) {
	for i, resource := range x.resources {
		if _, _, errno := unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, uintptr(resource),
			uintptr(unsafe.Pointer(&x.limits[i])), 0, 0, 0); errno != 0 {
			return len(x.files), errno
		}
	}
	failed := unix.ENOENT
	for i, name := range x.files {
		unix.RawSyscall(unix.SYS_WRITE, stageOut, uintptr(unsafe.Pointer(unsafe.StringData(stageReady))),
			uintptr(len(stageReady)))
		_, _, errno := unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(name)),
			uintptr(unsafe.Pointer(&x.argv[0])), uintptr(unsafe.Pointer(&x.envv[0])))
		switch errno {
		case unix.ENOENT, unix.ENOTDIR:
			if _, _, errno := unix.RawSyscall(unix.SYS_ACCESS, uintptr(unsafe.Pointer(name)), unix.F_OK, 0); errno == 0 {
				return i, unix.ELIBACC
			}
		case unix.EACCES: // another directory may have one
			file, failed = i, errno
		default:
			return i, errno
		}
	}
	return file, failed
}
