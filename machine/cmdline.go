package machine

import (
	"slices"
	"strings"

	"gvm/vmm/boot"
)

// addsNoKASLR reports whether gvm adds nokaslr to the kernel's command line.
func (s *Spec) addsNoKASLR() bool {
	return s.Debug && s.BootMode == boot.BzImage && !s.BareCmdLine && !strings.Contains(s.CmdLine, "kaslr")
}

// Moves reports whether the kernel chooses its address (KASLR): it decompresses itself, and nokaslr
// is not on its command line. A kernel that the host fails to decompress is not known to do so yet.
func (s *Spec) Moves() bool {
	return s.BootMode == boot.BzImage && !s.addsNoKASLR() && !slices.Contains(strings.Fields(s.CmdLine), "nokaslr")
}

// cmdLine returns the command line of a Linux guest with the disks; root finds root= for the first
// one.
func (s *Spec) cmdLine(root func() (word, why string)) string {
	if s.BareCmdLine {
		return s.CmdLine
	}
	words := append([]string{"console=ttyS0", "panic=-1"}, s.Words...)
	if s.addsNoKASLR() {
		words = append(words, "nokaslr") // else the debugger's symbols do not fit
	}
	if len(s.Disks) > 0 && len(s.Initrds) == 0 && !strings.Contains(" "+s.CmdLine, " root=") {
		if word, why := root(); word == "" {
			s.Note(why)
		} else if s.Disks[0].ReadOnly {
			words = append(words, "root="+word, "ro")
		} else {
			words = append(words, "root="+word, "rw")
		}
	}
	if s.CmdLine != "" {
		words = append(words, s.CmdLine)
	}
	return strings.Join(words, " ")
}
