package acpipm

import "gvm/inspect"

// Inspect returns the registers (ACPI 6.4, 4.8.3).
func (d *PM) Inspect(name string) inspect.Node {
	return inspect.Locked(name, &d.mu, func() []inspect.Node {
		return []inspect.Node{
			inspect.Bits("pm1_sts", d.status), inspect.Bits("pm1_en", d.enable), inspect.Bits("pm1_cnt", d.cntl|sciEN),
			inspect.Bits("pm_tmr", d.timer()), inspect.Bool("sci", d.sci), inspect.Bits("reset_control", d.rst),
		}
	})
}
