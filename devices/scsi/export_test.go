package scsi

// ReturnedSense returns the sense data that the target returns.
func ReturnedSense() []Sense { return returned }
