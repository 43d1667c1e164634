"""The C kernels against the torch reference, for every instruction set this machine has."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import inputs

from m2c.bundle.exact import round_to
from m2c.bundle.planes import GROUP, RecordLayout, quantize
from m2c.errors import UsageError
from m2c.kernels import dispatch, native, reference
from m2c.kernels.native import LIBRARY, NativeKernels, load_native
from m2c.kernels.operands import AttentionCall, LayerCall, Norm, Stack
from m2c.kernels.rows import ExactRows, PackedRows, Rows, as_exact_tensor
from m2c.kernels.workers import Kernels, Workers

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels were not built")
KINDS = ("int4", "int8", "bf16", "f16")
TOKENS = 70
LENGTHS = (32, 40, 72, 96, 250, 576)


def make_rows(kind: str, count: int, vectors: int, length: int, *, scale: float = 1.0) -> Rows:
    rng = np.random.default_rng(count + length)
    layout = RecordLayout(vectors, length)
    values = (scale * rng.standard_normal((count, vectors, length))).astype(np.float32)
    if kind in ("bf16", "f16"):
        bits = round_to(values.reshape(count, -1), kind)
        return ExactRows(layout, as_exact_tensor(bits, kind))
    int4, int8, _ = quantize(values)
    second = torch.from_numpy(int8) if kind == "int8" else None
    return PackedRows(layout, torch.from_numpy(int4), second)


@pytest.fixture
def workers() -> Workers:
    return Workers(1)


def as_int8(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The activations that 4- and 8-bit codes meet: rounded to int8 with a scale per group."""
    if isinstance(rows, ExactRows):
        return x
    layout = rows.layout
    padded = torch.nn.functional.pad(x, (0, layout.padded - layout.length))
    groups = padded.view(len(x), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    steps = torch.round(groups * torch.where(largest > 0, 127 / largest, 0))
    return (steps * largest / 127).view(len(x), -1)[:, : layout.length].contiguous()


def gather(
    kernels: Kernels, x: torch.Tensor, rows: Rows, mask: torch.Tensor | None = None,
    act: str = "silu", **given: Any,
) -> torch.Tensor:  # fmt: skip
    """The FFN output of neurons, as `dispatch.gather_ffn` puts it together."""
    total = torch.zeros_like(x)
    kernels.ffn(x, rows, act, mask=mask, into=total, **given)
    return total


def close(ours: torch.Tensor, theirs: torch.Tensor, *, columns: bool = False) -> None:
    """Equal but for the order of f32 sums, and for 16-bit factors in sums over down columns."""
    scale = max(1.0, float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) < (1e-4 if columns else 2e-5) * scale


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("count", "tokens"), [(1, 1), (2, 3), (33, 1), (257, 2)])
def test_parity_with_the_reference(
    kernels: Kernels, workers: Workers, kind: str, length: int, count: int, tokens: int
) -> None:
    row, neurons = make_rows(kind, count, 1, length), make_rows(kind, count, 3, length)
    x = inputs(tokens, length)
    met = as_int8(x, row)
    close(kernels.matmul_rows(x, row), reference.matmul_rows(met, row, workers))
    for act in ("silu", "relu", "gelu_pytorch_tanh", "fatrelu:0.2"):
        close(kernels.gate_up(x, neurons, act), reference.gate_up(met, neurons, act, workers))
    activations = inputs(tokens, count, seed=1)
    total = torch.zeros_like(x)
    kernels.down(activations, neurons, into=total)
    close(total, reference.down(activations, neurons, workers), columns=True)
    mask = (inputs(tokens, count, seed=2) > 0).float()
    theirs = reference.gather_ffn(met, neurons, "silu", workers, mask=mask)
    close(gather(kernels, x, neurons, mask), theirs, columns=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("count", "tokens", "length"), [(1, 1, 40), (33, 3, 96), (300, 2, 250)])
def test_neurons_without_a_gate(
    kernels: Kernels, workers: Workers, kind: str, act: str, biased: bool, count: int,
    tokens: int, length: int,
) -> None:  # fmt: skip
    rows, x = make_rows(kind, count, 2, length), inputs(tokens, length)
    met, bias = as_int8(x, rows), 3 * inputs(1, count, seed=4)[0] if biased else None
    expected = reference.gate_up(met, rows, act, workers, bias=bias)
    close(kernels.gate_up(x, rows, act, bias=bias), expected)
    kept = torch.empty(tokens, count)
    ours = gather(kernels, x, rows, act=act, bias=bias, kept=kept)
    close(kept, expected)
    theirs = reference.gather_ffn(met, rows, act, workers, bias=bias)
    close(ours, theirs, columns=True)
    mask = (inputs(tokens, count, seed=2) > 0).float()
    theirs = reference.gather_ffn(met, rows, act, workers, bias=bias, mask=mask)
    close(gather(kernels, x, rows, mask, act, bias=bias), theirs, columns=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [40, 576])
def test_a_norm_with_a_bias_is_a_layer_norm(
    kernels: Kernels, workers: Workers, kind: str, length: int
) -> None:
    rows, x = make_rows(kind, 50, 1, length), inputs(3, length) + 2
    norm = Norm(inputs(1, length, seed=1)[0], 1e-5, inputs(1, length, seed=2)[0])
    expected = reference.matmul_rows(as_int8(reference.apply_norm(x, norm), rows), rows, workers)
    ours = kernels.matmul_rows(x, rows, norm=norm)
    # a value between two steps may be rounded to the other one where the norms' last bits differ
    assert relative(ours, expected) < (2e-3 if kind in ("int4", "int8") else 1e-5)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_rounding_activations_costs_under_one_percent(workers: Workers, kind: str) -> None:
    kernels = NativeKernels("auto", 1)
    rows = make_rows(kind, 512, 3, 576)
    x = inputs(4, 576)
    ours = gather(kernels, x, rows)
    kernels.close()
    assert relative(ours, reference.gather_ffn(x, rows, "silu", workers)) < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vectors", [3, 2])
def test_tokens_and_threads_do_not_change_a_bit(kind: str, vectors: int) -> None:
    rows = make_rows(kind, 300, vectors, 250)
    x, norm = inputs(TOKENS, 250), Norm(inputs(1, 250)[0], 1e-5, inputs(1, 250)[0])
    how: dict[str, Any] = {"norm": norm, "bias": inputs(1, 300)[0]} if vectors == 2 else {}
    found = []
    for threads in (1, 2, 3, 7):
        kernels = NativeKernels("auto", threads)
        for tokens in (1, 2, 5, TOKENS):
            starts = range(0, TOKENS, tokens)
            parts = [gather(kernels, x[i : i + tokens], rows, **how) for i in starts]
            found.append(torch.cat(parts))
        kernels.close()
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_indexed_rows_are_the_gathered_ones(kernels: Kernels, kind: str) -> None:
    whole = make_rows(kind, 90, 3, 72)
    assert isinstance(whole, PackedRows)
    index = torch.tensor([0, 3, 4, 50, 89], dtype=torch.int32)
    second = None if whole.int8 is None else whole.int8[index.long()].contiguous()
    gathered = PackedRows(whole.layout, whole.int4[index.long()].contiguous(), second)
    x = inputs(2, 72)
    expected = gather(kernels, x, gathered)
    half = PackedRows(whole.layout, whole.int4, second, index4=index)
    both = PackedRows(whole.layout, whole.int4, whole.int8, index4=index, index8=index)
    assert torch.equal(gather(kernels, x, half), expected)
    if whole.int8 is not None:
        assert torch.equal(gather(kernels, x, both), expected)
    assert torch.equal(both.values(1, 4), gathered.values(1, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values(kernels: Kernels, workers: Workers, kind: str) -> None:
    rows = make_rows(kind, 40, 3, 64)
    zero = gather(kernels, torch.zeros(1, 64), rows)
    assert torch.equal(zero, torch.zeros(1, 64))
    x = torch.zeros(1, 64)
    x[0, 5], x[0, 40] = 1e4, -1e-4
    ours = kernels.gate_up(x, rows, "silu")
    assert torch.isfinite(ours).all()
    assert relative(ours, reference.gate_up(as_int8(x, rows), rows, "silu", workers)) < 1e-5
    tiny = make_rows(kind, 8, 1, 64, scale=1e-6)
    dense = kernels.matmul_rows(inputs(1, 64), tiny)
    assert torch.isfinite(dense).all()


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("code", [0x00, 0xFF])
def test_sums_over_down_columns_hold_the_largest_codes_and_factors(
    kernels: Kernels, workers: Workers, kind: str, code: int
) -> None:
    """Sums of a tile run in 16 bits with AVX2: factors of 128 mod 256 have the largest low byte."""
    layout, count = RecordLayout(3, 96), 32
    records = torch.full((count, layout.nbytes("int4")), code, dtype=torch.uint8)
    scales = torch.ones(count, 3 * layout.groups, dtype=torch.float16)
    records[:, layout.code_nbytes :] = scales.view(torch.uint8)
    second = torch.full((count, layout.nbytes("int8")), code, dtype=torch.uint8)
    rows = PackedRows(layout, records, second if kind == "int8" else None)
    for sign in (1, -1):
        h = torch.full((1, count), sign * (128 + 256 * 126) / 32512)
        h[:, 0] = 1
        total = torch.zeros(1, 96)
        kernels.down(h, rows, into=total)
        close(total, reference.down(h, rows, workers), columns=True)


def test_dispatch_falls_back_where_native_cannot() -> None:
    workers = Workers(1, kernel="auto")
    assert workers.native is not None
    x, f32 = inputs(2, 64), ExactRows(RecordLayout(1, 64), torch.randn(20, 64))
    assert not workers.native.takes(x, f32)
    assert torch.equal(
        dispatch.matmul_rows(x, f32, workers), reference.matmul_rows(x, f32, workers)
    )
    assert not workers.native.takes(x.to("meta"), make_rows("int4", 20, 1, 64))
    workers.close()


def test_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_native("torch", 1) is None
    with pytest.raises(UsageError, match="choose one of"):
        load_native("sse9", 1)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    assert load_native("auto", 1) is None
    with pytest.raises(UsageError, match="were not built"):
        load_native("avx2", 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(kernels: Kernels, kind: str, bad: float) -> None:
    x = inputs(1, 64)
    x[0, 37] = bad
    assert not torch.isfinite(kernels.matmul_rows(x, make_rows(kind, 3, 1, 64))).all()


def spoil(rows: PackedRows, record: int | list[int], vector: int, value: float) -> None:
    """The first scale of a vector becomes `value`."""
    groups = rows.layout.padded // GROUP
    scales = rows.int4[:, rows.layout.vectors * groups * 16 :].view(torch.float16)
    scales[record, vector * groups] = value


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu", "fatrelu:0.2"])
@pytest.mark.parametrize("vector", [0, 1, 2])
def test_a_scale_that_is_no_number_is_not_passed_over(
    kernels: Kernels, workers: Workers, kind: str, act: str, vector: int
) -> None:
    """Of gate, up or down, of any of the neurons that are computed together."""
    # of a neuron that a ReLU silences nobody needs the down column
    every = list(range(40)) if vector == 2 and "relu" in act else None
    for record in (0, 5, 15, 39):
        rows = make_rows(kind, 40, 3, 96)
        assert isinstance(rows, PackedRows)
        spoil(rows, every or record, vector, float("nan"))
        for tokens in (1, 3):
            x, total = inputs(tokens, 96), torch.zeros(tokens, 96)
            kernels.ffn(x, rows, act, into=total)
            assert not torch.isfinite(total).all()
            assert not torch.isfinite(reference.gather_ffn(x, rows, act, workers)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_soft_cap_does_not_hide_a_score_that_is_no_number(
    kernels: Kernels, workers: Workers, value: float
) -> None:
    norm = Norm(torch.ones(72), 1e-5)
    for which, seed in itertools.product((0, 1), range(5)):  # of queries, of keys
        for compute in (kernels.attention, partial(reference.attention, workers=workers)):
            call = as_calls("int4", kv=torch.float32, bias=False, extras="softcap")
            rows = call.projections[which]
            assert isinstance(rows, PackedRows)
            spoil(rows, 3, 0, value)
            x = inputs(2, 72, seed)
            out = compute(x, call, 0, norm=norm)
            assert not torch.isfinite(x if out is None else out).all()


def test_tiny_activations_are_zero_not_undefined(kernels: Kernels) -> None:
    x = torch.full((1, 64), 1e-38)
    assert torch.equal(kernels.matmul_rows(x, make_rows("int4", 3, 1, 64)), torch.zeros(1, 3))


def test_two_instruction_sets_side_by_side() -> None:
    first, second = NativeKernels("auto", 1), NativeKernels("scalar", 2)
    x, rows = inputs(1, 250), make_rows("int4", 50, 1, 250)
    before = first.matmul_rows(x, rows)
    second.matmul_rows(x, rows)
    assert torch.equal(first.matmul_rows(x, rows), before)
    assert (first.name, second.name)[1] == "scalar"
    first.close()
    second.close()


# what the attention of some families does besides
UNIT = Norm(torch.ones(72), 1e-5)
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.0},
    "out norm": {"out_norm": UNIT},
    "half turned": {"rotary": 10},
    "little turned, head norms": {
        "rotary": 2,
        "qk_norms": (Norm(torch.linspace(0.5, 2, 20), 1e-5), Norm(torch.linspace(-1, 1, 20), 1e-5)),
    },
    "no rotation": {"cosines": None, "sines": None},
    "head norms": {
        "qk_norms": (Norm(torch.linspace(0.5, 2, 20), 1e-5), Norm(torch.linspace(-1, 1, 20), 1e-5))
    },
}


def as_calls(kind: str, *, kv: torch.dtype, bias: bool, extras: str = "") -> AttentionCall:
    """extras: a key of EXTRAS."""
    heads, kv_heads, dim, hidden, positions = 6, 2, 20, 72, 50
    counts = (heads * dim, kv_heads * dim, kv_heads * dim)
    q, k, v = (make_rows(kind, count, 1, hidden) for count in counts)
    generator = torch.Generator().manual_seed(3)
    biases = [torch.randn(n, generator=generator) if bias else None for n in (*counts, hidden)]
    extra = dict(EXTRAS[extras])
    angles = torch.rand(positions, extra.pop("rotary", dim) // 2, generator=generator)
    keys, values = torch.zeros((2, kv_heads, positions, dim), dtype=kv)
    more = {"cosines": angles.cos(), "sines": angles.sin()} | extra
    return AttentionCall(
        projections=(q, k, v, make_rows(kind, hidden, 1, heads * dim)), biases=tuple(biases),
        keys=keys, values=values, heads=heads, scale=0.005, **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", [torch.float16, torch.float32])
@pytest.mark.parametrize(("bias", "extras"), [(True, ""), *((False, name) for name in EXTRAS)])
def test_attention_equals_the_reference(
    kernels: Kernels, workers: Workers, kind: str, kv: torch.dtype, bias: bool, extras: str
) -> None:
    norm = Norm(inputs(1, 72, seed=9)[0], 1e-5)
    ours, theirs = (as_calls(kind, kv=kv, bias=bias, extras=extras) for _ in range(2))
    x, start = inputs(7, 72), 0
    for tokens in (4, 1, 2):
        part = x[start : start + tokens]
        expected = reference.attention(part, theirs, start, workers, norm=norm)
        got = part.clone()
        kernels.attention(got, ours, start, norm=norm)
        wide = 2e-3 if kv == torch.float16 else 1e-5
        assert relative(got, expected) < (0.02 if kind in ("int4", "int8") else wide)
        start += tokens
    assert relative(ours.keys.float(), theirs.keys.float()) < 0.01
    assert not ours.keys[:, 7:].any()


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_a_batch_is_that_of_each_token(kind: str, extras: str) -> None:
    norm, x = Norm(torch.ones(72), 1e-5), inputs(40, 72)
    found = []
    for threads, tokens in ((1, 1), (2, 3), (3, 40)):
        kernels = NativeKernels("auto", threads)
        call = as_calls(kind, kv=torch.float16, bias=True, extras=extras)
        out = x.clone()
        for start in range(0, 40, tokens):
            part = out[start : start + tokens]
            kernels.attention(part, call, start, norm=norm)
        found.append(torch.cat((out.flatten(), call.keys.flatten(), call.values.flatten())))
        kernels.close()
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("neurons", [1, 7, 300])
def test_rank_takes_the_best_and_of_equals_the_first(
    kernels: Kernels, tokens: int, neurons: int
) -> None:
    activations, norms = inputs(tokens, neurons), torch.rand(neurons) + 0.1
    best = [(neurons, 1), (neurons * 3 // 5, 2), (neurons // 7, 3)]
    ours = kernels.rank(activations, norms, best)
    assert torch.equal(ours, reference.rank(activations, norms, best))
    tied = kernels.rank(torch.ones(tokens, neurons), torch.ones(neurons), best)
    assert torch.equal(tied[0], torch.sort(tied[0], descending=True).values)
    assert int((tied == 3).sum()) == tokens * (neurons // 7)


def test_activations_are_kept_when_asked_for(kernels: Kernels) -> None:
    rows, x = make_rows("int4", 300, 3, 96), inputs(2, 96)
    kept, total = torch.empty(2, 300), torch.zeros(2, 96)
    kernels.ffn(x, rows, "silu", kept=kept, into=total)
    assert torch.equal(kept, kernels.gate_up(x, rows, "silu"))
    assert torch.equal(total, gather(kernels, x, rows))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_gives_the_bits_of_its_layers(kind: str, parallel: bool) -> None:
    """Norms and FFNs with biases, neurons without a gate, attention and FFN side by side."""

    def stack() -> Stack:
        norms = [Norm(inputs(1, 72, seed=i)[0], 1e-5, inputs(1, 72, seed=i + 9)[0]) for i in (1, 2)]
        layers = [
            LayerCall(
                as_calls(kind, kv=torch.float16, bias=True), norms[0], make_rows(kind, 40, 2, 72),
                norms[1], "relu", inputs(1, 40, seed=i)[0], inputs(1, 72, seed=i)[0],
            )
            for i in range(2)
        ]  # fmt: skip
        return Stack(tuple(layers), parallel=parallel)

    workers, made = Workers(2, kernel="auto"), stack()
    assert workers.native is not None
    x, found = inputs(5, 72), []
    for at_once in (1, 5):
        parts = (x[i : i + at_once] for i in range(0, 5, at_once))
        found.append(
            torch.cat(
                [dispatch.run_stack(p, made, i * at_once, workers) for i, p in enumerate(parts)]
            )
        )
    layer_by_layer = x
    for layer in stack().layers:
        given = layer_by_layer
        out = dispatch.attention(given, layer.attention, 0, workers, norm=layer.attn_norm)
        given = given if parallel else out.clone()
        dispatch.gather_ffn(
            given, layer.neurons, layer.act, workers, norm=layer.ffn_norm, into=out,
            bias=layer.up_bias,
        )  # fmt: skip
        assert layer.down_bias is not None
        layer_by_layer = out + layer.down_bias
    workers.close()
    torch_only = Workers(1)
    expected = dispatch.run_stack(x, stack(), 0, torch_only)
    assert torch.equal(found[0], layer_by_layer)
    assert torch.equal(found[1], layer_by_layer)
    assert relative(found[0], expected) < (0.05 if kind in ("int4", "int8") else 2e-3)
