package main

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/devices/virtio"
	"gvm/inspect"
	"gvm/text"
)

func statCommand() *cli.Command {
	return &cli.Command{
		Name: "stat", Usage: "show a running machine's exits, requests, latencies and memory", ArgsUsage: "[VM]",
		Description: `VM is the name or the PID of a machine, as gvm list shows them. It may be
left out if only one runs.

Rates are per second, of the time between two readings. Of each CPU: all
exits from the guest, those for I/O ports, MMIO, HLT, and interrupts of the
host, those by signals, and interrupts that the guest got; "-" is of a host
that does not count them. Of each queue that the guest uses: requests, how
long the device kept them, those it has now, and interrupts. Queues that the
kernel serves (backend=vhost) are not counted. docs/inspect.md explains the
rest.

On a terminal --watch draws each reading over the last one; elsewhere it
prints one after the other, with --json an object on a line. It ends with
status 0 when the machine ends.

The exit status is 0, 2 if the machine does not exist, or 3 if it does not
answer.

EXAMPLES
   gvm stat
   gvm stat build --watch
   gvm stat build --watch --interval 10s --json >stat.jsonl`,
		Flags: watchFlags("a JSON object instead of tables"),
		Action: func(c *cli.Context) error {
			if c.Args().Len() > 1 {
				return usageError{fmt.Errorf("stat takes [VM], and got %s", text.Count(c.Args().Len(), "word"))}
			}
			client, err := theMachine(c.Args().First())
			if err != nil {
				return err
			}
			out := screen{out: c.App.Writer, watch: c.Bool("watch")}
			var last *reading
			return follow(c, client, "", 2, func(n inspect.Node) error {
				now := newReading(n)
				before := last
				if last = now; before == nil {
					return nil
				}
				s := now.since(before)
				s.Machine = text.Name(client.Name())
				if c.Bool("json") {
					return out.showJSON(s)
				}
				return out.show(s.String())
			})
		},
	}
}

// reading is a machine's state at a time.
type reading struct {
	at     time.Time
	root   inspect.Node
	values map[string]any // by path
}

func newReading(n inspect.Node) *reading {
	return &reading{time.Now(), n, maps.Collect(n.Values(""))}
}

// number returns the number at a path, and whether there is one.
func (r *reading) number(path string) (uint64, bool) {
	n, err := strconv.ParseUint(fmt.Sprint(r.values[path]), 10, 64)
	return n, err == nil
}

// nodes returns the members of the group at a path.
func (r *reading) nodes(path string) []inspect.Node {
	n, err := r.root.Read(context.Background(), path)
	if err != nil {
		return nil
	}
	return n.Nodes
}

// stats are a machine's work between two readings. A rate is per second; nil: it is not counted.
type stats struct {
	Machine text.Name   `json:"machine"`
	Seconds float64     `json:"seconds"`
	Paused  bool        `json:"paused"`
	Memory  memoryStats `json:"memory"`
	CPUs    []cpuStats  `json:"vcpus"`
	Queues  []queueStat `json:"queues"`
	Disks   []diskStats `json:"disks"`
}

type memoryStats struct {
	Size     uint64  `json:"size"`
	Resident uint64  `json:"resident"`
	Balloon  *uint64 `json:"balloon,omitempty"`
}

type cpuStats struct {
	ID          string   `json:"vcpu"`
	Busy        bool     `json:"busy,omitempty"`
	Exits       *float64 `json:"exits"`
	IO          *float64 `json:"io"`
	MMIO        *float64 `json:"mmio"`
	Halt        *float64 `json:"halt"`
	IRQ         *float64 `json:"irq"`
	Interrupted *float64 `json:"interrupted"`
	Injected    *float64 `json:"irq_injections"`
}

type queueStat struct {
	Device     string       `json:"device"`
	Kind       string       `json:"kind"`
	Queue      string       `json:"queue"`
	Requests   *float64     `json:"requests"`
	P50        *inspect.Age `json:"p50"`
	P90        *inspect.Age `json:"p90"`
	P99        *inspect.Age `json:"p99"`
	InFlight   uint64       `json:"in_flight"`
	Interrupts *float64     `json:"interrupts"`
}

type diskStats struct {
	LUN             string   `json:"lun"`
	Commands        *float64 `json:"commands"`
	Read            *float64 `json:"data_in_bytes"`
	Written         *float64 `json:"data_out_bytes"`
	Tasks           uint64   `json:"tasks"`
	CheckConditions *float64 `json:"check_conditions"`
}

// since returns the differences from before, an earlier reading.
func (r *reading) since(before *reading) *stats {
	s := &stats{Seconds: r.at.Sub(before.at).Seconds(), Paused: r.values["paused"] == true,
		CPUs: []cpuStats{}, Queues: []queueStat{}, Disks: []diskStats{}}
	rate := func(path string) *float64 {
		now, ok := r.number(path)
		if !ok {
			return nil
		}
		if was, _ := before.number(path); was <= now { // else the counter began again
			now -= was
		}
		per := float64(now) / s.Seconds
		return &per
	}
	for _, n := range r.nodes("memory") {
		size, _ := r.number("memory/" + n.Name + "/size")
		resident, _ := r.number("memory/" + n.Name + "/resident")
		s.Memory.Size += size
		s.Memory.Resident += resident
	}
	for _, n := range r.nodes("vcpu") {
		p := "vcpu/" + n.Name + "/"
		s.CPUs = append(s.CPUs, cpuStats{n.Name, n.Value != nil, rate(p + "kvm/exits"), rate(p + "exit/io"),
			rate(p + "exit/mmio"), rate(p + "kvm/halt_exits"), rate(p + "kvm/irq_exits"), rate(p + "exit/interrupted"),
			rate(p + "kvm/irq_injections")})
	}
	for _, f := range r.nodes("pci") {
		device := "pci/" + f.Name + "/virtio/"
		id, _ := r.number(device + "device_type")
		kind := virtio.ID(id).Name()
		if pages, ok := r.number(device + "device/actual"); ok && kind == "balloon" {
			bytes := pages << 12
			s.Memory.Balloon = &bytes
		}
		for _, q := range r.nodes(device + "queue") {
			p := device + "queue/" + q.Name + "/"
			if n, _ := r.number(p + "requests"); n == 0 {
				continue
			}
			inFlight, _ := r.number(p + "in_flight")
			stat := queueStat{Device: f.Name, Kind: kind, Queue: q.Name, Requests: rate(p + "requests"),
				InFlight: inFlight, Interrupts: rate(p + "interrupts")}
			if h := latency(r.root, p).Since(latency(before.root, p)); h.Count() > 0 {
				at := func(part float64) *inspect.Age { a := inspect.Age(h.Quantile(part)); return &a }
				stat.P50, stat.P90, stat.P99 = at(.5), at(.9), at(.99)
			}
			s.Queues = append(s.Queues, stat)
		}
	}
	for _, d := range r.nodes("disk") {
		p := "disk/" + d.Name + "/"
		tasks, _ := r.number(p + "tasks")
		s.Disks = append(s.Disks, diskStats{d.Name, rate(p + "commands"), rate(p + "data_in_bytes"),
			rate(p + "data_out_bytes"), tasks, rate(p + "check_conditions")})
	}
	return s
}

// latency returns the histogram of the queue at a path.
func latency(root inspect.Node, queue string) inspect.Histogram {
	n, err := root.Read(context.Background(), queue+"latency")
	if err != nil {
		return inspect.Histogram{}
	}
	return inspect.HistogramOf(n)
}

// String returns tables of at most 80 columns.
func (s *stats) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s, %s of memory, %s resident", text.Printable(string(s.Machine)), text.Count(len(s.CPUs), "CPU"),
		bytesWord(float64(s.Memory.Size)), bytesWord(float64(s.Memory.Resident)))
	if s.Memory.Balloon != nil {
		fmt.Fprintf(&b, ", %s in the balloon", bytesWord(float64(*s.Memory.Balloon)))
	}
	if s.Paused {
		b.WriteString(", paused")
	}
	fmt.Fprintf(&b, "\n\n%-8s%9s%9s%9s%9s%9s%9s%9s\n", "VCPU", "EXITS/s", "IO/s", "MMIO/s", "HALT/s", "IRQ/s", "SIGNAL/s",
		"INJECT/s")
	for _, c := range s.CPUs {
		id := text.Printable(c.ID)
		if c.Busy {
			fmt.Fprintf(&b, "%-8s%9s\n", id, "busy")
			continue
		}
		fmt.Fprintf(&b, "%-8s%9s%9s%9s%9s%9s%9s%9s\n", id, rateWord(c.Exits), rateWord(c.IO), rateWord(c.MMIO),
			rateWord(c.Halt), rateWord(c.IRQ), rateWord(c.Interrupted), rateWord(c.Injected))
	}
	if len(s.Queues) > 0 {
		fmt.Fprintf(&b, "\n%-12s%-9s%8s%10s%10s%10s%9s%8s\n", "QUEUE", "DEVICE", "REQ/s", "P50", "P90", "P99", "NOW", "INT/s")
	}
	for _, q := range s.Queues {
		fmt.Fprintf(&b, "%-12s%-9s%8s%10s%10s%10s%9d%8s\n", text.Printable(q.Device+"/"+q.Queue), q.Kind,
			rateWord(q.Requests), timeWord(q.P50), timeWord(q.P90), timeWord(q.P99), q.InFlight, rateWord(q.Interrupts))
	}
	if len(s.Disks) > 0 {
		fmt.Fprintf(&b, "\n%-12s%11s%15s%15s%9s%10s\n", "DISK", "COMMANDS/s", "READ/s", "WRITTEN/s", "NOW", "CHECK/s")
	}
	for _, d := range s.Disks {
		fmt.Fprintf(&b, "%-12s%11s%15s%15s%9d%10s\n", text.Printable(d.LUN), rateWord(d.Commands), rateBytes(d.Read),
			rateBytes(d.Written), d.Tasks, rateWord(d.CheckConditions))
	}
	return b.String()
}

// rateWord returns a rate in 7 columns at most.
func rateWord(r *float64) string {
	switch {
	case r == nil:
		return "-"
	case *r >= 999950:
		return fmt.Sprintf("%.2fM", *r/1e6)
	case *r >= 9999.5:
		return fmt.Sprintf("%.1fk", *r/1e3)
	case *r >= 99.95 || *r == float64(int(*r)):
		return fmt.Sprintf("%.0f", *r)
	}
	return fmt.Sprintf("%.1f", *r)
}

func rateBytes(r *float64) string {
	if r == nil {
		return "-"
	}
	return bytesWord(*r)
}

// bytesWord returns a number of bytes in the unit that suits it.
func bytesWord(n float64) string {
	for _, unit := range []string{"B", "KiB", "MiB", "GiB"} {
		if n < 1023.95 {
			return strings.TrimSuffix(fmt.Sprintf("%.1f", n), ".0") + " " + unit
		}
		n /= 1024
	}
	return fmt.Sprintf("%.1f TiB", n)
}

// timeWord returns a time in three digits.
func timeWord(a *inspect.Age) string {
	if a == nil {
		return "-"
	}
	d, unit := time.Duration(*a), time.Duration(1)
	for d/unit >= 1000 {
		unit *= 10
	}
	return d.Round(unit).String()
}
