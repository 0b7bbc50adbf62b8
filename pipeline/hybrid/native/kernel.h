/* Experts computed by the CPU in the layout in which they are held (pipeline/hybrid/records.py).
 *
 * A product of a vector x and a row of codes q with scales s and zeros z is
 *
 *     sum over groups of s * (sum of q * x  -  z * sum of x)
 *
 * Each vector is rounded once to whole numbers of 15 bits, 128 * high + low in units of its largest
 * element / LARGEST, so that the inner sums are of bytes and exact; groups are added up in float32.
 * The rounding moves a result by less than a tenth of what bfloat16 does, and a token's result is
 * the same whatever else is computed beside it, and on however many threads.
 */
#ifndef REQUANT_KERNEL_H
#define REQUANT_KERNEL_H

#include <stdint.h>
#include <string.h>

/* Bytes of codes, 128 columns, that vectors are laid out for. */
#define BLOCK 64
/* Groups of one row, and blocks, at most; `library.py` refuses more. */
#define MAX_GROUPS 2048
/* Scales that are widened at a time, where that makes ROWS rows or more: with many, the first ones
 * have left the nearest cache before their rows come, which halves the rate. */
#define FEW_SCALES 512
/* Bytes that codes are asked for before they are multiplied, into the second cache: the nearest has
 * too few misses under way at once for the rate of memory, and prefetchers fall behind. */
#define AHEAD 8192
/* Rows that are taken at a time. */
#define ROWS 4
/* 127 * 128 + 63: the largest 128 * high + low with high in -127..127 and low in -64..63. */
#define LARGEST 16319

/* One matrix of a record; the names are those of `Part`. */
typedef struct {
    int64_t rows, columns, group;
    int64_t codes, scales, zeros; /* offsets in bytes; zeros < 0: all are `zero` */
    int64_t zero;
} Matrix;

/* A vector of `columns` as kernels want it. */
typedef struct {
    int8_t *planes; /* per block of 128 columns: high of even columns, of odd ones, low of both */
    float *sums;    /* per group, of 128 * high + low, times a zero that all groups share;
                       zeros up to a multiple of 16 */
    float scale;
} Vector;

/* Products of rows first ... first + count with each vector: out[t * stride + i].
 * next: codes that will be read after these, or NULL. */
typedef void (*Product)(const Matrix *matrix, const uint8_t *record, int64_t first, int64_t count,
                        const uint8_t *next, const Vector *const *x, int64_t vectors, float *out,
                        int64_t stride);

/* OpenMP's fork and join, as GCC compiles it; libgomp and LLVM's runtime both have it. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned threads, unsigned flags);

/* What `sums` are multiplied by. */
static inline float shared_zero(const Matrix *m) { return m->zeros < 0 ? (float)m->zero : 1; }
static inline int64_t blocks_of(const Matrix *m) { return (m->columns / 2 + BLOCK - 1) / BLOCK; }
static inline int64_t groups_of(const Matrix *m) { return m->columns / m->group; }

void product_portable(const Matrix *, const uint8_t *, int64_t, int64_t, const uint8_t *,
                      const Vector *const *, int64_t, float *, int64_t);
#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
void product_avx2(const Matrix *, const uint8_t *, int64_t, int64_t, const uint8_t *,
                      const Vector *const *, int64_t, float *, int64_t);
void product_avx512(const Matrix *, const uint8_t *, int64_t, int64_t, const uint8_t *,
                      const Vector *const *, int64_t, float *, int64_t);
#endif
#endif
