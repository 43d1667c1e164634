"""The CUDA kernels on a CPU: `cuda_on_cpu.h` compiled with them, as a launcher."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from m2c.kernels.cuda_driver import kernel_names, source
from m2c.kernels.gpu import GpuKernels

HEADER = Path(__file__).parent / "cuda_on_cpu.h"
COMPILER = shutil.which("g++")
_FLAGS = (
    "-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-ffp-contract=off",
    "-fno-strict-aliasing", "-w",
)  # fmt: skip


class Emulator:
    """Blocks one after the other, on CPU tensors."""

    device = torch.device("cpu")

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.launched: list[str] = []

    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        self.launched.append(kernel)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        assert grid > 0
        assert 0 < block <= 1024
        assert not self._library.emu_launch(kernel.encode(), grid, block, pointers), kernel


@cache
def library(folder: Path) -> Path:
    """Compiled once per folder."""
    (folder / "kernels.cu").write_text(source())
    table = ", ".join(f'{{"{name}", emu_kernel<{name}>::run}}' for name in kernel_names())
    text = HEADER.read_text() + (
        "\nstatic const std::map<std::string, void (*)(void *)> &emu_kernels()\n"
        f"{{\n static const std::map<std::string, void (*)(void *)> all = {{ {table} }};\n"
        " return all;\n}\n"
    )
    (folder / "emulated.cc").write_text(text)
    target = folder / "emulated.so"
    assert COMPILER is not None
    subprocess.run(
        [COMPILER, *_FLAGS, "-I", str(folder), "-o", str(target), str(folder / "emulated.cc")],
        check=True,
    )
    return target


def emulated_kernels(folder: Path) -> GpuKernels:
    return GpuKernels(Emulator(library(folder)))
