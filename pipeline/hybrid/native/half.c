/* Halves of a decoder layer in one call each, from the residual stream to the residual stream: of
 * a layer's time on many cores, calling its parts from Python would be the larger part. */
#include <stdlib.h>

#include "half.h"
#include "numbers.h"

enum { DONE = 0, NO_MEMORY = 1 };

/* How to run; see `requant_experts`. */
typedef struct {
    int64_t kernel, threads;
    Parallel parallel;
} How;

/* Weights and sizes of a DeltaNet half; `steps/qwen3_next.py` fills these with 64-bit numbers. */
typedef struct {
    const uint16_t *norm, *wide, *narrow, *convolution, *a_log, *dt_bias, *own_norm, *out;
    int64_t hidden, key_heads, ratio, key_size, value_size, taps;
} DeltaHalf;

typedef struct {
    const uint16_t *norm, *query, *keys, *values, *q_norm, *k_norm, *out;
    int64_t hidden, heads, key_heads, size;
} AttentionHalf;

typedef struct {
    const uint16_t *norm, *router, *gate, *up, *opening, *down;
    int64_t hidden, experts, shared, chosen, normalise;
} SparseHalf;

static void *room(int64_t bytes) { return aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64); }

/* out += x */
static void add(const uint16_t *x, int64_t count, uint16_t *out)
{
    for (int64_t i = 0; i < count; i++) out[i] = narrow(widen(x[i]) + widen(out[i]));
}

static int project(const uint16_t *weight, int64_t rows, int64_t columns, const uint16_t *x,
                   int64_t tokens, uint16_t *out, const How *how)
{
    return requant_dense(weight, rows, NULL, 0, NULL, 0, NULL, 0, columns, x, tokens, out,
                         (int)how->kernel, how->threads, how->parallel);
}

/* out [tokens, hidden] = x + what DeltaNet makes of its norm; see `requant_delta`. */
int requant_delta_half(const DeltaHalf *half, const uint16_t *x, uint16_t *window, float *memory,
                       uint16_t *out, int64_t tokens, float eps, float own_eps, const How *how)
{
    int kernel = (int)how->kernel;
    int64_t hidden = half->hidden, keys = half->key_heads * half->key_size;
    int64_t heads = half->key_heads * half->ratio, values = heads * half->value_size;
    int64_t wide = 2 * keys + 2 * values, stride = wide + 2 * heads;
    uint16_t *normed = room(2 * tokens * (hidden + stride + values));
    if (!normed) return NO_MEMORY;
    uint16_t *mixed = normed + tokens * hidden, *core = mixed + tokens * stride;
    requant_norm(x, half->norm, tokens, hidden, eps, normed, kernel);
    int failed = requant_dense(half->wide, wide, half->narrow, 2 * heads, NULL, 0, NULL, 0, hidden,
                               normed, tokens, mixed, kernel, how->threads, how->parallel);
    if (!failed) {
        requant_delta(mixed, stride, mixed + wide, stride, half->convolution, half->a_log,
                      half->dt_bias, half->own_norm, own_eps, window, memory, core, tokens,
                      half->key_heads, half->ratio, half->key_size, half->value_size, half->taps,
                      kernel, how->threads, how->parallel);
        failed = project(half->out, hidden, values, core, tokens, out, how);
    }
    if (!failed) add(x, tokens * hidden, out);
    free(normed);
    return failed;
}

/* What attention needs before keys and values go to the cache; see `requant_rotate`. */
int requant_attention_opening(const AttentionHalf *half, const uint16_t *x, const uint16_t *cosine,
                              const uint16_t *sine, int64_t turn_stride, int64_t turned,
                              int64_t tokens, float eps, float own_eps, uint16_t *mixed,
                              uint16_t *query, uint16_t *keys, const How *how)
{
    int kernel = (int)how->kernel;
    int64_t hidden = half->hidden, wide = half->heads * half->size;
    int64_t narrow = half->key_heads * half->size;
    uint16_t *normed = room(2 * tokens * hidden);
    if (!normed) return NO_MEMORY;
    requant_norm(x, half->norm, tokens, hidden, eps, normed, kernel);
    int failed = requant_dense(half->query, 2 * wide, half->keys, narrow, half->values, narrow,
                               NULL, 0, hidden, normed, tokens, mixed, kernel, how->threads,
                               how->parallel);
    if (!failed)
        requant_rotate(mixed, 2 * wide + 2 * narrow, half->q_norm, half->k_norm, own_eps, cosine,
                       sine, turn_stride, turned, tokens, half->heads, half->key_heads, half->size,
                       query, keys, kernel);
    free(normed);
    return failed;
}

/* out [tokens, hidden] = x + attention to what the cache holds; see `requant_attend`. */
int requant_attention_half(const AttentionHalf *half, const uint16_t *x, const uint16_t *mixed,
                           const uint16_t *query, const uint16_t *keys, const uint16_t *values,
                           int64_t token_stride, int64_t head_stride, int64_t row_stride,
                           const uint8_t *mask, int64_t length, float scaling, uint16_t *out,
                           int64_t tokens, const How *how)
{
    int64_t wide = half->heads * half->size, narrow = half->key_heads * half->size;
    uint16_t *core = room(2 * tokens * wide);
    if (!core) return NO_MEMORY;
    int failed = requant_attend(mixed, 2 * wide + 2 * narrow, query, keys, values, token_stride,
                                head_stride, row_stride, mask, scaling, tokens, half->heads,
                                half->key_heads, length, half->size, core, (int)how->kernel,
                                how->threads, how->parallel);
    if (!failed) failed = project(half->out, half->hidden, wide, core, tokens, out, how);
    if (!failed) add(x, tokens * half->hidden, out);
    free(core);
    return failed;
}

/* out [tokens, hidden] = x + routed and shared experts of its norm; see `requant_experts`. */
int requant_sparse_half(const SparseHalf *half, const int64_t *sizes, const uint64_t *records,
                        const uint16_t *x, uint16_t *out, int64_t tokens, float eps, const How *how)
{
    int kernel = (int)how->kernel;
    int64_t hidden = half->hidden, shared = half->shared, chosen = half->chosen;
    int64_t stride = half->experts + 2 * shared + 1, all = tokens * hidden, pairs = tokens * chosen;
    int64_t words = pairs + tokens * stride + tokens * shared + 3 * all;
    int64_t *index = room(pairs * 8 + (all + pairs) * 4 + words * 2);
    if (!index) return NO_MEMORY;
    float *sums = (float *)(index + pairs), *shares = sums + all;
    uint16_t *weights = (uint16_t *)(shares + pairs), *logits = weights + pairs;
    uint16_t *inner = logits + tokens * stride, *normed = inner + tokens * shared;
    uint16_t *routed = normed + all, *beside = routed + all;
    requant_norm(x, half->norm, tokens, hidden, eps, normed, kernel);
    int failed = requant_dense(half->router, half->experts, half->gate, shared, half->up, shared,
                               half->opening, 1, hidden, normed, tokens, logits, kernel,
                               how->threads, how->parallel);
    if (!failed) {
        requant_route(logits, tokens, half->experts, shared, chosen, (int)half->normalise, index,
                      weights, inner, kernel);
        for (int64_t i = 0; i < pairs; i++) shares[i] = widen(weights[i]);
        failed = requant_experts(sizes, records, half->experts, normed, index, shares,
                                 tokens, chosen, sums, kernel, how->threads, how->parallel);
    }
    if (!failed) failed = project(half->down, hidden, shared, inner, tokens, beside, how);
    if (!failed) {
        for (int64_t i = 0; i < all; i++) routed[i] = narrow(sums[i]);
        requant_finish(routed, beside, logits + stride - 1, stride, tokens, hidden, out, kernel);
        add(x, all, out);
    }
    free(index);
    return failed;
}
