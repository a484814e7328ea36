package conformance

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gvm/devices/block"
	"gvm/devices/scsi"
)

var update = flag.Bool("update", false, "write testdata/tools anew")

// tools are the command lines of sg3_utils, for disks /dev/sg0, thin and write-back, /dev/sg1, with
// 4096-byte blocks and write-through, and /dev/sg2. Each row has a file in testdata/tools, and its
// lines run in sequence on new disks. A line with another exit status than 0 begins with it:
// sg3_utils uses 5 for ILLEGAL REQUEST, 22 for LBA OUT OF RANGE, 2 for NOT READY, 6 for UNIT
// ATTENTION, 14 for MISCOMPARE and 24 for RESERVATION CONFLICT.
var tools = map[string]string{
	"inq": `
sg_inq /dev/sg0
sg_inq /dev/sg1
sg_inq -d /dev/sg0
sg_inq -e /dev/sg0
sg_inq -i /dev/sg0
sg_inq -u /dev/sg0
sg_inq -HH /dev/sg0`,
	"vpd": `
sg_vpd /dev/sg0
sg_vpd --page=sn /dev/sg0
sg_vpd --page=di /dev/sg0
sg_vpd --page=di /dev/sg1
sg_vpd --page=ei --long /dev/sg0
sg_vpd --page=tpc /dev/sg0
sg_vpd --page=bl /dev/sg0
sg_vpd --page=bl /dev/sg1
sg_vpd --page=bdc /dev/sg0
sg_vpd --page=lbpv /dev/sg0
sg_vpd --page=lbpv /dev/sg1
sg_vpd -a /dev/sg1`,
	"readcap": `
sg_readcap /dev/sg0
sg_readcap --long /dev/sg0
sg_readcap /dev/sg1
sg_readcap --long /dev/sg1
sg_readcap --16 --brief /dev/sg1`,
	"modes": `
sg_modes /dev/sg0
sg_modes -a /dev/sg0
sg_modes -a -6 /dev/sg0
sg_modes -a /dev/sg1
sg_modes --page=0x3f,0xff /dev/sg0
sg_modes --page=8 --control=1 /dev/sg0
sg_modes --page=8 --control=2 /dev/sg0
sg_modes --page=0xa --control=1 /dev/sg0
5 sg_modes --page=8 --control=3 /dev/sg0
5 sg_modes --page=0x2f /dev/sg0
sg_wr_mode --page=8 /dev/sg0
sg_wr_mode --page=8 --contents=08,12,10,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00 --mask=00,00,04 /dev/sg0
sg_modes --page=8 /dev/sg0
5 sg_wr_mode --page=8 --contents=08,12,04,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00 --mask=00,00,04 /dev/sg1
sg_modes --page=8 /dev/sg1`,
	"opcodes": `
sg_opcodes /dev/sg0
sg_opcodes --alpha --rctd --mask /dev/sg1
sg_opcodes --opcode=0x28 /dev/sg0
sg_opcodes --opcode=0x9e,0x10 /dev/sg0
sg_opcodes --opcode=0x9e,0x10 --rctd /dev/sg0
5 sg_opcodes --opcode=0x9e --rctd /dev/sg0
sg_opcodes --opcode=0x99 /dev/sg0
sg_opcodes --tmf /dev/sg0
sg_opcodes --tmf --repd /dev/sg0`,
	"sync": `
sg_sync /dev/sg0
sg_sync --16 --lba=8 --count=8 /dev/sg0
sg_sync --immed /dev/sg0
22 sg_sync --16 --lba=0x100000 --count=1 /dev/sg0`,
	"unmap": `
sg_write_same --10 --lba=0 --num=256 --in=IN0 --xferlen=512 /dev/sg0
sg_get_lba_status --16 --maxlen=4096 --lba=0 /dev/sg0
sg_unmap --lba=64 --num=128 --force /dev/sg0
sg_get_lba_status --16 --maxlen=4096 --lba=0 /dev/sg0
sg_get_lba_status --16 --lba=100 --brief /dev/sg0
sg_verify --lba=64 --count=8 --ndo=4096 --in=ZERO /dev/sg0
22 sg_unmap --lba=49151 --num=2 --force /dev/sg0
sg_unmap --all=0,8192 --force /dev/sg0
sg_get_lba_status --16 --maxlen=4096 --lba=0 /dev/sg0
22 sg_get_lba_status --16 --lba=49152 /dev/sg0`,
	"write_same": `
sg_write_same --10 --lba=8 --num=8 --in=IN0 --xferlen=512 /dev/sg0
sg_read if=/dev/sg0 bs=512 count=8 skip=8
sg_verify --lba=8 --count=1 --ndo=512 --in=IN0 /dev/sg0
14 sg_verify --lba=7 --count=1 --ndo=512 --in=IN0 /dev/sg0
sg_write_same --16 --lba=8 --num=4 --unmap --in=ZERO --xferlen=512 /dev/sg0
sg_verify --lba=8 --count=4 --ndo=2048 --in=ZERO /dev/sg0
sg_verify --lba=12 --count=1 --ndo=512 --in=IN0 /dev/sg0
sg_write_same --16 --lba=12 --num=4 --ndob /dev/sg0
sg_verify --16 --lba=8 --count=8 --ndo=4096 --in=ZERO /dev/sg0
22 sg_write_same --16 --lba=49151 --num=2 --in=IN0 --xferlen=512 /dev/sg0`,
	"compare_and_write": `
sg_compare_and_write --in=ZEROIN0 --lba=5 --num=1 --xferlen=1024 /dev/sg0
sg_verify --lba=5 --count=1 --ndo=512 --in=IN0 /dev/sg0
14 sg_compare_and_write --in=ZEROIN0 --lba=5 --num=1 --xferlen=1024 /dev/sg0
sg_compare_and_write --in=IN0 --inw=ZERO --fua --lba=5 --num=1 /dev/sg0
sg_verify --lba=5 --count=1 --ndo=512 --in=ZERO /dev/sg0`,
	"persist": `
sg_persist --in --read-keys /dev/sg0
sg_persist --out --register --param-sark=0xabc /dev/sg0
sg_persist --out --reserve --param-rk=0xabc --prout-type=3 /dev/sg0
sg_persist --in --read-keys /dev/sg0
sg_persist --in --read-reservation /dev/sg0
sg_persist --in --read-full-status /dev/sg0
sg_persist --in --report-capabilities /dev/sg0
24 sg_persist --out --reserve --param-rk=0xabd --prout-type=3 /dev/sg0
24 sg_persist --out --reserve --param-rk=0xabc --prout-type=1 /dev/sg0
sg_persist --out --preempt --param-rk=0xabc --param-sark=0xabc --prout-type=1 /dev/sg0
sg_persist --in --read-reservation /dev/sg0
sg_persist --out --preempt-abort --param-rk=0xabc --param-sark=0xabc --prout-type=7 /dev/sg0
sg_persist --in --read-reservation /dev/sg0
sg_persist --out --release --param-rk=0xabc --prout-type=7 /dev/sg0
sg_persist --out --register-ignore --param-sark=0xdef /dev/sg0
sg_persist --in --read-keys /dev/sg0
sg_persist --out --clear --param-rk=0xdef /dev/sg0
sg_persist --in --read-full-status /dev/sg0
5 sg_persist --out --register --param-sark=1 --param-aptpl /dev/sg1
sg_persist --out --register --param-sark=0xabc /dev/sg0
sg_persist --out --reserve --param-rk=0xabc --prout-type=5 /dev/sg0
sg_persist --out --register-move --param-rk=0xabc --param-sark=0x123 ` +
		`--relative-target-port=1 --transport-id=sas,3000000000000005 /dev/sg0
sg_persist --in --read-full-status /dev/sg0`,
	"luns": `
sg_luns /dev/sg0
sg_luns --select=0 /dev/sg0
sg_luns --select=1 /dev/sg0
sg_luns --select=2 /dev/sg0
5 sg_luns --select=0x14 /dev/sg0
sg_luns --decode --hex /dev/sg1`,
	"logs": `
sg_logs /dev/sg0
sg_logs --list /dev/sg0
sg_logs --all /dev/sg0
sg_logs --page=0x2f /dev/sg0
5 sg_logs --page=0x0e /dev/sg0`,
	"requests": `
sg_requests /dev/sg0
sg_requests --desc /dev/sg0
sg_requests --hex /dev/sg0
sg_turs -n 3 /dev/sg0`,
	"start": `
sg_start --stop /dev/sg0
2 sg_turs /dev/sg0
sg_requests /dev/sg0
2 sg_verify --lba=0 --count=1 /dev/sg0
sg_start --start /dev/sg0
sg_turs /dev/sg0
sg_start --stop --immed /dev/sg0
sg_start 1 /dev/sg0
sg_prevent /dev/sg0
sg_prevent --allow /dev/sg0`,
	"reset": `
sg_start --stop /dev/sg0
sg_reset --device /dev/sg0
6 sg_turs /dev/sg0
sg_turs /dev/sg0
sg_reset --target /dev/sg0
6 sg_turs /dev/sg0
6 sg_turs /dev/sg1
sg_turs /dev/sg0`,
	"xcopy": `
sg_write_same --10 --lba=0 --num=16 --in=IN0 --xferlen=512 /dev/sg0
sg_xcopy if=/dev/sg0 of=/dev/sg0 bs=512 count=16 skip=0 seek=100
sg_verify --lba=115 --count=1 --ndo=512 --in=IN0 /dev/sg0
sg_verify --lba=116 --count=1 --ndo=512 --in=ZERO /dev/sg0
sg_xcopy if=/dev/sg0 of=/dev/sg2 bs=512 count=8 skip=8 seek=1
sg_verify --lba=8 --count=1 --ndo=512 --in=IN0 /dev/sg2
sg_verify --lba=9 --count=1 --ndo=512 --in=ZERO /dev/sg2
sg_copy_results --params /dev/sg0`,
	"verify": `
sg_verify --lba=0 --count=49152 /dev/sg0
sg_verify --16 --lba=49151 --count=1 /dev/sg0
sg_write_same --10 --lba=8 --num=8 --in=IN0 --xferlen=512 /dev/sg0
sg_verify --lba=8 --count=8 --ndo=32768 --0 /dev/sg1
14 sg_verify --lba=8 --count=8 --ndo=4096 --0 /dev/sg0
sg_verify --lba=8 --count=1 --ndo=512 --ebytchk=3 --in=IN0 /dev/sg0
sg_write_verify --16 --lba=20 --num=1 --ilen=512 --in=IN0 /dev/sg0
sg_verify --lba=20 --count=1 --ndo=512 --in=IN0 /dev/sg0
22 sg_verify --16 --lba=49152 --count=1 /dev/sg0`,
	"sanitize": `
sg_write_same --10 --lba=8 --num=8 --in=IN0 --xferlen=512 /dev/sg0
sg_sanitize --overwrite --pattern=IN0 --ipl=512 --quick --wait /dev/sg0
sg_verify --lba=49151 --count=1 --ndo=512 --in=IN0 /dev/sg0
sg_sanitize --block --quick --wait /dev/sg0
sg_get_lba_status --16 --maxlen=4096 --lba=0 /dev/sg0
5 sg_sanitize --crypto --quick --wait /dev/sg0`,
	"others": `
sg_read if=/dev/sg0 bs=512 count=128
sg_dd if=/dev/sg0 of=/dev/sg0 seek=16 bs=512 count=16 oflag=fua
sg_raw --request=64 /dev/sg0 12 01 80 00 40 00`,
}

// TestTools compares the output of sg3_utils' programs for the in-process target with
// testdata/tools.
func TestTools(t *testing.T) {
	if _, err := exec.LookPath("sg_inq"); err != nil {
		t.Skip("needs sg_inq, of Debian's sg3-utils")
	}
	environment := preload(t)
	dir := t.TempDir()
	pattern := bytes.Repeat([]byte("0123456789abcdef"), 32)
	for name, b := range map[string][]byte{"IN0": pattern, "ZERO": make([]byte, 8192),
		"ZEROIN0": append(make([]byte, 512), pattern...)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for tool, lines := range tools {
		t.Run(tool, func(t *testing.T) {
			var units []*scsi.Unit
			for i, cfg := range []scsi.UnitConfig{
				{Serial: "golden-0", PhysicalBlockExponent: 3},
				{Serial: "golden-1", BlockSize: 4096, Cache: scsi.WriteThrough},
				{Serial: "golden-2"},
			} {
				// The effect of UNMAP depends on a file system's block size; memory's is the same
				// everywhere.
				m, err := block.OpenMemory(Size)
				if err != nil {
					t.Fatal(err)
				}
				defer m.Close()
				cfg.Backend = m
				if i == 1 {
					cfg.Backend = struct{ block.Backend }{m}
				}
				u, err := scsi.NewUnit(cfg)
				if err != nil {
					t.Fatal(err)
				}
				units = append(units, u)
			}
			env := environment(serve(t, units...))
			var got bytes.Buffer
			for line := range strings.Lines(strings.TrimSpace(lines)) {
				words, want := strings.Fields(line), 0
				if _, err := fmt.Sscan(words[0], &want); err == nil {
					words = words[1:]
				}
				cmd := exec.Command(words[0], words[1:]...)
				cmd.Env, cmd.Dir = env, dir
				out, err := cmd.CombinedOutput()
				if cmd.ProcessState == nil {
					t.Fatalf("%v: %v", words, err)
				}
				fmt.Fprintf(&got, "$ %s\n%s", strings.Join(words, " "), out)
				if status := cmd.ProcessState.ExitCode(); status != want {
					t.Errorf("%v: exit status %d, want %d\n%s", words, status, want, out)
				}
			}
			golden := filepath.Join("testdata", "tools", tool+".txt")
			if *update {
				if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), want) {
				t.Errorf("the output is not that of %s:\n%s", golden, got.Bytes())
			}
		})
	}
}
