/* One decode step of gated attention between its projections: norms and rotary embedding of queries
 * and keys, then attention to what is cached.
 *
 * Sums and the softmax are float32.  Keys are taken in chunks, whose number depends on nothing but
 * how many keys there are, so that results are the same on however many threads. */
#include <stdatomic.h>
#include <stdlib.h>

#include "kernel.h"
#include "numbers.h"

/* Channels of a head, and queries of one key head, at most; steps/qwen3_next.py keeps to it. */
#define MOST_SIZE 512
#define MOST_GROUP 16
/* Keys that are weighed at once. */
#define KEYS 16
/* Keys of one chunk at least, and chunks at most. */
#define LEAST_CHUNK 64
#define MOST_CHUNKS 16
/* Below every score. */
#define LOWEST (-1e30f)

enum { DONE = 0, NO_MEMORY = 1 };

typedef struct {
    const uint16_t *query; /* [tokens, heads, size] */
    const uint16_t *keys, *values;
    int64_t token_stride, head_stride, row_stride; /* of both, in elements */
    const uint8_t *mask;                           /* [tokens, length]; NULL: all are seen */
    int64_t tokens, key_heads, group, length, size, chunk, chunks;
    float scaling;
    float *partial; /* [tokens, heads, chunks, size + 2] */
} Attend;

typedef struct {
    const Attend *attend;
    void (*compute)(const Attend *, int64_t token, int64_t number, int64_t chunk);
    atomic_long next;
} Job;

#define TEMPLATE "attend.h"
#include "kinds.h"

static void work(void *argument)
{
    Job *job = argument;
    const Attend *a = job->attend;
    for (;;) {
        int64_t ticket = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (ticket >= a->tokens * a->key_heads * a->chunks) return;
        int64_t number = ticket / a->chunks;
        job->compute(a, number / a->key_heads, number % a->key_heads, ticket % a->chunks);
    }
}

/* Queries [tokens, heads, size] and keys [tokens, key heads, size] made ready.
 *
 * mixed: of each head its query and its gate, then keys; tokens `stride` apart.  cosine, sine: the
 * first `turned` channels', tokens `turn_stride` apart (0: the same for all).  Sizes are multiples
 * of 16.  kernel: see `requant_experts`. */
void requant_rotate(const uint16_t *mixed, int64_t stride, const uint16_t *q_norm,
                    const uint16_t *k_norm, float eps, const uint16_t *cosine,
                    const uint16_t *sine, int64_t turn_stride, int64_t turned, int64_t tokens,
                    int64_t heads, int64_t key_heads, int64_t size, uint16_t *query,
                    uint16_t *keys, int kernel)
{
    for (int64_t t = 0; t < tokens; t++) {
        const uint16_t *own = mixed + t * stride, *c = cosine + t * turn_stride;
        const uint16_t *s = sine + t * turn_stride;
        for (int64_t h = 0; h < heads; h++)
            PICK(rotate)(own + 2 * h * size, q_norm, eps, size, c, s, turned,
                         query + (t * heads + h) * size);
        for (int64_t h = 0; h < key_heads; h++)
            PICK(rotate)(own + (2 * heads + h) * size, k_norm, eps, size, c, s, turned,
                         keys + (t * key_heads + h) * size);
    }
}

/* out [tokens, heads, size]: attention of each head's query, times its gate in `mixed`.
 * See `Attend` and `requant_rotate`; threads, parallel: see `requant_experts`. */
int requant_attend(const uint16_t *mixed, int64_t stride, const uint16_t *query,
                   const uint16_t *keys, const uint16_t *values, int64_t token_stride,
                   int64_t head_stride, int64_t row_stride, const uint8_t *mask, float scaling,
                   int64_t tokens, int64_t heads, int64_t key_heads, int64_t length, int64_t size,
                   uint16_t *out, int kernel, int64_t threads, Parallel parallel)
{
    int64_t chunk = (length + MOST_CHUNKS - 1) / MOST_CHUNKS;
    chunk = chunk < LEAST_CHUNK ? LEAST_CHUNK : (chunk + KEYS - 1) / KEYS * KEYS;
    Attend a = {.query = query, .keys = keys, .values = values, .token_stride = token_stride,
                .head_stride = head_stride, .row_stride = row_stride, .mask = mask,
                .tokens = tokens, .key_heads = key_heads, .group = heads / key_heads,
                .length = length, .size = size, .chunk = chunk,
                .chunks = (length + chunk - 1) / chunk, .scaling = scaling};
    int64_t apart = a.chunks * (size + 2);
    a.partial = malloc((size_t)(tokens * heads * apart) * sizeof *a.partial);
    if (!a.partial) return NO_MEMORY;
    Job job = {.attend = &a, .compute = PICK(attend)};
    int64_t all = tokens * key_heads * a.chunks;
    threads = threads < all ? threads : all;
    if (threads > 1)
        parallel(work, &job, (unsigned)threads, 0);
    else
        work(&job);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            PICK(combine)(&a, a.partial + (t * heads + h) * apart,
                          mixed + t * stride + (2 * h + 1) * size, out + (t * heads + h) * size);
    free(a.partial);
    return DONE;
}
