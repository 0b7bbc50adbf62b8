/* Products with AVX512 VNNI: 64 bytes of codes, 128 columns, an instruction. */
#include "kernel.h"

#ifdef X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* What products of some rows have in common. */
typedef struct {
    int64_t width, groups;
    int64_t blocks, whole; /* all, and those that are full */
    __mmask64 tail;        /* bytes of the last block that are the row's, where it is not full */
    int64_t steps, step;   /* `scale` per row, and from one block to the next */
    __m512i spread;        /* which of the scales from there on each lane of 8 columns takes */
    const uint8_t *stop, *next;    /* end of the rows, and what is read after it */
    float scale[MAX_GROUPS + 16];  /* of some rows; where groups are wider, one per block */
    float offset[MAX_GROUPS + 16]; /* per group: scale * zero, or, with a shared zero, the scale */
} Work;

/* Those of `rows` rows, all at once: one by one, each row would wait for memory.  The next ones are
 * asked for meanwhile. */
INLINE void read_scales(Work *w, const Matrix *m, const uint8_t *record, int64_t row, int64_t rows)
{
    const uint8_t *scales = record + m->scales + 2 * row * w->groups;
    const uint8_t *zeros = record + m->zeros + row * w->groups;
    int64_t count = rows * w->groups;
    for (int64_t i = 0; i < 2 * count; i += 64) __builtin_prefetch(scales + 2 * count + i);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 mask = count - i >= 16 ? 0xFFFF : (__mmask16)((1u << (count - i)) - 1);
        __m512 s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales + 2 * i));
        _mm512_storeu_ps(w->scale + i, s);
        if (m->zeros >= 0) {
            __m128i z = _mm_maskz_loadu_epi8(mask, zeros + i);
            s = _mm512_mul_ps(s, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(z)));
        }
        _mm512_storeu_ps(w->offset + i, s);
    }
    _mm512_storeu_ps(w->offset + count, _mm512_setzero_ps());
    int64_t each = w->steps / w->groups;
    if (each > 1) /* from behind, as there are more of them */
        for (int64_t i = count - 1; i >= 0; i--)
            for (int64_t k = each * (i + 1) - 1; k >= each * i; k--) w->scale[k] = w->scale[i];
    _mm512_storeu_ps(w->scale + rows * w->steps, _mm512_setzero_ps());
}

/* 64 bytes of codes, as even and odd columns. */
INLINE void split(__m512i bytes, __m512i *even, __m512i *odd)
{
    const __m512i low_half = _mm512_set1_epi8(15);
    *even = _mm512_and_si512(bytes, low_half);
    *odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_half);
}

INLINE __m512 scale_of(const int wide, const Work *w, const float *its)
{
    return wide ? _mm512_set1_ps(*its) : _mm512_permutexvar_ps(w->spread, _mm512_loadu_ps(its));
}

/* `sum` and the products of a block with `planes`. */
INLINE __m512 add_block(__m512 sum, __m512i even, __m512i odd, const int8_t *planes, __m512 scale)
{
    __m512i dot = _mm512_setzero_si512();
    dot = _mm512_dpbusd_epi32(dot, even, _mm512_loadu_si512(planes));
    dot = _mm512_dpbusd_epi32(dot, odd, _mm512_loadu_si512(planes + BLOCK));
    dot = _mm512_slli_epi32(dot, 7);
    dot = _mm512_dpbusd_epi32(dot, even, _mm512_loadu_si512(planes + 2 * BLOCK));
    dot = _mm512_dpbusd_epi32(dot, odd, _mm512_loadu_si512(planes + 3 * BLOCK));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum);
}

INLINE float finish(const Work *w, __m512 sum, int64_t row, const Vector *x)
{
    const float *offset = w->offset + row * w->groups;
    for (int64_t g = 0; g < w->groups; g += 16)
        sum = _mm512_fnmadd_ps(_mm512_loadu_ps(offset + g), _mm512_loadu_ps(x->sums + g), sum);
    return _mm512_reduce_add_ps(sum) * x->scale;
}

/* Rows up to `end` with one vector, one after the other, as fast as memory gives them.  wide: groups are of
 * whole blocks. */
INLINE void with_one(const int wide, const Work *w, const uint8_t *codes, int64_t row, int64_t end,
                     const Vector *x, float *out)
{
    const int64_t whole = w->whole, step = w->step;
    for (; row < end; row++) {
        const uint8_t *its = codes + row * w->width;
        const uint8_t *ahead = its + AHEAD;
        if (ahead >= w->stop) ahead = w->next + (ahead - w->stop);
        const float *scales = w->scale + row * w->steps;
        const int8_t *planes = x->planes;
        __m512 sum = _mm512_setzero_ps();
        __m512i even, odd;
        for (int64_t b = 0; b < whole; b++) {
            _mm_prefetch((const char *)ahead + b * BLOCK, _MM_HINT_T1);
            split(_mm512_loadu_si512(its + b * BLOCK), &even, &odd);
            __m512 scale = scale_of(wide, w, scales + (wide ? b : b * step));
            sum = add_block(sum, even, odd, planes + b * 4 * BLOCK, scale);
        }
        if (w->tail) {
            split(_mm512_maskz_loadu_epi8(w->tail, its + whole * BLOCK), &even, &odd);
            __m512 scale = scale_of(wide, w, scales + whole * step);
            sum = add_block(sum, even, odd, planes + whole * 4 * BLOCK, scale);
        }
        out[row] = finish(w, sum, row, x);
    }
}

/* ROWS rows with T vectors: out[t * stride + r]. */
INLINE void with_some(const int T, const int wide, const Work *w, const uint8_t *codes, int64_t row,
                      const Vector *const *x, float *out, int64_t stride)
{
    __m512 sum[ROWS * 4];
    for (int i = 0; i < ROWS * T; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < w->blocks; b++) {
        __m512i even[ROWS], odd[ROWS];
        __m512 scale[ROWS];
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *at = codes + (row + r) * w->width + b * BLOCK;
            __m512i bytes = b < w->whole ? _mm512_loadu_si512(at)
                                         : _mm512_maskz_loadu_epi8(w->tail, at);
            split(bytes, &even[r], &odd[r]);
            scale[r] = scale_of(wide, w, w->scale + (row + r) * w->steps + b * w->step);
        }
        for (int t = 0; t < T; t++)
            for (int r = 0; r < ROWS; r++)
                sum[r * T + t] = add_block(sum[r * T + t], even[r], odd[r],
                                           x[t]->planes + b * 4 * BLOCK, scale[r]);
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < ROWS; r++)
            out[t * stride + r] = finish(w, sum[r * T + t], row + r, x[t]);
}

/* All products of `rows` rows, a multiple of ROWS. */
INLINE void all_of(const int wide, const Work *w, const uint8_t *codes, int64_t rows,
                   const Vector *const *x, int64_t vectors, float *out, int64_t stride)
{
    for (int64_t row = 0; row < rows; row += ROWS) {
        float *to = out + row;
        int64_t t = 0;
        for (; t + 4 <= vectors; t += 4)
            with_some(4, wide, w, codes, row, x + t, to + t * stride, stride);
        for (; t + 2 <= vectors; t += 2)
            with_some(2, wide, w, codes, row, x + t, to + t * stride, stride);
        if (t < vectors) with_some(1, wide, w, codes, row, x + t, to + t * stride, stride);
    }
}

/* Functions of their own: inlined into one, the loops of a single vector became half as fast, as
 * prefetchers no longer followed them. */
#define OWN static __attribute__((noinline)) TARGET
#define BUILD(NAME, WIDE)                                                                         \
    OWN void one_##NAME(const Work *w, const uint8_t *codes, int64_t row, int64_t end,            \
                        const Vector *x, float *out)                                              \
    {                                                                                             \
        with_one(WIDE, w, codes, row, end, x, out);                                               \
    }                                                                                             \
    OWN void some_##NAME(const Work *w, const uint8_t *codes, int64_t rows,                       \
                         const Vector *const *x, int64_t vectors, float *out, int64_t stride)     \
    {                                                                                             \
        all_of(WIDE, w, codes, rows, x, vectors, out, stride);                                    \
    }

BUILD(wide, 1)
BUILD(narrow, 0)

TARGET void product_avx512(const Matrix *m, const uint8_t *record, int64_t first, int64_t count,
                    const uint8_t *next, const Vector *const *x, int64_t vectors, float *out,
                    int64_t stride)
{
    Work w;
    int lane[16];
    int wide = m->group >= 2 * BLOCK;
    w.width = m->columns / 2, w.groups = groups_of(m), w.blocks = blocks_of(m);
    w.whole = w.width / BLOCK, w.tail = ((__mmask64)1 << w.width % BLOCK) - 1;
    w.step = wide ? 1 : 2 * BLOCK / m->group, w.steps = wide ? w.blocks : w.groups;
    for (int i = 0; i < 16; i++) lane[i] = (int)(8 * i / m->group);
    w.spread = _mm512_loadu_si512(lane);
    w.stop = record + m->codes + (first + count) * w.width;
    w.next = next ? next : w.stop - AHEAD; /* at hand already */
    int64_t at_once = FEW_SCALES / w.steps; /* rows */
    at_once = at_once < ROWS ? MAX_GROUPS / w.steps : at_once / ROWS * ROWS;
    for (int64_t done = 0; done < count; done += at_once) {
        int64_t rows = count - done < at_once ? count - done : at_once;
        int64_t together = vectors > 1 ? rows / ROWS * ROWS : 0;
        const uint8_t *codes = record + m->codes + (first + done) * w.width;
        float *to = out + done;
        read_scales(&w, m, record, first + done, rows);
        (wide ? some_wide : some_narrow)(&w, codes, together, x, vectors, to, stride);
        for (int64_t t = 0; t < vectors; t++)
            (wide ? one_wide : one_narrow)(&w, codes, together, rows, x[t], to + t * stride);
    }
}
#endif
