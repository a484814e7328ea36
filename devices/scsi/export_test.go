package scsi

import "time"

// ReturnedSense returns the sense data that the target returns.
func ReturnedSense() (list []Sense) {
	for _, n := range returned {
		list = append(list, Sense{Key: n.key, ASC: n.asc, ASCQ: n.ascq})
	}
	return list
}

// UsageData returns the usage data of every command.
func UsageData() (list [][]byte) {
	for i := range opcodes {
		for _, o := range append(opcodes[i].actions, opcodes[i]) {
			if o.run != nil {
				list = append(list, o.usageData(byte(i)))
			}
		}
	}
	return list
}

// Counts returns the amounts that limits count for the command in cdb, by its row.
func Counts(u *Unit, cdb []byte) (commands, bytes int) {
	o, err := lookupOpcode(cdb)
	if err != nil || !o.limited() {
		return 0, 0
	}
	if o.data.ofBlocks() {
		_, n := o.extent.of(cdb)
		bytes = int(n) * u.BlockSize()
	}
	if o.flags&countsTwice != 0 {
		bytes *= 2
	}
	return 1, bytes
}

// Counted returns the counts of the limits of u, each with the rate 1, up to a constant.
func Counted(u *Unit) (commands, bytes int) {
	requests, counted := u.limit.Drained()
	return int(requests.Round(time.Second).Seconds()), int(counted.Round(time.Second).Seconds())
}

// MediumWaits returns how many commands and changes wait for the medium of u.
func MediumWaits(u *Unit) (n int) {
	u.medium.mu.Lock()
	defer u.medium.mu.Unlock()
	for range u.medium.queue.all() {
		n++
	}
	return n
}

// Aborting reports whether u ends its sanitize operation or, if it has none, a command.
func Aborting(u *Unit) bool {
	if op := u.sanitizing.Load(); op != nil {
		return op.stopped()
	}
	u.set.mu.Lock()
	defer u.set.mu.Unlock()
	for tk := range u.set.tasks.all() {
		if tk.state.Load() == aborted {
			return true
		}
	}
	return false
}
