package disk

import "testing"

// TestQueueNote: a note gives the kernel memory of many request queues, of all targets together,
// and the option that bounds it, unless the user chose the number.
func TestQueueNote(t *testing.T) {
	for _, tt := range []struct {
		k       kernelOptions
		targets int
		want    string
	}{
		{kernelOptions{queues: 8}, 0, ""},
		{kernelOptions{queues: 1}, 1, ""},
		{kernelOptions{queues: 4}, 1, ""},
		{kernelOptions{queues: 5}, 1, "the kernel takes some 21 MiB for each of 5 request queues, one a CPU: " +
			"105 MiB of its memory; --queues N bounds that"},
		{kernelOptions{queues: 5, chosen: true}, 1, ""},
		{kernelOptions{queues: 1, chosen: true}, 1, ""},
		{kernelOptions{queues: 1}, 4, ""},
		{kernelOptions{queues: 4}, 8, "the kernel takes some 21 MiB for each of 32 request queues, one a CPU for each " +
			"of 8 targets: 672 MiB of its memory; --queues N bounds that"},
		{kernelOptions{queues: 4, chosen: true}, 8, ""},
	} {
		if got := tt.k.queueNote(tt.targets); got != tt.want {
			t.Errorf("%+v, %d targets: %q, want %q", tt.k, tt.targets, got, tt.want)
		}
	}
}

func TestLosesResets(t *testing.T) {
	for release, want := range map[string]bool{"6.1.0-56-amd64": true, "5.10.0": true, "6.3.9": true, "6.4.0": false,
		"6.12.117+deb12": false, "7.0": false, "": false, "linux": false} {
		if losesResets(release) != want {
			t.Errorf("%q: %v", release, !want)
		}
	}
}
