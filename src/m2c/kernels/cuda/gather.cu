/* Records from memory of the host that the GPU sees: what it chose, and nothing else, crosses the link,
 * and no CPU puts it together first. */

/* One warp a record. ids [count]: which of those at `from`; slots [count]: where at `to`, or null: in
 * order. */
extern "C" __global__ void m2c_gather(const u8 *__restrict__ from, const int *ids, const int *slots,
                                      u8 *__restrict__ to, i64 nbytes, int count)
{
    int i = (int)(((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP), lane = threadIdx.x % WARP;
    if (i >= count)
        return;
    const u8 *source = from + ids[i] * nbytes;
    u8 *target = to + (slots ? slots[i] : i) * nbytes;
    if (((u64)source | (u64)target | (u64)nbytes) % 16 == 0) {
#pragma unroll 4 /* a link answers late: several reads under way */
        for (i64 at = lane * 16; at < nbytes; at += WARP * 16)
            *(Words *)(target + at) = *(const Words *)(source + at);
    } else {
        for (i64 at = lane * 2; at < nbytes; at += WARP * 2)
            *(u16 *)(target + at) = *(const u16 *)(source + at);
    }
}
