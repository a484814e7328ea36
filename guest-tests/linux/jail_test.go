package linux

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestJail: Linux in a jail uses a disk behind a block device, a shared directory and an interface,
// which belong to the jail's user. By --net user it fetches from this host, and answers at a
// published port.
func TestJail(t *testing.T) {
	needsRoot(t, "a jail")
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPPID, 0, 0, 0); errno != 0 {
		t.Skip("a jail has no libraries for a program with cgo: ", errno)
	}
	const user, tap = 41234, "gvmjail0"
	dir, share := filepath.Join(t.TempDir(), "jail"), t.TempDir()
	image := diskFile(t, content("jail", 1<<20))
	disk := loopDevice(t, image)
	defer tapOf(t, tap, user)()
	setLink(t, tap, 9, 1500)
	writeFile(t, filepath.Join(share, "host"), "host")
	must(t, errors.Join(os.Mkdir(dir, 0o755), os.Chown(disk, user, user), os.Chown(share, user, user)))
	published, mux := freeAddress(t), http.NewServeMux()
	mux.HandleFunc("/down", func(w http.ResponseWriter, _ *http.Request) { w.Write(content("down", 1<<20)) })
	mux.HandleFunc("/published", func(w http.ResponseWriter, r *http.Request) { askPublished(w, r, published) })
	defer func() { must(t, os.Chown(disk, 0, 0)) }()
	args := guest{kernel: kernel(t, "cloud"), modules: []string{"virtiofs", "virtio_net"}, script: fmt.Sprintf(`
d=$(disk 0)
wait_for $d
say disk $(sum $d)
printf guest | dd of=$d conv=notrunc,fsync 2>/dev/null && say written
mkdir /s && mount -t virtiofs s /s && say share "$(cat /s/host)" && echo guest >/s/made
umount /s
ip addr add 10.99.9.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 20 10.99.9.1 >/dev/null && say ping ok
ip addr add 10.0.2.15/24 dev eth1 && ip link set eth1 up
say down $(wget -q -O - http://10.0.2.2:%[1]s/down | sum)
echo from the guest | nc -l -p 80 >/got &
say reply $(wget -q -O - http://10.0.2.2:%[1]s/published)
wait
say got $(cat /got)
klog
`, serve(t, "127.0.0.1:0", mux))}.build(t)
	must(t, os.Chmod(args[4], 0o644)) // the initrd
	r := gvm(t, append(args, "--jail", dir, fmt.Sprint("--uid=", user), fmt.Sprint("--gid=", user),
		"--disk", disk+",lock=off", "--share", "s="+share, "--net", "tap="+tap, "--net", "user",
		"--publish", published+":80")...)
	if r.status != 0 {
		r.fatalf(t, "status %d", r.status)
	}
	r.want(t, map[string]string{"disk": sum(content("jail", 1<<20)), "written": "", "share": "host", "ping": "ok",
		"down": sum(content("down", 1<<20)), "reply": "from the guest", "got": "from the host"})
	b, err := os.ReadFile(image)
	if err != nil || !bytes.HasPrefix(b, []byte("guest")) {
		t.Errorf("the image has %q, %v", b[:5], err)
	}
	fi, err := os.Stat(filepath.Join(share, "made"))
	must(t, err)
	if st := fi.Sys().(*syscall.Stat_t); st.Uid != user || st.Size != 6 {
		t.Errorf("the guest's file: %+v", st)
	}
}

// tapOf makes an interface of a user's, as ip tuntap add does. remove removes it.
func tapOf(t *testing.T, name string, user int) (remove func()) {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	ifr, err := unix.NewIfreq(name)
	must(t, err)
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	must(t, errors.Join(unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr), unix.IoctlSetInt(fd, unix.TUNSETOWNER, user),
		unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1), unix.Close(fd)))
	return func() {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		must(t, err)
		must(t, errors.Join(unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr), unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0),
			unix.Close(fd)))
	}
}
