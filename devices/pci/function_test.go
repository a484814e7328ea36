package pci

import "testing"

// TestStatusIsClearedByOnes sets the error bits of the status register from inside the package:
// nothing else in gvm sets them yet.
func TestStatusIsClearedByOnes(t *testing.T) {
	f := NewFunction(FunctionConfig{})
	f.conf[regStatus], f.conf[regStatus+1] = 0x10, 0xff
	f.write(regStatus, []byte{0xff, 0x41})
	if f.conf[regStatus] != 0x10 || f.conf[regStatus+1] != 0xbe {
		t.Errorf("status is %#x %#x", f.conf[regStatus], f.conf[regStatus+1])
	}
	f.write(regStatus, []byte{0, 0xff})
	if f.conf[regStatus] != 0x10 || f.conf[regStatus+1] != 0x06 {
		t.Errorf("status is %#x %#x", f.conf[regStatus], f.conf[regStatus+1])
	}
}
