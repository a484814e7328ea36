package linux

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
)

// TestNetUser: a guest gets its addresses, and moves data with this host's loopback over IPv4 and
// IPv6 and by a published port.
func TestNetUser(t *testing.T) {
	const size = 24 << 20
	published := freeAddress(t)
	out := content("out", 4<<20)
	mux := http.NewServeMux()
	mux.HandleFunc("/down", func(w http.ResponseWriter, _ *http.Request) { w.Write(content("down", size)) })
	mux.HandleFunc("/small", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "by IPv6") })
	mux.HandleFunc("/published", func(w http.ResponseWriter, r *http.Request) { askPublished(w, r, published) })
	up, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer up.Close()
	received := make(chan []byte, 1)
	go func() {
		c, err := up.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		received <- b
	}()
	g := guest{
		kernel:  kernel(t, "cloud"),
		modules: []string{"virtio_net"},
		files:   map[string]string{"data": diskFile(t, out)},
		script: fmt.Sprintf(`
cat >/lease <<'E'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo $ip/$mask $router $dns >/leased
E
chmod +x /lease
ip link set lo up
ip link set eth0 up
udhcpc -i eth0 -n -q -s /lease >/dev/null 2>&1
say lease $(cat /leased)
ping -c 1 -W 20 10.0.2.2 >/dev/null && say ping ok
say down $(wget -q -O - http://10.0.2.2:%[1]s/down | sum)
nc 10.0.2.2 %[2]s </data && say up ok
echo from the guest | nc -l -p 80 >/got &
say reply $(wget -q -O - http://10.0.2.2:%[1]s/published)
wait
say got $(cat /got)
n=0
until ip -6 addr show dev eth0 scope global | grep -v tentative | grep -q fd00: || [ $n = 300 ]; do
	sleep 0.1
	n=$((n+1))
done
say six $(wget -q -O - http://[fd00::2]:%[3]s/small)
klog
`, serve(t, "127.0.0.1:0", mux), portOf(t, up), serve(t, "[::1]:0", mux)),
	}
	r := g.run(t, "--net", "user", "--publish", published+":80")
	r.wantStatus(t, 0)
	r.want(t, map[string]string{"lease": "10.0.2.15/24 10.0.2.2 10.0.2.3", "ping": "ok",
		"down": sum(content("down", size)), "up": "ok", "reply": "from the guest", "got": "from the host", "six": "by IPv6"})
	select {
	case b := <-received:
		if !bytes.Equal(b, out) {
			t.Errorf("%d of %d bytes came from the guest, or others", len(b), len(out))
		}
	default:
		t.Error("nothing came from the guest")
	}
	r.kernelLog(t, 1)
}

// freeAddress returns an address at which no other program listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, l.Close())
	return l.Addr().String()
}

// serve serves at an address until the test's end, and returns its port.
func serve(t *testing.T, addr string, h http.Handler) (port string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go http.Serve(l, h)
	return portOf(t, l)
}

// askPublished sends a line to a guest at a published port, as soon as it listens there, and
// answers with its reply.
func askPublished(w io.Writer, r *http.Request, published string) {
	for r.Context().Err() == nil {
		c, err := net.Dial("tcp", published)
		if err != nil {
			continue
		}
		io.WriteString(c, "from the host")
		c.(*net.TCPConn).CloseWrite()
		b, err := io.ReadAll(c)
		c.Close()
		if err == nil {
			w.Write(b)
			return
		}
	}
}

func portOf(t *testing.T, l net.Listener) string {
	t.Helper()
	_, port, err := net.SplitHostPort(l.Addr().String())
	must(t, err)
	return port
}
