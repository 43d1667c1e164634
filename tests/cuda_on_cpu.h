/* Runs the CUDA kernels on a CPU, slowly: every thread of a block is a coroutine, blocks come one after
 * the other. For tests of their arithmetic where there is no GPU; what it cannot show are races between
 * blocks and the compiler's own choices. x86-64 only. */

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __align__ alignas

struct emu_index {
    unsigned x, y, z;
};

struct emu_barrier {
    int waiting = 0, alive = 0;
    unsigned long turn = 0;
};

struct emu_thread {
    void *stack; /* where its stack ended when it last gave way */
    emu_index thread;
    emu_barrier *warp;
    bool done;
};

static emu_index blockIdx, blockDim, gridDim;
static std::vector<emu_thread> emu_threads;
static emu_thread *emu_now;
static emu_barrier emu_block, emu_warps[32];
static uint32_t emu_lanes[32][32];
static void *emu_main;
static void (*emu_body)(void *);
static void *emu_arguments;

#define threadIdx (emu_now->thread)

/* Keep what a call must keep on this stack, and go on where the other one was left: a library call
 * would ask the system for its signal mask each time, and there are millions. */
extern "C" void emu_switch(void **from, void *to);
asm(".text\n"
    "emu_switch:\n"
    "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, (%rdi)\n"
    "mov %rsi, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
    "ret\n");

static inline void emu_next()
{
    emu_thread *from = emu_now, *to = from;
    do
        to = to + 1 == emu_threads.data() + blockDim.x ? emu_threads.data() : to + 1;
    while (to->done && to != from);
    if (to == from)
        return;
    emu_now = to;
    emu_switch(&from->stack, to->stack);
}

static inline void emu_meet(emu_barrier *b)
{
    unsigned long turn = b->turn;
    if (++b->waiting == b->alive) {
        b->waiting = 0;
        b->turn++;
        return;
    }
    while (b->turn == turn)
        emu_next();
}

static inline void emu_leave(emu_barrier *b)
{
    b->alive--;
    if (b->alive && b->waiting == b->alive) {
        b->waiting = 0;
        b->turn++;
    }
}

static void emu_start()
{
    emu_body(emu_arguments);
    emu_now->done = true;
    emu_leave(&emu_block);
    emu_leave(emu_now->warp);
    emu_thread *self = emu_now;
    for (emu_thread &other : emu_threads)
        if (!other.done) {
            emu_next();
            abort(); /* nobody comes back to a thread that is done */
        }
    emu_switch(&self->stack, emu_main);
    abort();
}

static void emu_run(unsigned grid, unsigned block)
{
    static std::vector<std::vector<char>> stacks(1024, std::vector<char>(1 << 16));
    blockDim = { block, 1, 1 };
    gridDim = { grid, 1, 1 };
    emu_threads.resize(block);
    for (unsigned b = 0; b < grid; b++) {
        blockIdx = { b, 0, 0 };
        emu_block = { 0, (int)block, 0 };
        for (unsigned w = 0; w * 32 < block; w++)
            emu_warps[w] = { 0, (int)(block - 32 * w < 32 ? block - 32 * w : 32), 0 };
        for (unsigned t = 0; t < block; t++) {
            emu_thread &thread = emu_threads[t];
            uintptr_t end = (uintptr_t)(stacks[t].data() + stacks[t].size()) & ~(uintptr_t)15;
            void **top = (void **)end - 1; /* as after a call: 8 bytes off a multiple of 16 */
            *--top = (void *)emu_start;
            thread.stack = top - 6; /* six registers, whatever they hold */
            thread.thread = { t, 0, 0 };
            thread.warp = &emu_warps[t / 32];
            thread.done = false;
        }
        emu_now = emu_threads.data();
        emu_switch(&emu_main, emu_now->stack);
    }
}

static inline void __syncthreads() { emu_meet(&emu_block); }
static inline void __syncwarp(unsigned) { emu_meet(emu_now->warp); }

template <class T> static inline T __shfl_xor_sync(unsigned, T value, int other, int)
{
    uint32_t(&lanes)[32] = emu_lanes[threadIdx.x / 32];
    unsigned lane = threadIdx.x % 32;
    memcpy(&lanes[lane], &value, 4);
    emu_meet(emu_now->warp);
    T found;
    memcpy(&found, &lanes[lane ^ other], 4);
    emu_meet(emu_now->warp);
    return found;
}

static inline unsigned __ballot_sync(unsigned, int predicate)
{
    uint32_t(&lanes)[32] = emu_lanes[threadIdx.x / 32];
    lanes[threadIdx.x % 32] = predicate != 0;
    emu_meet(emu_now->warp);
    unsigned found = 0;
    for (int i = 0; i < 32; i++)
        found |= lanes[i] << i;
    emu_meet(emu_now->warp);
    return found;
}

static inline float __int_as_float(int bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline int __float_as_int(float value)
{
    int bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline int __float2int_rn(float value) { return (int)nearbyintf(value); }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

__attribute__((target("f16c"))) static float half_value(uint16_t bits)
{
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

__attribute__((target("f16c"))) static uint16_t half_bits(float value)
{
    return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), 0));
}

#include "kernels.cu"

template <class... A, size_t... I>
static void emu_call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>)
{
    kernel(*(A *)arguments[I]...);
}

template <auto kernel> struct emu_kernel;
template <class... A, void (*kernel)(A...)> struct emu_kernel<kernel> {
    static void run(void *arguments)
    {
        emu_call(kernel, (void **)arguments, std::index_sequence_for<A...>{});
    }
};

static const std::map<std::string, void (*)(void *)> &emu_kernels();

/* 0, or 1 where there is no such kernel */
extern "C" int emu_launch(const char *name, unsigned grid, unsigned block, void **arguments)
{
    auto found = emu_kernels().find(name);
    if (found == emu_kernels().end())
        return 1;
    emu_body = found->second;
    emu_arguments = arguments;
    emu_run(grid, block);
    return 0;
}
