package scsi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"reflect"
	"runtime"
	"testing"
)

// TestKeptIsBounded sends ever new requests that make a unit keep state: the state stays small.
func TestKeptIsBounded(t *testing.T) {
	const times = 20000
	target, u := idleTarget(t)
	do := func(tag uint64, cdb []byte) {
		done := make(chan struct{})
		target.Submit(&Command{CDB: cdb, Tag: tag, Done: func(Result) { close(done) }})
		<-done
	}
	s := &u.set
	for i := range times {
		s.holdCopy(0, copyResult{list: byte(i), bytes: uint64(i)})
		s.dropCopy(0, byte(i+128))
		// A deferred error holds neither the cause of a failure nor its place.
		deferred := senseOf(&mediumError{[]string{"flush", "write", "read"}[i%3], int64(i),
			fmt.Errorf("failure %d", i)})
		deferred.Deferred = true
		s.attention(deferred, everyone)
		s.attention([]Sense{CapacityChanged, ModeParamsChanged, CommandsCleared, LUNsChanged}[i%4], everyone)
		target.QueryTask(0, 0, uint64(i))
		target.AbortTask(0, 0, uint64(i))
		if i%16 == 0 {
			do(uint64(i), make([]byte, 6))
		}
	}
	s.mu.Lock()
	for s.tasks.first != nil { // a task leaves after Done
		s.mu.Unlock()
		runtime.Gosched()
		s.mu.Lock()
	}
	n := s.nexuses[0]
	if len(s.nexuses) != 1 || len(n.copies) > maxHeldCopies || len(n.attention) > 16 || len(s.byTag) > 0 {
		t.Errorf("%d nexuses, %d results of copies, %d conditions, %d tags",
			len(s.nexuses), len(n.copies), len(n.attention), len(s.byTag))
	}
	s.mu.Unlock()
	var p persistent
	for i := range NexusID(3 * maxRegistrations) {
		if o, err := p.apply(reserveOut{action: prRegisterIgnore, nexus: i, newKey: uint64(i) + 1}); err == nil {
			p = o.persistent
		}
	}
	if len(p.registered) != maxRegistrations {
		t.Errorf("%d registrations, want %d", len(p.registered), maxRegistrations)
	}
}

// FuzzKept: bytes are read as persistent reservations only if these are written as the same bytes.
func FuzzKept(f *testing.F) {
	p := persistent{kind: writeExclusive, holder: 7, aptpl: true, registered: []registration{{7, 0x11}, {9, 0x12}}}
	f.Add(p.kept())
	p.kind, p.holder = writeExclusiveAllRegistrants, 0
	f.Add(p.kept())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		inputs := [][]byte{b}
		if body := len(b) - 4; body >= 0 { // with the right sum as well
			inputs = append(inputs, binary.BigEndian.AppendUint32(bytes.Clone(b[:body]), crc32.Checksum(b[:body], keptCRC)))
		}
		for _, b := range inputs {
			p, err := parseKept(b)
			if err != nil && (err != ErrReservationState || !reflect.DeepEqual(p, persistent{})) {
				t.Errorf("% x: %+v, %v", b, p, err)
			}
			if err == nil && !bytes.Equal(p.kept(), b) {
				t.Errorf("% x is %+v, which is written as % x", b, p, p.kept())
			}
		}
	})
}
