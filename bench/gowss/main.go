// Gowss is the websocket link of KubeEdge in Go, reduced to what costs time: a node that uploads as
// KubeEdge's own edgehub does, or a hub that reads as CloudHub does, over gorilla/websocket as they.
//
//	gowss serve -ca ca.crt -cert server.crt -key server.key
//	gowss dial  -ca ca.crt -cert n1.crt -key n1.key -node n1 -count N ADDRESS
//
// serve prints one line of JSON with its ports, dial one line when it is served and waits for a line
// on standard input, then one with its result. The bench starts both (bench/native.py).
package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"os"
	"syscall"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: gowss serve|dial [flags]")
		os.Exit(2)
	}
	f := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	ca := f.String("ca", "", "`file` of the certificate authority")
	certificate := f.String("cert", "", "`file` of the own certificate")
	key := f.String("key", "", "`file` of the own key")
	node := f.String("node", "", "`name` of the node (dial)")
	count := f.Int("count", 0, "upload so many messages (dial)")
	f.Parse(os.Args[2:])

	pool, own, err := load(*ca, *certificate, *key)
	if err == nil {
		switch os.Args[1] {
		case "serve":
			err = serve(&tls.Config{
				Certificates: []tls.Certificate{own},
				ClientCAs:    pool,
				ClientAuth:   tls.RequireAndVerifyClientCert,
			}, pemText(*ca))
		case "dial":
			err = dial(&tls.Config{Certificates: []tls.Certificate{own}, RootCAs: pool}, f.Arg(0), *node, *count)
		default:
			err = fmt.Errorf("unknown command %q", os.Args[1])
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gowss:", err)
		os.Exit(1)
	}
}

func load(ca, certificate, key string) (*x509.CertPool, tls.Certificate, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(pemText(ca))) {
		return nil, tls.Certificate{}, fmt.Errorf("%q has no certificate", ca)
	}
	own, err := tls.LoadX509KeyPair(certificate, key)
	return pool, own, err
}

// pemText is what is in the file; nothing when it cannot be read.
func pemText(file string) string {
	text, _ := os.ReadFile(file)
	return string(text)
}

// cpuSeconds is the CPU time of this process so far.
func cpuSeconds() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}
