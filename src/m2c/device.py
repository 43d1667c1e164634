"""What computes: the device, the kernels for it, and the threads beside it.

Knows nothing about models.
"""

from collections.abc import Callable
from statistics import median
from typing import Final

import torch

from m2c.errors import UsageError
from m2c.home import home
from m2c.kernels.cuda_driver import CudaDriver, NoKernels
from m2c.kernels.gpu import GpuKernels
from m2c.kernels.native import computes_natively
from m2c.kernels.workers import Workers
from m2c.units import MiB

_PROBE_NBYTES: Final = 64 * MiB  # more than a GPU's cache holds
_PROBES: Final = 5


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


def probe_gpu(device: torch.device) -> tuple[float, float]:
    """Bytes per second from pinned memory of the host into a GPU's, and of reading that, medians; 0
    where there is not the memory to find out."""
    try:
        return _probed(device)
    except RuntimeError:
        return 0.0, 0.0
    finally:
        torch.cuda.empty_cache()  # a plan counts what is free


def _probed(device: torch.device) -> tuple[float, float]:
    data = torch.zeros(_PROBE_NBYTES // 8, dtype=torch.int64, device=device)
    pinned = torch.zeros(_PROBE_NBYTES // 8, dtype=torch.int64).pin_memory()
    works: list[Callable[[], object]] = [
        lambda: data.copy_(pinned, non_blocking=True), lambda: data.sum(),
    ]  # fmt: skip
    link, memory = (_speed(device, work) for work in works)
    return link, memory


def _speed(device: torch.device, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_PROBES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(device))
        work()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return _PROBE_NBYTES / median(seconds)
