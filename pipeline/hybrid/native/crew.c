/* Threads that compute a device's calls of experts while it computes others itself.
 *
 * Device and threads speak through two words of host memory that both read and write, so a captured
 * graph of a whole step needs neither Python nor a driver's callback in any layer.  The device
 * writes what a layer's experts are to be called with into that layer's desk, then desk and number
 * of the call into `request`.  The first thread, which watches that word, starts the call, all
 * compute, and the call's number goes into `answer`, which the device waits for.  Numbers rise by
 * one from call to call and nobody takes a word back.
 *
 * Threads are wanted for microseconds at a time, dozens of times a step, so they spin between the
 * layers; after some milliseconds without a call they sleep until a step begins.  They are not
 * OpenMP's, whose runtime knows no step, and lets threads sleep early where there are more of them
 * than cores; torch computes nothing on the CPU within a step.
 */
#ifdef __linux__
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#include "layer.h"

/* Calls that a crew can know: layers times numbers of tokens. */
#define MOST_DESKS 8192
/* Rounds of spinning, some milliseconds, before a thread without work sleeps; while calls of a step
 * are due, the first thread then looks every NAP nanoseconds: the device is busy elsewhere.  Naps
 * grow up to twenty times as long, as a step that was broken off leaves calls that never come. */
#define ROUNDS 100000
#define NAP 50000
#define NAPS_ALIKE 100
#define LONGEST 20
/* Naps without a call after which a crew that is to end gives up those that are due. */
#define LAST_NAPS 400

/* More results of a call; crew.py knows them. */
enum { NO_DESK = 3 };

typedef struct {
    Layer layer;
    Job job;
    uint8_t *room;
} Desk;

typedef struct {
    const _Atomic uint64_t *request; /* desk << 32 | lower half of the call's number */
    _Atomic uint64_t *answer;
    int64_t wanted, count; /* threads that were asked for, and that there are */
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t step, call; /* what the first thread, and what the others sleep for */
    _Atomic int64_t due;       /* calls of steps that were begun */
    _Atomic int64_t served;
    atomic_int failed, closing, sleeping; /* sleeping: of the others */
    atomic_long desks;
    _Atomic(Desk *) desk[MOST_DESKS];
    Job *job;
    /* turn is odd while a job can be joined, inside counts who has. */
    _Alignas(64) atomic_long turn;
    _Alignas(64) atomic_long inside;
} Crew;

/* What others sleep for is another turn, an end, or a step that begins: all of them change these. */
static void rouse(Crew *crew)
{
    if (!atomic_load(&crew->sleeping)) return;
    pthread_mutex_lock(&crew->lock);
    pthread_cond_broadcast(&crew->call);
    pthread_mutex_unlock(&crew->lock);
}

static void nap(long before)
{
    long times = 1 + before / NAPS_ALIKE;
    struct timespec time = {.tv_nsec = NAP * (times < LONGEST ? times : LONGEST)};
    nanosleep(&time, NULL);
}

static void compute(Crew *crew, Job *job)
{
    crew->job = job;
    atomic_fetch_add(&crew->turn, 1);
    rouse(crew);
    job_work(job);
    atomic_fetch_add(&crew->turn, 1); /* who comes now is late, and does not enter */
    for (long round = 0; atomic_load(&crew->inside); round++) breathe(round);
}

/* The device's next call, or 0 when none is due any more. */
static uint64_t next_call(Crew *crew, uint64_t last)
{
    for (long round = 0;; round++) {
        uint64_t word = atomic_load_explicit(crew->request, memory_order_acquire);
        if (word != last) return word;
        if (atomic_load(&crew->due) <= 0) return 0;
        if (round < ROUNDS) {
            breathe(round);
            continue;
        }
        if (atomic_load(&crew->closing) && round > ROUNDS + LAST_NAPS) return 0;
        nap(round - ROUNDS);
    }
}

static void serve(Crew *crew, uint64_t word)
{
    uint64_t number = word >> 32;
    Desk *desk = number < MOST_DESKS ? atomic_load(&crew->desk[number]) : NULL;
    int failed = desk ? job_start(&desk->job, desk->room, crew->wanted) : NO_DESK;
    if (!failed)
        compute(crew, &desk->job);
    else if (desk)
        memset(desk->job.out, 0,
               (size_t)(desk->job.tokens * desk->layer.down.rows) * sizeof(float));
    if (failed) atomic_store(&crew->failed, failed);
    atomic_fetch_add(&crew->served, 1);
    /* Before the answer, at which the step may end; not below 0, where none was due any more. */
    int64_t due = atomic_load(&crew->due);
    while (due > 0 && !atomic_compare_exchange_weak(&crew->due, &due, due - 1)) {}
    atomic_store_explicit(crew->answer, word & UINT32_MAX, memory_order_release);
}

/* Whether the first thread has something to do: calls are due, or one came that was not known of,
 * as after a step whose calls were served late. */
static int called(Crew *crew, uint64_t last)
{
    return atomic_load(&crew->due) > 0 ||
           atomic_load_explicit(crew->request, memory_order_acquire) != last;
}

static void *lead(void *argument)
{
    Crew *crew = argument;
    uint64_t last = 0; /* a first call may be there before this thread is */
    for (;;) {
        for (long round = 0; round < ROUNDS && !called(crew, last); round++) {
            if (atomic_load(&crew->closing)) break;
            breathe(round);
        }
        pthread_mutex_lock(&crew->lock);
        while (!called(crew, last) && !atomic_load(&crew->closing))
            pthread_cond_wait(&crew->step, &crew->lock);
        pthread_mutex_unlock(&crew->lock);
        if (!called(crew, last)) return NULL;
        rouse(crew);
        for (uint64_t word; (word = next_call(crew, last)); last = word) serve(crew, word);
        if (atomic_load(&crew->closing)) return NULL;
    }
}

static void *help(void *argument)
{
    Crew *crew = argument;
    long seen = 0;
    while (!atomic_load(&crew->closing)) {
        long turn = atomic_load(&crew->turn);
        for (long round = 0; round < ROUNDS && (turn == seen || turn % 2 == 0); round++) {
            if (atomic_load_explicit(&crew->closing, memory_order_relaxed)) return NULL;
            breathe(round);
            turn = atomic_load(&crew->turn);
        }
        if (turn == seen || turn % 2 == 0) {
            pthread_mutex_lock(&crew->lock);
            atomic_fetch_add(&crew->sleeping, 1);
            if (atomic_load(&crew->turn) == turn && !atomic_load(&crew->closing))
                pthread_cond_wait(&crew->call, &crew->lock);
            atomic_fetch_sub(&crew->sleeping, 1);
            pthread_mutex_unlock(&crew->lock);
            continue;
        }
        atomic_fetch_add(&crew->inside, 1);
        if (atomic_load(&crew->turn) == turn) job_work(crew->job);
        atomic_fetch_sub(&crew->inside, 1);
        seen = turn;
    }
    return NULL;
}

/* So many threads, or fewer where there are no more to be had; NULL where there is not one.
 * request and answer: two words in cache lines of their own, 0, for as long as the crew is. */
void *requant_crew(const void *request, void *answer, int64_t threads)
{
    Crew *crew = aligned_alloc(64, (sizeof(Crew) + 63) / 64 * 64);
    pthread_t *known = malloc((size_t)threads * sizeof *known);
    if (!crew || !known) {
        free(crew), free(known);
        return NULL;
    }
    memset(crew, 0, sizeof *crew);
    crew->request = request, crew->answer = answer, crew->threads = known;
    crew->wanted = threads;
    pthread_mutex_init(&crew->lock, NULL);
    pthread_cond_init(&crew->step, NULL);
    pthread_cond_init(&crew->call, NULL);
    sigset_t all, before; /* signals are the main thread's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (crew->count < threads &&
           !pthread_create(&known[crew->count], NULL, crew->count ? help : lead, crew))
        crew->count++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (crew->count) return crew;
    free(known), free(crew);
    return NULL;
}

/* The number of a new desk, -1 where there is no memory; arguments as for `requant_experts`, for
 * as long as the crew is.  Nothing is allocated when it is called. */
int64_t requant_crew_desk(void *handle, const int64_t *sizes, const uint64_t *records,
                          int64_t experts, const uint16_t *x, const int64_t *index,
                          const float *weights, int64_t tokens, int64_t each, float *out,
                          int kernel)
{
    Crew *crew = handle;
    Desk *desk = aligned_alloc(64, (sizeof(Desk) + 63) / 64 * 64);
    if (!desk) return -1;
    job_describe(&desk->job, &desk->layer, sizes, records, experts, x, index, weights, tokens, each,
                 out, kernel);
    desk->room = aligned_alloc(64, job_room(&desk->job));
    long number = atomic_fetch_add(&crew->desks, 1) + 1; /* so that no request is 0 */
    if (!desk->room || number >= MOST_DESKS) {
        free(desk->room), free(desk);
        return -1;
    }
    atomic_store(&crew->desk[number], desk);
    return number;
}

/* Wake the threads for so many calls more; calls < 0: none is due any more. */
void requant_crew_begin(void *handle, int64_t calls)
{
    Crew *crew = handle;
    if (calls < 0)
        atomic_store(&crew->due, 0);
    else
        atomic_fetch_add(&crew->due, calls);
    pthread_mutex_lock(&crew->lock);
    pthread_cond_signal(&crew->step);
    pthread_mutex_unlock(&crew->lock);
}

/* Calls that were served so far. */
int64_t requant_crew_served(void *handle) { return atomic_load(&((Crew *)handle)->served); }

/* What went wrong first since this was asked last, DONE if nothing. */
int requant_crew_failed(void *handle) { return atomic_exchange(&((Crew *)handle)->failed, DONE); }

/* Serve what is due, end the threads, and free everything. */
void requant_crew_close(void *handle)
{
    Crew *crew = handle;
    pthread_mutex_lock(&crew->lock);
    atomic_store(&crew->closing, 1);
    pthread_cond_broadcast(&crew->step);
    pthread_mutex_unlock(&crew->lock);
    pthread_join(crew->threads[0], NULL);
    pthread_mutex_lock(&crew->lock);
    pthread_cond_broadcast(&crew->call);
    pthread_mutex_unlock(&crew->lock);
    for (int64_t i = 1; i < crew->count; i++) pthread_join(crew->threads[i], NULL);
    for (long i = 0; i < MOST_DESKS; i++) {
        Desk *desk = atomic_load(&crew->desk[i]);
        if (desk) free(desk->room), free(desk);
    }
    pthread_cond_destroy(&crew->step), pthread_cond_destroy(&crew->call);
    pthread_mutex_destroy(&crew->lock);
    free(crew->threads), free(crew);
}
