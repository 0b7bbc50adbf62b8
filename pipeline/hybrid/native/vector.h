/* From numbers to the vectors of kernel.h, and SiLU: plain C that compilers vectorise, compiled
 * once for each kind of processor (vector.c). */
#ifndef REQUANT_VECTOR_H
#define REQUANT_VECTOR_H

#include "kernel.h"

/* Round numbers, of `values` or, where that is NULL, of bfloat16 `bits`, to a vector for `matrix`.
 * One that is not finite makes a vector whose products are NaN. */
typedef void (*Prepare)(const float *values, const uint16_t *bits, const Matrix *matrix,
                        Vector *vector);
/* out = silu(gate) * up */
typedef void (*Gate)(const float *gate, const float *up, int64_t count, float *out);

void prepare_portable(const float *, const uint16_t *, const Matrix *, Vector *);
void gate_portable(const float *, const float *, int64_t, float *);
#ifdef X86
void prepare_avx2(const float *, const uint16_t *, const Matrix *, Vector *);
void gate_avx2(const float *, const float *, int64_t, float *);
void prepare_avx512(const float *, const uint16_t *, const Matrix *, Vector *);
void gate_avx512(const float *, const float *, int64_t, float *);
#endif
#endif
