package main

import (
	"fmt"
	"os"
	"strings"

	"gvm/guest/embedded"
	"gvm/text"
)

// diskOption is a row of the grammar of --disk.
type diskOption struct {
	key, value string // value is "" for an option without one
	meaning    string
}

// word is the option as help has it.
func (o diskOption) word() string {
	if o.value == "" {
		return o.key
	}
	return o.key + "=" + o.value
}

// diskOptions are the options of --disk. parseDisk knows no others.
var diskOptions = []diskOption{
	{"readonly", "", "the guest sees a write-protected disk; the image is opened read-only"},
	{"serial", "S", "unit serial number; the default is derived from the image's path"},
	{"lun", "N", "logical unit number, 0 to 16383; the default is the next free one"},
	{"cache", "writeback|writethrough|unsafe", "writeback, the default: data is durable when the guest's " +
		"flush or FUA write is answered; writethrough: when the write is; unsafe: flushes do nothing"},
	{"size", "SIZE", "create the image, sparse, or grow it to SIZE; it never shrinks"},
	{"block_size", "512|4096", "bytes in a logical block"},
	{"physical_block_size", "N", "bytes in a block of the medium, as the guest is told"},
	{"pi", "0|1", "1: protection information (T10-PI type 1), kept in IMAGE.pi"},
	{"error", "report|stop|enospc-stop", "report, the default: a failure of the image is the guest's; stop: the " +
		"machine pauses, and repeats the request after gvm resume; enospc-stop: so only where the host has no room"},
	{"iops", "N[:BURST]", "limit of requests in a second, with a burst"},
	{"bps", "SIZE[:BURST]", "limit of bytes in a second, with a burst"},
	{"overlay", "on|FILE", "the image stays as it is; what the guest writes is gone with the machine, or kept in FILE"},
	{"lock", "on|off", "off: go on without a lock on a file system that has none"},
	{"backend", "process|vhost|auto", "process, the default: gvm's SCSI target serves the disk; vhost: the " +
		"kernel's does; auto: the kernel's where it can"},
	{"workers", "N|shared", "kernel threads for the request queues of backend=vhost"},
}

// diskGrammar is the part of `gvm help disk` about --disk.
func diskGrammar() string {
	var b strings.Builder
	b.WriteString(`THE VALUE OF --disk
   PATH[,OPTION]...         a raw image or block device; a comma that belongs
                            to PATH is written twice
   mem:SIZE[,OPTION]...     a disk in memory
   null:SIZE[,OPTION]...    a disk that keeps nothing
   wwn=NAME,backend=vhost[,workers=N|shared]
                            a target of the kernel that another tool made

OPTIONS OF A DISK`)
	for _, o := range diskOptions {
		b.WriteString("\n   " + column(o.word(), 25, o.meaning, helpWidth-6, 3))
	}
	return b.String()
}

// unknownOption says that --disk has no such option as the word at n, which is part of a path
// that has a comma if there is such a file, or if the word does not look like an option.
func unknownOption(words []string, n int, key string) error {
	var names []string
	for _, o := range diskOptions {
		names = append(names, o.key)
	}
	thing := fmt.Sprintf("option %q", key)
	path := strings.Join(words[:n+1], ",")
	if _, err := os.Stat(path); err == nil || n == 1 && strings.ContainsAny(words[n], "./ ") && !strings.Contains(words[n], "=") {
		return fmt.Errorf("--disk %s: unknown %s; a comma in a path is written twice: --disk %s", words[0], thing, strings.ReplaceAll(path, ",", ",,"))
	}
	return fmt.Errorf("--disk %s: %w", words[0], unknown(thing, text.Nearest(key, names), " disk"))
}

// guestWords is the part of `gvm help run` about --guest-arg.
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

// unknownWord says that the embedded guest does not know a word.
func unknownWord(word string) error {
	var names []string
	for _, w := range embedded.Words {
		names = append(names, guestWord(w))
	}
	return fmt.Errorf("--guest-arg: %w", unknown(fmt.Sprintf("word %q", word), text.Nearest(word, names), " run"))
}
