package rtc

import (
	"time"

	"gvm/inspect"
)

// Inspect returns the time, the control registers and the alarm. It does not clear register C.
func (r *RTC) Inspect(name string) inspect.Node {
	return inspect.Locked(name, &r.mu, func() []inspect.Node {
		return []inspect.Node{
			inspect.Text("time", r.time().Format(time.RFC3339)).As(inspect.Passing),
			inspect.Bool("updating", r.updating()),
			inspect.Bits("index", r.index),
			inspect.Bits("register_a", r.ram[regA]), inspect.Bits("register_b", r.ram[regB]),
			inspect.Bits("register_c", r.flags),
			inspect.Bits("seconds_alarm", r.ram[regSeconds+1]), inspect.Bits("minutes_alarm", r.ram[regMinutes+1]),
			inspect.Bits("hours_alarm", r.ram[regHours+1]),
			inspect.Bool("interrupt", r.active != 0),
		}
	})
}
