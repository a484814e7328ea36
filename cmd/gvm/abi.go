package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"gvm/devices/scsi/trace"
	"gvm/devices/virtio/vhostscsi"
	"gvm/kvmapi"
	"gvm/kvmapi/vhost"
	"gvm/text"
)

// exitABIDiffers is the exit status of `gvm abi diff` for kernels that differ.
const exitABIDiffers = 1

func abiCommand() *cli.Command {
	jsonFlag := &cli.BoolFlag{Name: "json", Usage: "write JSON, for gvm abi diff and other programs"}
	return &cli.Command{
		Name:  "abi",
		Usage: "show the versions and features of this kernel's KVM and vhost-scsi",
		Description: `Asks the kernel for the versions, features and capabilities of the interfaces
that gvm uses. Interfaces that this host lacks are shown as errors; the exit
status is 0 all the same. gvm abi diff ends with 1 if the two differ.

EXAMPLES
   gvm abi
   gvm abi --json > 6.12.json
   gvm abi diff 6.1.json 6.12.json`,
		Flags: []cli.Flag{jsonFlag},
		Subcommands: []*cli.Command{{
			Name:      "diff",
			Usage:     "show the changes between two kernels",
			ArgsUsage: "A.json B.json",
			Action: func(c *cli.Context) error {
				if c.Args().Len() != 2 {
					return usageError{fmt.Errorf("want gvm abi diff A.json B.json, and got %s",
						text.Count(c.Args().Len(), "file"))}
				}
				return abiDiff(c.App.Writer, c.Args().Get(0), c.Args().Get(1))
			},
		}},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return showHelp(c)
			}
			facts := abiFacts()
			if c.Bool("json") {
				return writeJSON(c.App.Writer, facts)
			}
			return abiTable(c.App.Writer, facts)
		},
	}
}

// facts describe a kernel: names with numbers, texts, switches or more facts. A diff compares them
// by name, so it needs to know none of them.
type facts = map[string]any

func abiFacts() facts {
	return facts{"gvm": version, "kernel": trace.HostKernel(), "kvm": kvmFacts(), "vhost_scsi": vhostFacts()}
}

func kvmFacts() facts {
	sys, err := kvmapi.Open()
	if err != nil {
		return facts{"error": err.Error()}
	}
	defer sys.Close()
	caps := facts{}
	for _, c := range slices.Concat(neededCaps, usefulCaps, countCaps) {
		caps[c.name] = sys.Check(c.cap)
	}
	return facts{"api_version": kvmapi.APIVersion, "capabilities": caps}
}

// maxQueuesParameter holds the number of request queues that the kernel gives a vhost-scsi device.
// Kernels before Linux 6.0 do not have the parameter.
const maxQueuesParameter = "/sys/module/vhost_scsi/parameters/max_io_vqs"

func vhostFacts() facts {
	dev, err := vhost.OpenSCSI()
	if err != nil {
		return facts{"error": err.Error()}
	}
	defer dev.Close()
	f := facts{}
	put := func(name string, value any, err error) {
		switch {
		case errors.Is(err, unix.ENOTTY):
			value = "none" // this kernel does not have the ioctl
		case err != nil:
			value = err.Error()
		}
		f[name] = value
	}
	v, err := dev.ABIVersion()
	put("abi_version", v, err)
	features, err := dev.Features()
	put("features", bitNames(features, featureNames), err)
	features, err = dev.BackendFeatures()
	put("backend_features", bitNames(features, backendFeatureNames), err)
	if err = dev.SetOwner(); err == nil {
		_, err = dev.NewWorker()
	}
	put("workers", "one for each queue if asked", err)
	b, err := os.ReadFile(maxQueuesParameter)
	n, numErr := strconv.Atoi(strings.TrimSpace(string(b)))
	if err == nil {
		put("max_io_vqs", n, numErr)
	}
	return f
}

// Names of feature bits: virtio 1.3, 6 and 5.6.3; linux/vhost_types.h.
var (
	featureNames = map[int]string{
		0: "VIRTIO_SCSI_F_INOUT", 1: "VIRTIO_SCSI_F_HOTPLUG", 2: "VIRTIO_SCSI_F_CHANGE", 3: "VIRTIO_SCSI_F_T10_PI",
		24: "VIRTIO_F_NOTIFY_ON_EMPTY", 26: "VHOST_F_LOG_ALL", 27: "VIRTIO_F_ANY_LAYOUT",
		28: "VIRTIO_F_INDIRECT_DESC", 29: "VIRTIO_F_EVENT_IDX", 32: "VIRTIO_F_VERSION_1",
		33: "VIRTIO_F_ACCESS_PLATFORM",
	}
	backendFeatureNames = map[int]string{1: "VHOST_BACKEND_F_IOTLB_MSG_V2", 2: "VHOST_BACKEND_F_IOTLB_BATCH"}
)

func bitNames(v uint64, names map[int]string) facts {
	out := facts{}
	for bit := range 64 {
		if v&(1<<bit) == 0 {
			continue
		}
		name, ok := names[bit]
		if !ok {
			name = fmt.Sprintf("bit %d", bit)
		}
		out[name] = true
	}
	return out
}

// flatten flattens nested facts to one level, such as "kvm.capabilities.KVM_CAP_IRQCHIP" to "1".
func flatten(prefix string, f facts, into map[string]string) {
	for name, v := range f {
		name = text.Printable(prefix + name)
		switch v := v.(type) {
		case facts:
			flatten(name+".", v, into)
		case bool:
			into[name] = map[bool]string{true: "yes", false: "no"}[v]
		default:
			into[name] = text.Printable(fmt.Sprint(v))
		}
	}
}

func abiTable(w io.Writer, f facts) error {
	flat := map[string]string{}
	flatten("", f, flat)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, name := range slices.Sorted(maps.Keys(flat)) {
		fmt.Fprintf(t, "%s\t%s\n", name, flat[name])
	}
	return t.Flush()
}

// readFacts reads the output of gvm abi --json.
func readFacts(path string) (map[string]string, error) {
	b, err := readInput(context.Background(), path, 16<<20) // signals end a command that catches none
	if err != nil {
		return nil, err
	}
	var f facts
	if err := json.Unmarshal(b, &f); err != nil || f["kernel"] == nil {
		return nil, configError{fmt.Errorf("%s: not the output of gvm abi --json; give a file that it made", path)}
	}
	flat := map[string]string{}
	flatten("", f, flat)
	return flat, nil
}

func abiDiff(w io.Writer, pathA, pathB string) error {
	a, err := readFacts(pathA)
	if err != nil {
		return err
	}
	b, err := readFacts(pathB)
	if err != nil {
		return err
	}
	names := maps.Clone(a)
	maps.Copy(names, b)
	differences := 0
	for _, name := range slices.Sorted(maps.Keys(names)) {
		va, inA := a[name]
		vb, inB := b[name]
		switch {
		case va == vb && inA == inB:
			continue
		case !inA:
			_, err = fmt.Fprintf(w, "+ %s: %s\n", name, vb)
		case !inB:
			_, err = fmt.Fprintf(w, "- %s: %s\n", name, va)
		default:
			_, err = fmt.Fprintf(w, "~ %s: %s -> %s\n", name, va, vb)
		}
		if err != nil {
			return err
		}
		if name != "gvm" && name != "kernel" { // the values are the names of the compared kernels
			differences++
		}
	}
	if differences > 0 {
		return endError{exitABIDiffers, fmt.Errorf("the interfaces of the two kernels differ in %d facts", differences)}
	}
	return nil
}

// parseABI parses the value of --vhost-abi.
func parseABI(s string) (vhostscsi.ABIPolicy, error) {
	switch n, err := strconv.ParseUint(s, 10, 31); {
	case s == "":
		return vhostscsi.ABIPolicy{}, nil
	case s == "any":
		return vhostscsi.AnyABI(), nil
	case err != nil:
		return vhostscsi.ABIPolicy{}, fmt.Errorf("%q: want a version number or any%s", s, text.Suggest(s, []string{"any"}))
	default:
		return vhostscsi.PinABI(int(n)), nil
	}
}
