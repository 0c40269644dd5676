/*
 * Gives the lines of the guests' serial logs a time stamp of the host:  stamp DIRECTORY
 *
 * For every file NAME.log in DIRECTORY it appends to NAME.stamps one line for each complete line of the log:
 * `<CLOCK_MONOTONIC in microseconds> <the line>`. A guest writes a line byte by byte within some 150 us; the first byte wakes
 * us (inotify), and we look again after SETTLE_US, when the line is whole: so a stamp is late by about SETTLE_US, always
 * by the same time, give or take 0.2 ms on an idle machine, and a guest of 100 lines/s costs 100 short wake-ups a second.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <time.h>
#include <unistd.h>

enum { SETTLE_US = 300, MAX_FILES = 1024, MAX_LINE = 256 };

struct tail {
    char name[NAME_MAX + 1];            /* empty: a free slot */
    int in, out;
    size_t length;
    char line[MAX_LINE];
};

static struct tail tails[MAX_FILES];

static int is_log(const char *name)
{
    size_t n = strlen(name);
    return n > 4 && n < NAME_MAX - 4 && !strcmp(name + n - 4, ".log");
}

static struct tail *find(const char *name)
{
    for (struct tail *t = tails; t < tails + MAX_FILES; t++)
        if (!strcmp(t->name, name))
            return t;
    return NULL;
}

static void forget(const char *name)
{
    struct tail *t = find(name);
    if (!t)
        return;
    close(t->in);
    close(t->out);
    memset(t, 0, sizeof *t);
}

static struct tail *open_tail(const char *name)
{
    char stamps[NAME_MAX + 8];
    struct tail *t = find(name);
    if (t || !(t = find("")))
        return t;
    snprintf(stamps, sizeof stamps, "%.*s.stamps", (int)strlen(name) - 4, name);
    t->in = open(name, O_RDONLY | O_CLOEXEC);
    if (t->in < 0)
        return NULL;
    t->out = open(stamps, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (t->out < 0) {
        perror(stamps);
        close(t->in);
        return NULL;
    }
    snprintf(t->name, sizeof t->name, "%s", name);
    t->length = 0;
    return t;
}

static void stamp_line(struct tail *t, uint64_t us)
{
    char text[MAX_LINE + 32];
    int n = snprintf(text, sizeof text, "%" PRIu64 " %.*s\n", us, (int)t->length, t->line);
    if (write(t->out, text, (size_t)n) != n)
        perror(t->name);
    t->length = 0;
}

static void follow(struct tail *t)
{
    char buffer[65536];
    struct timespec now;
    ssize_t n;
    while ((n = read(t->in, buffer, sizeof buffer)) > 0) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        uint64_t us = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
        for (char *c = buffer; c < buffer + n; c++)
            if (*c == '\n')
                stamp_line(t, us);
            else if (t->length < MAX_LINE - 1)
                t->line[t->length++] = *c;
    }
}

static void handle(const struct inotify_event *event)
{
    struct tail *t;
    if (!event->len || !is_log(event->name))
        return;
    if (event->mask & IN_DELETE)
        forget(event->name);
    else if ((t = open_tail(event->name)))
        follow(t);
}

int main(int argc, char **argv)
{
    char events[65536] __attribute__((aligned(8)));
    int fd = inotify_init1(IN_CLOEXEC);
    if (argc != 2 || fd < 0 || chdir(argv[1]) || inotify_add_watch(fd, ".", IN_MODIFY | IN_CREATE | IN_DELETE) < 0)
        return perror("stamp DIRECTORY"), 1;
    puts("ready");
    fflush(stdout);
    for (;;) {
        ssize_t n = read(fd, events, sizeof events);
        if (n < 0 && errno != EINTR)
            return perror("inotify"), 1;
        nanosleep(&(struct timespec){0, SETTLE_US * 1000}, NULL);
        for (char *p = events; p < events + n; p += sizeof(struct inotify_event) + ((struct inotify_event *)p)->len)
            handle((struct inotify_event *)p);
    }
}
