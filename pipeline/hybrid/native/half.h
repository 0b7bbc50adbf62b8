/* What other files offer to half.c; described where it is defined. */
#ifndef REQUANT_HALF_H
#define REQUANT_HALF_H

#include "kernel.h"

int requant_experts(const int64_t *sizes, const uint64_t *records, int64_t experts,
                    const uint16_t *x, const int64_t *index, const float *weights, int64_t tokens,
                    int64_t each, float *out, int kernel, int64_t threads, Parallel parallel);
int requant_dense(const uint16_t *first, int64_t rows1, const uint16_t *second, int64_t rows2,
                  const uint16_t *third, int64_t rows3, const uint16_t *fourth, int64_t rows4,
                  int64_t columns, const uint16_t *x, int64_t tokens, uint16_t *out, int kernel,
                  int64_t threads, Parallel parallel);
void requant_delta(const uint16_t *mixed, int64_t stride, const uint16_t *gates,
                   int64_t gate_stride, const uint16_t *weight, const uint16_t *a_log,
                   const uint16_t *dt_bias, const uint16_t *norm, float eps, uint16_t *window,
                   float *memory, uint16_t *out, int64_t tokens, int64_t key_heads, int64_t ratio,
                   int64_t key_size, int64_t value_size, int64_t taps, int kernel, int64_t threads,
                   Parallel parallel);
void requant_norm(const uint16_t *x, const uint16_t *weight, int64_t tokens, int64_t columns,
                  float eps, uint16_t *out, int kernel);
void requant_route(const uint16_t *logits, int64_t tokens, int64_t experts, int64_t shared,
                   int64_t chosen, int normalise, int64_t *index, uint16_t *weights,
                   uint16_t *inner, int kernel);
void requant_finish(const uint16_t *routed, const uint16_t *shared, const uint16_t *gate,
                    int64_t stride, int64_t tokens, int64_t hidden, uint16_t *out, int kernel);
void requant_rotate(const uint16_t *mixed, int64_t stride, const uint16_t *q_norm,
                    const uint16_t *k_norm, float eps, const uint16_t *cosine,
                    const uint16_t *sine, int64_t turn_stride, int64_t turned, int64_t tokens,
                    int64_t heads, int64_t key_heads, int64_t size, uint16_t *query,
                    uint16_t *keys, int kernel);
int requant_attend(const uint16_t *mixed, int64_t stride, const uint16_t *query,
                   const uint16_t *keys, const uint16_t *values, int64_t token_stride,
                   int64_t head_stride, int64_t row_stride, const uint8_t *mask, float scaling,
                   int64_t tokens, int64_t heads, int64_t key_heads, int64_t length, int64_t size,
                   uint16_t *out, int kernel, int64_t threads, Parallel parallel);
#endif
