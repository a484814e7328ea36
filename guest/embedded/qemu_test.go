package embedded_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"gvm/guest/embedded"
	"gvm/guest/embedded/embeddedtest"
)

const diskSize = 16 << 20

// qemu runs the image under QEMU's software emulation, with the command line words and further
// arguments given, and returns the console's output. QEMU stops when the guest powers off, and
// (-no-reboot) when it resets.
func qemu(t *testing.T, words string, arguments ...string) string {
	t.Helper()
	cmd := qemuCommand(t, words, arguments...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

func qemuCommand(t *testing.T, words string, arguments ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skipf("%v (install Debian's qemu-system-x86)", err)
	}
	image := filepath.Join(t.TempDir(), "guest.elf")
	if err := os.WriteFile(image, embedded.Image, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // a run takes 0.2 s: this ends only one that hangs
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, path, append([]string{"-accel", "tcg", "-m", "128", "-nodefaults", "-no-user-config",
		"-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", image, "-append", words}, arguments...)...)
}

// controller is the virtio-scsi device that disk attaches to.
var controller = []string{"-device", "virtio-scsi-pci,id=scsi,disable-legacy=on"}

// disk returns the arguments for a disk on the controller, with the drive's and the scsi-hd's
// options as given.
func disk(name, drive, device string) []string {
	return []string{"-drive", "if=none,id=" + name + "," + drive, "-device", "scsi-hd,bus=scsi.0,drive=" + name + device}
}

// newImage makes a disk image whose every 8 bytes differ from their neighbours', and from those of
// an image of another seed.
func newImage(t *testing.T, size int64, seed byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	content := make([]byte, size)
	for i := range content {
		content[i] = byte(i>>3) ^ byte(i>>11) ^ seed
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func raw(path string) string { return "format=raw,file=" + path }

func hash(t *testing.T, path string) [32]byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(content)
}

// parse requires a complete report that says PASS.
func parse(t *testing.T, console string) embeddedtest.Report {
	t.Helper()
	r, err := embeddedtest.ParseReport(console)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Passed {
		t.Fatalf("the guest found %q:\n%s", r.Failures, console)
	}
	return r
}

func checkDisk(t *testing.T, path string, blockSize int64, lun uint16) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := embeddedtest.CheckDisk(f, info.Size(), blockSize, 0, lun); err != nil {
		t.Error(err)
	}
}

func TestReadOnlyByDefault(t *testing.T) {
	for _, machine := range []string{"pc", "q35"} {
		t.Run(machine, func(t *testing.T) {
			image := newImage(t, diskSize, 1)
			before := hash(t, image)
			console := qemu(t, "", slices.Concat([]string{"-M", machine, "-smp", "3"}, controller, disk("a", raw(image), ""))...)
			r := parse(t, console)
			if hash(t, image) != before {
				t.Error("the disk has changed")
			}
			if r.CPUs != 3 || r.CPUsListed != 3 {
				t.Errorf("%d of %d CPUs up, want 3 of 3", r.CPUs, r.CPUsListed)
			}
			if r.Interrupts == 0 || r.Indirect == 0 || r.Indirect >= r.Requests {
				t.Errorf("%d requests, %d indirect, %d interrupts: want both kinds of request, and interrupts",
					r.Requests, r.Indirect, r.Interrupts)
			}
			if want := "  16 MiB, 32768 blocks of 512 bytes"; !strings.Contains(console, want) {
				t.Errorf("no line %q in\n%s", want, console)
			}
		})
	}
}

// TestBench requires every measurement of the benchmark, at every depth, of reads, and of writes if
// they are allowed.
func TestBench(t *testing.T) {
	for words, operations := range map[string]int{"bench bench-ms=2": 1, "bench write bench-ms=2": 2} {
		image := newImage(t, diskSize, 1)
		before := hash(t, image)
		console := qemu(t, words, slices.Concat([]string{"-M", "q35"}, controller, disk("a", raw(image), ""))...)
		line := regexp.MustCompile(`(?m)^bench: (read|write) depth \d+ (poll|interrupt): ` +
			`[1-9]\d* requests in [1-9]\d* us; ns p50 [1-9]\d* p99 [1-9]\d* p999 [1-9]\d* max [1-9]\d*; ` +
			`\d+ notifications, \d+ interrupts\r$`)
		lines := line.FindAllString(console, -1)
		if len(lines) != operations*2*5 || !strings.Contains(console, "\nPASS") {
			t.Errorf("%s: %d measurements:\n%s", words, len(lines), console)
		}
		if changed := hash(t, image) != before; changed != (operations == 2) {
			t.Errorf("%s: the disk has changed: %v", words, changed)
		}
	}
}

// TestWrite covers two block sizes, BARs that move, a CPU with 1 GiB pages, and the transitional
// device ID.
func TestWrite(t *testing.T) {
	high := []string{"bar 1 moved to 0xd0000000", "bar 4 moved to 0x7000000000"}
	tests := []struct {
		name, words string
		blockSize   int64
		device      string
		arguments   []string
		moved       []string
	}{
		{"plain", "write", 512, "", controller, nil},
		{"4 KiB blocks", "write", 4096, ",physical_block_size=4096,logical_block_size=4096", controller, nil},
		{"moved BARs", "movebars write", 512, "", controller,
			[]string{"bar 1 moved to 0xd0000000", "bar 4 moved to 0xd0004000"}},
		{"BARs moved high", "movebars=high write", 512, "", controller, high},
		{"BARs moved high with 1 GiB pages", "movebars=high write", 512, "",
			append([]string{"-cpu", "max"}, controller...), high},
		{"transitional", "write", 512, "", []string{"-device", "virtio-scsi-pci,id=scsi,disable-legacy=off"}, nil},
		{"neither indirect nor event index", "write", 512, "",
			[]string{"-device", "virtio-scsi-pci,id=scsi,disable-legacy=on,indirect_desc=off,event_idx=off"}, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			image := newImage(t, diskSize, 2)
			console := qemu(t, test.words, slices.Concat([]string{"-M", "q35"}, test.arguments,
				disk("a", raw(image), test.device))...)
			parse(t, console)
			checkDisk(t, image, test.blockSize, 0)
			var moved []string
			for line := range strings.Lines(console) {
				if strings.Contains(line, "moved to") {
					moved = append(moved, strings.TrimSpace(line))
				}
			}
			if !slices.Equal(moved, test.moved) {
				t.Errorf("moved BARs %q, want %q", moved, test.moved)
			}
		})
	}
}

// TestEachDiskByItself uses three LUNs of one target; each must get its own pattern.
func TestEachDiskByItself(t *testing.T) {
	luns := []uint16{0, 3, 300}
	arguments := slices.Concat([]string{"-M", "q35"}, controller)
	var images []string
	for i, lun := range luns {
		images = append(images, newImage(t, diskSize<<i, byte(i)))
		arguments = append(arguments, disk(fmt.Sprint("d", lun), raw(images[i]), fmt.Sprintf(",scsi-id=0,lun=%d,ver=v%d",
			lun, i))...)
	}
	r := parse(t, qemu(t, "write", arguments...))
	for i, lun := range luns {
		checkDisk(t, images[i], 512, lun)
	}
	slices.Sort(r.Disks)
	want := []string{"0:0:0:0 QEMU QEMU HARDDISK v0", "0:0:0:3 QEMU QEMU HARDDISK v1", "0:0:0:300 QEMU QEMU HARDDISK v2"}
	if !slices.Equal(r.Disks, want) {
		t.Errorf("disks %q, want %q", r.Disks, want)
	}
}

// TestTwoControllers: the second controller has its disk at a target whose LUN 0 is only a
// placeholder.
func TestTwoControllers(t *testing.T) {
	first, second := newImage(t, diskSize, 5), newImage(t, diskSize, 6)
	r := parse(t, qemu(t, "", slices.Concat([]string{"-M", "q35"}, controller, disk("a", raw(first), ",ver=v1,scsi-id=3"),
		[]string{"-device", "virtio-scsi-pci,id=other,num_queues=8", "-drive", "if=none,id=b," + raw(second),
			"-device", "scsi-hd,bus=other.0,drive=b,ver=v2,scsi-id=1,lun=2"})...))
	if want := []string{"0:0:3:0 QEMU QEMU HARDDISK v1", "1:0:1:2 QEMU QEMU HARDDISK v2"}; !slices.Equal(r.Disks, want) {
		t.Errorf("disks %q, want %q", r.Disks, want)
	}
}

func TestWriteProtectedDisk(t *testing.T) {
	image := newImage(t, diskSize, 3)
	before := hash(t, image)
	console := qemu(t, "write", slices.Concat([]string{"-M", "q35"}, controller,
		disk("a", raw(image)+",readonly=on", ""))...)
	parse(t, console)
	const want = "ok   a write to a write-protected disk is refused: response 0, status 0x2, sense 7/27/00"
	if !strings.Contains(console, want) {
		t.Errorf("no line %q in\n%s", want, console)
	}
	if hash(t, image) != before {
		t.Error("the disk has changed")
	}
}

// TestFailureIsReported: the guest must detect and report failures.
func TestFailureIsReported(t *testing.T) {
	image := newImage(t, diskSize, 4)
	failing := "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=" + image +
		",file.inject-error.0.event=none,file.inject-error.0.iotype=read" +
		",file.inject-error.0.sector=16384,file.inject-error.0.errno=5,rerror=report"
	tests := []struct {
		name, words string
		arguments   []string
		want        string
	}{
		{"read error", "", slices.Concat(controller, disk("a", failing, "")), "transfer: response 0, status 0x2, sense b/"},
		{"no device", "", nil, "no virtio-scsi device"},
		{"no disk", "", controller, "no disk"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			console := qemu(t, test.words, append([]string{"-M", "q35"}, test.arguments...)...)
			r, err := embeddedtest.ParseReport(console)
			if err != nil {
				t.Fatal(err)
			}
			if r.Passed || !slices.ContainsFunc(r.Failures, func(f string) bool { return strings.HasPrefix(f, test.want) }) {
				t.Errorf("passed %v, failures %q, want one that begins %q", r.Passed, r.Failures, test.want)
			}
		})
	}
	if r := parse(t, qemu(t, "nodisk", "-M", "q35")); r.Checks == 0 {
		t.Error("nodisk: no checks")
	}
}

// qemuEvents starts QEMU stopped, continues it through its QMP monitor, and returns the console and
// the monitor's output until the end.
func qemuEvents(t *testing.T, words string, arguments ...string) (console, events string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan string, 1)
	go func() {
		defer close(told)
		monitor, err := listener.Accept()
		if err != nil {
			return // QEMU did not start; the caller reports that
		}
		defer monitor.Close()
		io.WriteString(monitor, `{"execute":"qmp_capabilities"}{"execute":"cont"}`)
		b, _ := io.ReadAll(monitor) // until QEMU ends, however it closes the socket
		told <- string(b)
	}()
	defer listener.Close()
	console = qemu(t, words, append(arguments, "-S", "-chardev", "socket,id=qmp,path="+path, "-mon",
		"chardev=qmp,mode=control")...)
	return console, <-told
}

// TestCrashWords: each word ends the machine in its own way, before the verdict. So do the two
// verdicts.
func TestCrashWords(t *testing.T) {
	const reset, panicked, shutdown = `"reason": "guest-reset"`, `"event": "GUEST_PANICKED"`, `"reason": "guest-shutdown"`
	tests := []struct{ words, last, event string }{
		{"crash=triple", "triple fault next", reset},
		{"crash=reset", "reset next", reset},
		{"crash=reset-acpi", "reset by ACPI next", reset},
		{"crash=reset-cf9", "reset by port 0xcf9 next", reset},
		{"crash=reset-i8042", "reset by the i8042 next", reset},
		{"crash=panic", "pvpanic event next", panicked},
		{"nodisk", "PASS", shutdown},
		{"", "FAIL: 1 of 3 checks failed", panicked}, // because there is no disk
	}
	for _, test := range tests {
		t.Run(test.words, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			console, events := qemuEvents(t, test.words, "-M", "q35", "-device", "pvpanic", "-d", "cpu_reset", "-D", log)
			lines := strings.Split(strings.TrimSpace(console), "\n")
			if last := lines[len(lines)-1]; !strings.Contains(last, test.last) {
				t.Errorf("last line %q, want %q", last, test.last)
			}
			if !strings.Contains(events, test.event) {
				t.Errorf("no %s among QEMU's events:\n%s", test.event, events)
			}
			resets, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := bytes.Contains(resets, []byte("Triple fault")), test.words == "crash=triple"; got != want {
				t.Errorf("triple fault: %v, want %v", got, want)
			}
		})
	}
}

// startUntil starts QEMU and reads its console up to the line given.
func startUntil(t *testing.T, words, line string) (cmd *exec.Cmd, input io.Writer, console *bufio.Reader) {
	t.Helper()
	cmd = qemuCommand(t, words, "-M", "pc")
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	console = bufio.NewReader(output)
	for {
		got, err := console.ReadString('\n')
		if err != nil {
			t.Fatalf("the guest ended before it said %q: %v", line, err)
		}
		if strings.TrimSpace(got) == line {
			return cmd, input, console
		}
	}
}

func TestEcho(t *testing.T) {
	cmd, input, console := startUntil(t, "echo", "ready")
	if _, err := io.WriteString(input, "some 8-bit text: \xe4\xff, and the end: q"); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(console)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if want := "some 8-bit text: \xe4\xff, and the end: q\r\necho: 35 bytes, "; !strings.HasPrefix(string(rest), want) {
		t.Errorf("after ready came %q, want %q", rest, want)
	}
	parse(t, string(rest))
}

func TestHangAndSpin(t *testing.T) {
	for words, line := range map[string]string{"hang": "hanging", "spin": "spinning"} {
		cmd, _, console := startUntil(t, words, line)
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		if rest, err := io.ReadAll(console); err != nil || len(rest) != 0 {
			t.Errorf("%s: then came %q, error %v", words, rest, err)
		}
		cmd.Wait() // "signal: killed"
	}
}
