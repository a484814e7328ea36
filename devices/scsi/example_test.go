package scsi_test

import (
	"fmt"
	"log"

	"gvm/devices/block"
	"gvm/devices/scsi"
)

// A target with one disk in memory, and an initiator that asks for its capacity.
func Example() {
	unit, err := scsi.NewUnit(scsi.UnitConfig{Backend: block.NewMem(64 << 20), Serial: "example-1"})
	if err != nil {
		log.Fatal(err)
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, unit); err != nil {
		log.Fatal(err)
	}
	data := make([]byte, 8)
	done := make(chan struct{})
	readCapacity := &scsi.Command{
		CDB: []byte{0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		In:  [][]byte{data},
		Done: func(r scsi.Result) {
			fmt.Printf("status %02x, sense % x, residual %d\n", uint8(r.Status), r.Sense, r.Residual)
			done <- struct{}{}
		},
	}
	for range 2 { // the first command finds POWER ON OCCURRED
		go target.Submit(readCapacity)
		<-done
	}
	fmt.Printf("last block and block length: % x\n", data)
	// Output:
	// status 02, sense 70 00 06 00 00 00 00 0a 00 00 00 00 29 01 00 00 00 00, residual 8
	// status 00, sense , residual 0
	// last block and block length: 00 01 ff ff 00 00 02 00
}
