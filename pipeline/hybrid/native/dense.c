/* Products of a bfloat16 matrix and a few vectors: decoding's linear layers outside the experts.
 *
 * Sums are float32, of even and of odd columns, each lane in the order of columns, so that a
 * token's result is the same whatever else is computed beside it, and on however many threads.
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "kernel.h"

/* Vectors are padded to so many columns. */
#define WIDEST 16
/* Bytes of one thread's turn: as many as prefetchers need to fall into step, and few enough that
 * threads end together. */
#define TURN (1 << 17)

enum { DONE = 0, NO_MEMORY = 1 };

typedef struct Dense {
    const uint16_t *weight, *x; /* bfloat16 [rows, columns], [tokens, columns] */
    uint16_t *out;              /* [tokens, rows] */
    int64_t rows, columns, tokens, padded, turn;
    float *prepared; /* [tokens, padded]: even columns of one vector of words, then its odd ones */
    void (*compute)(const struct Dense *, int64_t row, int64_t end);
    atomic_long next;
} Dense;

/* To the nearest bfloat16, ties to even; a NaN stays one. */
static inline __attribute__((always_inline)) uint16_t narrow(float value)
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if (value != value) return 0x7FC0;
    return (uint16_t)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

#define NAME portable
#define TARGET
#define BYTES 16
#include "rows.h"
#ifdef X86
#define NAME avx2
#define TARGET __attribute__((target("avx2,fma")))
#define BYTES 32
#include "rows.h"
#endif

static void work(void *argument)
{
    Dense *d = argument;
    for (;;) {
        int64_t row = d->turn * atomic_fetch_add_explicit(&d->next, 1, memory_order_relaxed);
        if (row >= d->rows) return;
        d->compute(d, row, row + d->turn < d->rows ? row + d->turn : d->rows);
    }
}

/* out [tokens, rows] = x [tokens, columns] times weight [rows, columns] transposed, all bfloat16
 * and without gaps.  kernel, threads, parallel: see `requant_experts`. */
int requant_dense(const uint16_t *weight, int64_t rows, int64_t columns, const uint16_t *x,
                  int64_t tokens, uint16_t *out, int kernel, int64_t threads, Parallel parallel)
{
    Dense d = {.weight = weight, .x = x, .out = out, .rows = rows, .columns = columns,
               .tokens = tokens, .padded = (columns + WIDEST - 1) / WIDEST * WIDEST};
    void (*prepare)(const Dense *) = prepare_portable;
    d.compute = rows_portable;
#ifdef X86
    if (kernel) prepare = prepare_avx2, d.compute = rows_avx2;
#endif
    d.prepared = aligned_alloc(64, (size_t)(tokens * d.padded) * sizeof(float) + 64);
    if (!d.prepared) return NO_MEMORY;
    prepare(&d);
    int64_t turns = 1 + rows * columns * 2 / TURN;
    d.turn = (rows + turns - 1) / turns;
    threads = threads < turns ? threads : turns;
    if (threads > 1)
        parallel(work, &d, (unsigned)threads, 0);
    else
        work(&d);
    free(d.prepared);
    return DONE;
}
