/* Products with AVX512 VNNI: 64 bytes of codes, 128 columns, an instruction. */
#include "kernel.h"

#ifdef X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* What products of some rows have in common. */
typedef struct {
    int64_t width, blocks, groups;
    int64_t whole;  /* blocks that are full */
    __mmask64 tail; /* bytes of the last block that are the row's, where it is not full */
    __m512i spread; /* which of the scales from `base` on each lane of 8 columns takes */
    int16_t base[MAX_GROUPS];
    /* Of some rows, one after the other; offset: scale * zero, or, with a shared zero, `scale`. */
    float scale[MAX_GROUPS + 16], own[MAX_GROUPS + 16];
    const float *offset;
} Work;

/* Those of `rows` rows, all at once: one by one, each row would wait for memory. */
INLINE void read_scales(Work *w, const Matrix *m, const uint8_t *record, int64_t row, int64_t rows)
{
    const uint8_t *scales = record + m->scales + 2 * row * w->groups;
    const uint8_t *zeros = record + m->zeros + row * w->groups;
    int64_t count = rows * w->groups;
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 mask = count - i >= 16 ? 0xFFFF : (__mmask16)((1u << (count - i)) - 1);
        __m512 s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales + 2 * i));
        _mm512_storeu_ps(w->scale + i, s);
        if (m->zeros < 0) continue;
        __m128i z = _mm_maskz_loadu_epi8(mask, zeros + i);
        s = _mm512_mul_ps(s, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(z)));
        _mm512_storeu_ps(w->own + i, s);
    }
    _mm512_storeu_ps(w->scale + count, _mm512_setzero_ps());
    _mm512_storeu_ps(w->own + count, _mm512_setzero_ps());
    w->offset = m->zeros < 0 ? w->scale : w->own;
}

/* R rows with T vectors; results are written to out[t * stride + r].  wide: groups are of whole
 * blocks.  One row at a time is read as fast as memory gives it, since prefetchers follow it. */
INLINE void tile(const int R, const int T, const int wide, const Work *w, const uint8_t *codes,
                 int64_t row, const Vector *const *x, float *out, int64_t stride)
{
    const float *scales = w->scale + row * w->groups, *offsets = w->offset + row * w->groups;
    const __m512i low_half = _mm512_set1_epi8(15);
    __m512 sum[ROWS * 4];
    for (int i = 0; i < R * T; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < w->blocks; b++) {
        __m512i even[ROWS], odd[ROWS];
        __m512 scale[ROWS];
        for (int r = 0; r < R; r++) {
            const uint8_t *at = codes + r * w->width + b * BLOCK;
            __m512i bytes = b < w->whole ? _mm512_loadu_si512(at) /* prefetchers follow these */
                                         : _mm512_maskz_loadu_epi8(w->tail, at);
            even[r] = _mm512_and_si512(bytes, low_half);
            odd[r] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_half);
            const float *its = scales + r * w->groups + w->base[b];
            scale[r] = wide ? _mm512_set1_ps(*its)
                            : _mm512_permutexvar_ps(w->spread, _mm512_loadu_ps(its));
        }
        for (int t = 0; t < T; t++) {
            const int8_t *planes = x[t]->planes + 4 * BLOCK * b;
            __m512i high_even = _mm512_loadu_si512(planes);
            __m512i high_odd = _mm512_loadu_si512(planes + BLOCK);
            __m512i low_even = _mm512_loadu_si512(planes + 2 * BLOCK);
            __m512i low_odd = _mm512_loadu_si512(planes + 3 * BLOCK);
            for (int r = 0; r < R; r++) {
                __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even[r], high_even);
                dot = _mm512_slli_epi32(_mm512_dpbusd_epi32(dot, odd[r], high_odd), 7);
                dot = _mm512_dpbusd_epi32(dot, even[r], low_even);
                dot = _mm512_dpbusd_epi32(dot, odd[r], low_odd);
                sum[r * T + t] =
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale[r], sum[r * T + t]);
            }
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
            __m512 total = sum[r * T + t];
            for (int64_t g = 0; g < w->groups; g += 16)
                total = _mm512_fnmadd_ps(_mm512_loadu_ps(offsets + r * w->groups + g),
                                         _mm512_loadu_ps(x[t]->sums + g), total);
            out[t * stride + r] = _mm512_reduce_add_ps(total) * x[t]->scale;
        }
}

/* All products of R rows. */
INLINE void rows_of(const int R, const int wide, const Work *w, const uint8_t *codes, int64_t row,
                    const Vector *const *x, int64_t vectors, float *out, int64_t stride)
{
    int64_t t = 0;
    codes += row * w->width, out += row;
    if (R > 1) {
        for (; t + 4 <= vectors; t += 4)
            tile(R, 4, wide, w, codes, row, x + t, out + t * stride, stride);
        for (; t + 2 <= vectors; t += 2)
            tile(R, 2, wide, w, codes, row, x + t, out + t * stride, stride);
    }
    for (; t < vectors; t++) tile(R, 1, wide, w, codes, row, x + t, out + t * stride, stride);
}

TARGET void product_avx512(const Matrix *m, const uint8_t *record, int64_t first, int64_t count,
                           const Vector *const *x, int64_t vectors, float *out, int64_t stride)
{
    Work w;
    int lane[16];
    w.width = m->columns / 2, w.blocks = blocks_of(m), w.groups = groups_of(m);
    int64_t at_once = MAX_GROUPS / w.groups;
    w.whole = w.width / BLOCK, w.tail = ((__mmask64)1 << w.width % BLOCK) - 1;
    for (int i = 0; i < 16; i++) lane[i] = (int)(8 * i / m->group);
    w.spread = _mm512_loadu_si512(lane);
    for (int64_t b = 0; b < w.blocks; b++) w.base[b] = (int16_t)(2 * BLOCK * b / m->group);
    int wide = m->group >= 2 * BLOCK;
    for (int64_t done = 0; done < count; done += at_once) {
        int64_t rows = count - done < at_once ? count - done : at_once, row = 0;
        const uint8_t *codes = record + m->codes + (first + done) * w.width;
        float *to = out + done;
        read_scales(&w, m, record, first + done, rows);
        for (; vectors > 1 && row + ROWS <= rows; row += ROWS)
            if (wide)
                rows_of(ROWS, 1, &w, codes, row, x, vectors, to, stride);
            else
                rows_of(ROWS, 0, &w, codes, row, x, vectors, to, stride);
        for (; row < rows; row++)
            if (wide)
                rows_of(1, 1, &w, codes, row, x, vectors, to, stride);
            else
                rows_of(1, 0, &w, codes, row, x, vectors, to, stride);
    }
}
#endif
