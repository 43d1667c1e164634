"""The exact plane: every 16-bit weight comes back bit for bit, damaged frames are refused."""

import random

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from m2c.bundle.exact import (
    EXACT_TYPES,
    apply_distances,
    decode_frames,
    distances,
    encode_frames,
    round_to,
    widen,
)
from m2c.errors import BadInput

U16 = npt.NDArray[np.uint16]
EVERY = np.arange(1 << 16, dtype=np.uint16)


def finite(exact_type: str) -> U16:
    """All bit patterns of numbers: both zeros, subnormals, the largest."""
    with np.errstate(invalid="ignore"):
        return EVERY[np.isfinite(widen(EVERY, exact_type))]


def restore(true: U16, base: U16, per_frame: int) -> U16:
    """`true` [records, weights] through frames and back, given `base`."""
    frames = encode_frames(true, base, per_frame)
    data = np.frombuffer(frames.data, np.uint8)
    assert int(frames.nbytes.sum()) == len(data)
    counts = np.full(len(frames.nbytes), per_frame * true.shape[1], np.int64)
    counts[-1] = true.size - counts[:-1].sum()
    steps = decode_frames(data, counts, frames.escapes)
    return apply_distances(base.reshape(-1), steps).reshape(true.shape)


@pytest.mark.parametrize("exact_type", EXACT_TYPES)
@pytest.mark.parametrize("base_value", [0.0, -0.0, 1.0, -1.5, 1e-40, 65504.0])
def test_every_number_is_restored_from_any_base(exact_type: str, base_value: float) -> None:
    true = finite(exact_type)
    base = round_to(np.full(len(true), base_value, np.float32), exact_type)
    assert np.array_equal(restore(true[None], base[None], 1)[0], true)


@pytest.mark.parametrize("exact_type", EXACT_TYPES)
def test_every_number_is_restored_from_random_bases(exact_type: str) -> None:
    true = finite(exact_type)
    for seed in range(8):
        base = np.random.default_rng(seed).choice(true, len(true))
        assert np.array_equal(restore(true[None], base[None], 1)[0], true)


def test_distances_count_steps_in_the_order_of_floats() -> None:
    one, next_up, below_one = (np.array([b], np.uint16) for b in (0x3F80, 0x3F81, 0x3F7F))
    assert distances(next_up, one)[0] == 1
    assert distances(below_one, one)[0] == -1
    plus_zero, minus_zero = np.array([0], np.uint16), np.array([0x8000], np.uint16)
    assert distances(minus_zero, plus_zero)[0] == -1
    smallest, largest = np.array([0xFF7F], np.uint16), np.array([0x7F7F], np.uint16)
    steps = distances(largest, smallest)  # further than i16 holds: counted modulo 2**16
    assert apply_distances(smallest, steps)[0] == largest[0]


@pytest.mark.parametrize("exact_type", EXACT_TYPES)
def test_widen_and_round_are_inverse(exact_type: str) -> None:
    true = finite(exact_type)
    assert np.array_equal(round_to(widen(true, exact_type), exact_type), true)


def test_rounding_is_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1e-41
    for exact_type, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(round_to(values, exact_type), expected)


@settings(deadline=None)
@given(
    records=st.integers(1, 9), weights=st.integers(1, 70), per_frame=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 1, 120, 130, 40_000]),
)  # fmt: skip
def test_round_trip_with_frames_of_several_records(
    records: int, weights: int, per_frame: int, seed: int, spread: int
) -> None:
    """spread: how far, in steps, the base may be from the truth; beyond 127 they are escaped."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 1 << 16, (records, weights)).astype(np.uint16)
    moved = true.astype(np.int64) + rng.integers(-spread, spread + 1, true.shape)
    base = (moved % (1 << 16)).astype(np.uint16)
    assert np.array_equal(restore(true, base, per_frame), true)


def test_frames_can_be_decoded_apart() -> None:
    rng = np.random.default_rng(1)
    true = rng.integers(0, 1 << 16, (4, 50)).astype(np.uint16)
    base = np.zeros_like(true)
    frames = encode_frames(true, base, 1)
    ends = np.cumsum(frames.nbytes)
    data = np.frombuffer(frames.data, np.uint8)[ends[1] : ends[3]]
    steps = decode_frames(data, np.full(2, 50), frames.escapes[2:])
    assert np.array_equal(apply_distances(base[2:].reshape(-1), steps), true[2:].reshape(-1))


def test_no_frames_are_no_weights() -> None:
    none = np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.uint32)
    assert len(decode_frames(*none)) == 0


# -- damage ----------------------------------------------------------------------------------------


def sample_frames() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Three frames of two records of 40 weights; about a fifth of the weights are escaped."""
    rng = np.random.default_rng(2)
    base = rng.integers(0, 1 << 16, (6, 40)).astype(np.uint16)
    steps = np.where(rng.random(base.shape) < 0.2, 3000, rng.integers(-90, 90, base.shape))
    true = ((base.astype(np.int64) + steps) % (1 << 16)).astype(np.uint16)
    frames = encode_frames(true, base, 2)
    return np.frombuffer(frames.data, np.uint8), np.full(3, 80, np.int64), frames.escapes


def test_flipped_bits_never_crash_the_decoder() -> None:
    """Block checksums find them first; here only the shape of the answer is at stake."""
    data, counts, escapes = sample_frames()
    refused = 0
    for position in range(len(data)):
        for bit in range(8):
            damaged = data.copy()
            damaged[position] ^= 1 << bit
            try:
                assert len(decode_frames(damaged, counts, escapes)) == 240
            except BadInput:
                refused += 1
    assert refused > len(data)  # headers, block types and sizes are all checked


def test_truncated_frames_are_refused() -> None:
    data, counts, escapes = sample_frames()
    for length in range(len(data)):
        with pytest.raises(BadInput, match="exact plane"):
            decode_frames(data[:length], counts, escapes)


def test_surplus_bytes_are_refused() -> None:
    data, counts, escapes = sample_frames()
    for tail in (b"\0", b"garbage", zstandard.compress(b"x"), data.tobytes()):
        longer = np.concatenate((data, np.frombuffer(tail, np.uint8)))
        with pytest.raises(BadInput, match="exact plane"):
            decode_frames(longer, counts, escapes)


@pytest.mark.parametrize("change", [(0, 1), (0, -1), (2, 1), (1, 10)])
def test_a_wrong_escapes_table_is_refused(change: tuple[int, int]) -> None:
    data, counts, escapes = sample_frames()
    wrong = escapes.copy()
    wrong[change[0]] = int(escapes[change[0]]) + change[1]
    with pytest.raises(BadInput, match="exact plane"):
        decode_frames(data, counts, wrong)


def test_escapes_moved_between_frames_are_refused() -> None:
    data, counts, escapes = sample_frames()
    wrong = escapes.copy()
    wrong[0] += np.uint32(1)
    wrong[1] -= np.uint32(1)
    with pytest.raises(BadInput, match="exact plane"):
        decode_frames(data, counts, wrong)


def test_a_frame_cannot_claim_memory() -> None:
    """Neither by its content (a bomb) nor by the window that its header asks for."""
    counts, escapes = np.array([80]), np.zeros(1, np.uint32)
    bomb = zstandard.compress(bytes(1 << 24))
    assert len(bomb) < 2000
    with pytest.raises(BadInput, match="exact plane"):
        decode_frames(np.frombuffer(bomb, np.uint8), counts, escapes)
    # magic, no content size and a window of 64 MiB, then one raw block of 80 bytes
    wide = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([16 << 3])
    wide += (1 | 80 << 3).to_bytes(3, "little") + bytes(80)
    with pytest.raises(BadInput, match="exact plane"):
        decode_frames(np.frombuffer(wide, np.uint8), counts, escapes)


def test_random_bytes_are_refused() -> None:
    _, counts, escapes = sample_frames()
    rng = random.Random(3)
    for length in (1, 4, 18, 200):
        noise = np.frombuffer(rng.randbytes(length), np.uint8)
        with pytest.raises(BadInput, match="exact plane"):
            decode_frames(noise, counts, escapes)
