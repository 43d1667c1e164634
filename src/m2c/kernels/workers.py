"""A fixed set of threads that compute the pieces of one kernel call.

Work is always cut into the same pieces, whatever the number of threads, and results come back in
order: the output of a kernel does not depend on how many threads ran it. Knows nothing of weights.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from m2c.kernels.gpu import GpuKernels
from m2c.kernels.native import NativeKernels, load_native

R = TypeVar("R")
Kernels = NativeKernels | GpuKernels


class Workers:
    """`threads` threads including the caller's. Each piece runs on one thread."""

    def __init__(
        self, threads: int, *, kernel: str = "torch", gpu: GpuKernels | None = None,
        on_gpu: bool = False,
    ) -> None:  # fmt: skip
        """kernel: one of `native.CHOICES`. gpu: of the GPU that computes; on_gpu, no gpu: torch.

        Raises UsageError when the kernel cannot be had here.
        """
        self.threads = threads
        # on the host weights are decoded, whatever computes
        self.host = load_native(kernel, threads)
        self.native: Kernels | None = gpu if gpu is not None or on_gpu else self.host
        # torch would cut a sum differently for each thread count; ours alone share the work
        torch.set_num_threads(1)
        self._pool = (
            ThreadPoolExecutor(
                threads - 1, thread_name_prefix="m2c-kernel", initializer=torch.set_num_threads,
                initargs=(1,),
            )
            if threads > 1
            else None
        )  # fmt: skip

    def map(self, piece: Callable[[int], R], count: int) -> list[R]:
        """[piece(0), ..., piece(count - 1)], computed in parallel."""
        if self._pool is None or count < 2:
            return [piece(i) for i in range(count)]

        # a thread takes every threads-th piece: one hand-over per thread instead of per piece
        def stride(k: int) -> list[R]:
            return [piece(i) for i in range(k, count, self.threads)]

        others = [self._pool.submit(stride, k) for k in range(1, min(self.threads, count))]
        strides = [stride(0)]
        strides += [other.result() for other in others]
        return [strides[i % self.threads][i // self.threads] for i in range(count)]

    @property
    def replaying(self) -> GpuKernels | None:
        """What computes, if it can record a pass and replay it."""
        gpu = self.native
        return gpu if isinstance(gpu, GpuKernels) and gpu.replays else None

    @property
    def gather(self) -> Callable[[int, Tensor, Tensor, Tensor | None], None] | None:
        """`GpuKernels.gather`, if there is a GPU."""
        return self.native.gather if isinstance(self.native, GpuKernels) else None

    def check(self) -> None:
        """Raises BadInput if weights that were decoded since were damaged."""
        if self.native is not None:
            self.native.check()

    @property
    def kernel(self) -> str:
        """What computes: "torch", "cuda" or the instruction set of the native kernels."""
        return self.native.name if self.native is not None else "torch"

    def close(self) -> None:
        if self.host is not None:
            self.host.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
