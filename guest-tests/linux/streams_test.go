//go:build built

package linux

import (
	"bytes"
	"os"
	"os/exec"
	"testing"
	"time"

	"gvm/guest-tests/lab"
)

// TestVsockStreams: 1 GiB each way passes a thousand connections at a time unchanged, by --vsock
// unix.
func TestVsockStreams(t *testing.T) {
	begin := time.Now()
	defer func(p time.Duration) { patience = p }(patience)
	patience = 15 * time.Minute
	vsockBridge(t, 1<<30/1000+1)
	t.Logf("%v", time.Since(begin))
}

// TestStreams: 64 MiB of any bytes pass a command in a guest of a stock kernel unchanged, by each
// fast way to the agent. That takes a minute of the lab for each, so TestRungs has less there.
func TestStreams(t *testing.T) {
	k, bb := theLab(t).Cloud, busybox(t)
	for _, rung := range []string{"vsock", "console"} {
		t.Run(rung, func(t *testing.T) {
			in := content(t.Name(), 64<<20)
			var out, errs bytes.Buffer
			cmd := exec.Command(lab.Program("gvm"), "test", "-k", k.BZImage, "--rung", rung, "--timeout", "10m", "--", bb, "cat")
			cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+cacheHome)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &errs
			begin := time.Now()
			if err := cmd.Run(); err != nil || !bytes.Equal(out.Bytes(), in) {
				t.Errorf("%v; %d bytes of %d came back, equal %v\n%s", err, out.Len(), len(in),
					bytes.HasPrefix(in, out.Bytes()), &errs)
			}
			t.Logf("%d bytes in %v, with the boot", len(in), time.Since(begin))
		})
	}
}
