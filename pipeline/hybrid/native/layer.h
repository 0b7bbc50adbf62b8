/* One call of a layer's experts: set up by one thread, worked on by as many as there are. */
#ifndef REQUANT_LAYER_H
#define REQUANT_LAYER_H

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

#include "kernel.h"
#include "vector.h"

/* Rounds of spinning before a waiting thread offers its core to others. */
#define PATIENCE 2000

/* How a call ends; library.py knows these. */
enum { DONE = 0, NO_MEMORY = 1, NO_EXPERT = 2 };

typedef struct {
    Matrix gate_up, down;
    const uint64_t *records; /* address of each expert's */
    int64_t experts;
} Layer;

typedef struct {
    const Layer *layer;
    Product product;
    Prepare prepare;
    Gate gate;
    const uint16_t *x;    /* bfloat16 [tokens, hidden] */
    const int64_t *index; /* [tokens, each]; `experts`: computed elsewhere */
    int64_t tokens, each, pairs;
    const float *weights; /* [tokens, each] */
    float *out;           /* [tokens, hidden] */
    /* Pairs of token and expert, sorted by expert. */
    int64_t used;           /* experts that were chosen */
    int64_t *expert, *from; /* [used], [used + 1]: which, and its first pair */
    int64_t *place;         /* [tokens, each]: the pair's number; -1: computed elsewhere */
    Vector *vectors;        /* [tokens], then [pairs] of gated products */
    const Vector **given;   /* [pairs]: the token's vector, then the pair's own */
    float *inner, *part;    /* [pairs, inner], [pairs, hidden] */
    /* Tickets of each stage, how rows are shared out, and what has been done. */
    int64_t token_tickets, gate_parts, gate_rows, down_parts, down_rows;
    atomic_long *parts_left, *ready;
    /* In cache lines of their own: what is above is read all the time, and these change. */
    _Alignas(64) atomic_long ticket;
    _Alignas(64) atomic_long prepared, down_done;
} Job;

static inline void breathe(long round)
{
    if (round % PATIENCE == PATIENCE - 1) {
        sched_yield();
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Everything of a call but its room; arguments as for `requant_experts`. */
void job_describe(Job *job, Layer *layer, const int64_t *sizes, const uint64_t *records,
                  int64_t experts, const uint16_t *x, const int64_t *index, const float *weights,
                  int64_t tokens, int64_t each, float *out, int kernel);
/* Bytes of room that a call takes, whatever it chooses. */
size_t job_room(const Job *job);
/* Sort what is chosen, and share it out in tickets for so many threads; DONE or NO_EXPERT.
 * room: of `job_room` bytes, at a multiple of 64; a job can be started again and again. */
int job_start(Job *job, uint8_t *room, int64_t threads);
/* Draw tickets until there are none; for every thread. */
void job_work(void *job);

#endif
