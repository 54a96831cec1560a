package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/quic-go/quic-go"

	"edgezmq/quicgo/internal/viaduct"
)

// event is one line of what an edge saw.
type event struct {
	Event     string `json:"event"` // "control", "received", "confirmed", "uploaded", "end"
	ID        string `json:"id,omitempty"`
	Parent    string `json:"parent,omitempty"`
	Source    string `json:"source,omitempty"`
	Group     string `json:"group,omitempty"`
	Operation string `json:"operation,omitempty"`
	Resource  string `json:"resource,omitempty"`
	Content   string `json:"content,omitempty"` // short text only
	Size      int    `json:"size,omitempty"`
	Uploads   int    `json:"uploads,omitempty"`
	Reason    string `json:"reason,omitempty"`
}

// edge is a node: it greets, uploads, proves with a query that the hub has read all, acks what comes
// down, and keeps alive, until it is told to end or has got what it waits for.
type edge struct {
	node     string
	lane     *viaduct.Conn
	answered chan *viaduct.Message // responses to own queries
	mute     bool                  // do not ack

	mu       sync.Mutex
	out      *json.Encoder
	received int           // messages of the hub's own
	changed  chan struct{} // holds a token when received has grown
}

func dial(ctx context.Context, arguments []string) error {
	f := flag.NewFlagSet("dial", flag.ExitOnError)
	var who identity
	who.flags(f)
	node := f.String("node", "", "`name` of the node")
	uploads := f.Int("uploads", 0, "upload so many messages")
	size := f.Int("size", 0, "fill each upload up to so many `bytes`")
	expect := f.Int("expect", 0, "end after so many messages from the hub; else at a signal")
	mute := f.Bool("mute", false, "do not ack objects")
	idle := f.Duration("idle", 30*time.Second, "idle timeout of QUIC")
	heartbeat := f.Duration("heartbeat", 15*time.Second, "how often to send a keepalive")
	f.Parse(arguments)
	if f.NArg() != 1 {
		return errors.New("dial needs the address of the hub")
	}
	pool, _, own, err := who.load()
	if err != nil {
		return err
	}
	connection, err := quic.DialAddr(ctx, f.Arg(0), &tls.Config{
		Certificates: []tls.Certificate{own},
		RootCAs:      pool,
		NextProtos:   who.protocols(),
	}, quicConfig(*idle))
	if err != nil {
		return err
	}
	defer connection.CloseWithError(viaduct.CodeClosed, "")

	e := &edge{
		node:     *node,
		lane:     viaduct.NewConn(connection, viaduct.Options{Single: true}),
		answered: make(chan *viaduct.Message, 1),
		changed:  make(chan struct{}, 1),
		mute:     *mute,
		out:      json.NewEncoder(os.Stdout),
	}
	if err := e.greet(ctx, connection); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { cancel(e.lane.Serve(ctx, e.handle)) }()
	go func() { cancel(e.keepAlive(ctx, *heartbeat)) }()
	if err := e.confirm(ctx); err != nil {
		return err
	}
	if err := e.upload(ctx, *uploads, *size); err != nil {
		return err
	}
	for *expect == 0 || e.seen() < *expect {
		select {
		case <-e.changed:
		case <-ctx.Done():
			reason := context.Cause(ctx)
			e.say(event{Event: "end", Reason: reason.Error()})
			if errors.Is(reason, context.Canceled) {
				return nil // told to
			}
			return reason
		}
	}
	// The acks are on their way; the hub has read them when it answers this.
	err = e.confirm(ctx)
	e.say(event{Event: "end"})
	return err
}

// greet opens the control stream and says who this is.
func (e *edge) greet(ctx context.Context, connection *quic.Conn) error {
	control, err := connection.OpenStreamSync(ctx)
	if err != nil {
		return err
	}
	names, err := json.Marshal(map[string][]string{
		"Node_id":    {e.node},
		"Project_id": {"e632aba927ea4ac2b575ec1603d56f10"}, // KubeEdge's default
	})
	if err != nil {
		return err
	}
	header := viaduct.NewMessage("", "", viaduct.OpHeader, viaduct.OpHeader, names)
	if err := viaduct.WritePackage(control, header.Marshal()); err != nil {
		return err
	}
	payload, err := viaduct.ReadPackage(control)
	if err != nil {
		return fmt.Errorf("control stream: %w", err)
	}
	reply, err := viaduct.Unmarshal(payload)
	if err != nil {
		return fmt.Errorf("control stream: %w", err)
	}
	e.say(describe("control", reply))
	if reply.Parent != header.ID || string(reply.Content) != "ack" {
		return fmt.Errorf("the header was answered with %q to %q", reply.Content, reply.Parent)
	}
	return nil
}

// confirm asks what only a hub with a session answers. All that was sent before on the same stream
// has been read then.
func (e *edge) confirm(ctx context.Context) error {
	query := viaduct.NewMessage("edged", "meta", viaduct.OpQuery, "k8s/ca.crt", nil)
	if err := e.lane.Send(ctx, query, e.handle); err != nil {
		return err
	}
	for {
		select {
		case reply := <-e.answered:
			if reply.Parent == query.ID {
				e.say(event{Event: "confirmed", Size: len(reply.Content)})
				return nil
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (e *edge) upload(ctx context.Context, count, size int) error {
	if count == 0 {
		return nil
	}
	for i := range count {
		content := fmt.Appendf(nil, `{"n":%d`, i)
		if missing := size - len(content) - len(`,"fill":""}`); missing > 0 {
			content = fmt.Appendf(content, `,"fill":"%0*d"`, missing, 0)
		}
		content = append(content, '}')
		m := viaduct.NewMessage("eventbus", "user", viaduct.OpUpload, "peer/topic", content)
		if err := e.lane.Send(ctx, m, e.handle); err != nil {
			return err
		}
	}
	if err := e.confirm(ctx); err != nil {
		return err
	}
	e.say(event{Event: "uploaded", Uploads: count})
	return nil
}

func (e *edge) handle(ctx context.Context, _ quic.StreamID, m *viaduct.Message) error {
	if m.Operation == viaduct.OpResponse && m.Resource == "k8s/ca.crt" {
		select {
		case e.answered <- m:
		case <-ctx.Done():
		}
		return nil
	}
	e.say(describe("received", m))
	// What is to be stored is acked; the edge cannot see whether the hub waits for it.
	if m.Group == "resource" && !e.mute {
		if err := e.lane.Send(ctx, m.Reply([]byte("OK")), e.handle); err != nil {
			return err
		}
	}
	e.mu.Lock()
	e.received++
	e.mu.Unlock()
	select {
	case e.changed <- struct{}{}:
	default:
	}
	return nil
}

func (e *edge) seen() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.received
}

// keepAlive returns when ctx ends or the connection does.
func (e *edge) keepAlive(ctx context.Context, every time.Duration) error {
	for {
		m := viaduct.NewMessage("websocket", "resource", viaduct.OpKeepalive, "node", []byte("ping"))
		if err := e.lane.Send(ctx, m, e.handle); err != nil {
			return err
		}
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (e *edge) say(what event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.out.Encode(what) // the one who reads it has ended us if this fails
}

func describe(name string, m *viaduct.Message) event {
	what := event{
		Event:     name,
		ID:        m.ID,
		Parent:    m.Parent,
		Source:    m.Source,
		Group:     m.Group,
		Operation: m.Operation,
		Resource:  m.Resource,
		Size:      len(m.Content),
	}
	if len(m.Content) <= recordedContent && utf8.Valid(m.Content) {
		what.Content = string(m.Content)
	}
	return what
}
