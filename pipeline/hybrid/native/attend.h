/* Attention's step for one key head, for one kind of processor: attend.c includes this once for
 * each, with its NAME, its TARGET and the BYTES of its vectors. */
#include "lanes.h"

INLINE void FN(widen_all_)(const uint16_t *bits, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i++) out[i] = widen(bits[i]);
}

/* Norm and rotary embedding of one head of a query or key. */
static TARGET void FN(rotate_)(const uint16_t *bits, const uint16_t *norm, float eps, int64_t size,
                               const uint16_t *cosine, const uint16_t *sine, int64_t turned,
                               uint16_t *out)
{
    float x[MOST_SIZE];
    FN(widen_all_)(bits, size, x);
    float by = inverse_root(FN(squares_)(x, size) / (float)size + eps);
    for (int64_t i = 0; i < size; i++) x[i] = rounded(x[i] * by * (1 + widen(norm[i])));
    for (int64_t i = 0, half = turned / 2; i < turned; i++) {
        float partner = i < half ? -x[i + half] : x[i - half];
        out[i] = narrow(rounded(x[i] * widen(cosine[i])) + rounded(partner * widen(sine[i])));
    }
    for (int64_t i = turned; i < size; i++) out[i] = narrow(x[i]);
}

/* Products of a key with G queries. */
INLINE void FN(scores_)(const int G, const float *query, const float *key, int64_t size,
                        float scaling, float *out)
{
    FLOATS sums[4] = {{0}}, none = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        FLOATS its = FN(load_)(key + i);
        for (int g = 0; g < G; g++) sums[g] += FN(load_)(query + g * size + i) * its;
    }
    for (int g = 0; g < G; g++) out[g * KEYS] = FN(total_)(&sums[g], &none) * scaling;
}

/* What some keys add to a head's parts: its highest score, the weight and the sums below it. */
INLINE void FN(add_keys_)(float *score, const uint8_t *seen, int64_t size, const float *values,
                          float *sums)
{
    float *highest = sums + size, *weight = highest + 1, top = *highest, all = 0;
    for (int64_t k = 0; k < KEYS; k++) top = seen[k] && score[k] > top ? score[k] : top;
    float fade = exponential(*highest - top);
    for (int64_t k = 0; k < KEYS; k++) score[k] = seen[k] ? exponential(score[k] - top) : 0;
    for (int64_t k = 0; k < KEYS; k++) all += score[k];
    *highest = top, *weight = *weight * fade + all;
    for (int64_t i = 0; i < size; i += LANES) {
        FLOATS sum = FN(load_)(sums + i) * fade;
        for (int k = 0; k < KEYS; k++) sum += FN(load_)(values + k * size + i) * score[k];
        memcpy(sums + i, &sum, sizeof sum);
    }
}

/* One chunk of the keys of one head, for all queries that share it. */
static TARGET void FN(attend_)(const Attend *a, int64_t token, int64_t number, int64_t chunk)
{
    const int64_t size = a->size, group = a->group;
    float query[MOST_GROUP * MOST_SIZE], rows[KEYS * MOST_SIZE], scores[MOST_GROUP * KEYS];
    const int64_t first = chunk * a->chunk, base = token * a->token_stride + number * a->head_stride;
    const int64_t end = first + a->chunk < a->length ? first + a->chunk : a->length;
    const int64_t heads = group * a->key_heads, head = number * group;
    float *part = a->partial + ((token * heads + head) * a->chunks + chunk) * (size + 2);
    const int64_t apart = a->chunks * (size + 2);
    FN(widen_all_)(a->query + (token * heads + head) * size, group * size, query);
    for (int64_t g = 0; g < group; g++) {
        memset(part + g * apart, 0, (size_t)(size + 2) * sizeof *part);
        part[g * apart + size] = LOWEST;
    }
    for (int64_t from = first; from < end; from += KEYS) {
        uint8_t seen[KEYS] = {0};
        int any = 0;
        for (int64_t k = 0; k < KEYS && from + k < end; k++) {
            seen[k] = a->mask ? a->mask[token * a->length + from + k] : 1;
            any |= seen[k];
        }
        if (!any) continue;
        for (int64_t k = 0; k < KEYS; k++) {
            if (!seen[k]) continue;
            FN(widen_all_)(a->keys + base + (from + k) * a->row_stride, size, rows);
            int64_t g = 0;
            for (; g + 4 <= group; g += 4)
                FN(scores_)(4, query + g * size, rows, size, a->scaling, scores + g * KEYS + k);
            for (; g < group; g++)
                FN(scores_)(1, query + g * size, rows, size, a->scaling, scores + g * KEYS + k);
        }
        for (int64_t k = 0; k < KEYS; k++) {
            if (seen[k])
                FN(widen_all_)(a->values + base + (from + k) * a->row_stride, size, rows + k * size);
            else /* weighed by 0, which makes a NaN of what is not finite */
                memset(rows + k * size, 0, (size_t)size * sizeof *rows);
        }
        for (int64_t g = 0; g < group; g++)
            FN(add_keys_)(scores + g * KEYS, seen, size, rows, part + g * apart);
    }
}

/* One head's output from all its parts, times its gate. */
static TARGET void FN(combine_)(const Attend *a, const float *part, const uint16_t *gate,
                                uint16_t *out)
{
    const int64_t size = a->size;
    float sums[MOST_SIZE] = {0}, top = LOWEST, weight = 0;
    for (int64_t c = 0; c < a->chunks; c++) {
        float its = part[c * (size + 2) + size];
        top = its > top ? its : top;
    }
    for (int64_t c = 0; c < a->chunks; c++) {
        const float *its = part + c * (size + 2);
        float fade = exponential(its[size] - top);
        weight += its[size + 1] * fade;
        for (int64_t i = 0; i < size; i++) sums[i] += its[i] * fade;
    }
    for (int64_t i = 0; i < size; i++)
        out[i] = narrow(rounded(sums[i] / weight) * rounded(sigmoid(widen(gate[i]))));
}

#include "lanes_end.h"
