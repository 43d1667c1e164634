"""Rows with frames, decoded in C where they are computed: the bits of rows decoded before."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from running import inputs

from m2c.bundle.exact import encode_frames, round_to, widen
from m2c.bundle.planes import RecordLayout, dequantize, quantize
from m2c.errors import BadInput
from m2c.kernels import dispatch
from m2c.kernels.native import LIBRARY
from m2c.kernels.operands import AttentionCall, Norm
from m2c.kernels.rows import ExactFrames, ExactRows, PackedRows, as_exact_tensor
from m2c.kernels.workers import Kernels, Workers

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels were not built")
TYPES = ("bf16", "f16")
# records, vectors, length, records per frame
SHAPES = ((21, 3, 96, 1), (37, 1, 250, 4), (300, 3, 40, 1), (64, 1, 576, 64), (9, 1, 33, 16))


def values_of(records: int, weights: int) -> np.ndarray:
    """Normal ones, and what codes cannot reach: outliers, subnormals, zeros of both signs."""
    rng = np.random.default_rng(records + weights)
    values = 0.02 * rng.standard_normal((records, weights)).astype(np.float32)
    odd = rng.random(values.shape)
    values[odd < 0.02] *= 1e3
    values[(odd > 0.02) & (odd < 0.04)] *= 1e-6
    values[(odd > 0.04) & (odd < 0.05)] = 0
    values[(odd > 0.05) & (odd < 0.06)] = -0.0
    values[:, :40] *= 1e-7  # a whole group that FP16 scales hardly reach
    return values


def framed(
    records: int, vectors: int, length: int, per_frame: int, exact_type: str
) -> tuple[PackedRows, ExactRows]:
    """The same rows with frames, and decoded."""
    layout = RecordLayout(vectors, length)
    true = round_to(values_of(records, vectors * length), exact_type)
    int4, int8, _ = quantize(widen(true, exact_type).reshape(records, vectors, length))
    # codes of other weights for some records: whatever a writer chose, frames lead to the weights
    int8[::5] = np.random.default_rng(1).integers(0, 256, int8[::5].shape, np.uint8)
    made = encode_frames(true, int4, int8, layout, exact_type=exact_type, frame_records=per_frame)
    data = np.frombuffer(made.data, np.uint8).copy()
    frames = ExactFrames(torch.from_numpy(data), made.nbytes, made.escapes, per_frame, exact_type)
    rows = PackedRows(layout, torch.from_numpy(int4), torch.from_numpy(int8), frames)
    return rows, ExactRows(layout, as_exact_tensor(true, exact_type))


def decode(kernels: Kernels, rows: PackedRows) -> torch.Tensor:
    found = kernels.decode(rows)
    kernels.check()
    return found


def compute(kernels: Kernels, rows: PackedRows) -> None:
    x = inputs(2, 96)
    kernels.ffn(x, rows, "silu", into=x.clone())
    kernels.check()


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int16), two.view(torch.int16))


@pytest.mark.parametrize("exact_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_comes_back(
    kernels: Kernels, shape: tuple[int, int, int, int], exact_type: str
) -> None:
    rows, decoded = framed(*shape, exact_type)
    assert rows.frames is not None
    assert rows.frames.escapes.sum() > 0
    assert same_bits(decode(kernels, rows), decoded.weights)


@pytest.mark.parametrize("exact_type", TYPES)
def test_codes_and_scales_of_any_kind(kernels: Kernels, exact_type: str) -> None:
    """Random codes and every size and sign of scale, far from the weights: the reference's bits."""
    rng = np.random.default_rng(7)
    layout = RecordLayout(3, 90)
    int4 = rng.integers(0, 256, (64, layout.nbytes("int4")), np.uint8)
    int8 = rng.integers(0, 256, (64, layout.nbytes("int8")), np.uint8)
    scales = rng.integers(0, 1 << 16, (64, layout.scale_nbytes // 2), np.uint16)
    scales[scales & 0x7C00 == 0x7C00] = 0  # a scale is finite
    int4[:, layout.code_nbytes :] = scales.view(np.uint8)
    true = round_to(values_of(64, 270), exact_type)
    # half of the weights as near as codes can say: few escapes there, offsets of every width
    near = round_to(dequantize(layout, int4, int8).reshape(64, -1), exact_type)
    usual = (rng.random(true.shape) < 0.5) & np.isfinite(widen(near, exact_type))
    true[usual] = near[usual]
    made = encode_frames(true, int4, int8, layout, exact_type=exact_type, frame_records=1)
    data = np.frombuffer(made.data, np.uint8).copy()
    frames = ExactFrames(torch.from_numpy(data), made.nbytes, made.escapes, 1, exact_type)
    rows = PackedRows(layout, torch.from_numpy(int4), torch.from_numpy(int8), frames)
    assert same_bits(decode(kernels, rows), as_exact_tensor(true, exact_type))


@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_products_are_put_among_those_of_other_rows(kernels: Kernels, tokens: int) -> None:
    """The head comes in pieces: each fills its columns of the logits, and no others."""
    workers = Workers(1, kernel="torch")
    workers.native = kernels
    rows, decoded = framed(*SHAPES[1], "bf16")
    x, norm = inputs(tokens, rows.layout.length), Norm(torch.ones(rows.layout.length), 1e-5)
    for operand in (rows, decoded):
        logits = torch.full((tokens, len(operand) + 7), 5.0, device=x.device)
        part = logits[:, 3 : 3 + len(operand)]
        dispatch.matmul_into(part, x, operand, workers, norm=norm, at_once=4)
        assert torch.equal(part, kernels.matmul_rows(x, operand, norm=norm))
        part.fill_(5)
        assert bool((logits == 5).all())


@pytest.mark.parametrize("exact_type", TYPES)
def test_computing_with_frames_gives_the_bits_of_decoded_rows(
    kernels: Kernels, exact_type: str
) -> None:
    for tokens in (1, 5, 70):
        for rows, decoded in (framed(*SHAPES[1], exact_type), framed(*SHAPES[3], exact_type)):
            x = inputs(tokens, rows.layout.length)
            assert torch.equal(kernels.matmul_rows(x, rows), kernels.matmul_rows(x, decoded))
        rows, decoded = framed(*SHAPES[2], exact_type)
        x, norm = inputs(tokens, 40), Norm(torch.ones(40), 1e-5)
        one, other = x.clone(), x.clone()
        kernels.ffn(x, rows, "silu", into=one, norm=norm)
        kernels.ffn(x, decoded, "silu", into=other, norm=norm)
        assert torch.equal(one, other)
        assert torch.equal(kernels.gate_up(x, rows, "relu"), kernels.gate_up(x, decoded, "relu"))


def test_attention_with_frames(kernels: Kernels) -> None:
    heads, dim, hidden = 4, 16, 64
    found = []
    for which in (0, 1):
        q, o = (framed(heads * dim, 1, hidden, 16, "bf16")[which] for _ in range(2))
        k, v = (framed(2 * dim, 1, hidden, 16, "bf16")[which] for _ in range(2))
        keys, values = torch.zeros(2, 32, dim), torch.zeros(2, 32, dim)
        angles = torch.outer(torch.arange(32.0), torch.linspace(1, 0.1, dim // 2))
        call = AttentionCall(
            projections=(q, k, v, o), biases=(None,) * 4, keys=keys, values=values,
            cosines=angles.cos(), sines=angles.sin(), heads=heads, scale=0.25,
        )  # fmt: skip
        x = inputs(7, hidden)
        kernels.attention(x, call, 3, norm=Norm(torch.ones(hidden), 1e-5))
        found.append((x, keys, values))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def damaged(rows: PackedRows, **changes: object) -> PackedRows:
    assert rows.frames is not None
    return replace(rows, frames=replace(rows.frames, **changes))


def test_frames_that_do_not_add_up_are_refused(kernels: Kernels) -> None:
    rows, _ = framed(*SHAPES[0], "bf16")
    frames = rows.frames
    assert frames is not None
    moved = frames.nbytes.copy()
    moved[3] += 1
    moved[4] -= 1
    fewer = frames.escapes.copy()
    fewer[np.flatnonzero(fewer)[0]] -= 1
    first = int(np.flatnonzero(frames.escapes)[0])
    end = int(frames.nbytes[: first + 1].sum())
    beyond = frames.data.clone()
    beyond[end - 6 : end - 2] = 255  # the place of its last escape
    for broken in (
        damaged(rows, nbytes=moved), damaged(rows, escapes=fewer), damaged(rows, data=beyond),
        damaged(rows, escapes=np.full_like(frames.escapes, 1 << 31)),
    ):  # fmt: skip
        with pytest.raises(BadInput, match="damaged frame"):
            decode(kernels, broken)
        with pytest.raises(BadInput, match="damaged frame"):
            compute(kernels, broken)
    rows, decoded = framed(*SHAPES[0], "bf16")  # and nothing sticks
    assert same_bits(decode(kernels, rows), decoded.weights)


def test_noise_in_place_of_everything_neither_crashes_nor_reads_beyond(
    kernels: Kernels,
) -> None:
    rng = np.random.default_rng(3)
    rows, _ = framed(*SHAPES[1], "f16")
    frames = rows.frames
    assert frames is not None
    for _ in range(200):
        noise = rng.integers(0, 256, frames.data.shape, np.uint8)
        nothing = PackedRows(
            rows.layout,
            torch.from_numpy(rng.integers(0, 256, rows.int4.shape, np.uint8)),
            torch.from_numpy(rng.integers(0, 256, rows.int4[:, :128].shape, np.uint8)),
            replace(frames, data=torch.from_numpy(noise)),
        )
        with pytest.raises(BadInput, match="damaged frame"):
            decode(kernels, nothing)
