package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"gvm/kvmapi/nowait"
)

// contender is a VMM to measure: its name, its program and arguments.
type contender struct {
	name string
	args []string
}

// qemu is a QEMU to compare with.
type qemu struct {
	name    string // with the version, such as "qemu 11.1"
	path    string
	mapping bool // its virtio-scsi has iothread-vq-mapping, which came with QEMU 10.0
}

const systemQEMU = "qemu-system-x86_64"

// qemuFlag returns --qemu of the benchmarks.
func qemuFlag() cli.Flag {
	return &cli.GenericFlag{Name: "qemu", Value: new(words), TakesFile: true,
		Usage: "`PROGRAM` to compare with, which may be given several times; default: " + systemQEMU}
}

var qemuVersion = pattern(`^QEMU emulator version ((\d+)\.\d+)`)

// qemus returns the QEMUs among the programs of --qemu. A note names each that it leaves out.
func qemus(ctx context.Context, programs []string) (all []qemu) {
	if len(programs) == 0 {
		programs = []string{systemQEMU}
	}
	for _, program := range programs {
		path, err := exec.LookPath(program)
		if err != nil {
			note(program + " is not installed (Debian: apt install qemu-system-x86): nothing to compare with")
			continue
		}
		out, _ := nowait.Command(ctx, path, "--version").Output()
		found := qemuVersion().FindStringSubmatch(string(out))
		if found == nil {
			note(program + " --version prints no version of QEMU: left out")
			continue
		}
		q := qemu{name: "qemu " + found[1], path: path, mapping: len(found[2]) > 1}
		if slices.ContainsFunc(all, func(o qemu) bool { return o.name == q.name }) {
			note(program + " is " + q.name + ", which is measured already: left out")
			continue
		}
		all = append(all, q)
	}
	return all
}

// machine returns the command line of a machine with as few devices as gvm's.
func (q qemu) machine(kind string) []string {
	// Use the host's CPU without arch-capabilities, whose MSR not every KVM allows to set.
	return []string{
		q.path, "-M", kind, "-accel", "kvm", "-cpu", "max,-arch-capabilities", "-m", "512",
		"-nodefaults", "-no-user-config",
		"-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot",
	}
}

// withDisk returns the command line of a machine with the same guest and disk as gvm's, in QEMU's
// fastest configuration.
func (q qemu) withDisk(kernel, path, words, aio, cache string, write bool) []string {
	escape := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
	onOff := map[bool]string{false: "off", true: "on"}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs // QEMU takes text before a colon for a protocol
	}
	file := fmt.Sprintf("driver=file,filename=%s,node-name=f,read-only=%s,aio=%s,cache.direct=%s",
		escape(path), onOff[!write], aio, onOff[cache == "none"])
	if fi, err := os.Stat(path); err == nil && fi.Mode()&os.ModeDevice != 0 {
		file = strings.Replace(file, "driver=file", "driver=host_device", 1)
	}
	scsi, disk := "virtio-scsi-pci,id=scsi,disable-legacy=on,iothread=t", "scsi-hd,bus=scsi.0,drive=d"
	if q.mapping { // a list needs JSON, and devices in JSON are made after all others
		scsi = `{"driver":"virtio-scsi-pci","id":"scsi","disable-legacy":"on","iothread-vq-mapping":[{"iothread":"t"}]}`
		disk = `{"driver":"scsi-hd","bus":"scsi.0","drive":"d"}`
	}
	return append(q.machine("q35"), "-kernel", kernel, "-append", words,
		"-object", "iothread,id=t", "-device", scsi,
		"-blockdev", file, "-blockdev", "driver=raw,file=f,node-name=d,read-only="+onOff[!write],
		"-device", disk)
}

// inTurns measures each VMM once in every round. It drops a VMM that fails in the first round, with
// a note, and returns the others. Any other failure is an error, as is one of the first VMM, which
// is gvm.
func inTurns(
	ctx context.Context, rounds int, vmms []contender, measure func(round int, v contender) error,
) ([]contender, error) {
	for round := range rounds {
		for i := 0; i < len(vmms); {
			err := measure(round, vmms[i])
			switch {
			case ctx.Err() != nil:
				return nil, context.Cause(ctx)
			case err != nil && i > 0 && round == 0:
				note(fmt.Sprintf("%s does not run here and is left out: %v", vmms[i].name, err))
				vmms = slices.Delete(vmms, i, i+1)
			case err != nil:
				return nil, err
			default:
				i++
			}
		}
	}
	return vmms, nil
}

var timingPrint = pattern(`(?m)^gvm: timing .*\n`)

// said adds the first line of text, a program's error output without --timing lines, to err, with
// the exit status.
func said(err error, text string) error {
	var exit *exec.ExitError
	text, _, _ = strings.Cut(strings.TrimSpace(timingPrint().ReplaceAllString(text, "")), "\n")
	switch {
	case errors.As(err, &exit) && text != "":
		return endError{exit.ExitCode(), errors.New(strings.TrimPrefix(text, "gvm: "))}
	case err == nil:
		return errors.New("the machine ended before its guest was ready")
	}
	return err
}

// median sorts v, which is not empty, and returns its middle.
func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
