package kvmapi

import (
	"sync/atomic"
	"unsafe"
)

// setImmediateExit stores kvm_run.immediate_exit, the byte at offset 1, from any thread. Go has no
// atomic byte, so it changes the aligned word that holds it. The kernel never writes that word
// while a vCPU runs, and its other fields (request_interrupt_window, padding) are zero in gvm.
func setImmediateExit(page []byte, v byte) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&page[0])), uint32(v)<<8)
}
