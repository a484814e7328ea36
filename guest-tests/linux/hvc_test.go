package linux

import (
	"os"
	"os/exec"
	"regexp"
	"testing"

	"gvm/guest-tests/lab"
)

// TestHVC: Linux finds the virtio console. A getty there, the kernel's messages and the size of the
// terminal come and go by gvm console --hvc, in any order in which this kernel reads the
// message of a size, and a driver that starts anew learns the size.
func TestHVC(t *testing.T) {
	for _, name := range []string{"cloud", "7.3"} {
		t.Run(name, func(t *testing.T) { testHVC(t, name) })
	}
}

func testHVC(t *testing.T, name string) {
	g := guest{kernel: kernel(t, name), modules: []string{"virtio_console"}, cmdline: "console=hvc0", script: `
exec >/dev/ttyS0 2>&1 # /dev/console is hvc0 if the driver is built in, as in 7.3
wait_for /dev/hvc0
say ready
getty -n -l /bin/sh 115200 hvc0 dumb
echo logged out >/dev/hvc0
say first
PS1='second> ' getty -n -l /bin/sh 115200 hvc0 dumb
cd /sys/bus/virtio/drivers/virtio_console
device=$(echo virtio*)
echo $device >unbind && echo $device >bind && say rebound
cd /
sized() { # Linux may give the console another number
	for c in /dev/hvc[0-7]; do
		[ "$({ stty size <$c; } 2>/dev/null)" = "40 100" ] && return
	done
	return 1
}
until sized; do sleep 0.1; done
say sized
klog
stty opost </dev/ttyS0 # waits for the output, as the end does for that of /dev/console, which is hvc0
`}
	p := start(t, nil, append(g.build(t), "--name=hvc", "--hvc")...)
	p.waitFor("= ready")
	console := func() *exec.Cmd {
		c := exec.Command(lab.Program("gvm"), "console", "hvc", "--hvc")
		c.Env = os.Environ()
		return c
	}
	sized := func(size, said string) [2]string {
		return [2]string{`until [ "$(stty size)" = "` + size + `" ]; do sleep 0.1; done; echo ` + said + "$((1))\r",
			"\n" + said + "1\n"}
	}
	useTerminal(t, console(), 0, [][2]string{
		{"", "# "},
		{"tty; echo $((6*7))\r", "\n/dev/hvc0\n42\n"},
		sized("40 100", "siz"),
		{"size", ""},
		sized("50 132", "larg"),
		{"echo \"<2>kernel $((8*8)) says\" >/dev/kmsg\r", "kernel 64 says\n"},
		{"sh -c 'echo in fron$((1)); exec sleep 1000'\r", "\nin fron1\n"},
		{"\x03echo after $?\r", "\nafter 130\n"},
		{"exit\r", "\nlogged out\n"}, // input is lost if the console is left before it is sent
		{"\x01d", "left the virtio console of hvc, which runs on"},
	})
	p.waitFor("= first")
	useTerminal(t, console(), 0, [][2]string{
		{"", "\nafter 130\n"}, // of before
		{"", "second> "},
		sized("40 100", "again"),
		{"exit\r", "machine hvc has ended"},
	})
	r := p.wait()
	r.wantStatus(t, 0)
	for _, want := range []string{"rebound", "sized"} {
		if ok, _ := regexp.MatchString("(?m)^= "+want+"$", r.console); !ok {
			t.Errorf("no %q on the console", want)
		}
	}
	r.kernelLog(t, 1, `\] kernel 64 says$`)
}
