"""Codes that make up for each other's errors: against GPTQ as its authors write it, and C against
numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2c.bundle.exact import EXACT_TYPES, round_to, widen
from m2c.bundle.planes import GROUP, RecordLayout, dequantize, group_weights, quantize
from m2c.bundle.steering import MOST_DIRECTIONS, REACH, Factors, factors_of, spread_scales, steer
from m2c.directions import principal_directions
from m2c.errors import UsageError
from m2c.kernels.encoder import Encoder
from m2c.kernels.native import LIBRARY
from m2c.kernels.workers import Workers
from m2c.steer import Steering

built = pytest.mark.skipif(not LIBRARY.exists(), reason="no C library was built")


def moments(inputs: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(mean squares [inputs], directions [inputs, rank]) of inputs that move together."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((inputs, rank)).astype(np.float32)
    alone = rng.uniform(0.1, 2, inputs).astype(np.float32)
    return np.square(directions).sum(1) + alone, directions


def weights(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


def scales_of(values: np.ndarray) -> np.ndarray:
    """Of rows [n, length], [n, groups] f32."""
    layout = RecordLayout(1, values.shape[1])
    int4 = quantize(values[:, None])[0]
    halves = np.ascontiguousarray(int4[:, layout.code_nbytes :]).view(np.float16)
    return halves.astype(np.float32)


def error_of(
    values: np.ndarray, codes: np.ndarray, scales: np.ndarray, hessian: np.ndarray
) -> float:
    """Mean square of the outputs' errors: lanes are outputs."""
    off = (codes * scales - values).astype(np.float64)
    return float(np.einsum("il,ij,jl->", off, hessian, off))


def dense_gptq(values: np.ndarray, scales: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """As the paper has it: a Cholesky factor of the inverse, errors pushed onto what follows."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left = values.astype(np.float64)
    codes = np.empty(values.shape)
    for i, own in enumerate(values):
        ratio = own / scales[i]
        low, high = np.ceil(ratio - REACH), np.floor(ratio + REACH)
        q = np.clip(np.clip(np.rint(left[i] / scales[i]), low, high), -8, 7)
        codes[i] = q
        left[i + 1 :] -= np.outer(upper[i, i + 1 :], (left[i] - q * scales[i]) / upper[i, i])
    return codes


def test_codes_are_those_of_gptq_with_the_same_moments() -> None:
    mean_square, directions = moments(96, 5)
    values = np.ascontiguousarray(weights(40, 96).T)
    scales = np.ascontiguousarray(spread_scales(scales_of(values.T), 96).T)
    damp = 0.01 * mean_square.mean(dtype=np.float64)
    hessian = directions.astype(np.float64) @ directions.T.astype(np.float64)
    np.fill_diagonal(hessian, mean_square + damp)
    codes = steer(values, scales, factors_of(mean_square, directions))
    # roundings that are all but ties may fall otherwise in f32
    assert (codes == dense_gptq(values, scales, hessian)).mean() > 0.999
    nearest = np.clip(np.rint(values / scales), -8, 7)
    assert (codes != nearest).mean() > 0.02
    ratio = error_of(values, codes, scales, hessian) / error_of(values, nearest, scales, hessian)
    assert ratio < 0.5


def test_no_code_is_further_than_int8_mends() -> None:
    mean_square, directions = moments(128, 3)
    values = np.ascontiguousarray(weights(64, 128, 1).T) * 3
    scales = np.ascontiguousarray(spread_scales(scales_of(values.T), 128).T)
    codes = steer(values, scales, factors_of(mean_square, 5 * directions))
    assert (np.abs(values / scales - codes) <= REACH + 1e-5).all()
    assert codes.min() >= -8
    assert codes.max() <= 7


def test_without_directions_codes_are_the_nearest() -> None:
    values = np.ascontiguousarray(weights(32, 64).T)
    scales = np.ascontiguousarray(spread_scales(scales_of(values.T), 64).T)
    codes = steer(
        values, scales, factors_of(np.ones(64, np.float32), np.zeros((64, 4), np.float32))
    )
    assert (codes == np.clip(np.rint(values / scales), -8, 7)).all()


def test_factors_stay_right_over_many_inputs() -> None:
    """They are updated from input to input, and computed anew now and then."""
    mean_square, directions = moments(700, 8)
    mean_square += np.float32(0.01) * mean_square.mean()
    got = factors_of(mean_square, directions).feedback
    rest = mean_square - np.square(directions).sum(1) + 0.01 * mean_square.mean(dtype=np.float64)
    for i in (0, 255, 256, 511, 699):
        later = directions[i:].astype(np.float64)
        inverse = np.linalg.inv(np.eye(8) + (later / rest[i:, None]).T @ later)
        assert np.allclose(got[i], inverse @ later[0] / rest[i], rtol=1e-4, atol=1e-7)


@built
@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 130)), rank=st.integers(0, 12),
    exact_type=st.sampled_from(EXACT_TYPES), columns=st.booleans(),
    scale=st.sampled_from([1e-7, 1e-3, 1.0, 3e4]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_instruction_set_gives_the_codes_of_numpy(
    shape: tuple[int, int], rank: int, exact_type: str, columns: bool, scale: float, seed: int
) -> None:
    n, length = shape
    bits = round_to(np.clip(scale * weights(n, length, seed), -6e4, 6e4), exact_type)
    values = widen(bits, exact_type)
    scales = scales_of(values)
    factors = factors_of(*moments(n if columns else length, rank, seed))
    spread = spread_scales(scales, length)
    if columns:
        expected = steer(values, spread, factors)
    else:
        expected = steer(np.ascontiguousarray(values.T), np.ascontiguousarray(spread.T), factors).T
    halves = scales.astype(np.float16).view(np.uint16)
    for choice in ("scalar", "avx2", "avx512"):
        try:
            encoder = Encoder(choice)
        except UsageError:  # this processor cannot
            continue
        got = encoder.steer(bits, halves, factors, exact_type=exact_type, columns=columns)
        assert (got == expected).all(), choice


@built
def test_shapes_that_do_not_belong_together_are_refused() -> None:
    bits, scales = np.zeros((4, 64), np.uint16), np.zeros((4, 2), np.uint16)
    encoder, none = Encoder(), np.zeros((64, 1), np.float32)
    with pytest.raises(ValueError, match="factors"):
        encoder.steer(bits, scales, Factors(none[:63], none[:63]), exact_type="bf16")
    with pytest.raises(ValueError, match="scales"):
        encoder.steer(bits, scales[:, :1], Factors(none, none), exact_type="bf16")
    many = np.zeros((64, MOST_DIRECTIONS + 1), np.float32)
    with pytest.raises(ValueError, match="directions"):
        encoder.steer(bits, scales, Factors(many, many), exact_type="bf16")


@pytest.mark.parametrize("exact_type", EXACT_TYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_columns_share_one_pass_over_all_neurons(exact_type: str, threads: int) -> None:
    """The same codes with and without the library, for any number of threads."""
    columns = torch.from_numpy(weights(600, 100))
    factors = factors_of(*moments(600, 4))
    workers = Workers(threads)
    expected = Steering(exact_type, None).columns(columns, factors, workers)
    values = widen(round_to(columns.numpy(), exact_type), exact_type)
    flat = np.ones((1, 100), np.float32)
    int4 = quantize(values[:, None], flat)[0]
    layout = RecordLayout(1, 100)
    halves = np.ascontiguousarray(int4[:, layout.code_nbytes :]).view(np.float16)
    spread = spread_scales(halves.astype(np.float32), 100)
    assert expected is not None
    assert (expected == steer(values, spread, factors)).all()
    if LIBRARY.exists():
        got = Steering(exact_type, Encoder()).columns(columns, factors, workers)
        assert got is not None
        assert (got == expected).all()
    columns[-1, 5] = torch.nan
    assert Steering(exact_type, None).columns(columns, factors, workers) is None
    workers.close()


@built
def test_scales_are_those_of_the_planes() -> None:
    values = weights(9, 100)
    bits, layout = round_to(values, "bf16"), RecordLayout(1, 100)
    importance = np.random.default_rng(1).lognormal(0, 2, (1, 100)).astype(np.float32)
    laid_out = group_weights(importance, layout, 1)
    assert laid_out is not None
    int4 = quantize(widen(bits, "bf16")[:, None], importance)[0]
    expected = np.ascontiguousarray(int4[:, layout.code_nbytes :]).view(np.uint16)
    got = Encoder().scales(bits, laid_out, layout, exact_type="bf16")
    assert got is not None
    assert (got == expected).all()


def test_chosen_codes_reach_both_planes() -> None:
    """INT8 mends what they leave, to the end of its reach."""
    values = weights(6, 64)[:, None]
    scales = spread_scales(scales_of(values[:, 0]), 64)
    ratio = values[:, 0] / scales
    codes = np.clip(np.where(ratio > np.rint(ratio), np.ceil(ratio), np.floor(ratio)), -8, 7)
    codes = np.where(np.abs(ratio - codes) < 0.56, codes, np.clip(np.rint(ratio), -8, 7))
    int4, _, value = quantize(values, None, codes[:, None].astype(np.int8))
    layout = RecordLayout(1, 64)
    assert np.allclose(dequantize(layout, int4)[:, 0], codes * scales)
    assert (np.abs(value[:, 0] - values[:, 0]) <= np.abs(scales) * (2 / 16)).all()


# -- directions ------------------------------------------------------------------------------------


def test_principal_directions_are_those_of_the_singular_values() -> None:
    generator = torch.Generator().manual_seed(3)
    strong = torch.randn(500, 4, generator=generator) * torch.tensor([9.0, 7.0, 5.0, 3.0])
    x = strong @ torch.linalg.qr(torch.randn(80, 4, generator=generator)).Q.T
    x = x + 0.05 * torch.randn(500, 80, generator=generator)
    found = principal_directions(x, 4)
    moments_of_all = x.T @ x / len(x)
    kept = found @ found.T
    assert torch.linalg.matrix_norm(kept - moments_of_all) < 0.01 * torch.linalg.matrix_norm(
        moments_of_all
    )
    lengths = found.square().sum(0).sqrt()
    assert (lengths[:-1] >= lengths[1:]).all()


def test_fewer_tokens_than_directions_leave_zeros() -> None:
    found = principal_directions(torch.ones(2, 10), 6)
    assert found.shape == (10, 6)
    assert torch.allclose(found[:, :1].abs(), torch.ones(10, 1), atol=1e-5)
    assert torch.allclose(found[:, 1:], torch.zeros(10, 5), atol=1e-5)


def test_groups_of_weights_share_a_scale() -> None:
    scales = np.array([[1.0, 2.0]], np.float32)
    spread = spread_scales(scales, GROUP + 3)
    assert spread.shape == (1, GROUP + 3)
    assert (spread[0, :GROUP] == 1).all()
    assert (spread[0, GROUP:] == 2).all()
