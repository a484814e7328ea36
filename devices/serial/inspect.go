package serial

import "gvm/inspect"

// Inspect returns the registers (PC16550D table II), without the effects that reads of them have,
// and the numbers of characters in the FIFOs and of those that the host has not taken yet.
func (u *UART) Inspect(name string) inspect.Node {
	return inspect.Locked(name, &u.mu, func() []inspect.Node {
		return []inspect.Node{
			inspect.Bits("ier", u.ier), inspect.Bits("iir", u.iir()), inspect.Bits("fcr", u.fcr),
			inspect.Bits("lcr", u.lcr), inspect.Bits("mcr", u.mcr), inspect.Bits("lsr", u.lineStatus()),
			inspect.Bits("msr", u.modem()|u.delta), inspect.Bits("scr", u.scr),
			inspect.Bits("dll", u.dll), inspect.Bits("dlm", u.dlm),
			inspect.Int("receiver_fifo", len(u.rx)), inspect.Int("transmitter_fifo", len(u.tx)),
			inspect.Int("output", len(u.out)),
		}
	})
}
