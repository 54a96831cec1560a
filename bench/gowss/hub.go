package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"

	"github.com/gorilla/websocket"
)

// hub reads what nodes send, decodes each message, and answers what a node needs to be served. Pings are answered
// from the loop that reads, as CloudHub does, so a pong tells that everything before it was decoded.
type hub struct {
	upgrader websocket.Upgrader
	ca       string

	mu       sync.Mutex
	received int // uploads
	nodes    map[string]*node
}

type node struct {
	connection *websocket.Conn
	writing    sync.Mutex
}

func serve(config *tls.Config, ca string) error {
	h := &hub{ca: ca, nodes: map[string]*node{}}
	nodes, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	control, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	asks := http.NewServeMux()
	asks.HandleFunc("GET /received", h.tell)
	asks.HandleFunc("POST /send", h.send)
	go http.Serve(control, asks)
	ready := map[string]int{
		"port":         nodes.Addr().(*net.TCPAddr).Port,
		"control_port": control.Addr().(*net.TCPAddr).Port,
	}
	if err := json.NewEncoder(os.Stdout).Encode(ready); err != nil {
		return err
	}
	return http.Serve(tls.NewListener(nodes, config), http.HandlerFunc(h.upgrade))
}

func (h *hub) upgrade(w http.ResponseWriter, r *http.Request) {
	connection, err := h.upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // it has been answered
	}
	defer connection.Close()
	n := &node{connection: connection}
	h.mu.Lock()
	h.nodes[r.Header.Get("node_id")] = n
	h.mu.Unlock()
	if err := h.read(n); err != nil {
		fmt.Fprintln(os.Stderr, "gowss:", err)
	}
}

func (h *hub) read(n *node) error {
	for {
		var m message
		if err := n.connection.ReadJSON(&m); err != nil {
			return err
		}
		switch {
		case m.Route.Operation == "upload":
			h.mu.Lock()
			h.received++
			h.mu.Unlock()
		case m.Route.Resource == caResource:
			answer := newMessage("cloudhub", "resource", "response", caResource, h.ca)
			answer.Header.ParentID = m.Header.ID
			if err := n.write(answer); err != nil {
				return err
			}
		}
	}
}

func (n *node) write(m *message) error {
	n.writing.Lock()
	defer n.writing.Unlock()
	return n.connection.WriteJSON(m)
}

func (h *hub) tell(w http.ResponseWriter, _ *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	json.NewEncoder(w).Encode(map[string]int{"distinct": h.received})
}

// send writes so many commands to a node, one after another, and answers then.
func (h *hub) send(w http.ResponseWriter, r *http.Request) {
	count, _ := strconv.Atoi(r.FormValue("count"))
	h.mu.Lock()
	n := h.nodes[r.FormValue("node")]
	h.mu.Unlock()
	if n == nil {
		http.Error(w, "no such node", http.StatusNotFound)
		return
	}
	for i := range count {
		if err := n.write(newMessage("router_eventbus", "user", "publish", "bench/command", newReading(i))); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	json.NewEncoder(w).Encode(map[string]int{"sent": count})
}
