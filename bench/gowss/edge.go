package main

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
)

const (
	project  = "e632aba927ea4ac2b575ec1603d56f10" // KubeEdge's default
	warmUp   = 2000
	together = 256 // messages to a ping, of which one at most is under way
	patience = 2 * time.Minute
)

// edge writes one message after another, each in one frame and one write, as KubeEdge's edgehub. What it has
// beyond that: pings, whose pongs tell what the hub has read.
type edge struct {
	connection *websocket.Conn
	confirmed  atomic.Int64 // the number in the last pong
	asked      int64        // the number in the last ping
	passed     chan struct{}
	served     chan struct{}
}

func dial(config *tls.Config, address, node string, count int) error {
	dialer := websocket.Dialer{TLSClientConfig: config}
	names := http.Header{"node_id": {node}, "project_id": {project}, "ConnectionUse": {"msg"}}
	connection, _, err := dialer.Dial("wss://"+address+"/"+project+"/"+node+"/events", names)
	if err != nil {
		return err
	}
	defer connection.Close()
	e := &edge{connection: connection, passed: make(chan struct{}, 1), served: make(chan struct{}, 1)}
	connection.SetPongHandler(func(text string) error {
		number, err := strconv.ParseInt(text, 10, 64)
		e.confirmed.Store(number)
		select {
		case e.passed <- struct{}{}:
		default:
		}
		return err
	})
	broken := make(chan error, 1)
	go func() { broken <- e.read() }()
	if err := connection.WriteJSON(newMessage("websocket", "resource", "keepalive", "node", "ping")); err != nil {
		return err
	}
	if err := connection.WriteJSON(newMessage("metamanager", "meta", "query", caResource, nil)); err != nil {
		return err
	}
	select {
	case <-e.served:
	case err := <-broken:
		return err
	case <-time.After(patience):
		return errors.New("the hub does not serve this node")
	}
	if err := e.upload(0, warmUp); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	out.Encode(map[string]bool{"ready": true})
	bufio.NewReader(os.Stdin).ReadString('\n')
	cpu, started := cpuSeconds(), time.Now()
	if err := e.upload(warmUp, count); err != nil {
		return err
	}
	return out.Encode(map[string]any{
		"confirmed": count, "seconds": time.Since(started).Seconds(), "cpu_seconds": cpuSeconds() - cpu,
	})
}

// upload returns when the hub has read everything; `before` messages were uploaded earlier.
func (e *edge) upload(before, count int) error {
	for i := 1; i <= count; i++ {
		m := newMessage("bench", "user", "upload", "default/bench/1", newReading(before+i-1))
		if err := e.connection.WriteJSON(m); err != nil {
			return err
		}
		if i%together == 0 && e.confirmed.Load() == e.asked {
			if err := e.ping(int64(before + i)); err != nil {
				return err
			}
		}
	}
	if err := e.ping(int64(before + count)); err != nil {
		return err
	}
	for e.confirmed.Load() < int64(before+count) {
		select {
		case <-e.passed:
		case <-time.After(patience):
			return errors.New("no pong")
		}
	}
	return nil
}

func (e *edge) ping(number int64) error {
	e.asked = number
	return e.connection.WriteControl(websocket.PingMessage, strconv.AppendInt(nil, number, 10), time.Now().Add(patience))
}

func (e *edge) read() error {
	for {
		var m message
		if err := e.connection.ReadJSON(&m); err != nil {
			return err
		}
		if m.Route.Resource == caResource {
			e.served <- struct{}{}
		}
	}
}
