package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"gvm/guest/kernel"
	"gvm/text"
	"gvm/vmm/boot"
)

// exitLacks is the exit status of `gvm kernel check` for a kernel that lacks a required option.
const exitLacks = 1

func kernelCommand() *cli.Command {
	features := func() cli.Flag {
		return &cli.GenericFlag{Name: "feature", Value: new(words),
			Usage: "only the options of `FEATURE` " + strings.Join(kernel.Features, ", ")}
	}
	return &cli.Command{
		Name:  "kernel",
		Usage: "check and make the configurations of kernels",
		Description: `KERNEL is as for gvm run --kernel: a bzImage or vmlinux, a kernel tree or its
O= directory, a .deb or RPM package, the release of an installed kernel, or
host.

EXAMPLES
   gvm kernel check 6.1.0-13-amd64
   gvm kernel config > gvm.config
   scripts/kconfig/merge_config.sh .config gvm.config`,
		Subcommands: []*cli.Command{{
			Name: "check", ArgsUsage: "KERNEL",
			Usage: "tell which options a kernel has that guests of gvm need",
			Description: `The configuration is that in the image (CONFIG_IKCONFIG), else that of the
kernel tree, the package, or beside the installed kernel. IS is y, m for a
module, which needs an initrd to load it, or n. The exit status is 1 if a
required option is n.

EXAMPLES
   gvm kernel check .
   gvm kernel check linux-image-6.1.0-13-amd64_6.1.55-1_amd64.deb
   gvm kernel check --feature boot --feature console bzImage
   gvm kernel check --json host | jq '.options[] | select(.value == "n")'`,
			Flags: []cli.Flag{features(), &cli.BoolFlag{Name: "json", Usage: "a JSON object"}},
			Action: func(c *cli.Context) error {
				if c.NArg() != 1 {
					return usageError{fmt.Errorf("kernel check takes one KERNEL, and got %s", text.Count(c.NArg(), "word"))}
				}
				options, err := featureOptions(c)
				if err != nil {
					return err
				}
				return checkKernel(c.App.Writer, c.Args().First(), options, c.Bool("json"))
			},
		}, {
			Name:  "config",
			Usage: "print the options that guests of gvm need, for a kernel's build",
			Description: `Run scripts/kconfig/merge_config.sh with .config and this fragment, or save
it as kernel/configs/gvm.config and run make gvm.config.

EXAMPLES
   gvm kernel config --feature boot --feature console --feature disk
   gvm kernel config > kernel/configs/gvm.config && make defconfig gvm.config`,
			Flags: []cli.Flag{features()},
			Action: func(c *cli.Context) error {
				if c.Args().Present() {
					return usageError{fmt.Errorf("kernel config takes no argument, and got %q", c.Args().First())}
				}
				options, err := featureOptions(c)
				if err != nil {
					return err
				}
				_, err = io.WriteString(c.App.Writer, kernel.Fragment(options))
				return err
			},
		}},
	}
}

// featureOptions returns the options of --feature.
func featureOptions(c *cli.Context) ([]kernel.Option, error) {
	features := wordsOf(c, "feature")
	for _, f := range features {
		if !slices.Contains(kernel.Features, f) {
			return nil, usageError{text.OneOfNames("--feature ", f, kernel.Features)}
		}
	}
	return kernel.Of(features), nil
}

// kernelReport is the JSON of gvm kernel check.
type kernelReport struct {
	Kernel  text.Name      `json:"kernel"`
	Release string         `json:"release,omitempty"`
	Modules text.Name      `json:"modules,omitempty"`
	Config  text.Name      `json:"config"`
	Options []kernelOption `json:"options"`
	OK      bool           `json:"ok"` // no required option is missing
}

type kernelOption struct {
	Feature string `json:"feature"`
	Option  string `json:"option"`
	Need    string `json:"need"`  // required or recommended
	Value   string `json:"value"` // y, m or n
	Why     string `json:"why"`
}

func checkKernel(out io.Writer, name string, options []kernel.Option, asJSON bool) error {
	k, err := kernel.Finder{}.Find(context.Background(), name)
	if err != nil {
		return err
	}
	defer k.Close()
	config, err := k.Embedded(boot.CacheDir())
	if config.Text == nil {
		config = k.Config
	}
	if config.Text == nil {
		if err != nil {
			return err
		}
		return &boot.ImageError{Name: k.Image.Name, What: "has no configuration, inside or beside it",
			Mend: "give its build directory or package, or build it with CONFIG_IKCONFIG=y"}
	}
	r := kernelReport{Kernel: text.Name(k.Image.Name), Release: k.Release, Modules: text.Name(k.Modules.Path),
		Config: text.Name(config.From), OK: true}
	var missing []string
	for _, o := range options {
		need, value := "recommended", config.Has(o)
		if o.Required {
			if need = "required"; value == "n" {
				missing = append(missing, "CONFIG_"+o.Symbol)
				r.OK = false
			}
		}
		r.Options = append(r.Options, kernelOption{o.Feature, "CONFIG_" + o.Symbol, need, value, o.Why})
	}
	if asJSON {
		err = writeJSON(out, r)
	} else {
		err = r.print(out)
	}
	if err != nil || r.OK {
		return err
	}
	return endError{exitLacks, fmt.Errorf("%s lacks %s: merge the output of gvm kernel config into its configuration",
		k.Image.Name, strings.Join(missing, ", "))}
}

func (r *kernelReport) print(out io.Writer) error {
	var b strings.Builder
	for _, row := range [][2]string{{"kernel", string(r.Kernel)}, {"release", r.Release}, {"modules", string(r.Modules)},
		{"config", string(r.Config)}} {
		fmt.Fprintf(&b, "%-8s %s\n", row[0], text.Printable(cmp.Or(row[1], "unknown")))
	}
	const columns = 53 // of all but WHY
	line := func(feature, option, need, value, why string) {
		head := fmt.Sprintf("%-8s %-27s %-11s %-2s", feature, option, need, value)
		b.WriteString(column(head, columns, why, helpWidth, 0) + "\n")
	}
	b.WriteString("\n")
	line("FEATURE", "OPTION", "NEED", "IS", "WHY")
	for _, o := range r.Options {
		line(o.Feature, o.Option, o.Need, o.Value, o.Why)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// lacks returns a note about options that the kernel of a run needs and lacks, or "". It looks only
// at a configuration in a file: the one in an image takes too long to find at every start.
func (rc *runConfig) lacks(k *kernel.Kernel) string {
	features := []string{"boot", "console"}
	if len(rc.spec.Disks) > 0 {
		features = append(features, "disk")
	}
	lacks := k.Config.Missing(features, len(rc.initrds) == 0)
	if lacks == "" {
		return ""
	}
	return fmt.Sprintf("%s %s; by %s; see gvm help kernel", k.Image.Name, lacks, k.Config.From)
}
