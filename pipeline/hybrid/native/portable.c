/* Products in plain C, for processors that the other files do not know. */
#include "kernel.h"

/* float16 to float32, after IEEE 754; no infinities or NaNs are among a checkpoint's scales. */
static float half(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7FFF;
    float value;
    if (rest < 0x400) { /* subnormal: a multiple of 2**-24 */
        value = (float)rest * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    uint32_t word = sign | ((rest << 13) + 0x38000000);
    memcpy(&value, &word, sizeof value);
    return value;
}

/* Of one half of a vector's bits with `bytes` bytes of codes. */
static int32_t dot(const uint8_t *codes, const int8_t *even, const int8_t *odd, int64_t bytes)
{
    int32_t sum = 0;
    for (int64_t i = 0; i < bytes; i++) sum += (codes[i] & 15) * even[i] + (codes[i] >> 4) * odd[i];
    return sum;
}

void product_portable(const Matrix *m, const uint8_t *record, int64_t first, int64_t count,
                    const uint8_t *next, const Vector *const *x, int64_t vectors, float *out,
                    int64_t stride)
{
    int64_t width = m->columns / 2, groups = groups_of(m), span = m->group / 2;
    (void)next;
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i;
        const uint8_t *codes = record + m->codes + row * width;
        const uint8_t *scales = record + m->scales + 2 * row * groups;
        for (int64_t t = 0; t < vectors; t++) {
            float total = 0;
            for (int64_t g = 0; g < groups; g++) {
                uint16_t bits;
                memcpy(&bits, scales + 2 * g, sizeof bits);
                float zero = m->zeros < 0 ? 1 : record[m->zeros + row * groups + g];
                int64_t sum = 0;
                for (int64_t at = g * span, end; at < (g + 1) * span; at = end) {
                    int64_t block = at / BLOCK, inside = at % BLOCK;
                    end = (block + 1) * BLOCK < (g + 1) * span ? (block + 1) * BLOCK : (g + 1) * span;
                    const int8_t *planes = x[t]->planes + 4 * BLOCK * block + inside;
                    sum += 128 * dot(codes + at, planes, planes + BLOCK, end - at);
                    sum += dot(codes + at, planes + 2 * BLOCK, planes + 3 * BLOCK, end - at);
                }
                total += half(bits) * ((float)sum - zero * x[t]->sums[g]);
            }
            out[t * stride + i] = total * x[t]->scale;
        }
    }
}
