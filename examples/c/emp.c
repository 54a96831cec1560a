#include "emp.h"

#include <errno.h>
#include <inttypes.h>
#include <msgpack.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

enum {
    EXPECTS_REPLY = 1,
    REPLY = 2,
    RESENT = 4,
    REDELIVERED = 16,
    FROM_STORE = 32,
    REPLY_PRIORITY = 0,
    LIVENESS_MS = 15000,
    HELLO_MS = 500,
    DRAIN_MS = 8000,
    WORK_MS = 5,       /* of handling in one turn, then the socket is looked at again */
    WINDOW = 4096,     /* unsettled messages of a lane; the broker's own limit is taken when it is lower */
    MAX_BATCH = 1024,  /* messages; likewise */
    ARRAY_HEADER = 3,  /* bytes before the messages of a batch, whose count is known when it goes */
    RANDOM_BYTES = 4096,
    MAX_FLOORS = 1024, /* in one PING */
    INCARNATION = 16,
    EPOCH = 8,
    NAME_SIZE = 66, /* @, 64 characters, 0 */
    REASON_SIZE = 65
};

/* Messages of one lane under one header. It grows until it is sent, and never changes afterwards. */
typedef struct batch {
    struct batch *next;
    int64_t number, count; /* of its first message */
    int flags;
    bool is_sent, has_requester;
    uint8_t requester[INCARNATION];
    msgpack_sbuffer body; /* ARRAY_HEADER bytes of room, then the messages */
} batch;

typedef struct lane {
    struct lane *following;
    char destination[NAME_SIZE];
    int priority;
    int64_t floor, next;
    batch *first, *last;
    size_t bytes; /* of the batches that are not settled as a whole */
} lane;

typedef struct {
    int64_t number;
    char reason[REASON_SIZE];
} failure;

/* What is known of one lane towards us: all up to high, outcomes of all up to done (handled in order). */
typedef struct book {
    struct book *following;
    char sender[NAME_SIZE];
    uint8_t incarnation[INCARNATION];
    char destination[NAME_SIZE];
    int priority;
    int64_t base, high, done;
    failure *failures;
    size_t failure_count;
    int64_t session;
    uint64_t lane;
    int64_t session_high, told;
    bool is_owed; /* an ACK, with the others at the end of the turn */
    struct book *owed;
} book;

/* One DELIVER whose messages wait to be handled. */
typedef struct work {
    struct work *following;
    book *book;
    int64_t number, last, first;
    int flags;
    char sender[NAME_SIZE];
    uint8_t incarnation[INCARNATION];
    bool is_readable;
    msgpack_unpacked body;
    char *bytes; /* what body points into */
} work;

typedef struct known {
    struct known *following;
    char sender[NAME_SIZE];
    int64_t generation;
} known;

struct emp {
    void *zmq, *socket;
    char name[NAME_SIZE];
    emp_handler handle;
    emp_settler settled;
    void *context;
    uint8_t incarnation[INCARNATION], epoch[EPOCH];
    int64_t session, generation, heartbeat_ms, liveness_ms;
    int64_t nonce, pinged_at, ping_due, hello_due, taken_since, fresh_at; /* milliseconds; -1: not */
    int64_t message_bytes, window_messages, window_bytes, batch_messages, batch_bytes;
    bool attached, draining;
    emp_state state;
    lane *lanes;
    book *books, *owed;
    known *generations;
    work *work_first, *work_last;
    const work *handling;
    msgpack_sbuffer message; /* being written */
    uint8_t random[RANDOM_BYTES];
    size_t random_left;
};

/* --- small things ------------------------------------------------------------------------------------------- */

static int64_t clock_ms(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void *must(void *memory) {
    if (memory == NULL) {
        perror("emp");
        abort();
    }
    return memory;
}

/* A UUID of version 4. */
static void make_id(emp *bus, char id[36]) {
    static const char digits[] = "0123456789abcdef";
    uint8_t *b;
    if (bus->random_left == 0) {
        for (size_t at = 0; at < RANDOM_BYTES; at += 256) /* so much comes whole, whatever signals do */
            if (getrandom(bus->random + at, 256, 0) != 256) abort();
        bus->random_left = RANDOM_BYTES;
    }
    bus->random_left -= 16;
    b = bus->random + bus->random_left;
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) *id++ = '-';
        *id++ = digits[b[i] >> 4];
        *id++ = digits[b[i] & 15];
    }
}

static void pack_text(msgpack_packer *p, const char *text, size_t size) {
    msgpack_pack_str(p, size);
    msgpack_pack_str_body(p, text, size);
}

static void pack_string(msgpack_packer *p, const char *text) {
    pack_text(p, text != NULL ? text : "", text != NULL ? strlen(text) : 0);
}

static void pack_bytes(msgpack_packer *p, const void *bytes, size_t size) {
    msgpack_pack_bin(p, size);
    msgpack_pack_bin_body(p, bytes, size);
}

/* Fields of an array, by position. What is missing or of another type is 0 or empty: trailing fields may be left out. */
static const msgpack_object *at(const msgpack_object *array, uint32_t place) {
    return array->type == MSGPACK_OBJECT_ARRAY && place < array->via.array.size ? &array->via.array.ptr[place] : NULL;
}

static int64_t integer(const msgpack_object *array, uint32_t place) {
    const msgpack_object *field = at(array, place);
    if (field == NULL) return 0;
    if (field->type == MSGPACK_OBJECT_POSITIVE_INTEGER && field->via.u64 <= INT64_MAX) return (int64_t)field->via.u64;
    return field->type == MSGPACK_OBJECT_NEGATIVE_INTEGER ? field->via.i64 : 0;
}

static emp_text text(const msgpack_object *array, uint32_t place) {
    const msgpack_object *field = at(array, place);
    if (field != NULL && field->type == MSGPACK_OBJECT_STR)
        return (emp_text){field->via.str.ptr, field->via.str.size};
    if (field != NULL && field->type == MSGPACK_OBJECT_BIN)
        return (emp_text){field->via.bin.ptr, field->via.bin.size};
    return (emp_text){"", 0};
}

static bool copy_text(char *to, size_t room, emp_text from) {
    if (from.size >= room) return false;
    memcpy(to, from.data, from.size);
    to[from.size] = 0;
    return true;
}

char *emp_endpoint(void) {
    const char *bus = getenv("EDGEZMQ_BUS"), *home = getenv("EDGEZMQ_HOME"), *state = getenv("XDG_STATE_HOME");
    char path[4096];
    if (bus != NULL && *bus != 0)
        snprintf(path, sizeof path, "%s", bus);
    else if (home != NULL && *home != 0)
        snprintf(path, sizeof path, "ipc://%s/run/bus.sock", home);
    else if (state != NULL && *state == '/')
        snprintf(path, sizeof path, "ipc://%s/edgezmq/run/bus.sock", state);
    else
        snprintf(path, sizeof path, "ipc://%s/.local/state/edgezmq/run/bus.sock", getenv("HOME") ? getenv("HOME") : "");
    return must(strdup(path));
}

/* --- out ------------------------------------------------------------------------------------------------------ */

/* Send verb, header and perhaps a body. Without a connection nothing is sent: WELCOME will bring it again. */
static void put(emp *bus, const char *verb, const msgpack_sbuffer *header, const void *body, size_t size) {
    if (zmq_send(bus->socket, verb, strlen(verb), ZMQ_SNDMORE | ZMQ_DONTWAIT) < 0) {
        bus->attached = false;
        return;
    }
    zmq_send(bus->socket, header->data, header->size, body != NULL ? ZMQ_SNDMORE : 0);
    if (body != NULL) zmq_send(bus->socket, body, size, 0);
}

static void put_batch(emp *bus, const lane *l, batch *b) {
    uint8_t *body = (uint8_t *)b->body.data;
    size_t room = 0;
    msgpack_sbuffer header;
    msgpack_packer p;
    msgpack_sbuffer_init(&header);
    msgpack_packer_init(&p, &header, msgpack_sbuffer_write);
    msgpack_pack_array(&p, 8);
    pack_string(&p, l->destination);
    msgpack_pack_int(&p, l->priority);
    msgpack_pack_int64(&p, b->number);
    msgpack_pack_int64(&p, b->count);
    msgpack_pack_int64(&p, l->floor);
    msgpack_pack_int(&p, b->flags);
    msgpack_pack_nil(&p); /* ttl */
    if (b->has_requester)
        pack_bytes(&p, b->requester, INCARNATION);
    else
        msgpack_pack_nil(&p);
    if (b->count < 16) {
        room = ARRAY_HEADER - 1;
        body[room] = (uint8_t)(0x90 | b->count);
    } else {
        body[0] = 0xdc;
        body[1] = (uint8_t)(b->count >> 8);
        body[2] = (uint8_t)b->count;
    }
    put(bus, "SEND/1", &header, body + room, b->body.size - room);
    b->is_sent = true;
    b->flags |= RESENT; /* if it goes once more */
    msgpack_sbuffer_destroy(&header);
}

static void put_hello(emp *bus) {
    msgpack_sbuffer header;
    msgpack_packer p;
    msgpack_sbuffer_init(&header);
    msgpack_packer_init(&p, &header, msgpack_sbuffer_write);
    msgpack_pack_array(&p, 9);
    pack_string(&p, bus->name);
    msgpack_pack_array(&p, 0); /* groups */
    pack_bytes(&p, bus->incarnation, INCARNATION);
    msgpack_pack_int64(&p, bus->generation);
    msgpack_pack_int64(&p, bus->liveness_ms);
    pack_string(&p, "c-example");
    msgpack_pack_int(&p, 2048);
    msgpack_pack_int(&p, 8 << 20);
    msgpack_pack_int(&p, (int)getpid());
    put(bus, "HELLO/1", &header, NULL, 0);
    msgpack_sbuffer_destroy(&header);
}

static void put_ping(emp *bus, int64_t now) {
    msgpack_sbuffer header;
    msgpack_packer p;
    size_t idle = 0;
    for (const lane *l = bus->lanes; l != NULL; l = l->following) idle += l->first == NULL;
    idle = idle < MAX_FLOORS ? idle : MAX_FLOORS;
    bus->pinged_at = now;
    bus->ping_due = now + bus->heartbeat_ms;
    msgpack_sbuffer_init(&header);
    msgpack_packer_init(&p, &header, msgpack_sbuffer_write);
    msgpack_pack_array(&p, 3);
    msgpack_pack_int64(&p, ++bus->nonce);
    msgpack_pack_map(&p, 0);
    msgpack_pack_array(&p, idle);
    for (const lane *l = bus->lanes; l != NULL && idle > 0; l = l->following) {
        if (l->first != NULL) continue;
        idle--;
        msgpack_pack_array(&p, 3);
        pack_string(&p, l->destination);
        msgpack_pack_int(&p, l->priority);
        msgpack_pack_int64(&p, l->next);
    }
    put(bus, "PING/1", &header, NULL, 0);
    msgpack_sbuffer_destroy(&header);
}

/* DRAIN with its time, or BYE. */
static void put_end(emp *bus, const char *verb, bool is_bye) {
    msgpack_sbuffer header;
    msgpack_packer p;
    msgpack_sbuffer_init(&header);
    msgpack_packer_init(&p, &header, msgpack_sbuffer_write);
    msgpack_pack_array(&p, 1);
    if (is_bye)
        msgpack_pack_false(&p);
    else
        msgpack_pack_int(&p, DRAIN_MS);
    put(bus, verb, &header, NULL, 0);
    msgpack_sbuffer_destroy(&header);
}

static void acknowledge(emp *bus, book *b) {
    int64_t done = b->done < b->session_high ? b->done : b->session_high;
    uint32_t refused = 0;
    msgpack_sbuffer header;
    msgpack_packer p;
    if (!bus->attached || b->session != bus->session || done <= b->told) return;
    for (size_t i = 0; i < b->failure_count; i++)
        refused += b->failures[i].number > b->told && b->failures[i].number <= done;
    msgpack_sbuffer_init(&header);
    msgpack_packer_init(&p, &header, msgpack_sbuffer_write);
    msgpack_pack_array(&p, 2);
    msgpack_pack_int64(&p, bus->session);
    msgpack_pack_array(&p, 1);
    msgpack_pack_array(&p, 3);
    msgpack_pack_uint64(&p, b->lane);
    msgpack_pack_int64(&p, done);
    msgpack_pack_array(&p, refused);
    for (size_t i = 0; i < b->failure_count; i++) {
        if (b->failures[i].number <= b->told || b->failures[i].number > done) continue;
        msgpack_pack_array(&p, 2);
        msgpack_pack_int64(&p, b->failures[i].number);
        pack_string(&p, b->failures[i].reason);
    }
    b->told = done;
    put(bus, "ACK/1", &header, NULL, 0);
    msgpack_sbuffer_destroy(&header);
}

/* Something of the lane was finished, or has to be answered again. */
static void owe(emp *bus, book *b) {
    if (b->is_owed) return;
    b->is_owed = true;
    b->owed = bus->owed;
    bus->owed = b;
}

/* What the turn has brought together: open batches, then ACKs. */
static void flush(emp *bus) {
    for (lane *l = bus->lanes; bus->attached && l != NULL; l = l->following)
        if (l->last != NULL && !l->last->is_sent) put_batch(bus, l, l->last);
    while (bus->owed != NULL) {
        book *b = bus->owed;
        bus->owed = b->owed;
        b->is_owed = false;
        acknowledge(bus, b);
    }
}

static lane *lane_to(emp *bus, const char *destination, size_t size, int priority) {
    lane *l;
    for (l = bus->lanes; l != NULL; l = l->following)
        if (l->priority == priority && strlen(l->destination) == size && memcmp(l->destination, destination, size) == 0)
            return l;
    l = must(calloc(1, sizeof *l));
    copy_text(l->destination, sizeof l->destination, (emp_text){destination, size});
    l->priority = priority;
    l->next = l->floor = 1;
    l->following = bus->lanes;
    bus->lanes = l;
    return l;
}

static void write_message(emp *bus, emp_text parent, emp_text source, emp_text group, emp_text resource,
                          const char *operation, emp_text kind, const void *content, size_t size) {
    char id[36];
    msgpack_packer p;
    make_id(bus, id);
    msgpack_sbuffer_clear(&bus->message);
    msgpack_packer_init(&p, &bus->message, msgpack_sbuffer_write);
    msgpack_pack_array(&p, 11);
    pack_text(&p, id, sizeof id);
    pack_text(&p, parent.data, parent.size);
    msgpack_pack_int64(&p, clock_ms(CLOCK_REALTIME));
    msgpack_pack_false(&p);
    pack_string(&p, "");
    pack_text(&p, source.data, source.size);
    pack_text(&p, group.data, group.size);
    pack_text(&p, resource.data, resource.size);
    pack_string(&p, operation);
    pack_text(&p, kind.data, kind.size);
    pack_bytes(&p, content, size);
}

/* A new batch of the lane, without messages. */
static batch *open_batch(lane *l) {
    batch *b = must(calloc(1, sizeof *b));
    b->number = l->next;
    msgpack_sbuffer_init(&b->body);
    msgpack_sbuffer_write(&b->body, "\0\0", ARRAY_HEADER);
    if (l->last != NULL)
        l->last->next = b;
    else
        l->first = b;
    l->last = b;
    return b;
}

/* Give the written message to the batch. */
static int64_t append(emp *bus, lane *l, batch *b) {
    if (msgpack_sbuffer_write(&b->body, bus->message.data, bus->message.size) != 0) must(NULL);
    b->count++;
    l->bytes += bus->message.size;
    return l->next++;
}

static void free_batch(batch *b) {
    msgpack_sbuffer_destroy(&b->body);
    free(b);
}

static emp_text of(const char *string) { return (emp_text){string ? string : "", string ? strlen(string) : 0}; }

int64_t emp_send(emp *bus, const char *destination, int priority, const emp_message *message) {
    lane *l;
    batch *b;
    size_t size;
    if (strlen(destination) >= NAME_SIZE) return -1;
    l = lane_to(bus, destination, strlen(destination), priority);
    if (l->next - l->floor >= bus->window_messages) return 0;
    write_message(bus, of(""), of(message->source), of(message->group), of(message->resource), message->operation,
                  of(message->kind ? message->kind : "json"), message->content, message->size);
    size = bus->message.size;
    if (size > (size_t)bus->message_bytes) return -1;
    if (l->first != NULL && l->bytes + size > (size_t)bus->window_bytes) return 0;
    b = l->last;
    if (b == NULL || b->is_sent || b->count >= bus->batch_messages ||
        b->body.size - ARRAY_HEADER + size > (size_t)bus->batch_bytes) {
        if (b != NULL && !b->is_sent && bus->attached) put_batch(bus, l, b);
        b = open_batch(l);
    }
    return append(bus, l, b);
}

void emp_reply(emp *bus, const emp_delivery *request, const void *content, size_t size) {
    lane *l = lane_to(bus, request->sender.data, request->sender.size, REPLY_PRIORITY);
    batch *b = open_batch(l);
    write_message(bus, request->id, request->source, request->group, request->resource, "response", request->kind, content,
                  size);
    b->flags = REPLY;
    b->has_requester = true;
    memcpy(b->requester, bus->handling->incarnation, INCARNATION);
    append(bus, l, b);
    if (bus->attached) put_batch(bus, l, b);
}

/* --- in ------------------------------------------------------------------------------------------------------- */

static void on_welcome(emp *bus, const msgpack_object *header, int64_t now) {
    emp_text epoch = text(header, 0);
    int64_t session = integer(header, 1), generation = integer(header, 2), heartbeat = integer(header, 3);
    const msgpack_object *limits = at(header, 5);
    if (epoch.size != EPOCH || session < 0 || generation < 1 || heartbeat < 1) {
        fprintf(stderr, "emp: a WELCOME that makes no sense\n");
        return;
    }
    if (memcmp(epoch.data, bus->epoch, EPOCH) == 0 && session <= bus->session) return; /* an old one that lay unread */
    memcpy(bus->epoch, epoch.data, EPOCH);
    bus->session = session;
    bus->generation = generation;
    bus->heartbeat_ms = heartbeat < bus->liveness_ms / 3 ? heartbeat : bus->liveness_ms / 3;
    bus->attached = true;
    bus->taken_since = -1;
    if (limits != NULL && limits->type == MSGPACK_OBJECT_ARRAY && limits->via.array.size >= 3) {
        bus->message_bytes = integer(limits, 0);
        bus->window_messages = integer(limits, 1) < WINDOW ? integer(limits, 1) : WINDOW;
        bus->window_bytes = integer(limits, 2);
    }
    if (limits != NULL && limits->type == MSGPACK_OBJECT_ARRAY && limits->via.array.size >= 5) {
        bus->batch_messages = integer(limits, 3) < MAX_BATCH ? integer(limits, 3) : MAX_BATCH;
        bus->batch_bytes = integer(limits, 4);
    }
    for (lane *l = bus->lanes; l != NULL; l = l->following) /* everything unsettled, in order (rule 4) */
        for (batch *b = l->first; b != NULL; b = b->next) put_batch(bus, l, b);
    if (bus->draining) put_end(bus, "DRAIN/1", false);
    put_ping(bus, now);
}

static void on_refused(emp *bus, const msgpack_object *header, int64_t now) {
    emp_text code = text(header, 0), why = text(header, 1);
    char known_code[65] = "";
    copy_text(known_code, sizeof known_code, code);
    if (!bus->attached && strcmp(known_code, "name-taken") == 0) {
        if (bus->taken_since < 0) bus->taken_since = now;
        if (now - bus->taken_since <= bus->liveness_ms) return; /* it may be our own predecessor */
        bus->state = EMP_REFUSED;
    } else if (!bus->attached && (strcmp(known_code, "denied") == 0 || strcmp(known_code, "version") == 0 ||
                                  strcmp(known_code, "too-many") == 0)) {
        bus->state = EMP_REFUSED;
    }
    fprintf(stderr, "emp: refused: %s: %.*s\n", known_code, (int)why.size, why.data);
}

static void on_settled(emp *bus, const msgpack_object *header) {
    emp_text destination = text(header, 0);
    int64_t priority = integer(header, 1), cumulative = integer(header, 2);
    const msgpack_object *exceptions = at(header, 3);
    lane *l = bus->lanes;
    while (l != NULL && (l->priority != priority || strlen(l->destination) != destination.size ||
                         memcmp(l->destination, destination.data, destination.size) != 0))
        l = l->following;
    if (l == NULL || cumulative < l->floor || cumulative >= l->next) return;
    for (; l->floor <= cumulative; l->floor++) {
        batch *b = l->first;
        char reason[REASON_SIZE];
        bool is_refused = false;
        for (uint32_t i = 0; exceptions != NULL && exceptions->type == MSGPACK_OBJECT_ARRAY && i < exceptions->via.array.size;
             i++) {
            const msgpack_object *exception = &exceptions->via.array.ptr[i];
            if (integer(exception, 0) != l->floor) continue;
            if (!copy_text(reason, sizeof reason, text(exception, 1))) strcpy(reason, "failed");
            is_refused = true;
        }
        if (bus->settled != NULL && l->priority != REPLY_PRIORITY)
            bus->settled(bus, l->destination, l->floor, is_refused ? reason : NULL, bus->context);
        if (l->floor < b->number + b->count - 1) continue; /* it stays whole until its last is settled */
        l->first = b->next;
        if (l->first == NULL) l->last = NULL;
        l->bytes -= b->body.size - ARRAY_HEADER;
        free_batch(b);
    }
}

static void fail(book *b, int64_t number, emp_text reason) {
    failure *f;
    b->failures = must(realloc(b->failures, (b->failure_count + 1) * sizeof *b->failures));
    f = &b->failures[b->failure_count++];
    f->number = number;
    if (!copy_text(f->reason, sizeof f->reason, reason)) strcpy(f->reason, "failed");
}

static bool is_same(const char *string, emp_text other) {
    return strlen(string) == other.size && memcmp(string, other.data, other.size) == 0;
}

/* By sender too: anybody may say another's incarnation. */
static book *book_of(emp *bus, emp_text sender, emp_text incarnation, emp_text destination, int priority) {
    for (book *b = bus->books; b != NULL; b = b->following)
        if (memcmp(b->incarnation, incarnation.data, INCARNATION) == 0 && b->priority == priority &&
            is_same(b->sender, sender) && is_same(b->destination, destination))
            return b;
    return NULL;
}

static known *generation_of(emp *bus, emp_text sender) {
    known *k;
    for (k = bus->generations; k != NULL; k = k->following)
        if (strlen(k->sender) == sender.size && memcmp(k->sender, sender.data, sender.size) == 0) return k;
    k = must(calloc(1, sizeof *k));
    copy_text(k->sender, sizeof k->sender, sender);
    k->following = bus->generations;
    bus->generations = k;
    return k;
}

static void on_deliver(emp *bus, const msgpack_object *header, const void *body, size_t size) {
    emp_text sender = text(header, 2), incarnation = text(header, 3), destination = text(header, 5);
    int64_t session = integer(header, 0), generation = integer(header, 4), first = integer(header, 7);
    int64_t count = integer(header, 8), from = integer(header, 9), floor = integer(header, 10);
    int64_t last = first + count - 1;
    int priority = (int)integer(header, 6), flags = (int)integer(header, 12);
    const msgpack_object *voids = at(header, 11);
    book *b;
    known *k;
    if (count < 1 || count > 1024 || first < 1 || from < first || from > last || floor > from || incarnation.size != INCARNATION ||
        sender.size >= NAME_SIZE || destination.size >= NAME_SIZE) {
        fprintf(stderr, "emp: a DELIVER that makes no sense: first %" PRId64 " count %" PRId64 "\n", first, count);
        return;
    }
    k = generation_of(bus, sender);
    b = book_of(bus, sender, incarnation, destination, priority);
    if (b == NULL) {
        b = must(calloc(1, sizeof *b));
        memcpy(b->incarnation, incarnation.data, INCARNATION);
        copy_text(b->sender, sizeof b->sender, sender);
        copy_text(b->destination, sizeof b->destination, destination);
        b->priority = priority;
        b->base = floor;
        b->high = b->done = floor - 1;
        b->session = -1;
        b->following = bus->books;
        bus->books = b;
        if (generation < k->generation && (flags & (REPLY | FROM_STORE)) == 0) { /* rule 20 */
            b->high = b->done = last;
            for (int64_t number = from; number <= last; number++) fail(b, number, of("fenced"));
        }
    }
    if (generation > k->generation) k->generation = generation;
    for (size_t i = 0; i < b->failure_count;) { /* what is below the floor is settled */
        if (b->failures[i].number < floor)
            b->failures[i] = b->failures[--b->failure_count];
        else
            i++;
    }
    if (from > b->high + 1) { /* rule 15: everything below `from` is known now */
        for (uint32_t i = 0; voids != NULL && voids->type == MSGPACK_OBJECT_ARRAY && i < voids->via.array.size; i++) {
            const msgpack_object *each = &voids->via.array.ptr[i];
            if (integer(each, 0) > b->high && integer(each, 0) < from) fail(b, integer(each, 0), text(each, 1));
        }
        if (b->done == b->high) b->done = from - 1;
        b->high = from - 1;
    }
    for (int64_t number = from; number <= last && number < b->base; number++) fail(b, number, of("overtaken"));
    if (session == bus->session) {
        if (b->session != session || b->lane != (uint64_t)integer(header, 1)) {
            b->session = session;
            b->lane = (uint64_t)integer(header, 1);
            b->session_high = b->told = 0;
        }
        if (last > b->session_high) b->session_high = last;
        if (b->told > from - 1) b->told = from - 1; /* duplicates get the same answer again */
    }
    if (last > b->high && (!bus->draining || (flags & REPLY))) {
        work *w = must(calloc(1, sizeof *w));
        w->book = b;
        w->first = first;
        w->number = from > b->high + 1 ? from : b->high + 1;
        w->last = last;
        w->flags = flags;
        copy_text(w->sender, sizeof w->sender, sender);
        memcpy(w->incarnation, incarnation.data, INCARNATION);
        w->bytes = must(malloc(size > 0 ? size : 1));
        memcpy(w->bytes, body, size);
        msgpack_unpacked_init(&w->body);
        w->is_readable = msgpack_unpack_next(&w->body, w->bytes, size, NULL) == MSGPACK_UNPACK_SUCCESS &&
                         w->body.data.type == MSGPACK_OBJECT_ARRAY && w->body.data.via.array.size == (uint64_t)count;
        b->high = last;
        if (bus->work_last != NULL)
            bus->work_last->following = w;
        else
            bus->work_first = w;
        bus->work_last = w;
    }
    owe(bus, b);
}

static void read_frames(emp *bus, zmq_msg_t *frames, int count, int64_t now) {
    const char *verb = zmq_msg_data(&frames[0]);
    size_t size = zmq_msg_size(&frames[0]);
    msgpack_unpacked header;
    if (count < 2) return;
    msgpack_unpacked_init(&header);
    if (msgpack_unpack_next(&header, zmq_msg_data(&frames[1]), zmq_msg_size(&frames[1]), NULL) != MSGPACK_UNPACK_SUCCESS ||
        header.data.type != MSGPACK_OBJECT_ARRAY) {
        fprintf(stderr, "emp: %.*s with a header that cannot be read\n", (int)size, verb);
        msgpack_unpacked_destroy(&header);
        return;
    }
#define IS(name) (size == sizeof(name) - 1 && memcmp(verb, name, size) == 0)
    if (IS("WELCOME/1")) {
        on_welcome(bus, &header.data, now);
    } else if (IS("WHO/1")) {
        if (bus->attached) {
            bus->attached = false;
            bus->hello_due = now;
        }
    } else if (IS("PONG/1")) {
        if (bus->pinged_at >= 0 && integer(&header.data, 0) == bus->nonce) {
            bus->fresh_at = bus->pinged_at;
            bus->pinged_at = -1;
        }
    } else if (IS("SETTLED/1")) {
        on_settled(bus, &header.data);
    } else if (IS("DELIVER/1")) {
        if (count == 3) on_deliver(bus, &header.data, zmq_msg_data(&frames[2]), zmq_msg_size(&frames[2]));
    } else if (IS("FENCED/1")) {
        if (integer(&header.data, 0) >= bus->generation) bus->state = EMP_FENCED;
    } else if (IS("REFUSED/1")) {
        on_refused(bus, &header.data, now);
    }
#undef IS
    msgpack_unpacked_destroy(&header);
}

/* Everything that is there: before anything is handled (rule 21). */
static void read_all(emp *bus) {
    while (bus->state == EMP_RUNNING) {
        zmq_msg_t frames[3];
        int count = 0, more = 1;
        while (more) {
            zmq_msg_t spare, *frame = count < 3 ? &frames[count] : &spare;
            zmq_msg_init(frame);
            if (zmq_msg_recv(frame, bus->socket, ZMQ_DONTWAIT) < 0) {
                zmq_msg_close(frame);
                if (errno != EAGAIN && errno != EINTR) bus->state = EMP_BROKEN;
                return;
            }
            more = zmq_msg_more(frame);
            if (count < 3)
                count++;
            else
                zmq_msg_close(&spare);
        }
        read_frames(bus, frames, count, clock_ms(CLOCK_MONOTONIC));
        for (int i = 0; i < count; i++) zmq_msg_close(&frames[i]);
    }
}

/* --- turns ---------------------------------------------------------------------------------------------------- */

static void work_one(emp *bus) {
    work *w = bus->work_first;
    book *b = w->book;
    const char *reason = NULL;
    if ((w->flags & REPLY) == 0) {
        const msgpack_object *fields = w->is_readable ? at(&w->body.data, (uint32_t)(w->number - w->first)) : NULL;
        if (fields == NULL || fields->type != MSGPACK_OBJECT_ARRAY) {
            reason = "invalid";
        } else {
            emp_delivery d = {
                .id = text(fields, 0), .parent_id = text(fields, 1), .timestamp = integer(fields, 2),
                .resource_version = text(fields, 4), .source = text(fields, 5), .group = text(fields, 6),
                .resource = text(fields, 7), .operation = text(fields, 8), .kind = text(fields, 9),
                .content = text(fields, 10), .sender = of(w->sender), .expects_reply = (w->flags & EXPECTS_REPLY) != 0,
                .redelivered = (w->flags & REDELIVERED) != 0,
            };
            bus->handling = w;
            reason = bus->handle != NULL ? bus->handle(bus, &d, bus->context) : "unroutable";
            bus->handling = NULL;
        }
    } /* this client asks nobody: a reply is acknowledged and forgotten */
    if (reason != NULL) fail(b, w->number, of(reason));
    b->done = w->number++;
    owe(bus, b);
    if (w->number <= w->last) return;
    bus->work_first = w->following;
    if (bus->work_first == NULL) bus->work_last = NULL;
    msgpack_unpacked_destroy(&w->body);
    free(w->bytes);
    free(w);
}

static bool may_work(const emp *bus, int64_t now) {
    return bus->work_first != NULL && !(bus->draining && (bus->work_first->flags & REPLY) == 0) && bus->fresh_at >= 0 &&
           now - bus->fresh_at <= bus->liveness_ms; /* rule 21 */
}

emp_state emp_turn(emp *bus, int wait_ms) {
    int64_t now = clock_ms(CLOCK_MONOTONIC), due;
    zmq_pollitem_t item = {bus->socket, 0, ZMQ_POLLIN, 0};
    if (bus->attached && bus->pinged_at >= 0 && now - bus->pinged_at > bus->liveness_ms) bus->attached = false; /* no PONG */
    if (!bus->attached && now >= bus->hello_due) {
        bus->hello_due = now + HELLO_MS;
        put_hello(bus);
    } else if (bus->attached && bus->pinged_at < 0 && now >= bus->ping_due) {
        put_ping(bus, now);
    }
    due = bus->attached ? bus->ping_due : bus->hello_due;
    if (bus->attached && bus->pinged_at >= 0) due = bus->pinged_at + bus->liveness_ms;
    if (due - now < wait_ms) wait_ms = due > now ? (int)(due - now) : 0;
    flush(bus);
    zmq_poll(&item, 1, may_work(bus, now) ? 0 : wait_ms);
    read_all(bus);
    now = clock_ms(CLOCK_MONOTONIC);
    for (int64_t until = now + WORK_MS; bus->state == EMP_RUNNING && now < until && may_work(bus, now);
         now = clock_ms(CLOCK_MONOTONIC))
        work_one(bus);
    if (bus->state == EMP_RUNNING) flush(bus);
    return bus->state;
}

emp *emp_open(const char *name, const char *endpoint, emp_handler handle, emp_settler settled, void *context) {
    const struct {
        int option, value;
    } options[] = {{ZMQ_IMMEDIATE, 1}, {ZMQ_LINGER, 1000},     {ZMQ_SNDHWM, 0},
                   {ZMQ_RCVHWM, 0},    {ZMQ_RECONNECT_IVL, 20}, {ZMQ_RECONNECT_IVL_MAX, 500}};
    emp *bus = must(calloc(1, sizeof *bus));
    if (!copy_text(bus->name, sizeof bus->name, of(name)) || getrandom(bus->incarnation, INCARNATION, 0) != INCARNATION) {
        free(bus);
        errno = EINVAL;
        return NULL;
    }
    bus->handle = handle;
    bus->settled = settled;
    bus->context = context;
    bus->session = bus->pinged_at = bus->taken_since = bus->fresh_at = -1;
    bus->heartbeat_ms = 1000;
    bus->liveness_ms = LIVENESS_MS;
    bus->message_bytes = bus->window_bytes = 1 << 20; /* little, until WELCOME tells */
    bus->window_messages = 64;
    bus->batch_messages = 64;
    bus->batch_bytes = 1 << 18;
    msgpack_sbuffer_init(&bus->message);
    bus->zmq = zmq_ctx_new();
    bus->socket = zmq_socket(bus->zmq, ZMQ_DEALER);
    for (size_t i = 0; bus->socket != NULL && i < sizeof options / sizeof *options; i++)
        zmq_setsockopt(bus->socket, options[i].option, &options[i].value, sizeof(int));
    if (bus->socket == NULL || zmq_connect(bus->socket, endpoint) != 0) {
        int fault = errno;
        if (bus->socket != NULL) zmq_close(bus->socket);
        zmq_ctx_term(bus->zmq);
        free(bus);
        errno = fault;
        return NULL;
    }
    return bus;
}

void emp_set_liveness(emp *bus, int ms) { bus->liveness_ms = ms; }

void emp_drain(emp *bus) {
    if (!bus->draining && bus->attached) put_end(bus, "DRAIN/1", false);
    bus->draining = true;
}

bool emp_is_attached(const emp *bus) { return bus->attached && bus->fresh_at >= 0; }

bool emp_is_idle(const emp *bus) {
    for (const lane *l = bus->lanes; l != NULL; l = l->following)
        if (l->first != NULL) return false;
    return true;
}

void emp_close(emp *bus) {
    if (bus->attached && bus->state == EMP_RUNNING) {
        flush(bus);
        put_end(bus, "BYE/1", true);
    }
    msgpack_sbuffer_destroy(&bus->message);
    zmq_close(bus->socket);
    zmq_ctx_term(bus->zmq);
    while (bus->lanes != NULL) {
        lane *l = bus->lanes;
        bus->lanes = l->following;
        while (l->first != NULL) {
            batch *b = l->first;
            l->first = b->next;
            free_batch(b);
        }
        free(l);
    }
    while (bus->work_first != NULL) {
        work *w = bus->work_first;
        bus->work_first = w->following;
        msgpack_unpacked_destroy(&w->body);
        free(w->bytes);
        free(w);
    }
    while (bus->books != NULL) {
        book *b = bus->books;
        bus->books = b->following;
        free(b->failures);
        free(b);
    }
    while (bus->generations != NULL) {
        known *k = bus->generations;
        bus->generations = k->following;
        free(k);
    }
    free(bus);
}
