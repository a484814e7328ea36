package main

import (
	"fmt"
	"strings"

	"gvm/guest/embedded"
	"gvm/machine/disk"
	"gvm/text"
)

// diskGrammar returns the part of `gvm help disk` about --disk.
func diskGrammar() string {
	var b strings.Builder
	b.WriteString(`THE VALUE OF --disk
   PATH[,OPTION]...         a raw image or block device; a comma that belongs
                            to PATH is written twice
   mem:SIZE[,OPTION]...     a disk in memory
   temp:SIZE[,OPTION]...    a disk in a file in $TMPDIR that has no name
   null:SIZE[,OPTION]...    a disk that keeps nothing
   wwn=NAME,backend=vhost[,workers=N|shared]
                            a target of the kernel that another tool made

OPTIONS OF A DISK`)
	for _, o := range disk.Options() {
		b.WriteString("\n   " + column(o.Word(), 25, o.Meaning, helpWidth-6, 3))
	}
	return b.String()
}

// guestWords returns the part of `gvm help run` about --guest-arg.
func guestWords() string {
	var b strings.Builder
	b.WriteString("WORDS OF --guest-arg")
	for _, w := range embedded.Words {
		b.WriteString("\n   " + column(guestWord(w), 25, w.Text, helpWidth-6, 3))
	}
	return b.String()
}

func guestWord(w embedded.Word) string {
	if strings.HasSuffix(w.Name, "=") {
		return w.Name + "N"
	}
	return w.Name
}

// unknownWord returns an error for a word that the embedded guest does not know.
func unknownWord(word string) error {
	var names []string
	for _, w := range embedded.Words {
		names = append(names, guestWord(w))
	}
	return fmt.Errorf("--guest-arg: %w", text.Unknown(fmt.Sprintf("word %q", word), text.Nearest(word, names), " run"))
}
