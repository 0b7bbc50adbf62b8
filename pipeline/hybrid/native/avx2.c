/* Products with AVX2: 32 bytes of codes, 64 columns, an instruction. */
#include "kernel.h"

#ifdef X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define HALF (BLOCK / 2)

/* What products of some rows have in common; see avx512.c. */
typedef struct {
    int64_t width, halves, groups;
    int rest; /* bytes of the last half block that are the row's */
    __m256i spread;
    int16_t base[2 * MAX_GROUPS];
    float scale[MAX_GROUPS + 16], own[MAX_GROUPS + 16];
    const float *offset;
} Work;

INLINE void read_scales(Work *w, const Matrix *m, const uint8_t *record, int64_t row, int64_t rows)
{
    const uint8_t *scales = record + m->scales + 2 * row * w->groups;
    const uint8_t *zeros = record + m->zeros + row * w->groups;
    int64_t count = rows * w->groups;
    for (int64_t i = 0; i < count; i += 8) {
        size_t left = (size_t)(count - i < 8 ? count - i : 8);
        uint16_t some[8] = {0};
        uint8_t their[8] = {0};
        memcpy(some, scales + 2 * i, 2 * left);
        __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)some));
        _mm256_storeu_ps(w->scale + i, s);
        if (m->zeros < 0) continue;
        memcpy(their, zeros + i, left);
        __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)their));
        _mm256_storeu_ps(w->own + i, _mm256_mul_ps(s, _mm256_cvtepi32_ps(z)));
    }
    for (int64_t i = 0; i < 16; i++) w->scale[count + i] = w->own[count + i] = 0;
    w->offset = m->zeros < 0 ? w->scale : w->own;
}

INLINE float add_up(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE __m256i load(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

/* R rows with one vector; results are written to out[r].  wide: as in avx512.c. */
INLINE void tile(const int R, const int wide, const Work *w, const uint8_t *codes, int64_t row,
                 const Vector *x, float *out)
{
    const float *scales = w->scale + row * w->groups, *offsets = w->offset + row * w->groups;
    const __m256i low_half = _mm256_set1_epi8(15);
    const __m256i ones = _mm256_set1_epi16(1), many = _mm256_set1_epi16(128);
    __m256 sum[ROWS];
    for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < w->halves; b++) {
        const int8_t *planes = x->planes + 4 * BLOCK * (b / 2) + HALF * (b % 2);
        __m256i high_even = load(planes), high_odd = load(planes + BLOCK);
        __m256i low_even = load(planes + 2 * BLOCK), low_odd = load(planes + 3 * BLOCK);
        for (int r = 0; r < R; r++) {
            const uint8_t *at = codes + r * w->width + b * HALF;
            uint8_t last[HALF] = {0};
            if (b + 1 == w->halves && w->rest < HALF) {
                memcpy(last, at, (size_t)w->rest);
                at = last;
            }
            __m256i bytes = load(at);
            __m256i even = _mm256_and_si256(bytes, low_half);
            __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
            /* four products of at most 15 * 127 stay far within 16 bits */
            __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(even, high_even),
                                            _mm256_maddubs_epi16(odd, high_odd));
            __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(even, low_even),
                                           _mm256_maddubs_epi16(odd, low_odd));
            __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(high, many),
                                           _mm256_madd_epi16(low, ones));
            const float *its = scales + r * w->groups + w->base[b];
            __m256 scale = wide ? _mm256_set1_ps(*its)
                                : _mm256_permutevar8x32_ps(_mm256_loadu_ps(its), w->spread);
            sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sum[r]);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int64_t g = 0; g < w->groups; g += 8)
            sum[r] = _mm256_fnmadd_ps(_mm256_loadu_ps(offsets + r * w->groups + g),
                                      _mm256_loadu_ps(x->sums + g), sum[r]);
        out[r] = add_up(sum[r]) * x->scale;
    }
}

TARGET void product_avx2(const Matrix *m, const uint8_t *record, int64_t first, int64_t count,
                         const Vector *const *x, int64_t vectors, float *out, int64_t stride)
{
    Work w;
    int lane[8];
    w.width = m->columns / 2, w.groups = groups_of(m);
    w.halves = (w.width + HALF - 1) / HALF;
    w.rest = (int)(w.width - (w.halves - 1) * HALF);
    for (int i = 0; i < 8; i++) lane[i] = (int)(8 * i / m->group);
    w.spread = load(lane);
    for (int64_t b = 0; b < w.halves; b++) w.base[b] = (int16_t)(2 * HALF * b / m->group);
    int64_t at_once = MAX_GROUPS / w.groups;
    int wide = m->group >= 2 * HALF;
    for (int64_t done = 0; done < count; done += at_once) {
        int64_t rows = count - done < at_once ? count - done : at_once, row = 0;
        const uint8_t *codes = record + m->codes + (first + done) * w.width;
        read_scales(&w, m, record, first + done, rows);
        while (row < rows) {
            int some = vectors > 1 && row + ROWS <= rows ? ROWS : 1;
            const uint8_t *its = codes + row * w.width;
            for (int64_t t = 0; t < vectors; t++) {
                float *to = out + t * stride + done + row;
                if (some == ROWS && wide)
                    tile(ROWS, 1, &w, its, row, x[t], to);
                else if (some == ROWS)
                    tile(ROWS, 0, &w, its, row, x[t], to);
                else if (wide)
                    tile(1, 1, &w, its, row, x[t], to);
                else
                    tile(1, 0, &w, its, row, x[t], to);
            }
            row += some;
        }
    }
}
#endif
