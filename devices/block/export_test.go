package block

// SetSysfs sets the directory that stands for /sys, and returns a function that undoes that.
func SetSysfs(dir string) (undo func()) {
	was := sysfs
	sysfs = dir
	return func() { sysfs = was }
}
