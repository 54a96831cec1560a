/* A module of an edgezmq node, in C: it answers requests with what it was asked, and uploads a reading now and then.
 *
 *     edgezmq send c-example -r anything --content '{"x": 1}' --request
 */
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "emp.h"

#define NAME "c-example"

enum { DRAIN_MS = 8000, TURN_MS = 100 };

static volatile sig_atomic_t stopping;

static void on_signal(int number) {
    (void)number;
    stopping = 1;
}

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static const char *echo(emp *bus, const emp_delivery *delivery, void *context) {
    (void)context;
    if (delivery->expects_reply) emp_reply(bus, delivery, delivery->content.data, delivery->content.size);
    return NULL;
}

static void on_settled(emp *bus, const char *destination, int64_t number, const char *reason, void *context) {
    (void)bus;
    (void)context;
    if (reason != NULL) fprintf(stderr, "message %" PRId64 " to %s: refused: %s\n", number, destination, reason);
}

/* Milliseconds between two readings. */
static int64_t interval(void) {
    const char *set = getenv("UPLOAD_SECONDS");
    double seconds = set != NULL ? strtod(set, NULL) : 0;
    if (seconds <= 0) seconds = getenv("EDGEZMQ_CONFORM") != NULL ? 0.2 : 10;
    return (int64_t)(seconds * 1000);
}

int main(void) {
    struct sigaction action = {.sa_handler = on_signal};
    char *endpoint = emp_endpoint();
    emp *bus = emp_open(NAME, endpoint, echo, on_settled, NULL);
    emp_state state = EMP_RUNNING;
    int64_t due = now_ms(), every = interval(), number = 1, until = 0;

    if (bus == NULL) {
        fprintf(stderr, "%s: %s\n", endpoint, strerror(errno));
        return 1;
    }
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    while (state == EMP_RUNNING) {
        int64_t now = now_ms();
        if (stopping) {
            if (until == 0) {
                until = now + DRAIN_MS;
                emp_drain(bus);
            }
            if (emp_is_idle(bus) || now >= until) break;
        } else if (now >= due) {
            char content[64];
            emp_message reading = {.source = NAME, .group = "user", .resource = "default/c-example/reading",
                                   .operation = "upload", .content = content};
            reading.size = (size_t)snprintf(content, sizeof content, "{\"number\": %" PRId64 "}", number);
            /* 0: the window is full, the broker or the cloud is away. The same reading again after the next turn. */
            if (emp_send(bus, "@hub", EMP_DATA, &reading) > 0) {
                number++;
                due = now + every;
            }
        }
        state = emp_turn(bus, until != 0 || due - now > TURN_MS ? TURN_MS : (int)(due > now ? due - now : TURN_MS));
    }
    emp_close(bus);
    free(endpoint);
    return state == EMP_RUNNING ? 0 : state == EMP_FENCED ? 3 : 1;
}
