/* Rows of a bfloat16 matrix with a few vectors, for one kind of processor: dense.c includes this
 * once for each, with its NAME, its TARGET and the BYTES of its vectors. */
#include "lanes.h"

/* R rows with T vectors that lie `stride` apart. */
INLINE void FN(few_)(const int R, const int T, const Dense *d, int64_t row, int64_t token)
{
    FLOATS even[4], odd[4], low, high;
    const int64_t columns = d->columns, whole = columns / STEP, rest = columns % STEP;
    const int64_t stride = 2 * (d->padded / STEP);
    const uint16_t *its = d->weight + row * columns;
    const FLOATS *x = (const FLOATS *)d->prepared + token * stride;
    for (int i = 0; i < R * T; i++) even[i] = odd[i] = (FLOATS){0};
    for (int64_t b = 0; b < whole; b++)
        for (int r = 0; r < R; r++) {
            const uint16_t *at = its + r * columns + b * STEP;
            __builtin_prefetch((const char *)at + AHEAD, 0, 2);
            FN(split_)(at, &low, &high);
            for (int t = 0; t < T; t++) {
                even[r * T + t] += low * x[t * stride + 2 * b];
                odd[r * T + t] += high * x[t * stride + 2 * b + 1];
            }
        }
    for (int r = 0; rest && r < R; r++) {
        uint16_t last[STEP] = {0};
        memcpy(last, its + r * columns + whole * STEP, (size_t)rest * sizeof *its);
        FN(split_)(last, &low, &high);
        for (int t = 0; t < T; t++) {
            even[r * T + t] += low * x[t * stride + 2 * whole];
            odd[r * T + t] += high * x[t * stride + 2 * whole + 1];
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++)
            d->out[(token + t) * d->out_stride + row + r] =
                narrow(FN(total_)(&even[r * T + t], &odd[r * T + t]));
}

static TARGET void FN(prepare_)(const Dense *d)
{
    for (int64_t t = 0; t < d->tokens; t++) {
        FLOATS *x = (FLOATS *)d->prepared + 2 * (d->padded / STEP) * t;
        for (int64_t from = 0; from < d->columns; from += STEP, x += 2) {
            int64_t left = d->columns - from;
            uint16_t some[STEP] = {0};
            memcpy(some, d->x + t * d->columns + from,
                   (size_t)(left < STEP ? left : STEP) * sizeof *some);
            FN(split_)(some, x, x + 1);
        }
    }
}

/* With one token a row at a time, in the order of memory. */
static TARGET void FN(rows_)(const Dense *d, int64_t row, int64_t end)
{
    for (; d->tokens > 1 && row + 2 <= end; row += 2) {
        int64_t t = 0;
        for (; t + 2 <= d->tokens; t += 2) FN(few_)(2, 2, d, row, t);
        if (t < d->tokens) FN(few_)(2, 1, d, row, t);
    }
    for (; row < end; row++)
        for (int64_t t = 0; t < d->tokens; t++) FN(few_)(1, 1, d, row, t);
}

#include "lanes_end.h"
