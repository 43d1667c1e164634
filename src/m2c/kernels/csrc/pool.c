/* Threads that wait for one call at a time and sleep in between.
 *
 * A waiting thread spins for some ten microseconds, since kernel calls of one token follow each other
 * closely, and then sleeps: an idle m2c uses no processor.
 */

#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define SPINS 4000

struct pool {
    int threads;
    pthread_t *handles;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    atomic_ulong round; /* rises with each call */
    atomic_int left; /* threads still working */
    atomic_int stopping;
    pool_work work;
    void *context;
};

struct member {
    struct pool *pool;
    int part;
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void await_round(struct pool *p, unsigned long seen)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&p->round, memory_order_acquire) != seen)
            return;
        relax();
    }
    pthread_mutex_lock(&p->mutex);
    while (atomic_load(&p->round) == seen)
        pthread_cond_wait(&p->wake, &p->mutex);
    pthread_mutex_unlock(&p->mutex);
}

static void *serve(void *argument)
{
    struct member me = *(struct member *)argument;
    struct pool *p = me.pool;
    free(argument);
    for (unsigned long seen = 0;; seen++) {
        await_round(p, seen);
        if (atomic_load(&p->stopping))
            return NULL;
        p->work(p->context, me.part, p->threads);
        if (atomic_fetch_sub(&p->left, 1) == 1) {
            pthread_mutex_lock(&p->mutex);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->mutex);
        }
    }
}

static void next_round(struct pool *p)
{
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->round, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

struct pool *m2c_pool_new(int threads)
{
    struct pool *p = calloc(1, sizeof(*p));
    if (!p)
        return NULL;
    p->handles = calloc((size_t)threads, sizeof(*p->handles));
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    p->threads = 1;
    for (int part = 1; p->handles && part < threads; part++) {
        struct member *me = malloc(sizeof(*me));
        if (!me)
            break;
        *me = (struct member){ p, part };
        if (pthread_create(&p->handles[part], NULL, serve, me)) {
            free(me);
            break;
        }
        p->threads = part + 1; /* fewer threads than asked for still do all parts */
    }
    return p;
}

int pool_threads(const struct pool *p)
{
    return p->threads;
}

void pool_run(struct pool *p, pool_work work, void *context)
{
    if (p->threads == 1) {
        work(context, 0, 1);
        return;
    }
    p->work = work;
    p->context = context;
    atomic_store(&p->left, p->threads - 1);
    next_round(p);
    work(context, 0, p->threads);
    for (int i = 0; i < SPINS && atomic_load_explicit(&p->left, memory_order_acquire); i++)
        relax();
    if (!atomic_load(&p->left))
        return;
    pthread_mutex_lock(&p->mutex);
    while (atomic_load(&p->left))
        pthread_cond_wait(&p->done, &p->mutex);
    pthread_mutex_unlock(&p->mutex);
}

void m2c_pool_free(struct pool *p)
{
    if (!p)
        return;
    atomic_store(&p->stopping, 1);
    next_round(p);
    for (int part = 1; part < p->threads; part++)
        pthread_join(p->handles[part], NULL);
    pthread_mutex_destroy(&p->mutex);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
    free(p->handles);
    free(p);
}
