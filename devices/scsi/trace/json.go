package trace

import (
	"encoding/hex"
	"encoding/json"
	"fmt"

	"gvm/devices/scsi"
)

var kindNames = map[Kind]string{Command: "command", TaskManagement: "tmf", Reset: "reset",
	PowerOn: "power on", Lost: "lost"}

// MarshalJSON writes the record with its names and decoded fields beside the bytes. Fields that the
// backend does not know are left out.
func (r *Record) MarshalJSON() ([]byte, error) {
	v := struct {
		Time     int64   `json:"time_ns"`
		Kind     string  `json:"kind"`
		Device   uint8   `json:"device"`
		Queue    *uint16 `json:"queue,omitempty"`
		LUN      *int    `json:"lun,omitempty"`
		LUNBytes string  `json:"lun_bytes,omitempty"`
		Tag      string  `json:"tag,omitempty"`
		Attr     *uint8  `json:"attr,omitempty"`
		Op       string  `json:"op"`
		Function *uint32 `json:"function,omitempty"`
		CDB      string  `json:"cdb,omitempty"`
		LBA      *uint64 `json:"lba,omitempty"`
		Blocks   *uint64 `json:"blocks,omitempty"`
		Out      *uint32 `json:"out,omitempty"`
		In       *uint32 `json:"in,omitempty"`
		Response *uint8  `json:"response,omitempty"`
		Status   *uint8  `json:"status,omitempty"`
		Residual *uint32 `json:"residual,omitempty"`
		Sense    string  `json:"sense,omitempty"`
		Payload  string  `json:"payload,omitempty"`
		Latency  *int64  `json:"latency_ns,omitempty"`
		Failed   bool    `json:"failed"`
		Outcome  string  `json:"outcome,omitempty"`
		Count    uint64  `json:"count,omitempty"`
	}{
		Time: int64(r.Time), Kind: kindNames[r.Kind], Device: r.Device, Op: r.Op(), Failed: r.Failed(),
		Outcome: r.Outcome(), Count: r.Count,
	}
	if r.Missing&NoQueue == 0 {
		v.Queue = &r.Queue
	}
	if r.Missing&NoResponse == 0 && r.Kind <= TaskManagement {
		v.Response = &r.Response
	}
	if r.Kind <= TaskManagement {
		if n, ok := r.UnitNumber(); ok {
			v.LUN = &n
		}
		v.LUNBytes = hex.EncodeToString(r.LUN[:])
		if r.Missing&NoTag == 0 {
			v.Tag = fmt.Sprintf("%016x", r.Tag)
		}
		v.Latency = (*int64)(&r.Latency)
	}
	switch r.Kind {
	case TaskManagement:
		v.Function = &r.Function
	case Command:
		v.Attr, v.Status = (*uint8)(&r.Attr), (*uint8)(&r.Status)
		v.CDB, v.Sense, v.Payload = hex.EncodeToString(r.CDB), hex.EncodeToString(r.Sense),
			hex.EncodeToString(r.Payload)
		v.Out, v.In = &r.Out, &r.In
		if lba, n, ok := scsi.Extent(r.CDB); ok {
			v.LBA, v.Blocks = &lba, &n
		}
		if r.Missing&NoResidual == 0 {
			v.Residual = &r.Residual
		}
	}
	return json.Marshal(v)
}
