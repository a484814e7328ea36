package disk

import "testing"

// TestQueueNote: a note gives the kernel memory of many request queues and the option that bounds
// it, unless the user chose the number.
func TestQueueNote(t *testing.T) {
	for _, tt := range []struct {
		k    kernelOptions
		want string
	}{
		{kernelOptions{queues: 1}, ""},
		{kernelOptions{queues: 4}, ""},
		{kernelOptions{queues: 5}, "the kernel takes some 21 MiB for each of 5 request queues, one a CPU: " +
			"105 MiB of its memory; --queues N bounds that"},
		{kernelOptions{queues: 5, chosen: true}, ""},
		{kernelOptions{queues: 1, chosen: true}, ""},
	} {
		if got := tt.k.queueNote(); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.k, got, tt.want)
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
