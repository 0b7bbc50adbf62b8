/* Products of bfloat16 matrices and a few vectors: decoding's linear layers outside the experts.
 *
 * Sums are float32, of even and of odd columns, each lane in the order of columns, so that a
 * token's result is the same whatever else is computed beside it, and on however many threads.
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "kernel.h"
#include "numbers.h"

/* Vectors are padded to so many columns. */
#define WIDEST 16
/* Bytes of one thread's turn: as many as prefetchers need to fall into step, and few enough that
 * threads end together. */
#define TURN (1 << 17)

/* Matrices of one call. */
#define MATRICES 4

enum { DONE = 0, NO_MEMORY = 1 };

typedef struct Dense {
    const uint16_t *weight, *x; /* bfloat16 [rows, columns], [tokens, columns] */
    uint16_t *out;              /* [tokens, rows], tokens `out_stride` apart */
    int64_t rows, columns, tokens, padded, out_stride;
    int64_t turn, turns; /* rows of one thread's turn, and how many turns there are */
    float *prepared; /* [tokens, padded]: even columns of one vector of words, then its odd ones */
} Dense;

typedef struct {
    Dense each[MATRICES];
    void (*compute)(const Dense *, int64_t row, int64_t end);
    atomic_long next;
} Job;

#define TEMPLATE "rows.h"
#include "kinds.h"

static void work(void *argument)
{
    Job *job = argument;
    for (;;) {
        int64_t turn = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        const Dense *d = job->each, *end = job->each + MATRICES;
        while (d < end && turn >= d->turns) turn -= d++->turns;
        if (d == end) return;
        int64_t row = d->turn * turn;
        job->compute(d, row, row + d->turn < d->rows ? row + d->turn : d->rows);
    }
}

/* out [tokens, rows of all] = x [tokens, columns] times each of four matrices [rows, columns]
 * transposed, side by side, all bfloat16 and without gaps; where fewer are wanted the others have
 * no rows.  kernel, threads, parallel: see `requant_experts`. */
int requant_dense(const uint16_t *first, int64_t rows1, const uint16_t *second, int64_t rows2,
                  const uint16_t *third, int64_t rows3, const uint16_t *fourth, int64_t rows4,
                  int64_t columns, const uint16_t *x, int64_t tokens, uint16_t *out, int kernel,
                  int64_t threads, Parallel parallel)
{
    const uint16_t *weights[MATRICES] = {first, second, third, fourth};
    const int64_t rows[MATRICES] = {rows1, rows2, rows3, rows4};
    int64_t padded = (columns + WIDEST - 1) / WIDEST * WIDEST, all = 0;
    Job job = {.compute = rows_portable};
    void (*prepare)(const Dense *) = prepare_portable;
#ifdef X86
    if (kernel) prepare = prepare_avx2, job.compute = rows_avx2;
#endif
    float *prepared = aligned_alloc(64, (size_t)(tokens * padded) * sizeof(float) + 64);
    if (!prepared) return NO_MEMORY;
    for (int64_t i = 0, before = 0; i < MATRICES; before += rows[i++]) {
        int64_t turns = rows[i] ? 1 + rows[i] * columns * 2 / TURN : 1;
        job.each[i] = (Dense){
            .weight = weights[i], .x = x, .out = out + before, .rows = rows[i],
            .columns = columns, .tokens = tokens, .padded = padded,
            .out_stride = rows1 + rows2 + rows3 + rows4, .prepared = prepared,
            .turn = (rows[i] + turns - 1) / turns};
        job.each[i].turns = rows[i] ? (rows[i] + job.each[i].turn - 1) / job.each[i].turn : 0;
        all += job.each[i].turns;
    }
    prepare(job.each);
    threads = threads < all ? threads : all;
    if (threads > 1)
        parallel(work, &job, (unsigned)threads, 0);
    else
        work(&job);
    free(prepared);
    return DONE;
}
