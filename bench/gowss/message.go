package main

import (
	"fmt"
	"strings"
	"sync/atomic"
	"time"
)

// message is KubeEdge's model.Message as it is on the wire.
type message struct {
	Header  header `json:"header"`
	Route   route  `json:"route"`
	Content any    `json:"content"`
}

type header struct {
	ID        string `json:"msg_id"`
	ParentID  string `json:"parent_msg_id,omitempty"`
	Timestamp int64  `json:"timestamp"`
	Sync      bool   `json:"sync,omitempty"`
}

type route struct {
	Source    string `json:"source,omitempty"`
	Group     string `json:"group,omitempty"`
	Operation string `json:"operation,omitempty"`
	Resource  string `json:"resource,omitempty"`
}

// reading is what bench/payload.py has for one: 256 bytes of JSON.
type reading struct {
	Number int    `json:"number"`
	Filler string `json:"filler"`
}

const (
	readingBytes = 256
	firstReading = 1_000_000
	caResource   = "k8s/ca.crt"
)

var filler = strings.Repeat("x", readingBytes-len(`{"number":1000000,"filler":""}`))

func newReading(number int) reading { return reading{firstReading + number, filler} }

var messages atomic.Uint64

func newMessage(source, group, operation, resource string, content any) *message {
	// A counter in the form of a UUID: quicker than the random ones that KubeEdge makes.
	id := fmt.Sprintf("00000000-0000-4000-8000-%012x", messages.Add(1))
	return &message{
		Header:  header{ID: id, Timestamp: time.Now().UnixMilli()},
		Route:   route{source, group, operation, resource},
		Content: content,
	}
}
