//go:build race

package vscsi

// The race detector makes every eventfd read and write allocate.
func init() { raceDetector = true }
