/* One decode step of gated DeltaNet (arXiv 2412.06464) between its projections: the causal
 * convolution, the gated delta rule over a float32 memory, the gated norm.
 *
 * Numbers are rounded to bfloat16 where the transformers model rounds them.  A key head and the
 * value heads that share it are one thread's work, so that results are the same on however many. */
#include <stdatomic.h>

#include "kernel.h"
#include "numbers.h"

/* Channels of a head, and of the values of one key head, at most; steps/qwen3_next.py keeps to it. */
#define MOST_SIZE 512
#define MOST_VALUES 4096
/* Bytes of memory that are worth another thread. */
#define THREAD_BYTES (1 << 17)

typedef struct {
    const uint16_t *mixed, *gates; /* the projections; tokens `stride` and `gate_stride` apart */
    const uint16_t *weight, *a_log, *dt_bias, *norm;
    uint16_t *window; /* [tokens, channels, taps] */
    float *memory;    /* [tokens, value heads, key size, value size] */
    uint16_t *out;    /* [tokens, value heads, value size] */
    int64_t tokens, key_heads, ratio, key_size, value_size, taps, stride, gate_stride;
    float eps;
} Delta;

typedef struct {
    const Delta *delta;
    void (*compute)(const Delta *, int64_t token, int64_t group);
    atomic_long next;
} Job;

#define TEMPLATE "delta.h"
#include "kinds.h"

static void work(void *argument)
{
    Job *job = argument;
    int64_t heads = job->delta->key_heads, all = job->delta->tokens * heads;
    for (;;) {
        int64_t ticket = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (ticket >= all) return;
        job->compute(job->delta, ticket / heads, ticket % heads);
    }
}

/* See `Delta`; mixed holds query, key, values and z of one key head after the other, gates beta and
 * time of its value heads.  Sizes are multiples of 16.  kernel, threads, parallel: see
 * `requant_experts`. */
void requant_delta(const uint16_t *mixed, int64_t stride, const uint16_t *gates,
                   int64_t gate_stride, const uint16_t *weight, const uint16_t *a_log,
                   const uint16_t *dt_bias, const uint16_t *norm, float eps, uint16_t *window,
                   float *memory, uint16_t *out, int64_t tokens, int64_t key_heads, int64_t ratio,
                   int64_t key_size, int64_t value_size, int64_t taps, int kernel, int64_t threads,
                   Parallel parallel)
{
    Delta delta = {.mixed = mixed, .gates = gates, .weight = weight, .a_log = a_log,
                   .dt_bias = dt_bias, .norm = norm, .window = window, .memory = memory,
                   .out = out, .tokens = tokens, .key_heads = key_heads, .ratio = ratio,
                   .key_size = key_size, .value_size = value_size, .taps = taps,
                   .stride = stride, .gate_stride = gate_stride, .eps = eps};
    Job job = {.delta = &delta, .compute = delta_portable};
#ifdef X86
    if (kernel) job.compute = delta_avx2;
#endif
    int64_t all = tokens * key_heads, each = ratio * key_size * value_size * 4;
    int64_t most = 1 + all * each / THREAD_BYTES;
    most = most < all ? most : all;
    threads = threads < most ? threads : most;
    if (threads > 1)
        parallel(work, &job, (unsigned)threads, 0);
    else
        work(&job);
}
