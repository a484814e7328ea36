package scsi

// Probe is a command that shows how targets answer it, for a comparison.
type Probe struct {
	CDB     []byte
	In, Out int  // bytes of its buffers
	Writes  bool // it may write the blocks of its extent
}

// Probes returns commands of every row of the table for a disk with blocks of blockSize bytes, of
// which the last is last: addresses at both ends of the disk and past them, lists of several
// lengths, and buffers that do not fit. Commands of service actions include one without a row.
func Probes(blockSize int, last uint64) (list []Probe) {
	for code := range opcodes {
		row, action := &opcodes[code], byte(0)
		for i := range row.actions {
			a := &row.actions[i]
			list = append(list, a.probes([]byte{byte(code), a.action()}, blockSize, last)...)
			if a.action() == action {
				action++
			}
		}
		switch {
		case row.run != nil:
			list = append(list, row.probes([]byte{byte(code), 0}, blockSize, last)...)
		case row.actions != nil:
			cdb := make([]byte, row.actions[0].length())
			cdb[0], cdb[1] = byte(code), action
			list = append(list, Probe{CDB: cdb})
		}
	}
	return list
}

// probes returns the Probes of a row, whose CDBs have the first two bytes of begin.
func (o *opcode) probes(begin []byte, blockSize int, last uint64) (list []Probe) {
	// add makes a command with buffers of the size that it takes, times of halves.
	add := func(lba, blocks, length uint64, halves int) {
		fields := []field{o.extent.lba, o.extent.blocks, o.list}
		cdb := make([]byte, o.length())
		copy(cdb, begin)
		for i, v := range []uint64{lba, blocks, length} {
			if f := fields[i]; f != (field{}) && !f.put(cdb, v) {
				return
			}
		}
		_, n := o.extent.of(cdb)
		size := 0
		switch {
		case o.data == listIn || o.data == listOut:
			size = int(length)
		case o.data == oneBlock:
			size = blockSize
		case o.data == blocksIn || o.data == blocksOut:
			size = int(n) * blockSize
		case o.data == compared && o.flags&writes != 0:
			size = 2 * int(n) * blockSize
		}
		p := Probe{CDB: cdb, Writes: o.flags&writes != 0}
		switch size = size * halves / 2; o.data.direction() {
		case DataIn:
			p.In = size
		case DataOut:
			p.Out = size
		}
		list = append(list, p)
	}
	const fits = 2
	switch {
	case o.extent.blocks != field{}:
		for _, at := range []struct{ lba, blocks uint64 }{{0, 1}, {0, 8}, {7, 3}, {last - 7, 8}, {last, 1}, {last, 2},
			{last + 1, 1}, {1<<32 - 1, 1}, {1 << 40, 1}, {1<<64 - 1, 2}, {0, 0}, {last, 0}, {last + 1, 0}} {
			add(at.lba, at.blocks, 0, fits)
		}
		for _, halves := range []int{0, 1, 8} {
			add(16, 1, 0, halves)
		}
	case o.extent.lba != field{}:
		for _, lba := range []uint64{0, 7, last, last + 1, 1<<64 - 1} {
			add(lba, 0, 96, fits)
		}
	}
	switch {
	case o.data == listIn || o.data == listOut:
		for _, length := range []uint64{0, 1, 4, 8, 13, 24, 255, 4096} {
			add(0, 0, length, fits)
		}
		for _, halves := range []int{0, 1, 8} {
			add(0, 0, 24, halves)
		}
	case o.list != field{}:
		add(0, 0, 1, fits) // a list that the command does not have
	case o.extent.lba == field{}:
		add(0, 0, 0, fits)
	}
	return list
}
