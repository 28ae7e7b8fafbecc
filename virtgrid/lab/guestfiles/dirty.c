/* Rewrites memory at a given rate, so that a migration has something to send.
 *
 * usage: dirty BYTES_PER_SECOND
 *
 * Walks round a region of 32 MiB page by page: below that amount every page it writes is a
 * different one, and a precopy never has more than that to send again because of it.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PAGE_BYTES = 4096, REGION_PAGES = 8192, TICK_NS = 10 * 1000 * 1000, TICKS_PER_SECOND = 100 };

int main(int argc, char **argv)
{
    char *end = NULL;
    unsigned long long rate = argc == 2 ? strtoull(argv[1], &end, 10) : 0;
    if (rate == 0 || *end != '\0') {
        fprintf(stderr, "usage: dirty BYTES_PER_SECOND\n");
        return 2;
    }
    unsigned char *region = aligned_alloc(PAGE_BYTES, (size_t)REGION_PAGES * PAGE_BYTES);
    if (!region) {
        perror("dirty");
        return 1;
    }
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    unsigned long long owed_bytes = 0; /* in bytes * TICKS_PER_SECOND, so that nothing is rounded away */
    uint32_t round = 0;
    unsigned page = 0;
    for (;;) {
        for (owed_bytes += rate; owed_bytes >= (unsigned long long)PAGE_BYTES * TICKS_PER_SECOND;
             owed_bytes -= (unsigned long long)PAGE_BYTES * TICKS_PER_SECOND) {
            /* Never a page of one value: it must not be sent as a zero page. */
            memset(region + (size_t)page * PAGE_BYTES, (int)(round | 1), PAGE_BYTES);
            memcpy(region + (size_t)page * PAGE_BYTES, &round, sizeof round);
            if (++page == REGION_PAGES) {
                page = 0;
                round++;
            }
        }
        next.tv_nsec += TICK_NS;
        if (next.tv_nsec >= 1000000000L) {
            next.tv_nsec -= 1000000000L;
            next.tv_sec++;
        }
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        /* After a pause (a migration) go on from now instead of making up for lost time in a burst. */
        if (now.tv_sec > next.tv_sec + 1)
            next = now;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
}
