"""The reference kernels against plain float64 numpy, and their independence of threads."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from m2c.bundle.exact import encode_frames, round_to, widen
from m2c.bundle.planes import RecordLayout, dequantize, quantize
from m2c.kernels.operands import Norm
from m2c.kernels.reference import CHUNK, apply_norm, down, gate_up, gather_ffn, matmul_rows
from m2c.kernels.rows import ExactFrames, ExactRows, PackedRows, Rows, as_exact_tensor
from m2c.kernels.workers import Workers

F64 = npt.NDArray[np.float64]
PRECISIONS = ("int4", "int8", "frames", "exact")
COUNTS = (1, 2, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7)
HIDDEN = 40  # no multiple of a group


def make_rows(
    precision: str, count: int, vectors: int, length: int = HIDDEN, exact_type: str = "bf16"
) -> tuple[Rows, F64]:
    """Rows of one precision, and the values they stand for: [count, vectors, length]."""
    rng = np.random.default_rng(count * 10 + vectors)
    layout = RecordLayout(vectors, length)
    drawn = rng.standard_normal((count, vectors, length)).astype(np.float32)
    true = round_to(drawn, exact_type).reshape(count, -1)
    int4, int8, approximate = quantize(widen(true, exact_type).reshape(drawn.shape))
    packed4, packed8 = torch.from_numpy(int4), torch.from_numpy(int8)
    if precision == "int4":
        return PackedRows(layout, packed4), dequantize(layout, int4).astype(np.float64)
    if precision == "int8":
        return PackedRows(layout, packed4, packed8), approximate.astype(np.float64)
    values = widen(true, exact_type).reshape(drawn.shape).astype(np.float64)
    if precision == "exact":
        return ExactRows(layout, as_exact_tensor(true, exact_type)), values
    encoded = encode_frames(true, int4, int8, layout, exact_type=exact_type, frame_records=4)
    frames = ExactFrames(
        torch.frombuffer(bytearray(encoded.data), dtype=torch.uint8),
        encoded.nbytes,
        encoded.escapes,
        4,
        exact_type,
    )
    return PackedRows(layout, packed4, packed8, frames), values


def inputs(tokens: int, length: int = HIDDEN) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn((tokens, length), generator=generator)


def activation(name: str, x: F64) -> F64:
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))
    return np.maximum(x, 0) if name == "relu" else x / (1 + np.exp(-x))


def close(got: torch.Tensor, expected: F64) -> None:
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    scale = np.abs(expected).max(initial=1e-3)
    assert np.abs(got.double().numpy() - expected).max(initial=0) < 3e-6 * scale


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    pool = Workers(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_matmul(precision: str, count: int, tokens: int, workers: Workers) -> None:
    rows, values = make_rows(precision, count, 1)
    x = inputs(tokens)
    close(matmul_rows(x, rows, workers), x.double().numpy() @ values[:, 0].T)


@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ffn(precision: str, count: int, tokens: int, act: str, workers: Workers) -> None:
    rows, values = make_rows(precision, count, 3)
    x = inputs(tokens)
    x64 = x.double().numpy()
    hidden = activation(act, x64 @ values[:, 0].T) * (x64 @ values[:, 1].T)
    close(gate_up(x, rows, act, workers), hidden)
    close(gather_ffn(x, rows, act, workers), hidden @ values[:, 2])
    weights = inputs(tokens, count)
    close(down(weights, rows, workers), weights.double().numpy() @ values[:, 2])
    mask = (weights > 0).float()
    masked = (hidden * mask.numpy()) @ values[:, 2]
    close(gather_ffn(x, rows, act, workers, mask=mask), masked)


@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ffn_without_a_gate(
    precision: str, count: int, biased: bool, act: str, workers: Workers
) -> None:
    rows, values = make_rows(precision, count, 2)
    x, bias = inputs(3), inputs(1, count)[0] if biased else None
    before = x.double().numpy() @ values[:, 0].T
    hidden = activation(act, before if bias is None else before + bias.double().numpy())
    close(gate_up(x, rows, act, workers, bias=bias), hidden)
    close(gather_ffn(x, rows, act, workers, bias=bias), hidden @ values[:, 1])
    weights = inputs(3, count)
    close(down(weights, rows, workers), weights.double().numpy() @ values[:, 1])


def test_a_norm_with_a_bias_is_a_layer_norm() -> None:
    x, weight, bias = inputs(3) + 2, inputs(1, HIDDEN)[0], inputs(2, HIDDEN)[1]
    x64 = x.double().numpy()
    centred = x64 - x64.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    expected = normed * weight.double().numpy() + bias.double().numpy()
    close(apply_norm(x, Norm(weight, 1e-5, bias)), expected)


@pytest.mark.parametrize("precision", ["int4", "exact"])
def test_no_neurons_add_nothing(precision: str, workers: Workers) -> None:
    rows, _ = make_rows(precision, 3, 3)
    none = rows.take(torch.empty(0, dtype=torch.int64))
    assert torch.equal(gather_ffn(inputs(2), none, "silu", workers), torch.zeros(2, HIDDEN))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_do_not_change_a_bit(precision: str, tokens: int) -> None:
    count = 4 * CHUNK + 3
    neurons, _ = make_rows(precision, count, 3)
    matrix, _ = make_rows(precision, count, 1)
    x = inputs(tokens)
    results = []
    for threads in (1, 2, 3, 8):
        pool = Workers(threads)
        try:
            hidden = gate_up(x, neurons, "silu", pool)
            results.append(
                [
                    matmul_rows(x, matrix, pool), hidden, down(hidden, neurons, pool),
                    gather_ffn(x, neurons, "silu", pool),
                ]
            )  # fmt: skip
        finally:
            pool.close()
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("exact_type", ["bf16", "f16"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("length", [32, 40, 33])
@pytest.mark.parametrize("count", [1, 7, CHUNK + 5])
def test_frames_and_decoded_rows_compute_the_same_bits(
    count: int, length: int, tokens: int, exact_type: str, workers: Workers
) -> None:
    """So a layer may be streamed or resident without changing a logit."""
    x = inputs(tokens, length)
    for vectors in (1, 3):
        frames, _ = make_rows("frames", count, vectors, length, exact_type)
        decoded, _ = make_rows("exact", count, vectors, length, exact_type)
        assert torch.equal(frames.values(0, count), decoded.values(0, count))
        if vectors == 1:
            one, two = (matmul_rows(x, rows, workers) for rows in (frames, decoded))
        else:
            one, two = (gather_ffn(x, rows, "silu", workers) for rows in (frames, decoded))
            hidden = [gate_up(x, rows, "silu", workers) for rows in (frames, decoded)]
            assert torch.equal(*hidden)
            assert torch.equal(*(down(hidden[0], rows, workers) for rows in (frames, decoded)))
        assert torch.equal(one, two)


@pytest.mark.parametrize("precision", ["int4", "int8", "exact"])
def test_taken_rows_are_those_rows(precision: str, workers: Workers) -> None:
    rows, values = make_rows(precision, 50, 3)
    index = torch.tensor([3, 4, 17, 49])
    taken = rows.take(index)
    assert len(taken) == 4
    assert np.array_equal(taken.values(0, 4).double().numpy(), values[index.numpy()])


# -- workers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 23])
def test_results_come_back_in_order(threads: int, count: int) -> None:
    pool = Workers(threads)
    try:
        assert pool.map(lambda i: i * i, count) == [i * i for i in range(count)]
    finally:
        pool.close()


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_what_a_piece_raises_comes_out(bad: int) -> None:
    pool = Workers(2)

    def piece(i: int) -> int:
        if i == bad:
            raise OSError(f"piece {i}")
        return i

    try:
        with pytest.raises(OSError, match=f"piece {bad}"):
            pool.map(piece, 4)
        assert pool.map(lambda i: i, 4) == [0, 1, 2, 3]  # and the pool is still good
    finally:
        pool.close()
