//go:build race

package virtio_test

// The race detector makes every eventfd read and write allocate.
func init() { raceDetector = true }
