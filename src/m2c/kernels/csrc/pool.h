/* Threads that wait for one call at a time and sleep in between. */
#ifndef M2C_POOL_H
#define M2C_POOL_H

struct pool;
typedef void (*pool_work)(void *context, int part, int parts);

struct pool *m2c_pool_new(int threads);
void m2c_pool_free(struct pool *pool);

int pool_threads(const struct pool *pool);

/* Run work(context, part, threads) for every part, the caller's thread among them; returns when
 * all are done. One call at a time per pool. */
void pool_run(struct pool *pool, pool_work work, void *context);

#endif
