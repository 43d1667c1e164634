"""How fast the native kernels read packed rows, beside a plain read of memory.

    python scripts/bench_kernels.py [--threads 1 2] [--repeats 15]

One layer of the llama2-7b shape (11,008 neurons of 3 x 4,096), random codes, INT4; operands rotate
through 6 copies (450 MB) so that no cache holds them. Medians, GB/s of the bytes a kernel needs.
Then decoding the exact plane of 512 such neurons with normal weights, BF16: G weights/s.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from m2c.bundle.exact import encode_frames, round_to, widen
from m2c.bundle.planes import RecordLayout, quantize
from m2c.errors import UsageError
from m2c.kernels.native import NativeKernels
from m2c.kernels.rows import ExactFrames, PackedRows
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


def interleaved(calls: list[tuple[Callable[[int], object], float]], repeats: int) -> list[float]:
    """Median bytes per second of each call, all of them measured in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for i in range(repeats):
        for (call, _), found in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call(i % COPIES)
            found.append(time.perf_counter() - begin)
    return [
        nbytes / statistics.median(found) for (_, nbytes), found in zip(calls, seconds, strict=True)
    ]


def measure(kernels: NativeKernels, records: list[torch.Tensor], repeats: int) -> list[float]:
    """Bytes per second of a plain read, gate_up, down, the FFN, and a dense product."""
    layout, row = RecordLayout(3, HIDDEN), RecordLayout(1, HIDDEN)
    neurons = [PackedRows(layout, r) for r in records]
    count = NEURONS * 3
    dense = [
        PackedRows(row, r.view(-1)[: count * row.nbytes("int4")].view(count, -1)) for r in records
    ]
    # a random half of the neurons, in order, as a mix or --drop takes them
    half = torch.randperm(NEURONS)[: NEURONS // 2].sort().values.to(torch.int32)
    some = [PackedRows(layout, r, index4=half) for r in records]
    x, h, into = torch.randn(1, HIDDEN), torch.randn(1, NEURONS), torch.zeros(1, HIDDEN)
    whole = records[0].numel()
    return interleaved(
        [
            (lambda i: kernels.read(records[i]), whole),
            (lambda i: kernels.gate_up(x, neurons[i], "silu"), whole * 2 / 3),
            (lambda i: kernels.down(h, neurons[i], into=into), whole / 3),
            (lambda i: kernels.ffn(x, neurons[i], "silu", into=into), whole),
            (lambda i: kernels.ffn(x, some[i], "silu", into=into), whole / 2),
            (lambda i: kernels.matmul_rows(x, dense[i]), count * row.nbytes("int4")),
        ],
        repeats,
    )


def framed_neurons(neurons: int = 512) -> PackedRows:
    layout = RecordLayout(3, HIDDEN)
    values = np.random.default_rng(0).normal(0, 0.02, (neurons, 3 * HIDDEN)).astype(np.float32)
    true = round_to(values, "bf16")
    int4, int8, _ = quantize(widen(true, "bf16").reshape(neurons, 3, HIDDEN))
    made = encode_frames(true, int4, int8, layout, exact_type="bf16", frame_records=1)
    frames = ExactFrames(
        np.frombuffer(made.data, np.uint8).copy(), made.nbytes, made.escapes, 1, "bf16"
    )
    return PackedRows(layout, torch.from_numpy(int4), torch.from_numpy(int8), frames)


def decoded(kernels: NativeKernels, rows: PackedRows, repeats: int) -> float:
    """Weights per second."""
    (found,) = interleaved([(lambda _: kernels.decode(rows), len(rows) * 3 * HIDDEN)], repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--kernels", nargs="+", default=["scalar", "avx2", "avx512"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    records, framed = operands(), framed_neurons()
    names = ["plain read", "gate_up", "down", "FFN", "FFN, half", "dense rows", "exact plane"]
    print("| kernels | threads | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 2) + "|")
    for choice in given.kernels:
        for threads in given.threads:
            try:
                kernels = NativeKernels(choice, threads)
            except UsageError:
                continue
            found = measure(kernels, records, given.repeats)
            cells = [f"{found[0] / 1e9:.1f}"]
            cells += [f"{v / 1e9:.1f} ({v / found[0]:.0%})" for v in found[1:]]
            cells.append(f"{decoded(kernels, framed, given.repeats) / 1e9:.2f}")
            kernels.close()
            print(f"| {choice} | {threads} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
