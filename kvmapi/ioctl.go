package kvmapi

// Numbers of the ioctls that gvm uses (linux/kvm.h), for kvm.IIO and its kin.
const (
	nrGetAPIVersion       = 0x00
	nrCreateVM            = 0x01
	nrCheckExtension      = 0x03
	nrGetVCPUMmapSize     = 0x04
	nrGetSupportedCPUID   = 0x05
	nrCreateVCPU          = 0x41
	nrSetUserMemoryRegion = 0x46
	nrSetTSSAddr          = 0x47
	nrSetIdentityMapAddr  = 0x48
	nrCreateIRQChip       = 0x60
	nrIRQLine             = 0x61
	nrGetIRQChip          = 0x62
	nrSetIRQChip          = 0x63
	nrSetGSIRouting       = 0x6a
	nrIRQFD               = 0x76
	nrCreatePIT2          = 0x77
	nrSetBootCPUID        = 0x78
	nrIOEventFD           = 0x79
	nrRun                 = 0x80
	nrGetRegs             = 0x81
	nrSetRegs             = 0x82
	nrGetSregs            = 0x83
	nrSetSregs            = 0x84
	nrTranslate           = 0x85
	nrGetMSRs             = 0x88
	nrSetMSRs             = 0x89
	nrGetFPU              = 0x8c
	nrSetFPU              = 0x8d
	nrGetLAPIC            = 0x8e
	nrSetLAPIC            = 0x8f
	nrSetCPUID2           = 0x90
	nrGetMPState          = 0x98
	nrSetMPState          = 0x99
	nrNMI                 = 0x9a
	nrSetGuestDebug       = 0x9b
	nrGetDebugRegs        = 0xa1
	nrSetDebugRegs        = 0xa2
	nrGetTSCKHz           = 0xa3
	nrEnableCap           = 0xa3
	nrSignalMSI           = 0xa5
	nrKVMClockCtrl        = 0xad
	nrGetStatsFD          = 0xce
)
