package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"
	"time"

	"gvm/devices/acpipm"
	"gvm/devices/debugport"
	"gvm/devices/pvpanic"
	"gvm/devices/serial"
	"gvm/guestmem"
	"gvm/vmm/boot"
)

// script is the program of a scripted guest: bytes written to ports, in order.
type script []byte

func (s script) out(port uint16, values ...byte) script {
	for _, v := range values {
		s = append(binary.LittleEndian.AppendUint16(s, port), v)
	}
	return s
}

func (s script) print(text string) script       { return s.out(serial.COM1, []byte(text)...) }
func (s script) pvpanic(e pvpanic.Event) script { return s.out(pvpanic.Port, byte(e)) }
func (s script) stamp(code byte) script         { return s.out(debugport.Port, code) }
func (s script) reset() script                  { return s.out(acpipm.ResetPort, acpipm.ResetValue) }

// idle makes the CPU halt with interrupts enabled at the end of the script.
func (s script) idle() script { return s.out(idlePort, 0) }

// in prints the byte read from a port.
func (s script) in(port uint16) script { return s.out(inPort|port>>8, byte(port)) }

const (
	idlePort = 0xfff0 // ports without a device
	inPort   = 0xf100
)

// powerOff writes SLP_TYP and SLP_EN to the high byte of PM1_CNT (ACPI 6.5, 4.8.3.2.1).
func (s script) powerOff() script {
	return s.out(acpipm.Port+acpipm.OffControl+1, acpipm.SleepTypeS5<<2|1<<5)
}

// kernel returns an ELF file that runs the script, and halts or raises a triple fault at its end.
func (s script) kernel(t *testing.T, tripleFault bool) *boot.Image {
	t.Helper()
	const base, header = 2 << 20, 64 + 56
	code := []byte{
		0x48, 0x8d, 0x35, 0, 0, 0, 0, // lea script(%rip), %rsi
		0x66, 0x8b, 0x16, // 1: mov (%rsi), %dx
		0x8a, 0x46, 0x02, // mov 2(%rsi), %al
		0x48, 0x83, 0xc6, 0x03, // add $3, %rsi
		0x66, 0x85, 0xd2, // test %dx, %dx
		0x74, 0x12, // jz 2f
		0x90,             // nop
		0x80, 0xfe, 0xf1, // cmp $(inPort >> 8), %dh
		0x75, 0x09, // jne 3f
		0x88, 0xd6, // mov %dl, %dh
		0x88, 0xc2, // mov %al, %dl
		0xec,                   // in (%dx), %al
		0x66, 0xba, 0xf8, 0x03, // mov $COM1, %dx
		0xee,       // 3: out %al, (%dx)
		0xeb, 0xdf, // jmp 1b
		0x90, 0x90, // 2: nothing, or ud2 without a handler
		0xfa,       // cli
		0xf4,       // hlt
		0xeb, 0xfc, // jmp back to cli
	}
	if bytes.HasSuffix(s, script{}.idle()) {
		code[42] = 0xfb // sti
	}
	if tripleFault {
		copy(code[40:], []byte{0x0f, 0x0b})
	}
	binary.LittleEndian.PutUint32(code[3:], uint32(len(code)-7))
	body := append(append(code, s...), 0, 0, 0)
	f := binary.LittleEndian.AppendUint64([]byte("\x7fELF\x02\x01\x01\x00"), 0)
	for _, v := range []uint16{2, 62} { // ET_EXEC, EM_X86_64
		f = binary.LittleEndian.AppendUint16(f, v)
	}
	f = binary.LittleEndian.AppendUint32(f, 1)
	for _, v := range []uint64{base, 64, 0} { // entry, program headers, sections
		f = binary.LittleEndian.AppendUint64(f, v)
	}
	f = binary.LittleEndian.AppendUint32(f, 0)
	for _, v := range []uint16{64, 56, 1, 0, 0, 0} {
		f = binary.LittleEndian.AppendUint16(f, v)
	}
	for _, v := range []uint32{1, 7} { // PT_LOAD, RWX
		f = binary.LittleEndian.AppendUint32(f, v)
	}
	for _, v := range []uint64{header, base, base, uint64(len(body)), uint64(len(body)), 4096} {
		f = binary.LittleEndian.AppendUint64(f, v)
	}
	f = append(f, body...)
	k, err := boot.NewImage(&boot.File{Name: "script", ReaderAt: bytes.NewReader(f), Size: int64(len(f))})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// printed returns the script's output to COM1.
func (s script) printed() string {
	var text []byte
	for i := 0; i < len(s); i += 3 {
		if binary.LittleEndian.Uint16(s[i:]) == serial.COM1 {
			text = append(text, s[i+2])
		}
	}
	return string(text)
}

// run runs the script as a guest.
func (s script) run(t *testing.T, tripleFault bool, cfg Config) (Outcome, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // bounds a guest that misses its end
	defer cancel()
	return s.runContext(ctx, t, tripleFault, cfg)
}

func (s script) runContext(ctx context.Context, t *testing.T, tripleFault bool, cfg Config) (Outcome, string) {
	t.Helper()
	console := new(testConsole)
	if cfg.Console == nil {
		cfg.Console = console
	}
	cfg.Memory = guestmem.Config{Size: 64 << 20}
	cfg.Kernel, cfg.Protocol, cfg.PanicText = s.kernel(t, tripleFault), boot.Linux64, true
	out, err := Run(ctx, system(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return out, console.out.String()
}
