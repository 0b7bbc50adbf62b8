/* Vectors of one kind of processor.  A file of kernels includes this first and `lanes_end.h` last,
 * and is itself included once for each kind, with its NAME, its TARGET and the BYTES of its vectors. */
#define INLINE static inline __attribute__((always_inline)) TARGET
#define CONCAT(a, b) a##b
#define NAMED(a, b) CONCAT(a, b)
#define FN(name) NAMED(name, NAME)
#define WORDS FN(words_)
#define FLOATS FN(floats_)
/* Columns of one vector of words, two to a word. */
#define STEP (BYTES / 2)
/* Floats of one vector. */
#define LANES (BYTES / 4)

typedef uint32_t WORDS __attribute__((vector_size(BYTES)));
typedef float FLOATS __attribute__((vector_size(BYTES)));

/* Two float32 of each word: bfloat16 are their upper halves. */
INLINE void FN(split_)(const void *at, FLOATS *even, FLOATS *odd)
{
    WORDS words;
    memcpy(&words, at, sizeof words);
    *even = (FLOATS)(words << 16), *odd = (FLOATS)(words & 0xFFFF0000);
}

INLINE float FN(total_)(FLOATS *even, FLOATS *odd)
{
    FLOATS both = *even + *odd;
    float lanes[LANES];
    memcpy(lanes, &both, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE FLOATS FN(load_)(const float *at)
{
    FLOATS value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Of `count` numbers, a multiple of 16. */
INLINE float FN(squares_)(const float *x, int64_t count)
{
    FLOATS sum = {0}, none = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        FLOATS some = FN(load_)(x + i);
        sum += some * some;
    }
    return FN(total_)(&sum, &none);
}
