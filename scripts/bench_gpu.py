"""The CUDA kernels on the GPU that is there: how near they come to its memory, and tokens a second.

    python scripts/bench_gpu.py kernels [--shape llama2-7b]
    python scripts/bench_gpu.py model [--shape llama2-7b] [--mix 0/0/100] [--ctx-size 4096]

`kernels` times each kernel on weights of the shape, and a copy within the GPU; several sets of
weights take turns, so that none comes from a cache. `model` decodes with random weights that lie in
GPU memory: synthetic, for speed only. Knows nothing about bundles.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from m2c.bundle.exact import encode_frames, round_to
from m2c.bundle.planes import RecordLayout, quantize
from m2c.home import home
from m2c.kernels.cuda_driver import CudaDriver
from m2c.kernels.gpu import GpuKernels
from m2c.kernels.operands import AttentionCall, Norm
from m2c.kernels.rows import ExactFrames, ExactRows, PackedRows, Rows
from m2c.kernels.workers import Workers
from m2c.model.aliases import ALIASES
from m2c.model.attention import MATRICES
from m2c.model.config import ModelConfig
from m2c.model.kv import KvCache
from m2c.model.mix import Mix
from m2c.model.tensors import small_tensors
from m2c.model.transformer import Transformer

ROUNDS, CALLS, SETS = 12, 16, 4


def random_rows(kind: str, count: int, vectors: int, length: int, device: torch.device) -> Rows:
    """Codes of any value and scales of one size."""
    layout = RecordLayout(vectors, length)
    if kind == "fp16":
        drawn = torch.randn(count, vectors * length, device=device, dtype=torch.bfloat16)
        return ExactRows(layout, drawn * 0.02)
    int4 = torch.randint(0, 256, (count, layout.nbytes("int4")), dtype=torch.uint8, device=device)
    scales = torch.full((count, layout.scale_nbytes // 2), 0.004, dtype=torch.float16)
    int4[:, layout.code_nbytes :] = scales.view(torch.uint8).to(device)
    if kind == "int4":
        return PackedRows(layout, int4)
    shape = (count, layout.nbytes("int8"))
    int8 = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return PackedRows(layout, int4, int8)


def nbytes_of(rows: Rows) -> int:
    if isinstance(rows, ExactRows):
        return rows.weights.nbytes
    return rows.int4.nbytes + (0 if rows.int8 is None else rows.int8.nbytes)


def median_s(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """Seconds of one call on the GPU, median and third quartile of replays of many: Python, which
    takes longer to ask than the GPU to answer, is not in them."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    seconds = []
    for _ in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000 / CALLS)
    seconds = sorted(seconds[1:])
    return statistics.median(seconds), seconds[ROUNDS * 3 // 4]


def kernel_cases(
    kernels: GpuKernels, config: ModelConfig
) -> Iterator[tuple[str, int, list[Callable[[], object]]]]:
    """(name, bytes that must be read, calls on different weights)."""
    device, hidden, size = kernels.device, config.hidden_size, config.intermediate_size
    big = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    yield "copy", 2 * big.nbytes, [big.clone]
    del big
    for kind in ("int4", "int8", "fp16"):
        dense = [random_rows(kind, 3 * hidden, 1, hidden, device) for _ in range(SETS)]
        neurons = [random_rows(kind, size, 3, hidden, device) for _ in range(SETS)]
        for tokens in (1, 4, 16, 64):
            x = torch.randn(tokens, hidden, device=device)
            a = torch.randn(tokens, size, device=device)
            out = torch.zeros(tokens, hidden, device=device)
            named: dict[str, tuple[list[Rows], Callable[[Rows], object]]] = {
                "product": (dense, lambda r, x=x: kernels.matmul_rows(x, r)),
                "gate_up": (neurons, lambda r, x=x: kernels.gate_up(x, r, "silu")),
                "columns": (neurons, lambda r, a=a, out=out: kernels.down(a, r, into=out)),
                "ffn": (neurons, lambda r, x=x, out=out: kernels.ffn(x, r, "silu", into=out)),
            }
            for name, (rows, call) in named.items():
                share = {"gate_up": 2 / 3, "columns": 1 / 3}.get(name, 1)
                calls = [lambda r=r, call=call: call(r) for r in rows]
                yield f"{name} {kind} x{tokens}", int(share * nbytes_of(rows[0])), calls
        del dense, neurons


def attention_cases(
    kernels: GpuKernels, config: ModelConfig
) -> Iterator[tuple[str, int, list[Callable[[], object]]]]:
    device, hidden, dim = kernels.device, config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = (random_rows("int4", n * dim, 1, hidden, device) for n in (heads, kv_heads, kv_heads))
    o = random_rows("int4", hidden, 1, heads * dim, device)
    norm = Norm(torch.ones(hidden, device=device), 1e-5)
    keys, values = (torch.randn(kv_heads, 8192, dim, device=device).half() for _ in range(2))
    call = AttentionCall((q, k, v, o), (None,) * 4, keys, values, None, None, heads, dim**-0.5)
    weights = sum(map(nbytes_of, (q, k, v, o)))
    for start in (0, 1024, 4096, 8000):
        for tokens in (1, 16):
            x = torch.randn(tokens, hidden, device=device)
            nbytes = weights + 4 * (start + tokens) * dim * kv_heads
            run = [lambda x=x, start=start: kernels.attention(x.clone(), call, start, norm=norm)]
            yield f"attention at {start} x{tokens}", nbytes, run


def decode_case(kernels: GpuKernels) -> tuple[str, int, list[Callable[[], object]]]:
    """The exact plane of weights as models have them, repeated until it fills a GPU."""
    layout, count = RecordLayout(3, 1024), 256
    drawn = 0.02 * np.random.default_rng(0).standard_normal((count, 3, 1024), np.float32)
    true = round_to(drawn, "bf16").reshape(count, -1)
    int4, int8, _ = quantize((true.astype(np.uint32) << 16).view(np.float32).reshape(drawn.shape))
    made = encode_frames(true, int4, int8, layout, exact_type="bf16", frame_records=1)
    times, device = 32, kernels.device

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([array] * times)).to(device)

    frames = ExactFrames(
        there(np.frombuffer(made.data, np.uint8)), np.concatenate([made.nbytes] * times),
        np.concatenate([made.escapes] * times), 1, "bf16",
    )  # fmt: skip
    rows = PackedRows(layout, there(int4), there(int8), frames)
    assert torch.equal(
        kernels.decode(rows)[-count:].view(torch.int16).cpu(),
        torch.from_numpy(true.view(np.int16)),
    )
    return "decode (weights, not bytes)", true.size * times, [lambda: kernels.decode(rows)]


def bench_kernels(kernels: GpuKernels, config: ModelConfig) -> None:
    print("| kernel | GB/s | us | slower quarter, us |\n|---|---|---|---|")
    cases = [*kernel_cases(kernels, config), *attention_cases(kernels, config)]
    for name, nbytes, calls in [*cases, decode_case(kernels)]:
        half, worse = median_s(calls)
        print(f"| {name} | {nbytes / half / 1e9:.0f} | {half * 1e6:.0f} | {worse * 1e6:.0f} |",
              flush=True)  # fmt: skip


class RandomWeights:
    """What `Transformer` asks of a store, all of it in GPU memory."""

    holds_all = True

    def __init__(self, config: ModelConfig, mix: Mix, device: torch.device) -> None:
        self.device, self._config = device, config
        hidden, dim = config.hidden_size, config.head_dim
        wide = config.num_attention_heads * dim, config.num_key_value_heads * dim
        counts = dict(zip(MATRICES, (wide[0], wide[1], wide[1], hidden), strict=True))
        lengths = dict.fromkeys(MATRICES, hidden) | {"o_proj": wide[0]}
        layers = range(config.num_hidden_layers)
        self._dense = [
            {n: random_rows(mix.dense, counts[n], 1, lengths[n], device) for n in MATRICES}
            for _ in layers
        ]
        self._neurons = [
            {"ffn": random_rows(mix.floor, config.intermediate_size, 3, hidden, device)}
            for _ in layers
        ]
        self._refined = [
            random_rows("int8", config.intermediate_size, 3, hidden, device) for _ in layers[:1]
        ]
        self._head = {"lm_head": random_rows(mix.dense, config.vocab_size, 1, hidden, device)}

    def uses(self, kind: str, layer: int) -> Iterator[dict[str, Rows]]:
        held = {"dense": self._dense, "neurons": self._neurons}
        yield self._head if kind == "head" else held[kind][layer]

    def experts(self, layer: int, ids: object, planes: object) -> Iterator[Rows]:
        raise NotImplementedError

    def embed(self, ids: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        rows = self._head["lm_head"].take(index)
        return rows.values(0, len(rows))[:, 0]

    holds_upgrades = True

    def served_again(self) -> None: ...

    def upgrade(self, layer: int, plane: str, ids: np.ndarray, floor: Rows, *, step: bool) -> Rows:
        return self.chosen(layer, plane, torch.from_numpy(ids).to(self.device), floor)

    def chosen(self, layer: int, plane: str, index: torch.Tensor, floor: Rows) -> Rows:
        whole = self._refined[0]
        assert isinstance(whole, PackedRows)
        assert isinstance(floor, PackedRows)
        return PackedRows(floor.layout, floor.int4, whole.int8, index4=index, index8=index)


def bench_model(
    workers: Workers, device: torch.device, config: ModelConfig, mix: Mix, ctx_size: int,
    *, profile: bool,
) -> None:  # fmt: skip
    store = RandomWeights(config, mix, device)
    vectors = {
        name: torch.ones(shape, device=device) for name, shape in small_tensors(config).items()
    }
    norms = [torch.ones(config.intermediate_size, device=device)] * config.num_hidden_layers
    kv = KvCache(config, ctx_size, kv_type="f16", device=device)
    model = Transformer(
        config, store, vectors=vectors, down_norms=norms, mix=mix, kv=kv, workers=workers,
        upgrades=store,
    )  # fmt: skip
    seconds = []
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 512, dtype=np.int32)
    for _ in range(2):
        kv.truncate(0)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.forward(ids)
        prompt_s = time.perf_counter() - begin
    for _ in range(72):
        begin = time.perf_counter()
        model.forward(ids[:1])
        seconds.append(time.perf_counter() - begin)
    half = statistics.median(seconds[8:])
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for _ in range(4):
                model.forward(ids[:1])
        print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=24))
    held = torch.cuda.max_memory_allocated() / 1e9
    print(
        f"| {workers.kernel} | {mix} | pp512 {512 / prompt_s:.0f} tok/s | tg {1 / half:.1f} tok/s "
        f"| {held:.1f} GB |", flush=True,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("kernels", "model"))
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--mix", default="0/0/100")
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--torch", action="store_true", help="the reference in torch instead")
    parser.add_argument("--profile", action="store_true", help="time by kernel, of four tokens")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: this torch sees no GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    config = ALIASES[given.shape].config()
    kernels = GpuKernels(CudaDriver(device, Path(home()) / "kernels"))
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {given.shape}")
    if given.what == "kernels":
        bench_kernels(kernels, config)
        return 0
    with torch.no_grad():
        workers = Workers(1, gpu=None if given.torch else kernels, on_gpu=True)
        bench_model(
            workers, device, config, Mix.parse(given.mix), given.ctx_size, profile=given.profile
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
