/* Numbers one at a time, for loops that compilers vectorise.  No library of mathematics is asked:
 * results are the same on every machine of one kind, and nothing has to be linked. */
#ifndef REQUANT_NUMBERS_H
#define REQUANT_NUMBERS_H

#include <stdint.h>
#include <string.h>

#define NUMBER static inline __attribute__((always_inline))

/* The value of a bfloat16. */
NUMBER float widen(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* To the nearest bfloat16, ties to even; a NaN stays one. */
NUMBER uint16_t narrow(float value)
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if (value != value) return 0x7FC0;
    return (uint16_t)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

/* The same, as a float. */
NUMBER float rounded(float value) { return widen(narrow(value)); }

/* e**x to about 1e-7 of itself: 2**n * e**r, |r| <= ln 2 / 2, with e**r by its Taylor series. */
NUMBER float exponential(float x)
{
    x = x > 88 ? 88 : x < -87 ? -87 : x; /* a NaN stays one */
    float shifted = x * 1.44269504f + 12582912.0f; /* its last bits are n */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float power = 1 + r * (1 + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 +
                  r * (1.0f / 720 + r * (1.0f / 5040)))))));
    uint32_t word;
    memcpy(&word, &shifted, sizeof word);
    word = (word << 23) + 0x3F800000;
    float whole;
    memcpy(&whole, &word, sizeof whole);
    return power * whole;
}

NUMBER float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

/* 1 / sqrt(x) for x > 0: a first guess by the exponent, then Newton's steps to float32's limit. */
NUMBER float inverse_root(float x)
{
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    word = 0x5F3759DF - (word >> 1);
    float y;
    memcpy(&y, &word, sizeof y);
    for (int i = 0; i < 4; i++) y *= 1.5f - 0.5f * x * y * y;
    return y;
}

/* log(1 + e**x): the logarithm of 2**n * m as n ln 2 + 2 artanh((m - 1) / (m + 1)), by its series. */
NUMBER float softplus(float x)
{
    if (!(x <= 20)) return x; /* torch's threshold; a NaN stays one */
    double y = 1 + (double)exponential(x);
    uint64_t word;
    memcpy(&word, &y, sizeof word);
    int64_t n = (int64_t)(word >> 52) - 1023;
    word = (word & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    double m;
    memcpy(&m, &word, sizeof m);
    if (m > 1.41421356) m /= 2, n++;
    double s = (m - 1) / (m + 1), square = s * s, sum = 0;
    for (int k = 15; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
    return (float)((double)n * 0.69314718055994531 + 2 * s * sum);
}
#endif
