"""What computes: the device, the kernels for it, and the threads beside it.

Knows nothing about models.
"""

from contextlib import suppress

import torch

from m2c.errors import UsageError
from m2c.home import home
from m2c.kernels.cuda_driver import CudaDriver, NoKernels
from m2c.kernels.gpu import GpuKernels
from m2c.kernels.workers import Workers


def device_of(name: str) -> torch.device:
    """What computes. Raises UsageError when it is not there."""
    device = torch.device(name)
    cuda = device.type == "cuda"
    if cuda and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(f"--device {name}: this torch sees no such GPU", "m2c doctor says why")
    return device


def kernel_of(device: str, kernel: str) -> str:
    """One of `native.CHOICES`; on a GPU auto means our kernels for it."""
    if device != "cpu" and kernel not in ("auto", "torch"):
        raise UsageError(f"--kernel {kernel} computes on the CPU", "use --device cpu")
    return kernel


def workers_of(name: str, kernel: str, threads: int) -> Workers:
    """Kernels and threads for the device. On a GPU where our kernels cannot be had, torch computes:
    `Workers.kernel` says so."""
    device = device_of(name)
    if device.type == "cpu":
        return Workers(threads, kernel=kernel)
    gpu = None
    if kernel_of(name, kernel) == "auto":
        with suppress(NoKernels):
            gpu = GpuKernels(CudaDriver(device, home() / "kernels"))
    return Workers(threads, kernel="auto", gpu=gpu, on_gpu=True)
