#include "vector.h"

#include <float.h>
#include <math.h>

#include "numbers.h"

#define INLINE static inline __attribute__((always_inline))

/* Smaller largest elements count as zero: their inverse would leave float32's range. */
#define TINY 1e-30f

INLINE void prepare(const float *values, const uint16_t *bits, const Matrix *m, Vector *v)
{
    int64_t columns = m->columns, group = m->group, groups = groups_of(m), blocks = blocks_of(m);
    /* Through magnitudes as integers, which order as floats do and put NaNs above everything. */
    uint32_t largest = 0;
    for (int64_t i = 0; i < columns; i++) {
        uint32_t word = (uint32_t)(bits ? bits[i] : 0) << 16;
        if (!bits) memcpy(&word, values + i, sizeof word);
        word &= 0x7FFFFFFF;
        largest = word > largest ? word : largest;
    }
    float most, units;
    memcpy(&most, &largest, sizeof most);
    int finite = most <= FLT_MAX;
    units = finite && most > TINY ? LARGEST / most : 0;
    v->scale = !finite ? NAN : most > TINY ? most / LARGEST : 0;

    memset(v->sums, 0, (size_t)(groups + 15) / 16 * 16 * sizeof(float));
    if (units == 0) {
        memset(v->planes, 0, (size_t)blocks * 4 * BLOCK);
        return;
    }
    memset(v->planes + (blocks - 1) * 4 * BLOCK, 0, 4 * BLOCK);
    for (int64_t b = 0; b < blocks; b++) {
        int64_t from = b * 2 * BLOCK, count = columns - from < 2 * BLOCK ? columns - from : 2 * BLOCK;
        int32_t whole[2 * BLOCK];
        for (int64_t i = 0; i < count; i++) {
            float value = (bits ? widen(bits[from + i]) : values[from + i]) * units;
            whole[i] = (int32_t)(value + (value < 0 ? -0.5f : 0.5f));
        }
        int8_t *planes = v->planes + b * 4 * BLOCK;
        for (int64_t i = 0; i < count / 2; i++) {
            int32_t even = whole[2 * i], odd = whole[2 * i + 1];
            int32_t high_even = (even + 64) >> 7, high_odd = (odd + 64) >> 7;
            planes[i] = (int8_t)high_even;
            planes[BLOCK + i] = (int8_t)high_odd;
            planes[2 * BLOCK + i] = (int8_t)(even - high_even * 128);
            planes[3 * BLOCK + i] = (int8_t)(odd - high_odd * 128);
        }
        if (group >= 2 * BLOCK) {
            int32_t sum = 0;
            for (int64_t i = 0; i < count; i++) sum += whole[i];
            v->sums[from / group] += (float)sum * shared_zero(m);
        } else {
            for (int64_t g = 0; g * group < count; g++) {
                int32_t sum = 0;
                for (int64_t i = g * group; i < (g + 1) * group && i < count; i++) sum += whole[i];
                v->sums[from / group + g] += (float)sum * shared_zero(m);
            }
        }
    }
}

INLINE void gate_all(const float *gate, const float *up, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i++) out[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

#define BUILD(NAME, TARGET)                                                                       \
    TARGET void prepare_##NAME(const float *values, const uint16_t *bits, const Matrix *matrix,   \
                               Vector *vector)                                                    \
    {                                                                                             \
        if (bits)                                                                                 \
            prepare(NULL, bits, matrix, vector);                                                  \
        else                                                                                      \
            prepare(values, NULL, matrix, vector);                                                \
    }                                                                                             \
    TARGET void gate_##NAME(const float *gate, const float *up, int64_t count, float *out)        \
    {                                                                                             \
        gate_all(gate, up, count, out);                                                           \
    }

BUILD(portable, )
#ifdef X86
BUILD(avx2, __attribute__((target("avx2,fma"))))
BUILD(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))))
#endif
