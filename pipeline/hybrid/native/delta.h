/* One step of gated DeltaNet for one key head, for one kind of processor: delta.c includes this
 * once for each, with its NAME, its TARGET and the BYTES of its vectors. */
#include "lanes.h"

/* Some channels of the causal convolution, and SiLU; the window of each moves on by one. */
INLINE void FN(convolve_)(const int64_t taps, const uint16_t *mixed, const uint16_t *weight,
                          uint16_t *window, int64_t channels, float *out)
{
    for (int64_t c = 0; c < channels; c++) {
        uint16_t *its = window + c * taps;
        float total = 0;
        for (int64_t i = 0; i + 1 < taps; i++) {
            its[i] = its[i + 1];
            total += widen(its[i]) * widen(weight[c * taps + i]);
        }
        its[taps - 1] = mixed[c];
        out[c] = rounded(total + widen(mixed[c]) * widen(weight[c * taps + taps - 1]));
    }
    for (int64_t c = 0; c < channels; c++) out[c] = rounded(out[c] * sigmoid(out[c]));
}

/* x to unit length, times `scale`. */
INLINE void FN(unit_)(float *x, int64_t count, float scale)
{
    float by = inverse_root(FN(squares_)(x, count) + 1e-6f) * scale;
    for (int64_t i = 0; i < count; i++) x[i] *= by;
}

/* memory [K, V] fades, learns that `key` has `value`, and is asked for `query`; four rows at once,
 * as sums over rows would be loaded and stored with each one.  `value` is lost. */
INLINE void FN(learn_)(const Delta *d, float *memory, const float *query, const float *key,
                       float *value, float beta, float decay, float *result)
{
    const int64_t K = d->key_size, V = d->value_size;
    memset(result, 0, (size_t)V * sizeof *result);
    for (int64_t k = 0; k < K; k += 4) {
        const float *row = memory + k * V;
        for (int64_t v = 0; v < V; v += LANES) {
            FLOATS sum = FN(load_)(result + v);
            for (int i = 0; i < 4; i++) sum += FN(load_)(row + i * V + v) * key[k + i];
            memcpy(result + v, &sum, sizeof sum);
        }
    }
    for (int64_t v = 0; v < V; v++) {
        value[v] = (value[v] - result[v] * decay) * beta;
        result[v] = 0;
    }
    for (int64_t k = 0; k < K; k += 4) {
        float *row = memory + k * V;
        for (int64_t v = 0; v < V; v += LANES) {
            FLOATS sum = FN(load_)(result + v), change = FN(load_)(value + v);
            for (int i = 0; i < 4; i++) {
                FLOATS now = FN(load_)(row + i * V + v) * decay + change * key[k + i];
                memcpy(row + i * V + v, &now, sizeof now);
                sum += now * query[k + i];
            }
            memcpy(result + v, &sum, sizeof sum);
        }
    }
}

/* The gated norm of one head's result. */
INLINE void FN(gated_norm_)(const Delta *d, const float *result, const uint16_t *z, uint16_t *out)
{
    const int64_t V = d->value_size;
    float x[MOST_SIZE];
    for (int64_t v = 0; v < V; v++) x[v] = rounded(result[v]);
    float by = inverse_root(FN(squares_)(x, V) / (float)V + d->eps);
    for (int64_t v = 0; v < V; v++) {
        float gate = widen(z[v]);
        x[v] = rounded(widen(d->norm[v]) * rounded(x[v] * by));
        out[v] = narrow(x[v] * (gate * sigmoid(gate)));
    }
}

static TARGET void FN(delta_)(const Delta *d, int64_t token, int64_t group)
{
    const int64_t K = d->key_size, V = d->value_size, ratio = d->ratio, taps = d->taps;
    const int64_t keys = d->key_heads * K, heads = d->key_heads * ratio;
    const int64_t channels = 2 * keys + heads * V;
    /* the channels of this head's query, key and values: where, how many, and where they come from */
    const int64_t first[3] = {group * K, keys + group * K, 2 * keys + group * ratio * V};
    const int64_t many[3] = {K, K, ratio * V}, from[3] = {0, K, 2 * K};
    const uint16_t *own = d->mixed + token * d->stride + group * (2 * K + 2 * ratio * V);
    const uint16_t *gates = d->gates + token * d->gate_stride + group * 2 * ratio;
    float query[MOST_SIZE], key[MOST_SIZE], values[MOST_VALUES], result[MOST_SIZE];
    float *to[3] = {query, key, values};
    for (int i = 0; i < 3; i++) {
        uint16_t *window = d->window + (token * channels + first[i]) * taps;
        const uint16_t *weight = d->weight + first[i] * taps;
        if (taps == 4)
            FN(convolve_)(4, own + from[i], weight, window, many[i], to[i]);
        else
            FN(convolve_)(taps, own + from[i], weight, window, many[i], to[i]);
    }
    FN(unit_)(query, K, inverse_root((float)K));
    FN(unit_)(key, K, 1);
    for (int64_t r = 0; r < ratio; r++) {
        int64_t head = group * ratio + r;
        float beta = rounded(sigmoid(widen(gates[r])));
        float time = softplus(widen(gates[ratio + r]) + widen(d->dt_bias[head]));
        float decay = exponential(-exponential(widen(d->a_log[head])) * time);
        float *memory = d->memory + (token * heads + head) * K * V;
        FN(learn_)(d, memory, query, key, values + r * V, beta, decay, result);
        FN(gated_norm_)(d, result, own + 2 * K + ratio * V + r * V,
                        d->out + (token * heads + head) * V);
    }
}

#include "lanes_end.h"
