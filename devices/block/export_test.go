package block

// SetSysfs sets the directory that stands for /sys, and returns a function that undoes that.
func SetSysfs(dir string) (undo func()) {
	was := sysfs
	sysfs = dir
	return func() { sysfs = was }
}

// SetConfigfs does the same for /sys/kernel/config.
func SetConfigfs(dir string) (undo func()) {
	was := configfs
	configfs = dir
	return func() { configfs = was }
}
