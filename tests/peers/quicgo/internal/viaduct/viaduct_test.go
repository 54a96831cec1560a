package viaduct

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type vector struct {
	Name    string `json:"name"`
	Raw     string `json:"raw_hex"`
	Decoded struct {
		PayloadLen   *int            `json:"payload_len"`
		PayloadHex   string          `json:"payload_hex"`
		Error        string          `json:"error"`
		Panic        string          `json:"panic"`
		Err          string          `json:"err"`
		AfterTheTrip json.RawMessage `json:"message_after_the_trip"`
	} `json:"decoded"`
}

type afterTheTrip struct {
	Header struct {
		ID        string `json:"msg_id"`
		Parent    string `json:"parent_msg_id"`
		Timestamp int64  `json:"timestamp"`
		Sync      bool   `json:"sync"`
	} `json:"header"`
	Route struct {
		Source    string `json:"source"`
		Group     string `json:"group"`
		Operation string `json:"operation"`
		Resource  string `json:"resource"`
	} `json:"route"`
	Content *string `json:"content"`
}

// vectors returns the recorded vectors whose names begin with prefix.
func vectors(t *testing.T, prefix string) []vector {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "..", "..", "vectors", "cloudlink", "quic_framing.json"))
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []vector `json:"vectors"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	var chosen []vector
	for _, v := range file.Vectors {
		if strings.HasPrefix(v.Name, prefix) {
			chosen = append(chosen, v)
		}
	}
	if len(chosen) == 0 {
		t.Fatalf("no vector is named %s…", prefix)
	}
	return chosen
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	raw, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestPackagesAreWrittenAndReadAsTheVectorsSay(t *testing.T) {
	for _, v := range append(vectors(t, "package_full_"), vectors(t, "package_min_")...) {
		t.Run(v.Name, func(t *testing.T) {
			raw := unhex(t, v.Raw)
			payload, err := ReadPackage(bytes.NewReader(raw))
			if err != nil {
				t.Fatal(err)
			}
			m, err := Unmarshal(payload)
			if err != nil {
				t.Fatal(err)
			}
			var want afterTheTrip
			if err := json.Unmarshal(v.Decoded.AfterTheTrip, &want); err != nil {
				t.Fatal(err)
			}
			var content []byte
			if want.Content != nil {
				if content, err = base64.StdEncoding.DecodeString(*want.Content); err != nil {
					t.Fatal(err)
				}
			}
			h, r := want.Header, want.Route
			if m.ID != h.ID || m.Parent != h.Parent || m.Timestamp != h.Timestamp || m.Sync != h.Sync {
				t.Errorf("header %+v, want %+v", m, h)
			}
			if m.Source != r.Source || m.Group != r.Group || m.Operation != r.Operation || m.Resource != r.Resource {
				t.Errorf("route %+v, want %+v", m, r)
			}
			if !bytes.Equal(m.Content, content) {
				t.Errorf("content %q, want %q", m.Content, content)
			}
			var again bytes.Buffer
			if err := WritePackage(&again, m.Marshal()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(again.Bytes(), raw) {
				t.Errorf("written %x, want %x", again.Bytes(), raw)
			}
		})
	}
}

func TestTheReaderLooksAtTheLengthOnly(t *testing.T) {
	for _, v := range vectors(t, "reader_case_") {
		t.Run(v.Name, func(t *testing.T) {
			payload, err := ReadPackage(bytes.NewReader(unhex(t, v.Raw)))
			if message := errorText(err); message != v.Decoded.Error {
				t.Fatalf("error %q, want %q", message, v.Decoded.Error)
			}
			if got := hex.EncodeToString(payload); got != v.Decoded.PayloadHex {
				t.Errorf("payload %s, want %s", got, v.Decoded.PayloadHex)
			}
		})
	}
}

func TestBodiesAreAcceptedAndRefusedAsTheVectorsSay(t *testing.T) {
	for _, v := range vectors(t, "protobuf_decode_case_") {
		t.Run(v.Name, func(t *testing.T) {
			_, err := Unmarshal(unhex(t, v.Raw))
			refused := v.Decoded.Panic != "" || v.Decoded.Err != ""
			if refused != (err != nil) {
				t.Errorf("error %v, want one: %v", err, refused)
			}
			if v.Decoded.Panic != "" && !errors.Is(err, ErrNoSubmessage) {
				t.Errorf("error %v where the genuine receiver panics", err)
			}
		})
	}
}

func TestTheEndBetweenPackagesIsNoError(t *testing.T) {
	if _, err := ReadPackage(bytes.NewReader(nil)); err != io.EOF {
		t.Errorf("error %v, want io.EOF", err)
	}
}

func TestTooLargeAPayloadIsNotWritten(t *testing.T) {
	var written bytes.Buffer
	err := WritePackage(&written, make([]byte, MaxPayload+1))
	if errorText(err) != "payload length 33554433 exceeds maximum 33554432" || written.Len() != 0 {
		t.Errorf("error %v, %d bytes written", err, written.Len())
	}
}

func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte("\x0a\x00\x12\x00\x1a\x01x"))
	f.Fuzz(func(t *testing.T, payload []byte) {
		m, err := Unmarshal(payload)
		if err != nil {
			return
		}
		again, err := Unmarshal(m.Marshal())
		if err != nil || again.ID != m.ID || again.Timestamp != m.Timestamp || !bytes.Equal(again.Content, m.Content) {
			t.Errorf("%+v came back as %+v, %v", m, again, err)
		}
	})
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
