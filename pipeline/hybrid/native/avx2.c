/* Products with AVX2: 32 bytes of codes, 64 columns, an instruction. */
#include "kernel.h"

#ifdef X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define HALF (BLOCK / 2)

/* What products of some rows have in common; see avx512.c. */
typedef struct {
    int64_t width, groups;
    int64_t halves, whole; /* half blocks: all, and those that are full */
    int64_t steps, step;
    __m256i spread;
    const uint8_t *stop, *next;
    float scale[MAX_GROUPS + 16], offset[MAX_GROUPS + 16];
} Work;

INLINE void read_scales(Work *w, const Matrix *m, const uint8_t *record, int64_t row, int64_t rows)
{
    const uint8_t *scales = record + m->scales + 2 * row * w->groups;
    const uint8_t *zeros = record + m->zeros + row * w->groups;
    int64_t count = rows * w->groups;
    for (int64_t i = 0; i < 2 * count; i += 64) __builtin_prefetch(scales + 2 * count + i);
    for (int64_t i = 0; i < count; i += 8) {
        size_t left = (size_t)(count - i < 8 ? count - i : 8);
        uint16_t some[8] = {0};
        uint8_t their[8] = {0};
        memcpy(some, scales + 2 * i, 2 * left);
        __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)some));
        _mm256_storeu_ps(w->scale + i, s);
        if (m->zeros >= 0) {
            memcpy(their, zeros + i, left);
            __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)their));
            s = _mm256_mul_ps(s, _mm256_cvtepi32_ps(z));
        }
        _mm256_storeu_ps(w->offset + i, s);
    }
    memset(w->offset + count, 0, 16 * sizeof(float));
    int64_t each = w->steps / w->groups;
    if (each > 1) /* from behind, as there are more of them */
        for (int64_t i = count - 1; i >= 0; i--)
            for (int64_t k = each * (i + 1) - 1; k >= each * i; k--) w->scale[k] = w->scale[i];
    memset(w->scale + rows * w->steps, 0, 16 * sizeof(float));
}

INLINE __m256i load(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

/* The last codes of a row, with zeros behind them. */
INLINE __m256i load_some(const uint8_t *at, int64_t bytes)
{
    uint8_t last[HALF] = {0};
    memcpy(last, at, (size_t)bytes);
    return load(last);
}

INLINE __m256 scale_of(const int wide, const Work *w, const float *its)
{
    return wide ? _mm256_set1_ps(*its)
                : _mm256_permutevar8x32_ps(_mm256_loadu_ps(its), w->spread);
}

/* `sum` and the products of half a block with `planes`. */
INLINE __m256 add_half(__m256 sum, __m256i bytes, const int8_t *planes, __m256 scale)
{
    const __m256i low_half = _mm256_set1_epi8(15);
    __m256i even = _mm256_and_si256(bytes, low_half);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
    /* four products of at most 15 * 127 stay far within 16 bits */
    __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(even, load(planes)),
                                    _mm256_maddubs_epi16(odd, load(planes + BLOCK)));
    __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(even, load(planes + 2 * BLOCK)),
                                   _mm256_maddubs_epi16(odd, load(planes + 3 * BLOCK)));
    __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(128)),
                                   _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sum);
}

INLINE float finish(const Work *w, __m256 sum, int64_t row, const Vector *x)
{
    const float *offset = w->offset + row * w->groups;
    for (int64_t g = 0; g < w->groups; g += 8)
        sum = _mm256_fnmadd_ps(_mm256_loadu_ps(offset + g), _mm256_loadu_ps(x->sums + g), sum);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four))) * x->scale;
}

INLINE const int8_t *planes_of(const Vector *x, int64_t half)
{
    return x->planes + half / 2 * 4 * BLOCK + half % 2 * HALF;
}

/* Rows up to `end`, R at a time, with one vector. */
INLINE void rows_of(const int R, const int wide, const Work *w, const uint8_t *codes, int64_t row,
                    int64_t end, const Vector *x, float *out)
{
    const int64_t whole = w->whole, rest = w->width % HALF, step = w->step;
    for (; row < end; row += R) {
        const uint8_t *its = codes + row * w->width;
        const uint8_t *ahead = its + AHEAD;
        if (ahead >= w->stop) ahead = w->next + (ahead - w->stop);
        const float *scales = w->scale + row * w->steps;
        __m256 sum[ROWS];
        for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_ps();
        for (int64_t b = 0; b < whole; b++) {
            if (R == 1 && b % 2 == 0) _mm_prefetch((const char *)ahead + b * HALF, _MM_HINT_T1);
            for (int r = 0; r < R; r++)
                sum[r] = add_half(sum[r], load(its + r * w->width + b * HALF), planes_of(x, b),
                                  scale_of(wide, w, scales + r * w->steps + b * step));
        }
        for (int r = 0; r < R; r++) {
            if (rest)
                sum[r] = add_half(sum[r], load_some(its + r * w->width + whole * HALF, rest),
                                  planes_of(x, whole),
                                  scale_of(wide, w, scales + r * w->steps + whole * step));
            out[row + r] = finish(w, sum[r], row + r, x);
        }
    }
}

/* Functions of their own: see avx512.c. */
#define BUILD(NAME, R, WIDE)                                                                      \
    static __attribute__((noinline)) TARGET void NAME(                                            \
        const Work *w, const uint8_t *codes, int64_t row, int64_t end, const Vector *x,           \
        float *out)                                                                               \
    {                                                                                             \
        rows_of(R, WIDE, w, codes, row, end, x, out);                                             \
    }

BUILD(one_wide, 1, 1)
BUILD(one_narrow, 1, 0)
BUILD(some_wide, ROWS, 1)
BUILD(some_narrow, ROWS, 0)

TARGET void product_avx2(const Matrix *m, const uint8_t *record, int64_t first, int64_t count,
                    const uint8_t *next, const Vector *const *x, int64_t vectors, float *out,
                    int64_t stride)
{
    Work w;
    int lane[8];
    int wide = m->group >= 2 * HALF;
    w.width = m->columns / 2, w.groups = groups_of(m);
    w.halves = (w.width + HALF - 1) / HALF, w.whole = w.width / HALF;
    w.step = wide ? 1 : 2 * HALF / m->group, w.steps = wide ? w.halves : w.groups;
    for (int i = 0; i < 8; i++) lane[i] = (int)(8 * i / m->group);
    w.spread = load(lane);
    w.stop = record + m->codes + (first + count) * w.width;
    w.next = next ? next : w.stop - AHEAD; /* at hand already */
    int64_t at_once = FEW_SCALES / w.steps; /* rows */
    at_once = at_once < ROWS ? MAX_GROUPS / w.steps : at_once / ROWS * ROWS;
    for (int64_t done = 0; done < count; done += at_once) {
        int64_t rows = count - done < at_once ? count - done : at_once;
        int64_t together = vectors > 1 ? rows / ROWS * ROWS : 0;
        const uint8_t *codes = record + m->codes + (first + done) * w.width;
        read_scales(&w, m, record, first + done, rows);
        for (int64_t t = 0; t < vectors; t++) {
            float *to = out + done + t * stride;
            (wide ? some_wide : some_narrow)(&w, codes, 0, together, x[t], to);
            (wide ? one_wide : one_narrow)(&w, codes, together, rows, x[t], to);
        }
    }
}
#endif
