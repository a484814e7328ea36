package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"gvm/devices/block"
	"gvm/devices/scsi"
	"gvm/devices/virtio/ringbench"
	"gvm/devices/virtio/vscsi"
	"gvm/machine/disk"
	"gvm/text"
)

func benchDiskCommand() *cli.Command {
	return &cli.Command{
		Name:      "disk",
		Usage:     "measure the path from the ring to the storage and back, without a guest",
		ArgsUsage: " ",
		Description: `Random reads go through rings, doorbells and interrupts to gvm's SCSI target
and its storage: nothing (null), memory (mem), and an image under $TMPDIR
that is in the page cache (file), or the image of --disk, which is only read.
Beside them, in the same round, fio reads the same file by io_uring, which is
about the most that the host can do, and by pread with one request in flight;
without fio those rows are missing. The driver sleeps until an interrupt, or
polls, where there are two CPUs for each queue: one for it, and one for the
device. QEMU's device cannot run without a guest: gvm bench guest compares
with it.

All figures are medians of the rounds, with the lowest and the highest in
brackets. CPU is that of the whole process, the driver's part included. The
last column is the median of file's requests per second divided by io_uring's
of the same round.

EXAMPLES
   gvm bench disk
   gvm bench disk --depth 32 --size 4K --rounds 11 --json disk.json`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "disk", Usage: "raw image or block device as `PATH`", TakesFile: true},
			&cli.DurationFlag{Name: "time", Value: 200 * time.Millisecond, Usage: "`DURATION` of each measurement"},
			&cli.IntFlag{Name: "rounds", Value: 5, Usage: "measure everything `N` times, in turns"},
			&cli.StringFlag{Name: "size", Value: "4K,128K", Usage: "`LIST` of request sizes"},
			&cli.StringFlag{Name: "depth", Value: "1,8,32,128", Usage: "`LIST` of requests in flight in each queue"},
			&cli.StringFlag{Name: "queues", Value: "1,2", Usage: "`LIST` of numbers of queues"},
			&cli.StringFlag{Name: "driver", Value: "interrupt,poll",
				Usage: "`LIST` of how the driver learns of answers"},
			pollFlag(),
			&cli.StringFlag{Name: "json", Usage: "write every measurement to `FILE`", TakesFile: true},
			plotFlag(),
		},
		Action: benchAction(parseBench),
	}
}

// diskBench is the command line of `gvm bench disk`.
type diskBench struct {
	disk                  string
	time                  time.Duration
	rounds                int
	sizes, depths, queues []int
	drivers               []string
	poll                  time.Duration
	json, plot            string
}

func parseBench(c *cli.Context) (b diskBench, err error) {
	b = diskBench{disk: c.String("disk"), time: c.Duration("time"), rounds: c.Int("rounds"),
		json: c.String("json"), plot: c.String("plot")}
	if b.poll, err = parsePoll(c); err != nil {
		return b, err
	}
	if err := checkPlot(b.plot); err != nil {
		return b, err
	}
	b.drivers = strings.Split(c.String("driver"), ",")
	for _, d := range b.drivers {
		if d != "interrupt" && d != "poll" {
			return b, text.OneOfNames("--driver ", d, []string{"interrupt", "poll"})
		}
	}
	if b.time < time.Millisecond || b.time > time.Hour {
		return b, fmt.Errorf("--time %s: want 1ms to 1h", b.time)
	}
	for _, l := range []struct {
		flag string
		max  int
		to   *[]int
	}{{"size", 1 << 20, &b.sizes}, {"depth", 256, &b.depths}, {"queues", disk.MaxQueues, &b.queues}} {
		for _, word := range strings.Split(c.String(l.flag), ",") {
			v, err := text.ParseSize(word, 1)
			if err == nil && (v < 1 || v > uint64(l.max)) {
				err = fmt.Errorf("want 1 to %d", l.max)
			}
			if err == nil && l.flag == "size" && v%4096 != 0 {
				err = errors.New("want a multiple of 4096")
			}
			if err != nil {
				return b, fmt.Errorf("--%s %s: %w", l.flag, text.Word(word), err)
			}
			*l.to = append(*l.to, int(v))
		}
	}
	return b, nil
}

// sample is one measurement, as in the JSON file.
type sample struct {
	Storage string  `json:"storage"`          // null, mem or file; io_uring and pread are fio's
	Driver  string  `json:"driver,omitempty"` // interrupt or poll; fio has none
	Size    int     `json:"size"`
	Depth   int     `json:"depth"`
	Queues  int     `json:"queues"`
	Round   int     `json:"round"`
	IOPS    float64 `json:"iops"`
	CPU     float64 `json:"cpu_ns"` // per request
	P50     float64 `json:"p50_ns"`
	P99     float64 `json:"p99_ns"`
	Allocs  float64 `json:"allocs"` // per request
}

func (b diskBench) run(ctx context.Context, w io.Writer) (err error) {
	record, err := openBenchRecord(b.json)
	if err != nil {
		return err
	}
	defer func() { err = record.close(err) }()
	path, remove, err := benchFile(b.disk)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	file, err := block.Open(path, block.Options{ReadOnly: true})
	if err != nil {
		return disk.ImageError{Err: err}
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if largest := slices.Max(b.sizes); file.Size() < int64(largest) {
		return configError{fmt.Errorf("--disk %s: has %d bytes, less than a request of %d", path, file.Size(), largest)}
	}
	fio, err := exec.LookPath("fio")
	if err != nil {
		note("fio is not installed (Debian: apt install fio): nothing to compare with")
	}
	storages := []struct {
		name string
		b    block.Backend
	}{{"null", block.Null(file.Size())}, {"mem", block.NewMem(64 << 20)}, {"file", file}}
	var devices []*vscsi.Device
	for _, s := range storages {
		d, err := b.device(s.b)
		if err != nil {
			return err
		}
		devices = append(devices, d)
	}
	var all []sample
	for round := range b.rounds {
		for _, size := range b.sizes {
			for _, queues := range b.queues {
				for _, depth := range b.depths {
					at := sample{Size: size, Depth: depth, Queues: queues, Round: round}
					for i, s := range storages {
						for _, driver := range b.drivers {
							if driver == "poll" && 2*queues > runtime.NumCPU() {
								continue
							}
							r, err := ringbench.Run(devices[i], ringbench.Load{
								Queues: queues, Depth: depth, Size: size, Poll: driver == "poll",
								BlockSize: 512, Blocks: uint64(s.b.Size()) / 512, Time: b.time,
							})
							if err == nil && ctx.Err() != nil {
								err = context.Cause(ctx)
							}
							if err != nil {
								return fmt.Errorf("%s: %w", s.name, err)
							}
							n := float64(r.Requests)
							at.Storage, at.Driver = s.name, driver
							at.IOPS, at.CPU, at.Allocs = n/r.Elapsed.Seconds(), float64(r.CPU)/n, float64(r.Allocs)/n
							at.P50, at.P99 = float64(r.Latency.Quantile(0.5)), float64(r.Latency.Quantile(0.99))
							all = append(all, at)
						}
					}
					for _, engine := range []string{"io_uring", "pread"} {
						if fio == "" || engine == "pread" && depth != b.depths[0] {
							continue // pread has no depth
						}
						if err := b.fio(ctx, fio, engine, path, &at); err != nil {
							return err
						}
						all = append(all, at)
					}
				}
			}
		}
	}
	if len(all) == 0 {
		return configError{fmt.Errorf("nothing to measure: a driver that polls takes two CPUs for each queue, "+
			"and this host has %d", runtime.NumCPU())}
	}
	if err := record.write(all); err != nil {
		return err
	}
	if b.plot != "" {
		var panels []benchPanel
		for _, size := range b.sizes {
			for _, queues := range b.queues {
				p := benchPanel{title: fmt.Sprintf("read %s, %d queues", text.FormatSize(uint64(size)), queues)}
				if queues == 1 {
					p.title = strings.TrimSuffix(p.title, "s")
				}
				for _, s := range all {
					if s.Size == size && s.Queues == queues && s.Storage != "pread" {
						p.add(strings.TrimSpace(s.Storage+" "+s.Driver), s.Depth, s.IOPS/1e3)
					}
				}
				if len(p.curves) > 0 { // empty if the driver would have to poll on too few CPUs
					panels = append(panels, p)
				}
			}
		}
		if err := writeBenchPlot(b.plot, panels); err != nil {
			return err
		}
	}
	return benchTable(w, all)
}

func (b diskBench) device(s block.Backend) (*vscsi.Device, error) {
	u, err := scsi.NewUnit(scsi.UnitConfig{Backend: s, Serial: "BENCH"})
	if err != nil {
		return nil, err
	}
	target := scsi.NewTarget()
	if err := target.Attach(0, u); err != nil {
		return nil, err
	}
	return vscsi.New(vscsi.Config{Target: target, Queues: slices.Max(b.queues), Poll: b.poll})
}

// fio measures s with fio.
func (b diskBench) fio(ctx context.Context, program, engine, path string, s *sample) error {
	depth, name := s.Depth, "io_uring"
	if engine == "pread" {
		depth, name = 1, "psync"
	}
	c := exec.CommandContext(ctx, program, "--name=bench", "--filename="+strings.ReplaceAll(path, ":", `\:`),
		"--readonly", "--rw=randread", "--ioengine="+name, "--bs="+strconv.Itoa(s.Size),
		"--iodepth="+strconv.Itoa(depth), "--numjobs="+strconv.Itoa(s.Queues), "--thread", "--group_reporting",
		"--norandommap", "--invalidate=0", "--time_based", fmt.Sprintf("--runtime=%dms", b.time.Milliseconds()),
		"--output-format=json")
	out, err := c.Output()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("fio --ioengine=%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	var v struct {
		Jobs []struct {
			Usr  float64 `json:"usr_cpu"` // percent of one CPU
			Sys  float64 `json:"sys_cpu"`
			Read struct {
				IOPS    float64 `json:"iops"`
				Latency struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			} `json:"read"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &v); err != nil || len(v.Jobs) != 1 {
		return fmt.Errorf("fio --ioengine=%s: no result in its output: %w", name, err)
	}
	j := v.Jobs[0]
	*s = sample{
		Storage: engine, Size: s.Size, Depth: depth, Queues: s.Queues, Round: s.Round, IOPS: j.Read.IOPS,
		CPU: (j.Usr + j.Sys) / 100 * float64(s.Queues) * 1e9 / j.Read.IOPS,
		P50: j.Read.Latency.Percentile["50.000000"], P99: j.Read.Latency.Percentile["99.000000"],
	}
	return nil
}

// benchTable prints the medians of the rounds.
func benchTable(w io.Writer, all []sample) error {
	key := func(s sample) sample {
		return sample{Storage: s.Storage, Driver: s.Driver, Size: s.Size, Depth: s.Depth, Queues: s.Queues}
	}
	at := map[sample][]sample{}
	var order []sample
	for _, s := range all {
		k := key(s)
		if at[k] == nil {
			order = append(order, k)
		}
		at[k] = append(at[k], s)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "storage\tdriver\tsize\tqueues\tdepth\tkIOPS\t\tCPU, µs\tp50, µs\tp99, µs\tallocs\tof io_uring\t")
	for _, k := range order {
		rounds := at[k]
		pick := func(f func(sample) float64) []float64 {
			var v []float64
			for _, s := range rounds {
				v = append(v, f(s))
			}
			slices.Sort(v)
			return v
		}
		median := func(f func(sample) float64) float64 { return median(pick(f)) }
		iops := pick(func(s sample) float64 { return s.IOPS / 1e3 })
		allocs, ratio := "", ""
		if k.Storage != "io_uring" && k.Storage != "pread" {
			allocs = fmt.Sprintf("%.3f", median(func(s sample) float64 { return s.Allocs }))
		}
		peer := k
		peer.Storage, peer.Driver = "io_uring", ""
		if peers := at[peer]; k.Storage == "file" && len(peers) == len(rounds) {
			i := -1
			ratio = fmt.Sprintf("%.2f", median(func(s sample) float64 { i++; return s.IOPS / peers[i].IOPS }))
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%.1f\t(%.1f–%.1f)\t%.2f\t%.1f\t%.1f\t%s\t%s\t\n",
			k.Storage, k.Driver, text.FormatSize(uint64(k.Size)), k.Queues, k.Depth,
			iops[len(iops)/2], iops[0], iops[len(iops)-1], median(func(s sample) float64 { return s.CPU / 1e3 }),
			median(func(s sample) float64 { return s.P50 / 1e3 }),
			median(func(s sample) float64 { return s.P99 / 1e3 }), allocs, ratio)
	}
	return t.Flush()
}
