"""What computes: the device, the kernels for it, and the threads beside it.

Knows nothing about models.
"""

import torch

from m2c.errors import UsageError
from m2c.home import home
from m2c.kernels.cuda_driver import CudaDriver, NoKernels
from m2c.kernels.gpu import GpuKernels
from m2c.kernels.native import computes_natively
from m2c.kernels.workers import Workers


def device_of(name: str) -> torch.device:
    """What computes; a GPU with its number, as tensors have it. Raises UsageError when it is not
    there."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    index = device.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this torch sees no such GPU", "m2c doctor says why")
    return torch.device("cuda", index)


def kernel_of(device: str, kernel: str) -> str:
    """One of `native.CHOICES`; on a GPU auto means our kernels for it."""
    if device != "cpu" and kernel not in ("auto", "torch"):
        raise UsageError(f"--kernel {kernel} computes on the CPU", "use --device cpu")
    return kernel


def family_of(device: str, kernel: str) -> str:
    """Who computes: "c", "cuda" or "torch"; a GPU need not be there to be planned for."""
    kernel = kernel_of(device, kernel)
    if device != "cpu":
        return "cuda" if kernel == "auto" else "torch"
    return "c" if computes_natively(kernel) else "torch"


def workers_of(name: str, kernel: str, threads: int) -> Workers:
    """Kernels and threads for the device.

    Raises UsageError where they cannot be had. That torch computes in their place must be asked
    for: it is far slower, and needs more memory.
    """
    device = device_of(name)
    if device.type == "cpu":
        return Workers(threads, kernel=kernel)
    torch.cuda.set_device(device)
    gpu = None
    if kernel_of(name, kernel) == "auto":
        try:
            gpu = GpuKernels(CudaDriver(device, home() / "kernels"))
        except NoKernels as error:
            hint = "add --kernel torch to compute with torch, slowly"
            raise UsageError(f"--device {name}: {error.message}", hint) from None
    return Workers(threads, kernel="auto", gpu=gpu, on_gpu=True)
