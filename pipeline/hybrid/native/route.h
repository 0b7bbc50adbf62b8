/* Norms, the router and what stands beside the experts, for one kind of processor: route.c includes
 * this once for each, with its NAME, its TARGET and the BYTES of its vectors. */
#include "lanes.h"

/* x / its root mean square * (1 + weight). */
static TARGET void FN(norm_)(const uint16_t *x, const uint16_t *weight, int64_t columns, float eps,
                             uint16_t *out)
{
    FLOATS even = {0}, odd = {0}, low, high;
    for (int64_t i = 0; i < columns; i += STEP) {
        FN(split_)(x + i, &low, &high);
        even += low * low, odd += high * high;
    }
    float by = inverse_root(FN(total_)(&even, &odd) / (float)columns + eps);
    for (int64_t i = 0; i < columns; i++) out[i] = narrow(widen(x[i]) * by * (1 + widen(weight[i])));
}

/* The likeliest experts by the softmax of the logits, equal ones by their number, and their shares;
 * valid numbers even where logits are none. */
static TARGET void FN(choose_)(const uint16_t *logits, int64_t experts, int64_t wanted,
                               int normalise, int64_t *index, uint16_t *weights)
{
    float share[MOST_EXPERTS], best[MOST_CHOSEN], most = widen(logits[0]), sum = 0;
    for (int64_t e = 1; e < experts; e++) most = widen(logits[e]) > most ? widen(logits[e]) : most;
    for (int64_t e = 0; e < experts; e++) share[e] = exponential(widen(logits[e]) - most);
    for (int64_t e = 0; e < experts; e++) sum += share[e];
    for (int64_t e = 0; e < experts; e++) share[e] /= sum;
    int64_t found = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (found == wanted && !(share[e] > best[wanted - 1])) continue;
        int64_t place = found < wanted ? found++ : wanted - 1;
        for (; place > 0 && share[e] > best[place - 1]; place--)
            best[place] = best[place - 1], index[place] = index[place - 1];
        best[place] = share[e], index[place] = e;
    }
    sum = 0;
    for (int64_t i = 0; i < wanted; i++) sum += best[i];
    for (int64_t i = 0; i < wanted; i++) weights[i] = narrow(normalise ? best[i] / sum : best[i]);
}

/* silu(gate) * up */
static TARGET void FN(gate_)(const uint16_t *gate, const uint16_t *up, int64_t count, uint16_t *out)
{
    for (int64_t i = 0; i < count; i++) {
        float x = widen(gate[i]);
        out[i] = narrow(rounded(x * sigmoid(x)) * widen(up[i]));
    }
}

/* routed + sigmoid(gate) * shared */
static TARGET void FN(finish_)(const uint16_t *routed, const uint16_t *shared, float gate,
                               int64_t count, uint16_t *out)
{
    float open = rounded(sigmoid(gate));
    for (int64_t i = 0; i < count; i++)
        out[i] = narrow(widen(routed[i]) + rounded(open * widen(shared[i])));
}

#include "lanes_end.h"
