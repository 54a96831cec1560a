package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/quic-go/quic-go"
)

// identity is who this side is, and whom it trusts.
type identity struct {
	ca, certificate, key string // PEM files
	alpn                 string
}

func (i *identity) flags(f *flag.FlagSet) {
	f.StringVar(&i.ca, "ca", "ca.crt", "`file` of the certificate authority")
	f.StringVar(&i.certificate, "cert", "", "`file` of the own certificate")
	f.StringVar(&i.key, "key", "", "`file` of the own key")
	f.StringVar(&i.alpn, "alpn", "", "application `protocol` to negotiate; both sides must say the same")
}

// load returns the pool of the authority, its file's text, and the own certificate.
func (i *identity) load() (*x509.CertPool, []byte, tls.Certificate, error) {
	text, err := os.ReadFile(i.ca)
	if err != nil {
		return nil, nil, tls.Certificate{}, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, nil, tls.Certificate{}, fmt.Errorf("%s has no certificate", i.ca)
	}
	own, err := tls.LoadX509KeyPair(i.certificate, i.key)
	return pool, text, own, err
}

func (i *identity) protocols() []string {
	if i.alpn == "" {
		return nil
	}
	return []string{i.alpn}
}

// quicConfig is the same on both sides. The stream limit is CloudHub's default.
func quicConfig(idle time.Duration) *quic.Config {
	return &quic.Config{
		Versions:           []quic.Version{quic.Version1},
		MaxIdleTimeout:     idle,
		MaxIncomingStreams: 10000,
	}
}
