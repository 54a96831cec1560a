/* One side of the one -> one benchmark, in C on the client of examples/c:
 *
 *     bench ROLE ENDPOINT COUNT SIZE PER_SECOND      ROLE: sender, receiver, responder
 *
 * The talk with the bench is that of bench/worker.py: {"ready": true}, a line to begin, one line of result, and the end
 * when standard input ends. PER_SECOND 0: as fast as the window allows, else so many messages a second.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "emp.h"

#define SINK "bench-sink"

enum { NUMBER_BYTES = 8, STAMP_BYTES = 8, TURN_MS = 10, WAIT_SECONDS = 120 };

typedef struct {
    int64_t count, received, expected, skips, confirmed, last_ns;
    double *took_us; /* of each message, when they are paced */
    bool answers;
} side;

static int64_t nanoseconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void store(uint8_t *to, uint64_t value) {
    for (int i = 7; i >= 0; i--, value >>= 8) to[i] = (uint8_t)value;
}

static uint64_t load(const char *from) {
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) value = value << 8 | (uint8_t)from[i];
    return value;
}

static void fail(const char *what) {
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

static void turn(emp *bus, int wait_ms) {
    if (emp_turn(bus, wait_ms) != EMP_RUNNING) fail("the bus does not serve us");
}

/* Keep up with the broker until the bench writes, or ends standard input. */
static void await_input(emp *bus) {
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    char line[256];
    while (poll(&input, 1, 0) == 0) turn(bus, TURN_MS);
    if (read(STDIN_FILENO, line, sizeof line) < 0) fail(strerror(errno));
}

static const char *take(emp *bus, const emp_delivery *delivery, void *context) {
    side *self = context;
    int64_t number;
    if (self->answers) {
        emp_reply(bus, delivery, delivery->content.data, delivery->content.size);
        return NULL;
    }
    if (delivery->content.size < NUMBER_BYTES) return "invalid";
    number = (int64_t)load(delivery->content.data);
    self->skips += number != self->expected;
    self->expected = number + 1;
    if (self->took_us != NULL && self->received < self->count && delivery->content.size >= NUMBER_BYTES + STAMP_BYTES)
        self->took_us[self->received] =
            (double)(nanoseconds(CLOCK_MONOTONIC) - (int64_t)load(delivery->content.data + NUMBER_BYTES)) / 1000;
    if (++self->received == self->count) self->last_ns = nanoseconds(CLOCK_MONOTONIC);
    return NULL;
}

static void on_settled(emp *bus, const char *destination, int64_t number, const char *reason, void *context) {
    side *self = context;
    (void)bus;
    if (reason != NULL) {
        fprintf(stderr, "bench: message %" PRId64 " to %s: refused: %s\n", number, destination, reason);
        exit(1);
    }
    self->confirmed++;
}

static void say_cpu(int64_t began) {
    printf("\"cpu_seconds\": %.6f}\n", (double)(nanoseconds(CLOCK_PROCESS_CPUTIME_ID) - began) / 1e9);
    fflush(stdout);
}

static void send_all(emp *bus, side *self, size_t size, int64_t per_second) {
    uint8_t *payload = malloc(size);
    emp_message message = {.source = "bench-sender", .resource = "bench", .operation = "update", .kind = "bytes",
                           .content = payload, .size = size};
    int64_t started = nanoseconds(CLOCK_MONOTONIC), cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID), sent;
    if (payload == NULL) fail("no memory");
    memset(payload, 'x', size);
    for (int64_t number = 0; number < self->count; number++) {
        while (per_second > 0) {
            int64_t left = started + number * 1000000000 / per_second - nanoseconds(CLOCK_MONOTONIC);
            if (left <= 0) break;
            if (left >= 1000000)
                turn(bus, (int)(left / 1000000));
            else
                nanosleep(&(struct timespec){.tv_nsec = (long)left}, NULL);
        }
        store(payload, (uint64_t)number);
        if (per_second > 0) store(payload + NUMBER_BYTES, (uint64_t)nanoseconds(CLOCK_MONOTONIC));
        while ((sent = emp_send(bus, SINK, EMP_DATA, &message)) == 0) turn(bus, TURN_MS); /* the window is full */
        if (sent < 0) fail("too large");
        if (per_second > 0) turn(bus, 0);
    }
    while (self->confirmed < self->count) turn(bus, TURN_MS);
    printf("{\"started_ns\": %" PRId64 ", \"finished_ns\": %" PRId64 ", \"confirmed\": %" PRId64 ", ", started,
           nanoseconds(CLOCK_MONOTONIC), self->confirmed);
    say_cpu(cpu);
    free(payload);
}

static void receive_all(emp *bus, side *self) {
    int64_t cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID);
    while (self->received < self->count) turn(bus, TURN_MS);
    printf("{\"received\": %" PRId64 ", \"skips\": %" PRId64 ", \"last_ns\": %" PRId64 ", ", self->received, self->skips,
           self->last_ns);
    if (self->took_us != NULL) {
        printf("\"took_us\": [");
        for (int64_t i = 0; i < self->count; i++) printf("%s%.1f", i > 0 ? ", " : "", self->took_us[i]);
        printf("], ");
    }
    say_cpu(cpu);
}

int main(int argc, char **argv) {
    side self = {0};
    emp *bus;
    size_t size;
    int64_t per_second;
    bool sends;
    if (argc != 6) fail("expected ROLE ENDPOINT COUNT SIZE PER_SECOND");
    self.count = strtoll(argv[3], NULL, 10);
    size = (size_t)strtoull(argv[4], NULL, 10);
    per_second = strtoll(argv[5], NULL, 10);
    sends = strcmp(argv[1], "sender") == 0;
    self.answers = strcmp(argv[1], "responder") == 0;
    if (size < NUMBER_BYTES + STAMP_BYTES || (!sends && !self.answers && strcmp(argv[1], "receiver") != 0))
        fail("no such role or size");
    if (per_second > 0 && !sends && (self.took_us = calloc((size_t)self.count, sizeof(double))) == NULL) fail("no memory");
    bus = emp_open(sends ? "bench-sender" : SINK, argv[2], take, on_settled, &self);
    if (bus == NULL) fail(strerror(errno));
    alarm(WAIT_SECONDS); /* whatever happens */
    while (!emp_is_attached(bus)) turn(bus, TURN_MS);
    puts("{\"ready\": true}");
    fflush(stdout);
    if (!self.answers) {
        await_input(bus);
        if (sends)
            send_all(bus, &self, size, per_second);
        else
            receive_all(bus, &self);
    }
    await_input(bus);
    emp_close(bus);
    free(self.took_us);
    return 0;
}
