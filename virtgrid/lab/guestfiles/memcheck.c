/* Checks its own memory for as long as the guest lives: writes lost by a migration show up as
 * pages that do not hold what was last written.
 *
 * usage: memcheck PAGES STATEFILE
 *
 * Every page holds the number of the current round in its first word and the complement in its
 * last. A tight loop on purpose: it is pages written without pause whose dirty bits an emulator
 * can lose. Once a second the state goes to STATEFILE (renamed into place, so that a reader
 * never sees half of it); damage is printed on standard output at once.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, WORDS = PAGE_BYTES / sizeof(uint32_t), REPORTED_PER_ROUND = 3 };

static volatile sig_atomic_t publish_now = 1;

static void on_second(int signal_number)
{
    (void)signal_number;
    publish_now = 1;
}

static void publish(const char *path, unsigned long pages, uint64_t rounds, uint64_t corrupt)
{
    char draft[4096];
    snprintf(draft, sizeof draft, "%s.new", path);
    FILE *file = fopen(draft, "w");
    if (!file) {
        perror(draft);
        return;
    }
    fprintf(file, "{\"pages\": %lu, \"iterations\": %" PRIu64 ", \"corrupt\": %" PRIu64 "}\n", pages, rounds,
            corrupt);
    if (fclose(file) != 0 || rename(draft, path) != 0)
        perror(path);
}

int main(int argc, char **argv)
{
    char *end = NULL;
    unsigned long pages = argc == 3 ? strtoul(argv[1], &end, 10) : 0;
    if (pages == 0 || *end != '\0') {
        fprintf(stderr, "usage: memcheck PAGES STATEFILE\n");
        return 2;
    }
    volatile uint32_t *memory = aligned_alloc(PAGE_BYTES, pages * PAGE_BYTES);
    if (!memory) {
        perror("memcheck");
        return 1;
    }
    /* The web server comes first: the loop takes what is left of the processor. */
    if (nice(19) == -1)
        perror("memcheck: nice");
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (unsigned long page = 0; page < pages; page++) {
        memory[page * WORDS] = 0;
        memory[page * WORDS + WORDS - 1] = UINT32_MAX;
    }
    signal(SIGALRM, on_second);
    struct itimerval second = {{1, 0}, {1, 0}};
    setitimer(ITIMER_REAL, &second, NULL);

    uint64_t corrupt = 0;
    for (uint64_t rounds = 0;; rounds++) {
        uint32_t want = (uint32_t)rounds;
        unsigned bad = 0;
        for (unsigned long page = 0; page < pages; page++) {
            volatile uint32_t *first = memory + page * WORDS, *last = first + WORDS - 1;
            if (*first != want || *last != (uint32_t)~want) {
                if (bad++ < REPORTED_PER_ROUND)
                    printf("memcheck: CORRUPT page %lu has %" PRIu32 "/%" PRIu32 ", want %" PRIu32 "\n", page,
                           *first, (uint32_t)~*last, want);
            }
            *first = want + 1;
            *last = ~(want + 1);
        }
        corrupt += bad;
        if (publish_now) {
            publish_now = 0;
            publish(argv[2], pages, rounds, corrupt);
        }
    }
}
