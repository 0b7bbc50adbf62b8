/* A layer's routed experts in one call.
 *
 * Work is a row of tickets that threads draw: tokens become vectors, then come rows of gate and up
 * of every chosen expert, rows of their down, and each token's sum.  A ticket may wait for earlier
 * ones; those are in some running thread's hands, so however many threads there are, and one is
 * enough, the waiting ends.  Each number is computed by one thread in a fixed order.
 *
 * Threads are those of torch's OpenMP runtime: a second pool would share the cores with it, whose
 * threads spin for some time after each of torch's own products.
 */
#include <stdlib.h>

#include "layer.h"

/* Tickets that each thread should find in a stage: fewer, and threads wait for the last one; more,
 * and reads are so short that prefetchers hardly begin. */
#define SHARES 8
/* Rows of one ticket: at least, and at most of gate and up, and of down. */
#define LEAST_ROWS 16
#define MOST_ROWS 128
#define MOST_DOWN 512
/* Bytes of codes, counted once a pair, that are worth another thread: some 10 us of work, which waking
 * it takes too. */
#define THREAD_BYTES (1 << 18)
/* Vectors that are multiplied between two writes of results. */
#define AT_ONCE 32
/* Tokens of one ticket that prepares or adds up. */
#define TOKENS 4

static void wait_for(atomic_long *count, long wanted)
{
    for (long round = 0; atomic_load_explicit(count, memory_order_acquire) < wanted; round++)
        breathe(round);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void prepare_tokens(Job *job, int64_t number)
{
    const Matrix *m = &job->layer->gate_up;
    int64_t end = least((number + 1) * TOKENS, job->tokens);
    for (int64_t t = number * TOKENS; t < end; t++)
        job->prepare(NULL, job->x + t * m->columns, m, &job->vectors[t]);
    atomic_fetch_add_explicit(&job->prepared, 1, memory_order_release);
}

static const uint8_t *record_of(const Job *job, int64_t slot)
{
    return (const uint8_t *)(uintptr_t)job->layer->records[job->expert[slot]];
}

/* Some rows of one expert's gate and up; whoever comes last prepares the vectors for down. */
static void gate_and_up(Job *job, int64_t number, const uint8_t *then)
{
    const Matrix *m = &job->layer->gate_up, *next = &job->layer->down;
    int64_t slot = number / job->gate_parts, inner = next->columns;
    int64_t first = number % job->gate_parts * job->gate_rows;
    int64_t rows = least(job->gate_rows, inner - first), end = job->from[slot + 1];
    const uint8_t *record = record_of(job, slot);
    const uint8_t *up_codes = record + m->codes + (inner + first) * m->columns / 2;
    float gate[AT_ONCE * MOST_ROWS], up[AT_ONCE * MOST_ROWS];
    wait_for(&job->prepared, job->token_tickets);
    for (int64_t pair = job->from[slot]; pair < end; pair += AT_ONCE) {
        int64_t some = least(AT_ONCE, end - pair);
        const Vector *const *x = job->given + pair;
        job->product(m, record, first, rows, up_codes, x, some, gate, MOST_ROWS);
        job->product(m, record, inner + first, rows, then, x, some, up, MOST_ROWS);
        for (int64_t t = 0; t < some; t++)
            job->gate(gate + t * MOST_ROWS, up + t * MOST_ROWS, rows,
                      job->inner + (pair + t) * inner + first);
    }
    if (atomic_fetch_sub_explicit(&job->parts_left[slot], 1, memory_order_acq_rel) > 1) return;
    for (int64_t pair = job->from[slot]; pair < end; pair++)
        job->prepare(job->inner + pair * inner, NULL, next, &job->vectors[job->tokens + pair]);
    atomic_store_explicit(&job->ready[slot], 1, memory_order_release);
}

/* Some rows of one expert's down. */
static void down(Job *job, int64_t number, const uint8_t *then)
{
    const Matrix *m = &job->layer->down;
    int64_t slot = number / job->down_parts, first = number % job->down_parts * job->down_rows;
    int64_t pair = job->from[slot], count = job->from[slot + 1] - pair;
    wait_for(&job->ready[slot], 1);
    job->product(m, record_of(job, slot), first, least(job->down_rows, m->rows - first), then,
                 job->given + job->pairs + pair, count, job->part + pair * m->rows + first, m->rows);
    atomic_fetch_add_explicit(&job->down_done, 1, memory_order_release);
}

/* Each token's sum, in the order of its choices. */
static void add_up(Job *job, int64_t number)
{
    int64_t hidden = job->layer->down.rows, end = least((number + 1) * TOKENS, job->tokens);
    wait_for(&job->down_done, job->used * job->down_parts);
    for (int64_t t = number * TOKENS; t < end; t++) {
        float *out = job->out + t * hidden;
        memset(out, 0, (size_t)hidden * sizeof *out);
        for (int64_t i = t * job->each; i < (t + 1) * job->each; i++) {
            if (job->place[i] < 0) continue;
            const float *part = job->part + job->place[i] * hidden;
            for (int64_t h = 0; h < hidden; h++) out[h] += job->weights[i] * part[h];
        }
    }
}

/* The first codes that a ticket reads; NULL for one that reads none. */
static const uint8_t *codes_of(const Job *job, int64_t number)
{
    int64_t wide = job->used * job->gate_parts;
    if ((number -= job->token_tickets) < 0) return NULL;
    int gate = number < wide;
    int64_t parts = gate ? job->gate_parts : job->down_parts;
    const Matrix *m = gate ? &job->layer->gate_up : &job->layer->down;
    if (!gate && (number -= wide) >= job->used * parts) return NULL;
    int64_t first = number % parts * (gate ? job->gate_rows : job->down_rows);
    return record_of(job, number / parts) + m->codes + first * m->columns / 2;
}

/* Draws one ticket ahead, to ask for its codes meanwhile.  Each thread's tickets rise, so the first
 * one that is not done is always some thread's present one, and all that it waits for are done. */
void job_work(void *argument)
{
    Job *job = argument;
    int64_t wide = job->used * job->gate_parts, narrow = job->used * job->down_parts;
    int64_t next = atomic_fetch_add_explicit(&job->ticket, 1, memory_order_relaxed);
    for (;;) {
        int64_t number = next;
        next = atomic_fetch_add_explicit(&job->ticket, 1, memory_order_relaxed);
        const uint8_t *then = codes_of(job, next);
        if (number < job->token_tickets)
            prepare_tokens(job, number);
        else if ((number -= job->token_tickets) < wide)
            gate_and_up(job, number, then);
        else if ((number -= wide) < narrow)
            down(job, number, then);
        else if ((number -= narrow) < job->token_tickets)
            add_up(job, number);
        else
            return;
    }
}

/* How many rows make a ticket, and how many of those an expert's `rows` are. */
static void share_out(int64_t rows, int64_t most, int64_t used, int64_t threads, int64_t *each,
                      int64_t *parts)
{
    int64_t wanted = used ? (SHARES * threads + used - 1) / used : 1;
    int64_t some = (rows / wanted + 7) / 8 * 8;
    *each = some < LEAST_ROWS ? LEAST_ROWS : least(some, most);
    *parts = (rows + *each - 1) / *each;
}

/* A piece of the room for a call, in cache lines of its own; counts only while `room` is NULL. */
static void *take(uint8_t *room, size_t *used, size_t bytes)
{
    void *piece = room ? room + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return piece;
}

/* Give every array of the job its place in `room`; returns the bytes that takes. */
static size_t lay_out(Job *job, uint8_t *room)
{
    const Matrix *wide = &job->layer->gate_up, *narrow = &job->layer->down;
    size_t used = 0, pairs = (size_t)job->pairs, tokens = (size_t)job->tokens;
    size_t slots = (size_t)least(job->layer->experts, job->pairs);
    job->expert = take(room, &used, slots * sizeof(int64_t));
    job->from = take(room, &used, (slots + 1) * sizeof(int64_t));
    job->parts_left = take(room, &used, slots * sizeof(atomic_long));
    job->ready = take(room, &used, slots * sizeof(atomic_long));
    job->place = take(room, &used, pairs * sizeof(int64_t));
    job->vectors = take(room, &used, (tokens + pairs) * sizeof(Vector));
    job->given = take(room, &used, 2 * pairs * sizeof(Vector *));
    job->inner = take(room, &used, pairs * (size_t)narrow->columns * sizeof(float));
    job->part = take(room, &used, pairs * (size_t)narrow->rows * sizeof(float));
    for (size_t i = 0; i < tokens + pairs; i++) {
        const Matrix *m = i < tokens ? wide : narrow;
        size_t sums = (size_t)(groups_of(m) + 15) / 16 * 16;
        int8_t *planes = take(room, &used, (size_t)blocks_of(m) * 4 * BLOCK);
        float *its = take(room, &used, sums * sizeof(float));
        if (room) job->vectors[i].planes = planes, job->vectors[i].sums = its;
    }
    return used;
}

/* Sort the pairs by expert; `count` [experts + 1] is scratch.  An index of `experts` stands for one
 * that is computed elsewhere, and is left out. */
static void sort_pairs(Job *job, const int64_t *index, int64_t *count)
{
    int64_t experts = job->layer->experts, start = 0;
    memset(count, 0, (size_t)(experts + 1) * sizeof *count);
    for (int64_t i = 0; i < job->pairs; i++) count[index[i]]++;
    for (int64_t e = 0; e < experts; e++) {
        int64_t its = count[e];
        count[e] = start;
        if (!its) continue;
        job->expert[job->used] = e;
        job->from[job->used++] = start;
        start += its;
    }
    job->from[job->used] = start;
    for (int64_t i = 0; i < job->pairs; i++) {
        int64_t at = job->place[i] = index[i] == experts ? -1 : count[index[i]]++;
        if (at < 0) continue;
        job->given[at] = &job->vectors[i / job->each];
        job->given[job->pairs + at] = &job->vectors[job->tokens + at];
    }
}

/* Raised with every change of what functions there are and take: library.py calls no others. */
int requant_version(void) { return 4; }

/* The best kernel that this processor has: 2 AVX512 VNNI, 1 AVX2, 0 plain C. */
int requant_best(void)
{
#ifdef X86
    __builtin_cpu_init();
    int two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
    if (two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return 2;
    return two;
#else
    return 0;
#endif
}

/* Bytes of the job's arrays, then those and the scratch of `sort_pairs`. */
static size_t all_room(const Job *job, size_t *own)
{
    Job other = *job;
    size_t all = *own = lay_out(&other, NULL);
    take(NULL, &all, (size_t)(job->layer->experts + 1) * sizeof(int64_t));
    return all;
}

size_t job_room(const Job *job)
{
    size_t own;
    return all_room(job, &own);
}

void job_describe(Job *job, Layer *layer, const int64_t *sizes, const uint64_t *records,
                  int64_t experts, const uint16_t *x, const int64_t *index, const float *weights,
                  int64_t tokens, int64_t each, float *out, int kernel)
{
    layer->records = records, layer->experts = experts;
    memcpy(&layer->gate_up, sizes, sizeof(Matrix));
    memcpy(&layer->down, sizes + sizeof(Matrix) / sizeof *sizes, sizeof(Matrix));
    memset(job, 0, sizeof *job);
    job->layer = layer, job->x = x, job->index = index, job->weights = weights, job->out = out;
    job->tokens = tokens, job->each = each, job->pairs = tokens * each;
    job->product = product_portable, job->prepare = prepare_portable, job->gate = gate_portable;
#ifdef X86
    if (kernel == 1)
        job->product = product_avx2, job->prepare = prepare_avx2, job->gate = gate_avx2;
    if (kernel == 2)
        job->product = product_avx512, job->prepare = prepare_avx512, job->gate = gate_avx512;
#else
    (void)kernel;
#endif
}

int job_start(Job *job, uint8_t *room, int64_t threads)
{
    const Layer *layer = job->layer;
    size_t own;
    for (int64_t i = 0; i < job->pairs; i++)
        if (job->index[i] < 0 || job->index[i] > layer->experts) return NO_EXPERT;
    all_room(job, &own);
    lay_out(job, room);
    job->used = 0;
    sort_pairs(job, job->index, (int64_t *)(room + own));
    job->token_tickets = (job->tokens + TOKENS - 1) / TOKENS;
    share_out(layer->down.columns, MOST_ROWS, job->used, threads, &job->gate_rows,
              &job->gate_parts);
    share_out(layer->down.rows, MOST_DOWN, job->used, threads, &job->down_rows, &job->down_parts);
    atomic_init(&job->ticket, 0);
    atomic_init(&job->prepared, 0);
    atomic_init(&job->down_done, 0);
    for (int64_t slot = 0; slot < job->used; slot++) {
        atomic_init(&job->parts_left[slot], job->gate_parts);
        atomic_init(&job->ready[slot], 0);
    }
    return DONE;
}

/* out [tokens, hidden] = sum over the `each` chosen experts of weight * down(silu(gate) * up).
 *
 * sizes: rows, columns, group, and offsets of codes, scales and zeros (-1: none) and the zero, of
 * gate_up, then of down.  kernel: at most `requant_best()`.  parallel: GOMP_parallel; not called
 * where one thread is asked for, or enough for so little. */
int requant_experts(const int64_t *sizes, const uint64_t *records, int64_t experts,
                    const uint16_t *x, const int64_t *index, const float *weights, int64_t tokens,
                    int64_t each, float *out, int kernel, int64_t threads, Parallel parallel)
{
    Layer layer;
    Job job;
    job_describe(&job, &layer, sizes, records, experts, x, index, weights, tokens, each, out,
                 kernel);
    uint8_t *room = aligned_alloc(64, job_room(&job));
    if (!room) return NO_MEMORY;
    int64_t bytes = (layer.gate_up.rows * layer.gate_up.columns +
                     layer.down.rows * layer.down.columns) / 2 * job.pairs;
    threads = least(threads, 1 + bytes / THREAD_BYTES);
    int failed = job_start(&job, room, threads);
    if (!failed && threads > 1)
        parallel(job_work, &job, (unsigned)threads, 0);
    else if (!failed)
        job_work(&job);
    free(room);
    return failed;
}
