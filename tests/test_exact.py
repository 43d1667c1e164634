"""The exact plane: every 16-bit weight comes back bit for bit, false frames are refused."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2c.bundle.exact import (
    ESCAPE_NBYTES,
    EXACT_TYPES,
    Frames,
    decode_frames,
    encode_frames,
    round_to,
    widen,
)
from m2c.bundle.planes import RecordLayout, dequantize, pack_nibbles, quantize
from m2c.errors import BadInput

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
EVERY = np.arange(1 << 16, dtype=np.uint16)
# F16: one, a third, both signs, the smallest, a subnormal, the largest, both zeros
SCALES = (0x3C00, 0x3555, 0xB555, 0x0001, 0x8003, 0x03FF, 0x7BFF, 0xFBFF, 0x0000, 0x8000)


def finite(exact_type: str) -> U16:
    """All bit patterns of numbers: both zeros, subnormals, the largest."""
    with np.errstate(invalid="ignore"):
        return EVERY[np.isfinite(widen(EVERY, exact_type))]


@dataclass(frozen=True)
class Coded:
    """Weights with codes, well chosen or not, and the frames that lead from one to the other."""

    layout: RecordLayout
    true: U16
    int4: U8
    int8: U8
    exact_type: str
    frame_records: int = 1

    def encode(self) -> Frames:
        return encode_frames(
            self.true, self.int4, self.int8, self.layout, exact_type=self.exact_type,
            frame_records=self.frame_records,
        )  # fmt: skip

    def decode(self, data: bytes, nbytes: Any, escapes: Any) -> U16:
        return decode_frames(
            np.frombuffer(data, np.uint8), np.array(nbytes, np.uint32),
            np.array(escapes, np.uint32), self.int4, self.int8, self.layout,
            exact_type=self.exact_type, frame_records=self.frame_records,
        )  # fmt: skip

    def assert_restored(self) -> Frames:
        frames = self.encode()
        assert len(frames.data) == frames.nbytes.sum()
        assert np.array_equal(self.decode(frames.data, frames.nbytes, frames.escapes), self.true)
        return frames


def coded(values: F32, exact_type: str, frame_records: int = 1) -> Coded:
    """Weights [records, vectors, length] with the codes that `quantize` gives them."""
    true = round_to(values, exact_type)
    int4, int8, _ = quantize(widen(true, exact_type))
    layout = RecordLayout(*values.shape[1:])
    return Coded(layout, true.reshape(len(true), -1), int4, int8, exact_type, frame_records)


def with_codes(
    true: U16, n: npt.NDArray[np.int64], scales: npt.NDArray[np.int64], exact_type: str
) -> Coded:
    """Weights [records, length] with codes n = 16 q + r of the same shape, and F16 scales."""
    layout = RecordLayout(1, true.shape[1])
    padded = np.zeros((len(true), layout.padded), np.int64)
    padded[:, : layout.length] = n
    q = (padded + 8) >> 4
    int8 = pack_nibbles((padded - 16 * q).astype(np.int8))
    words = np.broadcast_to(scales.astype(np.uint16), (len(true), layout.groups))
    halves = np.ascontiguousarray(words).view(np.uint8)
    int4 = np.concatenate((pack_nibbles(q.astype(np.int8)), halves), axis=1)
    return Coded(layout, true, int4, int8, exact_type)


def gaussian(*shape: int, seed: int = 0) -> F32:
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# -- a reader in plain Python ----------------------------------------------------------------------


def candidates(n: int, scale: int, exact_type: str) -> list[int]:
    """Bits that a weight with code n may have, in the order of their offsets; the format's text."""
    s = float(np.uint16(scale).view(np.float16))
    magnitudes = widen(np.arange(0x7C00 if exact_type == "f16" else 0x7F80, dtype=np.uint16),
                       exact_type).astype(np.float64)  # fmt: skip
    m, r = abs(n), (n + 8) % 16 - 8
    further = {7: 2.5, -8: 1.5}.get(r, 0)  # away from q
    outwards = (r == 7) == (n > 0)
    below = 0 if m == 0 else m - 0.5 - (0 if outwards else further)
    above = m + 0.5 + (further if outwards else 0)
    first = int(np.searchsorted(magnitudes, abs(s) / 16 * below, "left"))
    last = int(np.searchsorted(magnitudes, abs(s) / 16 * above, "right")) - 1
    if n == 0:
        return [bits | sign for bits in range(last + 1) for sign in (0, 0x8000)]
    sign = 0x8000 if (n < 0) != (scale >= 0x8000) else 0
    return [bits | sign for bits in range(first, max(last, first) + 1)]


def read_slowly(data: bytes, n: list[int], scales: list[int], exact_type: str) -> list[int]:
    """One frame of one record with a scale per weight, no padding: weights, bit by bit."""
    bits = [byte >> i & 1 for byte in data for i in range(8)]
    weights = []
    for start in range(0, len(n), 64):
        pairs = zip(n[start : start + 64], scales[start : start + 64], strict=True)
        lists = [candidates(code, scale, exact_type) for code, scale in pairs]
        widths = [(len(found) - 1).bit_length() for found in lists]
        offsets = [0] * len(lists)
        for k in range(max(widths)):
            for i, width in enumerate(widths):
                if width > k:
                    offsets[i] |= bits.pop(0) << k
        weights += [found[offset] for found, offset in zip(lists, offsets, strict=True)]
    used = -(-(8 * len(data) - len(bits)) // 8)
    for at in range(used, len(data), ESCAPE_NBYTES):
        position = int.from_bytes(data[at : at + 4], "little")
        weights[position] = int.from_bytes(data[at + 4 : at + 6], "little")
    return weights


@pytest.mark.parametrize("exact_type", EXACT_TYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_frames_are_what_the_format_says(exact_type: str, scale: int) -> None:
    """Every code, weights of its interval's ends and middle, and some that it cannot have."""
    rng = np.random.default_rng(scale)
    n = np.repeat(np.arange(-136, 120), 2)
    drawn = [rng.choice(candidates(int(code), scale, exact_type)) for code in n]
    true = np.array(drawn, np.uint16)
    largest = 0x7BFF if exact_type == "f16" else 0x7F7F
    true = np.where((true & 0x7FFF) > largest, 0, true).astype(np.uint16)
    strange = rng.random(len(n)) < 0.02
    true[strange] = rng.choice(finite(exact_type), int(strange.sum()))
    case = with_codes(true[None], n[None], np.array([[scale]]), exact_type)
    frames = case.assert_restored()
    assert read_slowly(frames.data, n.tolist(), [scale] * len(n), exact_type) == true.tolist()


@pytest.mark.parametrize("exact_type", EXACT_TYPES)
def test_what_rounds_to_a_code_is_no_escape(exact_type: str) -> None:
    """All weights that lie in reach of a scale: the interval is neither too small nor too large."""
    for scale in (0x3C00, 0xB555, 0x2E66, 0x0455):
        true = finite(exact_type)
        ratio = widen(true, exact_type) / np.float64(np.uint16(scale).view(np.float16))
        near = np.flatnonzero(np.abs(ratio) < 7.4)
        near = near[: len(near) // 64 * 64]
        true, ratio = true[near], ratio[near]
        # codes up to 10/16 from the weight, as steering takes them
        q = np.clip(np.rint(ratio + np.resize([0, 1 / 8, -1 / 8], len(ratio))), -8, 7)
        n = (16 * q + np.clip(np.rint((ratio - q) * 16), -8, 7)).astype(np.int64)
        case = with_codes(true.reshape(-1, 64), n.reshape(-1, 64), np.array([[scale]]), exact_type)
        assert case.assert_restored().escapes.sum() == 0


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_type", EXACT_TYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_number_is_restored_from_any_code(exact_type: str, scale: int) -> None:
    true = np.resize(finite(exact_type), (64, 1024))
    n = np.random.default_rng(scale).integers(-136, 120, true.shape)
    with_codes(true, n, np.array([[scale]]), exact_type).assert_restored()


@settings(max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 130)),
    exact_type=st.sampled_from(EXACT_TYPES), per_frame=st.integers(1, 5),
    power=st.floats(-42, 38), outliers=st.sampled_from([0, 0.02, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_round_trip_of_quantized_weights(
    shape: tuple[int, int, int], exact_type: str, per_frame: int, power: float, outliers: float,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    power = min(power, 4) if exact_type == "f16" else power
    x = rng.standard_normal(shape) * np.where(rng.random(shape) < outliers, 1e3, 1)
    values = np.clip(x * 10.0**power, -3e38, 3e38).astype(np.float32)
    values = np.clip(values, -6e4, 6e4) if exact_type == "f16" else values
    coded(values, exact_type, per_frame).assert_restored()


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 130)),
    exact_type=st.sampled_from(EXACT_TYPES), per_frame=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_round_trip_with_codes_of_other_weights(
    shape: tuple[int, int, int], exact_type: str, per_frame: int, seed: int
) -> None:
    """Any bytes are codes, any F16 a scale, infinity and NaN in a hostile bundle."""
    rng = np.random.default_rng(seed)
    layout = RecordLayout(*shape[1:])
    true = rng.choice(finite(exact_type), (shape[0], shape[1] * shape[2]))
    planes = [
        rng.integers(0, 256, (shape[0], layout.nbytes(plane))).astype(np.uint8)
        for plane in ("int4", "int8")
    ]
    Coded(layout, true, *planes, exact_type, per_frame).assert_restored()


def test_frames_can_be_decoded_apart() -> None:
    whole = coded(gaussian(5, 3, 50), "bf16", 2)
    frames = whole.encode()
    begin = int(frames.nbytes[0])
    rest = Coded(whole.layout, whole.true[2:], whole.int4[2:], whole.int8[2:], "bf16", 2)
    got = rest.decode(frames.data[begin:], frames.nbytes[1:], frames.escapes[1:])
    assert np.array_equal(got, whole.true[2:])


def test_large_pieces_are_worked_through_in_chunks() -> None:
    case = coded(gaussian(700, 1, 600), "bf16", 16)
    frames = case.assert_restored()
    alone = coded(gaussian(700, 1, 600)[:16], "bf16", 16).encode()
    assert frames.data[: frames.nbytes[0]] == alone.data


def test_no_records_are_no_weights() -> None:
    layout = RecordLayout(3, 40)
    none = np.empty((0, 120), np.uint16)
    int4, int8 = (np.empty((0, layout.nbytes(plane)), np.uint8) for plane in ("int4", "int8"))
    frames = Coded(layout, none, int4, int8, "bf16", 4).assert_restored()
    assert len(frames.nbytes) == len(frames.escapes) == 0


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exact_type", "bits"), [("bf16", 3.2), ("f16", 6.3)])
def test_gaussian_weights_take_few_bits(exact_type: str, bits: float) -> None:
    case = coded(gaussian(64, 1, 1024), exact_type)
    frames = case.assert_restored()
    assert 8 * len(frames.data) / case.true.size < bits
    assert frames.escapes.sum() == 0


def test_weights_beyond_the_scales_are_escapes() -> None:
    """The size is that of the offsets and six bytes for each."""
    values = gaussian(1, 1, 64)
    plain = coded(values, "bf16")
    before = plain.encode()
    true = plain.true.copy()
    true[0, [3, 40]] = round_to(np.float32([7.0, -9.0]), "bf16")
    case = Coded(plain.layout, true, plain.int4, plain.int8, "bf16")
    frames = case.assert_restored()
    assert frames.escapes.tolist() == [2]
    assert len(frames.data) == len(before.data) + 2 * ESCAPE_NBYTES


def test_a_weight_of_the_other_sign_is_an_escape() -> None:
    n = np.full((1, 32), 20)
    true = round_to(np.full((1, 32), 20 / 16, np.float32), "bf16")
    true[0, 5] |= 0x8000
    frames = with_codes(true, n, np.array([[0x3C00]]), "bf16").assert_restored()
    assert frames.escapes.tolist() == [1]


def test_zeros_cost_nothing_beyond_their_signs() -> None:
    values = np.zeros((2, 1, 64), np.float32)
    values[1, 0, ::3] = -0.0
    frames = coded(values, "bf16").assert_restored()
    assert frames.nbytes.tolist() == [8, 8]
    assert not any(frames.data[:8])


# -- rounding --------------------------------------------------------------------------------------


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


# -- damage ----------------------------------------------------------------------------------------


def sample() -> Coded:
    """Three frames of two records of 40 weights, a fifth of them escapes."""
    case = coded(gaussian(6, 1, 40), "bf16", 2)
    true = np.where(np.random.default_rng(2).random((6, 40)) < 0.2, 0x4000, case.true)
    return Coded(case.layout, true.astype(np.uint16), case.int4, case.int8, "bf16", 2)


def test_flipped_bits_never_crash_the_decoder() -> None:
    """Block checksums find them first; here only the shape of the answer is at stake."""
    case = sample()
    frames = case.encode()
    refused = 0
    for position in range(len(frames.data)):
        for bit in range(8):
            damaged = bytearray(frames.data)
            damaged[position] ^= 1 << bit
            try:
                got = case.decode(bytes(damaged), frames.nbytes, frames.escapes)
            except BadInput:
                refused += 1
            else:
                assert got.shape == case.true.shape
    assert refused > 24 * frames.escapes.sum()  # the high bytes of their positions


@pytest.mark.parametrize("change", [-ESCAPE_NBYTES, -1, 1, ESCAPE_NBYTES, 1000])
def test_frames_of_another_length_are_refused(change: int) -> None:
    """Whether the index says so, or the bytes are missing, or surplus."""
    case = sample()
    frames = case.encode()
    data = frames.data[:change] if change < 0 else frames.data + bytes(change)
    nbytes = frames.nbytes.astype(np.int64)
    with pytest.raises(BadInput, match="wrong length"):
        case.decode(data, nbytes, frames.escapes)
    nbytes[2] += change
    with pytest.raises(BadInput, match="wrong length"):
        case.decode(data, nbytes, frames.escapes)


def test_bytes_moved_between_frames_are_refused() -> None:
    case = sample()
    frames = case.encode()
    with pytest.raises(BadInput, match="wrong length"):
        case.decode(frames.data, frames.nbytes + np.array([1, -1, 0]), frames.escapes)


@pytest.mark.parametrize("change", [(0, 1), (0, -1), (2, 1), (1, 10), (1, 1 << 31)])
def test_a_wrong_escapes_table_is_refused(change: tuple[int, int]) -> None:
    case = sample()
    frames = case.encode()
    wrong = frames.escapes.astype(np.int64)
    wrong[change[0]] += change[1]
    with pytest.raises(BadInput, match="wrong length"):
        case.decode(frames.data, frames.nbytes, wrong)


@pytest.mark.parametrize("tables", [slice(2), slice(1, 3), slice(0)])
def test_tables_of_another_number_of_frames_are_refused(tables: slice) -> None:
    case = sample()
    frames = case.encode()
    with pytest.raises(BadInput, match="wrong length"):
        case.decode(frames.data, frames.nbytes[tables], frames.escapes[tables])


@pytest.mark.parametrize("position", [80, 81, 1 << 31, (1 << 32) - 1])
def test_escapes_beyond_their_frame_are_refused(position: int) -> None:
    case = sample()
    frames = case.encode()
    last = len(frames.data) - ESCAPE_NBYTES
    damaged = frames.data[:last] + position.to_bytes(4, "little") + frames.data[last + 4 :]
    with pytest.raises(BadInput, match="out of place"):
        case.decode(damaged, frames.nbytes, frames.escapes)


@pytest.mark.parametrize("repeat", [True, False])
def test_escapes_must_ascend(repeat: bool) -> None:
    case = sample()
    frames = case.encode()
    tail = frames.data[-2 * ESCAPE_NBYTES :]
    first, second = tail[:ESCAPE_NBYTES], tail[ESCAPE_NBYTES:]
    wrong = first + first if repeat else second + first
    with pytest.raises(BadInput, match="out of place"):
        case.decode(frames.data[: -len(tail)] + wrong, frames.nbytes, frames.escapes)


def test_escapes_in_a_short_last_frame_are_checked_against_its_own_weights() -> None:
    case = coded(gaussian(3, 1, 40), "bf16", 2)
    true = case.true.copy()
    true[2, 39] = 0x4000
    case = Coded(case.layout, true, case.int4, case.int8, "bf16", 2)
    frames = case.assert_restored()
    assert frames.data[-ESCAPE_NBYTES:] == bytes([39, 0, 0, 0, 0x00, 0x40])
    damaged = frames.data[:-ESCAPE_NBYTES] + bytes([40, 0, 0, 0, 0x00, 0x40])
    with pytest.raises(BadInput, match="out of place"):
        case.decode(damaged, frames.nbytes, frames.escapes)


def test_an_offset_beyond_its_interval_gives_some_weight() -> None:
    """Nothing is sized by it; the weight is what the sum of both says."""
    n, true = np.full((1, 32), 119), np.zeros((1, 32), np.uint16)
    case = with_codes(true, n, np.array([[0x7BFF]]), "f16")
    count = len(candidates(119, 0x7BFF, "f16"))
    assert count == 1
    case = with_codes(true, np.full((1, 32), 1), np.array([[0x3C00]]), "f16")
    width = (len(candidates(1, 0x3C00, "f16")) - 1).bit_length()
    got = case.decode(b"\xff" * (4 * width), [4 * width], [0])
    assert (got == candidates(1, 0x3C00, "f16")[0] + (1 << width) - 1).all()


def test_int8_values_lie_in_their_intervals() -> None:
    """So a weight that is its own INT8 value is never an escape."""
    case = coded(gaussian(8, 3, 100), "f16")
    values = dequantize(case.layout, case.int4, case.int8).reshape(8, -1)
    true = round_to(values, "f16")
    same = Coded(case.layout, true, case.int4, case.int8, "f16")
    assert same.assert_restored().escapes.sum() == 0
