"""The INT4 and INT8 planes: round trips, error bounds and the two readings of the same bytes."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2c.bundle.planes import (
    GROUP,
    RecordLayout,
    dequantize,
    pack_nibbles,
    quantize,
    unpack_nibbles,
)
from m2c.kernels.rows import PackedRows

F32 = npt.NDArray[np.float32]
_HALF_STEP = 2.0**-25  # of the smallest scale FP16 can hold
DISTRIBUTIONS = ("gaussian", "outliers", "one-sided", "constant", "sparse", "tiny", "wide")


def draw(kind: str, shape: tuple[int, int, int], seed: int) -> F32:
    """Weights of many characters; "wide" spans the whole range that FP16 scales reach."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "outliers":
        x = np.where(rng.random(shape) < 0.02, 50 * x, 0.02 * x)
    elif kind == "one-sided":
        x = np.abs(x) * rng.choice([-1, 1])
    elif kind == "constant":
        x = np.full(shape, x.flat[0])
    elif kind == "sparse":
        x = np.where(rng.random(shape) < 0.9, 0, x)
    elif kind == "tiny":
        x = x * 10.0 ** rng.uniform(-45, -5)
    elif kind == "wide":
        x = np.sign(x) * 10.0 ** rng.uniform(-9, 5.5, shape)
    return x.astype(np.float32)


def scales_of(layout: RecordLayout, int4: npt.NDArray[np.uint8]) -> F32:
    """The scale of every weight: [records, vectors, length]."""
    scales = np.ascontiguousarray(int4[:, layout.code_nbytes :]).view(np.float16)
    spread = np.repeat(scales.astype(np.float32), GROUP, axis=1)
    return spread.reshape(len(int4), layout.vectors, layout.padded)[..., : layout.length]


shapes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 130))
kinds = st.sampled_from(DISTRIBUTIONS)
seeds = st.integers(0, 2**32 - 1)


@given(rows=st.integers(1, 4), groups=st.integers(1, 5), seed=seeds)
def test_nibbles_round_trip(rows: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (rows, groups * GROUP)).astype(np.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, groups * GROUP // 2)
    assert np.array_equal(unpack_nibbles(packed), codes)


def test_nibble_order_is_the_one_in_the_format() -> None:
    """Byte j of a group: element j in the low nibble, element j + 16 in the high one."""
    codes = np.zeros((1, GROUP), np.int8)
    codes[0, 3], codes[0, 19] = -8, 7
    packed = pack_nibbles(codes)
    assert packed[0, 3] == 0xF0
    assert (np.delete(packed[0], 3) == 0x88).all()


@given(shape=shapes, kind=kinds, seed=seeds)
def test_int8_is_close_to_every_weight(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    """Scales are bounded below, so that no weight of any group is out of the INT8 code's reach."""
    values = draw(kind, shape, seed)
    layout = RecordLayout(shape[1], shape[2])
    int4, int8, approximate = quantize(values)
    scale = np.abs(scales_of(layout, int4))
    codes = unpack_nibbles(int8).reshape(len(values), layout.vectors, layout.padded)
    # q is the nearest step, half a step above it takes r = 8: the highest code is half a step short
    steps = np.where(codes[..., : layout.length] == 7, 1 / 16, 1 / 32)
    # FP16 cannot hold the scale of a group of tiny weights: rounding it moves all 8.5 steps
    bound = scale * steps * (1 + 1e-5) + 8.5 * _HALF_STEP
    assert (np.abs(approximate - values) <= bound).all()


@given(shape=shapes, kind=kinds, seed=seeds)
def test_records_hold_what_quantize_says(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    """One value, three ways to it: quantize's own, the numpy reading and the torch reading."""
    records, vectors, length = shape
    values = draw(kind, shape, seed)
    layout = RecordLayout(vectors, length)
    int4, int8, approximate = quantize(values)
    assert int4.shape == (records, layout.nbytes("int4"))
    assert int8.shape == (records, layout.nbytes("int8"))
    assert np.array_equal(bits(dequantize(layout, int4, int8)), bits(approximate))
    both = PackedRows(layout, torch.from_numpy(int4), torch.from_numpy(int8))
    assert np.array_equal(bits(both.values(0, records).numpy()), bits(approximate))
    coarse = PackedRows(layout, torch.from_numpy(int4)).values(0, records).numpy()
    assert np.array_equal(bits(coarse), bits(dequantize(layout, int4)))


def bits(values: F32) -> npt.NDArray[np.uint32]:
    """Bit patterns, with -0 as +0: the readings need not agree on the sign of nothing."""
    return np.ascontiguousarray(values + np.float32(0)).view(np.uint32)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("length", [32, 40])
def test_a_part_of_the_vectors_is_read_alone(first: int, length: int) -> None:
    layout = RecordLayout(3, length)
    int4, int8, approximate = quantize(draw("gaussian", (7, 3, length), 1))
    rows = PackedRows(layout, torch.from_numpy(int4), torch.from_numpy(int8))
    for last in range(first + 1, 4):
        part = rows.values(2, 5, first=first, last=last).numpy()
        assert np.array_equal(part, approximate[2:5, first:last])


@pytest.mark.parametrize("largest", [1e6, 1e20, 3e38])
def test_weights_beyond_fp16_scales_saturate_quietly(largest: float) -> None:
    """The exact plane mends them; what counts is that nothing overflows to infinity or NaN."""
    values = draw("gaussian", (4, 3, 50), 3)
    values[1, 2, 7] = largest
    int4, int8, approximate = quantize(values, np.ones((3, 50), np.float32))
    assert np.isfinite(approximate).all()
    assert np.array_equal(dequantize(RecordLayout(3, 50), int4, int8), approximate)
    assert np.abs(approximate[0] - values[0]).max() < 0.1  # the other records do not suffer


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, 1e-38])
def test_zeros_and_denormals_become_zero(value: float) -> None:
    int4, int8, approximate = quantize(np.full((2, 1, 33), value, np.float32))
    assert (approximate == 0).all()
    assert (dequantize(RecordLayout(1, 33), int4, int8) == 0).all()


@given(kind=kinds, seed=seeds, cut=st.integers(1, 5))
@settings(max_examples=30)
def test_a_record_does_not_depend_on_its_neighbours(kind: str, seed: int, cut: int) -> None:
    values = draw(kind, (6, 2, 70), seed)
    importance = np.abs(draw("gaussian", (1, 2, 70), seed + 1))[0]
    whole = quantize(values, importance)
    head, tail = quantize(values[:cut], importance), quantize(values[cut:], importance)
    for i in range(3):
        assert np.array_equal(whole[i], np.concatenate((head[i], tail[i])))


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "one-sided"])
def test_importance_lowers_the_weighted_error(kind: str) -> None:
    values = draw(kind, (64, 1, 128), 5)
    importance = np.random.default_rng(6).lognormal(0, 2, (1, 128)).astype(np.float32)
    layout = RecordLayout(1, 128)

    def weighted_error(weights: F32 | None) -> float:
        int4, _, _ = quantize(values, weights)
        error = (dequantize(layout, int4) - values).astype(np.float64)
        return float((error**2 * importance).sum())

    assert weighted_error(importance) < 0.97 * weighted_error(None)


def test_importance_of_zero_keeps_the_weights() -> None:
    """A channel that calibration never excited may still matter later."""
    values = draw("gaussian", (16, 1, 64), 7)
    importance = np.ones((1, 64), np.float32)
    importance[0, ::2] = 0
    _, _, approximate = quantize(values, importance)
    assert np.abs(approximate - values).max() < 0.05
