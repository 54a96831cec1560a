// Quicgo is a stranger to edgezmq that speaks the same link: a small CloudHub, or an edge node,
// over IETF QUIC with viaduct's framing.
//
//	quicgo serve -ca ca.crt -cert server.crt -key server.key     a CloudHub; see control.go
//	quicgo dial  -ca ca.crt -cert n1.crt -key n1.key -node n1 ADDRESS   an edge node; see edge.go
//
// serve prints one line of JSON with its addresses on standard output when it is ready, dial one
// line for each event. Both end on SIGTERM and log to standard error.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: quicgo serve|dial [flags]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(ctx, os.Args[2:])
	case "dial":
		err = dial(ctx, os.Args[2:])
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "quicgo:", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context, arguments []string) error {
	f := flag.NewFlagSet("serve", flag.ExitOnError)
	var who identity
	who.flags(f)
	listen := f.String("listen", "127.0.0.1:0", "UDP `address` of the hub")
	controlAddress := f.String("control", "127.0.0.1:0", "TCP `address` of the control interface")
	idle := f.Duration("idle", time.Minute, "idle timeout of QUIC")
	validate := f.Bool("validate-address", false, "make every client prove its address (a Retry packet)")
	var s settings
	f.DurationVar(&s.keepalive, "keepalive", 30*time.Second, "drop a session after so long without a keepalive")
	f.DurationVar(&s.retry, "retry", 5*time.Second, "send an object again after so long without an ack")
	f.BoolVar(&s.authorization, "authorization", false, "serve a node only with its own certificate")
	f.BoolVar(&s.rotate, "rotate", false, "spread what goes down over all streams")
	f.Parse(arguments)

	pool, text, own, err := who.load()
	if err != nil {
		return err
	}
	s.ca = text
	address, err := net.ResolveUDPAddr("udp", *listen)
	if err != nil {
		return err
	}
	socket, err := net.ListenUDP("udp", address)
	if err != nil {
		return err
	}
	transport := &quic.Transport{Conn: socket}
	if *validate {
		transport.VerifySourceAddress = func(net.Addr) bool { return true }
	}
	listener, err := transport.Listen(&tls.Config{
		Certificates: []tls.Certificate{own},
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		NextProtos:   who.protocols(),
	}, quicConfig(*idle))
	if err != nil {
		return err
	}
	controlListener, err := net.Listen("tcp", *controlAddress)
	if err != nil {
		return err
	}

	h := newHub(s, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	server := &http.Server{Handler: h.control()}
	go server.Serve(controlListener)
	ready := map[string]string{
		"address": socket.LocalAddr().String(),
		"control": "http://" + controlListener.Addr().String(),
	}
	if err := json.NewEncoder(os.Stdout).Encode(ready); err != nil {
		return err
	}

	var connections sync.WaitGroup
	for {
		connection, err := listener.Accept(ctx)
		if err != nil {
			break // told to end
		}
		connections.Go(func() { h.serve(ctx, connection) })
	}
	connections.Wait() // each closes its connection properly
	server.Close()
	return transport.Close()
}
