package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/quic-go/quic-go"

	"edgezmq/quicgo/internal/viaduct"
)

// rules are what a hub does to connections; the control interface can change them for later ones.
type rules struct {
	Reject bool `json:"reject"` // accept the connection, never serve it: the zombie of docs/cloudlink.md
	Stall  bool `json:"stall"`  // read nothing after the control stream
}

// settings do not change while a hub runs.
type settings struct {
	keepalive     time.Duration // a session without a keepalive for so long is dropped
	retry         time.Duration // an object is sent again after so long without an ack
	authorization bool          // the certificate must name the node
	rotate        bool          // spread what goes down over all streams
	ca            []byte        // what a query for k8s/ca.crt is answered with
}

// A record is one message that came up, in the order in which the hub took them over.
type record struct {
	Sequence  int    `json:"sequence"`
	Session   int    `json:"session"`
	Node      string `json:"node"`
	Stream    int64  `json:"stream"` // IETF stream number; 0 is the control stream
	ID        string `json:"id"`
	Parent    string `json:"parent,omitempty"`
	Source    string `json:"source"`
	Group     string `json:"group"`
	Operation string `json:"operation"`
	Resource  string `json:"resource"` // as it was on the wire, not prefixed with the node
	Size      int    `json:"size"`
	SHA256    string `json:"sha256"`
	Content   string `json:"content,omitempty"` // short text only
}

// recordedContent is the longest content that a record repeats.
const recordedContent = 4096

// hub is a small CloudHub: it knows nodes, not connections. Safe for concurrent use.
type hub struct {
	settings
	log *slog.Logger

	mu          sync.Mutex
	rules       rules
	connections int
	sessions    map[string]*session // served, by node
	live        map[int]*session    // every connection that has said its header, by number
	records     []record
	deliveries  map[string]*delivery
	faults      []string // why connections were ended that broke the protocol
}

func newHub(s settings, log *slog.Logger) *hub {
	return &hub{
		settings:   s,
		log:        log,
		sessions:   make(map[string]*session),
		live:       make(map[int]*session),
		deliveries: make(map[string]*delivery),
	}
}

// serve runs one connection to its end.
func (h *hub) serve(ctx context.Context, connection *quic.Conn) {
	s, err := h.greet(ctx, connection)
	if err != nil {
		h.log.Info("no session", "remote", connection.RemoteAddr(), "reason", err)
		connection.CloseWithError(viaduct.CodeProtocol, err.Error())
		return
	}
	h.log.Info("connected", "node", s.node, "session", s.number, "rejected", s.rejected)
	err = s.run(ctx)
	h.forget(s, err)
	h.log.Info("disconnected", "node", s.node, "session", s.number, "reason", err)
	connection.CloseWithError(viaduct.CodeClosed, "")
}

// greet takes the header message from the control stream and makes the session, or one that will
// never be served: a CloudHub that rejects a node does not close its connection.
func (h *hub) greet(ctx context.Context, connection *quic.Conn) (*session, error) {
	control, err := connection.AcceptStream(ctx)
	if err != nil {
		return nil, err
	}
	payload, err := viaduct.ReadPackage(control)
	if err != nil {
		return nil, fmt.Errorf("control stream: %w", err)
	}
	header, err := viaduct.Unmarshal(payload)
	if err != nil {
		return nil, fmt.Errorf("control stream: %w", err)
	}
	if header.Operation != viaduct.OpHeader || header.Resource != viaduct.OpHeader {
		return nil, fmt.Errorf("control stream begins with %s of %s", header.Operation, header.Resource)
	}
	answer := "ack"
	said := make(map[string][]string)
	if err := json.Unmarshal(header.Content, &said); err != nil {
		answer = "nack" // and goes on regardless, under the empty name
	}
	names := make(http.Header)
	for key, values := range said {
		names[http.CanonicalHeaderKey(key)] = values
	}
	s := h.admit(names.Get("Node_id"), connection, control)
	if err := viaduct.WritePackage(control, header.Reply([]byte(answer)).Marshal()); err != nil {
		h.forget(s, err)
		return nil, err
	}
	return s, nil
}

// admit registers a connection. A former session of the same node is dropped.
func (h *hub) admit(node string, connection *quic.Conn, control *quic.Stream) *session {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.connections++
	s := newSession(h, node, h.connections, connection, control)
	switch {
	case h.rules.Reject:
		s.rejected = "told to reject"
	case h.authorization:
		s.rejected = mismatch(node, connection)
	}
	s.lane.Gate().Set(h.rules.Stall)
	h.live[s.number] = s
	if s.rejected == "" {
		if former := h.sessions[node]; former != nil {
			former.end(errReplaced)
		}
		h.sessions[node] = s
	}
	return s
}

// mismatch says why the certificates of a connection do not allow the node's name, or nothing.
func mismatch(node string, connection *quic.Conn) string {
	certificates := connection.ConnectionState().TLS.PeerCertificates
	if len(certificates) != 1 {
		return fmt.Sprintf("%d certificates instead of one", len(certificates))
	}
	if name := certificates[0].Subject.CommonName; name != "system:node:"+node {
		return fmt.Sprintf("certificate of %q for node %q", name, node)
	}
	return ""
}

func (h *hub) forget(s *session, reason error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.live, s.number)
	if h.sessions[s.node] == s {
		delete(h.sessions, s.node)
	}
	var application *quic.ApplicationError
	var idle *quic.IdleTimeoutError
	switch {
	case errors.As(reason, &application) && application.Remote: // the edge closed
	case errors.As(reason, &idle):
	case errors.Is(reason, errDropped), errors.Is(reason, context.Canceled):
	default:
		h.faults = append(h.faults, fmt.Sprintf("session %d of %s: %v", s.number, s.node, reason))
	}
}

// receive records one message of a session.
func (h *hub) receive(s *session, stream quic.StreamID, m *viaduct.Message) {
	sum := sha256.Sum256(m.Content)
	r := record{
		Session:   s.number,
		Node:      s.node,
		Stream:    int64(stream),
		ID:        m.ID,
		Parent:    m.Parent,
		Source:    m.Source,
		Group:     m.Group,
		Operation: m.Operation,
		Resource:  m.Resource,
		Size:      len(m.Content),
		SHA256:    hex.EncodeToString(sum[:]),
	}
	if len(m.Content) <= recordedContent && utf8.Valid(m.Content) {
		r.Content = string(m.Content)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	r.Sequence = len(h.records)
	h.records = append(h.records, r)
}

// An order is what the control interface asks to be sent down.
type order struct {
	Node      string `json:"node"`
	Source    string `json:"source"`
	Group     string `json:"group"`
	Operation string `json:"operation"`
	Resource  string `json:"resource"`
	Content   string `json:"content"`
	Size      int    `json:"size"`  // instead of content: so many bytes
	Count     int    `json:"count"` // so many messages; {n} in the content becomes the number of each
	Ack       bool   `json:"ack"`   // an object: resent until the node has acked it, one at a time
}

// send queues what an order says for the node's session and returns the ids.
func (h *hub) send(o order) ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.sessions[o.Node]
	if s == nil {
		return nil, fmt.Errorf("node %q has no session", o.Node)
	}
	ids := make([]string, 0, max(o.Count, 1))
	for i := range max(o.Count, 1) {
		content := []byte(strings.ReplaceAll(o.Content, "{n}", strconv.Itoa(i)))
		if o.Size > 0 {
			content = bytes.Repeat([]byte("d"), o.Size)
		}
		d := &delivery{
			Node:    o.Node,
			message: viaduct.NewMessage(o.Source, o.Group, o.Operation, o.Resource, content),
			acked:   make(chan struct{}),
		}
		h.deliveries[d.message.ID] = d
		ids = append(ids, d.message.ID)
		if o.Ack {
			s.objects.put(d)
		} else {
			s.plain.put(d)
		}
	}
	return ids, nil
}

// acked marks what a node answered. Unknown parents and those of other nodes have no effect.
func (h *hub) acked(node, parent string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d := h.deliveries[parent]; d != nil && d.Node == node && !d.Acked {
		d.Acked = true
		close(d.acked)
	}
}

func (h *hub) sent(d *delivery) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d.Attempts++
}

// session returns the newest connection of a node, also a rejected one.
func (h *hub) session(node string) *session {
	h.mu.Lock()
	defer h.mu.Unlock()
	var newest *session
	for _, s := range h.live {
		if s.node == node && (newest == nil || s.number > newest.number) {
			newest = s
		}
	}
	return newest
}
