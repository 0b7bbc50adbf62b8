/* Small things of one decode step: norms, the router's choice, the shared expert's place beside the
 * routed ones.  Each is a few microseconds of one thread; numbers are rounded to bfloat16 where the
 * transformers model rounds them. */
#include "kernel.h"
#include "numbers.h"

/* Experts, and those chosen for a token, at most; steps/qwen3_next.py keeps to it. */
#define MOST_EXPERTS 4096
#define MOST_CHOSEN 64

#define TEMPLATE "route.h"
#include "kinds.h"

/* out [tokens, columns] = x [tokens, columns] normalised by "1 + weight"; columns: a multiple of 16.
 * kernel: see `requant_experts`. */
void requant_norm(const uint16_t *x, const uint16_t *weight, int64_t tokens, int64_t columns,
                  float eps, uint16_t *out, int kernel)
{
    for (int64_t t = 0; t < tokens; t++)
        PICK(norm)(x + t * columns, weight, columns, eps, out + t * columns);
}

/* logits [tokens, experts + 2 * shared + 1]: of the router, the shared expert's gate and up, and the
 * gate of all of it; index and weights [tokens, chosen]; inner [tokens, shared].  Where shared is 0
 * there are logits of the router alone. */
void requant_route(const uint16_t *logits, int64_t tokens, int64_t experts, int64_t shared,
                   int64_t chosen, int normalise, int64_t *index, uint16_t *weights,
                   uint16_t *inner, int kernel)
{
    int64_t stride = experts + (shared ? 2 * shared + 1 : 0);
    for (int64_t t = 0; t < tokens; t++) {
        const uint16_t *own = logits + t * stride;
        PICK(choose)(own, experts, chosen, normalise, index + t * chosen, weights + t * chosen);
        if (shared)
            PICK(gate)(own + experts, own + experts + shared, shared, inner + t * shared);
    }
}

/* out [tokens, hidden] = routed + sigmoid(gate) * shared; gate: one number a token, `stride` apart. */
void requant_finish(const uint16_t *routed, const uint16_t *shared, const uint16_t *gate,
                    int64_t stride, int64_t tokens, int64_t hidden, uint16_t *out, int kernel)
{
    for (int64_t t = 0; t < tokens; t++)
        PICK(finish)(routed + t * hidden, shared + t * hidden, widen(gate[t * stride]), hidden,
                     out + t * hidden);
}
