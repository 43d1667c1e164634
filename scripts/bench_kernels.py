"""How fast the native kernels read packed rows, beside a plain read of memory.

    python scripts/bench_kernels.py [--threads 1 2] [--repeats 15]

One layer of the llama2-7b shape (11,008 neurons of 3 x 4,096), random codes, INT4; operands rotate
through 6 copies (450 MB) so that no cache holds them. Medians, GB/s of the bytes a kernel needs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from m2c.bundle.planes import RecordLayout
from m2c.errors import UsageError
from m2c.kernels.native import CHOICES, NativeKernels
from m2c.kernels.rows import PackedRows
from m2c.tiers.memory import aligned_buffer

NEURONS, HIDDEN, COPIES = 11008, 4096, 6


def operands() -> list[torch.Tensor]:
    layout = RecordLayout(3, HIDDEN)
    codes = torch.randint(0, 256, (NEURONS, layout.nbytes("int4")), dtype=torch.uint8)
    scales = torch.full((NEURONS, 3 * layout.groups), 0.01, dtype=torch.float16)
    codes[:, layout.code_nbytes :] = scales.view(torch.uint8)
    return [in_arena(codes) for _ in range(COPIES)]


def in_arena(records: torch.Tensor) -> torch.Tensor:
    """A copy in memory of the kind that holds weights: page-aligned, huge pages where granted."""
    arena = torch.from_numpy(aligned_buffer(records.numel()))[: records.numel()]
    return arena.view(records.shape).copy_(records)


def bandwidth(call: Callable[[int], object], nbytes: float, repeats: int) -> float:
    call(0)
    seconds = []
    for i in range(repeats):
        begin = time.perf_counter()
        call((i + 1) % COPIES)
        seconds.append(time.perf_counter() - begin)
    return nbytes / statistics.median(seconds) / 1e9


def measure(kernels: NativeKernels, records: list[torch.Tensor], repeats: int) -> list[float]:
    """GB/s of gate_up, down, both as one FFN, and a dense product over the same bytes."""
    layout, row = RecordLayout(3, HIDDEN), RecordLayout(1, HIDDEN)
    neurons = [PackedRows(layout, r) for r in records]
    dense = [r.view(-1)[: NEURONS * 3 * row.nbytes("int4")].view(NEURONS * 3, -1) for r in records]
    x, h = torch.randn(1, HIDDEN), torch.randn(1, NEURONS)
    whole = records[0].numel()
    return [
        bandwidth(lambda i: kernels.gate_up(x, neurons[i], "silu"), whole * 2 / 3, repeats),
        bandwidth(lambda i: kernels.down(h, neurons[i]), whole / 3, repeats),
        bandwidth(
            lambda i: kernels.ffn(x, neurons[i], "silu", mask=None, into=torch.zeros(1, HIDDEN)),
            whole, repeats,
        ),
        bandwidth(lambda i: kernels.matmul_rows(x, PackedRows(row, dense[i])), whole, repeats),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    records = operands()
    data = [np.frombuffer(r.numpy(), np.int64) for r in records]
    torch.set_num_threads(1)
    plain = bandwidth(lambda i: data[i].sum(), records[0].numel(), given.repeats)
    print(f"a plain read with one thread: {plain:.1f} GB/s\n")
    print("| kernels | threads | gate_up | down | FFN | dense rows |\n|---|---|---|---|---|---|")
    for choice in [c for c in CHOICES if c not in ("auto", "torch")]:
        for threads in given.threads:
            try:
                kernels = NativeKernels(choice, threads)
            except UsageError:
                continue
            cells = [f"{v:.1f}" for v in measure(kernels, records, given.repeats)]
            kernels.close()
            print(f"| {choice} | {threads} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
