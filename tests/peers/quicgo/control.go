package main

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
)

// sessionState is what GET /state tells of one connection.
type sessionState struct {
	Session  int    `json:"session"`
	Node     string `json:"node"`
	Rejected string `json:"rejected,omitempty"`
	Streams  int    `json:"streams"`
	Remote   string `json:"remote"`
	ALPN     string `json:"alpn"`
}

type state struct {
	Connections int            `json:"connections"` // ever
	Sessions    []sessionState `json:"sessions"`
	Received    int            `json:"received"`
	Faults      []string       `json:"faults"`
}

// control is the interface for tests, on loopback.
//
//	GET  /state                                what is connected
//	GET  /received?since=N&limit=M             records from sequence number N on
//	GET  /deliveries/ID                        what became of a message sent down
//	POST /send      order                      → {"ids": […]}
//	POST /rules     {"reject", "stall"}        for connections that come
//	POST /stall     {"node", "on"}             read nothing more, or again
//	POST /open      {"node", "count"}          open streams towards the node
//	POST /raw       {"node", "hex", "end"}     write bytes into a stream of their own: "fin", "reset" or "" ends it
//	POST /kick      {"node"}                   end the connection
func (h *hub) control() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /state", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, h.state())
	})
	mux.HandleFunc("GET /received", func(w http.ResponseWriter, r *http.Request) {
		since, _ := strconv.Atoi(r.FormValue("since"))
		limit, err := strconv.Atoi(r.FormValue("limit"))
		if err != nil {
			limit = 1000
		}
		answer(w, h.received(since, limit))
	})
	mux.HandleFunc("GET /deliveries/{id}", func(w http.ResponseWriter, r *http.Request) {
		d, known := h.delivery(r.PathValue("id"))
		if !known {
			http.NotFound(w, r)
			return
		}
		answer(w, d)
	})
	mux.HandleFunc("POST /send", asked(func(w http.ResponseWriter, o order) {
		ids, err := h.send(o)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		answer(w, map[string]any{"ids": ids})
	}))
	mux.HandleFunc("POST /rules", asked(func(w http.ResponseWriter, r rules) {
		h.mu.Lock()
		h.rules = r
		h.mu.Unlock()
		answer(w, r)
	}))
	mux.HandleFunc("POST /stall", h.toSession(func(w http.ResponseWriter, s *session, o nodeOrder) {
		s.lane.Gate().Set(o.On)
		answer(w, o)
	}))
	mux.HandleFunc("POST /open", h.toSession(func(w http.ResponseWriter, s *session, o nodeOrder) {
		for range o.Count {
			if err := s.lane.Open(s.ending, s.handle); err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
				return
			}
		}
		answer(w, o)
	}))
	mux.HandleFunc("POST /raw", h.toSession(func(w http.ResponseWriter, s *session, o nodeOrder) {
		if err := s.writeRaw(o.Hex, o.End); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		answer(w, o)
	}))
	mux.HandleFunc("POST /kick", h.toSession(func(w http.ResponseWriter, s *session, o nodeOrder) {
		s.end(errKicked)
		answer(w, o)
	}))
	return mux
}

// nodeOrder is what is asked for the connection of one node.
type nodeOrder struct {
	Node  string `json:"node"`
	On    bool   `json:"on"`
	Count int    `json:"count"`
	Hex   string `json:"hex"`
	End   string `json:"end"`
}

func (h *hub) toSession(do func(http.ResponseWriter, *session, nodeOrder)) http.HandlerFunc {
	return asked(func(w http.ResponseWriter, o nodeOrder) {
		s := h.session(o.Node)
		if s == nil {
			http.Error(w, "node is not connected", http.StatusConflict)
			return
		}
		do(w, s, o)
	})
}

func (h *hub) state() state {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := state{
		Connections: h.connections,
		Received:    len(h.records),
		Sessions:    []sessionState{},
		Faults:      append([]string{}, h.faults...),
	}
	for _, s := range h.live {
		st.Sessions = append(st.Sessions, sessionState{
			Session:  s.number,
			Node:     s.node,
			Rejected: s.rejected,
			Streams:  s.lane.Streams(),
			Remote:   s.quic.RemoteAddr().String(),
			ALPN:     s.quic.ConnectionState().TLS.NegotiatedProtocol,
		})
	}
	slices.SortFunc(st.Sessions, func(a, b sessionState) int { return a.Session - b.Session })
	return st
}

func (h *hub) delivery(id string) (delivery, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d := h.deliveries[id]; d != nil {
		return *d, true
	}
	return delivery{}, false
}

func (h *hub) received(since, limit int) []record {
	h.mu.Lock()
	defer h.mu.Unlock()
	from := min(max(since, 0), len(h.records))
	to := min(from+max(limit, 0), len(h.records))
	return append([]record{}, h.records[from:to]...)
}

// asked decodes the body of a request.
func asked[T any](do func(http.ResponseWriter, T)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var what T
		decoder := json.NewDecoder(r.Body)
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&what); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		do(w, what)
	}
}

func answer(w http.ResponseWriter, what any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(what) // a client that is gone needs no answer
}
