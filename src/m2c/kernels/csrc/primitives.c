/* The choice between the instruction sets when m2c runs. */

#include "primitives.h"

#include <string.h>

const struct primitives *primitives_for(const char *want, const char **name)
{
    int any = !strcmp(want, "auto");
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
               && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (avx512 && (any || !strcmp(want, "avx512"))) {
        *name = "avx512";
        return &primitives_avx512;
    }
    if (avx2 && (any || !strcmp(want, "avx2"))) {
        *name = "avx2";
        return &primitives_avx2;
    }
#endif
    *name = "scalar";
    return any || !strcmp(want, "scalar") ? &primitives_scalar : NULL;
}
