package agent

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"gvm/guest/agent/wire"
	"gvm/text"
)

// diskPatience bounds the wait for disks. The kernel finds them in the background, after it has
// loaded their driver.
const diskPatience = 30 * time.Second

// diskFinder finds disks by their serial numbers.
type diskFinder struct {
	sys, dev string // /sys and /dev
	sleep    func(time.Duration)
	now      func() time.Time
}

var theDisks = diskFinder{"/sys", "/dev", time.Sleep, time.Now}

// environment sets the variables of cmd that name disks, when all are there. A variable that cmd
// has already stays.
func (d diskFinder) environment(cmd *wire.Command) error {
	deadline, found := d.now().Add(diskPatience), map[string]string{}
	for _, v := range cmd.Disks {
		var paths []string
		for _, serial := range v.Serials {
			for ; found[serial] == ""; d.find(found) {
				if d.now().After(deadline) {
					return fmt.Errorf("the disk with the serial number %s is not in %s after %s", serial, d.sys, diskPatience)
				}
				d.sleep(10 * time.Millisecond)
			}
			paths = append(paths, found[serial])
		}
		has := func(e text.Name) bool { return strings.HasPrefix(string(e), v.Name+"=") }
		if !slices.ContainsFunc(cmd.Env, has) {
			cmd.Env = append(cmd.Env, text.Name(v.Name+"="+strings.Join(paths, " ")))
		}
	}
	return nil
}

// find adds the device nodes of the disks that are new to those found, by serial number.
func (d diskFinder) find(found map[string]string) {
	disks, _ := os.ReadDir(filepath.Join(d.sys, "block"))
	for _, disk := range disks {
		page, _ := os.ReadFile(filepath.Join(d.sys, "block", disk.Name(), "device/vpd_pg80"))
		serial := unitSerial(page)
		if serial == "" || found[serial] != "" {
			continue
		}
		path := filepath.Join(d.dev, disk.Name())
		if f, err := os.Open(path); err == nil { // which fails for a moment after the node came
			f.Close()
			found[serial] = path
		}
	}
}

// unitSerial returns the serial number of a Unit Serial Number page (SPC-5 7.7.19), or "".
func unitSerial(page []byte) string {
	const header = 4
	if len(page) < header {
		return ""
	}
	n := int(binary.BigEndian.Uint16(page[2:]))
	return strings.TrimSpace(string(page[header:min(len(page), header+n)]))
}
