"""The INT4 and INT8 planes: nested codes of a group of weights that share one scale.

A vector of weights is cut into groups of `GROUP` consecutive values with one FP16 scale *s* each.
The INT4 plane stores a code q in [-8, 7]; its value is s*q. The INT8 plane stores a second code r
in [-8, 7] that refines it to s*(q + r/16). Codes are stored with 8 added, two to a byte: byte j of
a group holds element j in its low and element j + GROUP/2 in its high nibble. docs/FORMAT.md,
section "Planes", is the specification.

Knows nothing about files, models or torch: arrays in, arrays out.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GROUP = 32
CODE_BIAS = 8
# levels given to the largest weight of a group; four more candidates gain nothing measurable
_SEARCH = (6.8, 7.3, 7.8, 8.2, 8.5)
# what FP16 scales reach: larger weights saturate, groups of smaller ones are zero
_LARGEST = np.float32(65504 * 8.5)
_SMALLEST = np.float32(2.0**-24)

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RecordLayout:
    """A record is `vectors` weight vectors of `length` values each, padded to whole groups.

    A neuron is 3 vectors (gate row, up row, down column); a row of a dense matrix is 1.
    """

    vectors: int
    length: int

    @property
    def groups(self) -> int:
        """Groups per vector."""
        return -(-self.length // GROUP)

    @property
    def padded(self) -> int:
        """Stored values per vector."""
        return self.groups * GROUP

    @property
    def code_nbytes(self) -> int:
        """Bytes of the 4-bit codes of one record; also the size of an INT8 record."""
        return self.vectors * self.padded // 2

    @property
    def scale_nbytes(self) -> int:
        return self.vectors * self.groups * 2

    def nbytes(self, plane: str) -> int:
        """Bytes of one record in `plane` ("int4" or "int8")."""
        return self.code_nbytes + (self.scale_nbytes if plane == "int4" else 0)


def pack_nibbles(codes: npt.NDArray[np.int8]) -> U8:
    """Codes [..., n] in [-8, 7], n a multiple of GROUP, to bytes [..., n / 2]."""
    grouped = (codes + CODE_BIAS).astype(np.uint8).reshape(*codes.shape[:-1], -1, 2, GROUP // 2)
    packed = grouped[..., 0, :] | (grouped[..., 1, :] << 4)
    return np.ascontiguousarray(packed.reshape(*codes.shape[:-1], codes.shape[-1] // 2))


def unpack_nibbles(packed: U8) -> npt.NDArray[np.int8]:
    """Inverse of `pack_nibbles`: bytes [..., n / 2] to codes [..., n]."""
    halves = packed.reshape(*packed.shape[:-1], -1, 1, GROUP // 2)
    both = np.concatenate((halves & 15, halves >> 4), axis=-2).astype(np.int8) - CODE_BIAS
    return both.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def quantize(
    values: F32, importance: F32 | None = None, chosen: npt.NDArray[np.int8] | None = None
) -> tuple[U8, U8, F32]:
    """Quantize records to both planes.

    values: [records, vectors, length] f32, finite. importance: [vectors, length] f32 or None: the
    mean square of the activation each weight meets; the scale search minimises the error weighted
    by it. chosen: INT4 codes like values, where they are not to be the nearest.

    Returns INT4 records [records, nbytes] u8, INT8 records [records, nbytes] u8, and the
    value after the INT8 plane [records, vectors, length] f32.
    """
    records, vectors, length = values.shape
    layout = RecordLayout(vectors, length)
    x = np.clip(_grouped(values, layout), -_LARGEST, _LARGEST)
    scale = _search_scales(x, group_weights(importance, layout, records))
    given = None if chosen is None else _grouped(chosen.astype(np.float32), layout)
    q, r = _codes(x, scale, given)
    # + 0 turns the -0 that rint may give into the +0 that stored codes decode to
    value = (scale * (q + r * np.float32(1 / 16) + np.float32(0))).T.reshape(
        records, vectors, layout.padded
    )[..., :length]
    codes4 = pack_nibbles(q.T.astype(np.int8).reshape(records, -1))
    codes8 = pack_nibbles(r.T.astype(np.int8).reshape(records, -1))
    scales = scale.astype(np.float16).reshape(records, -1).view(np.uint8)
    return np.concatenate((codes4, scales), axis=1), codes8, np.ascontiguousarray(value)


def _grouped(values: F32, layout: RecordLayout) -> F32:
    """[records, vectors, length] to [GROUP, records * vectors * groups], padded with zeros.

    Reductions then run along axis 0, vectorised and in a fixed order, so the same bytes come out
    on every machine.
    """
    padded = np.zeros((len(values), layout.vectors, layout.padded), np.float32)
    padded[..., : layout.length] = values
    return np.ascontiguousarray(padded.reshape(-1, GROUP).T)


def dequantize(layout: RecordLayout, int4: U8, int8: U8 | None = None) -> F32:
    """Records [records, nbytes] u8 of the INT4 and, if given, the INT8 plane to values f32."""
    records = int4.shape[0]
    codes = unpack_nibbles(int4[:, : layout.code_nbytes]).astype(np.float32)
    if int8 is not None:
        codes += unpack_nibbles(int8).astype(np.float32) * np.float32(1 / 16)
    scales = np.ascontiguousarray(int4[:, layout.code_nbytes :]).view(np.float16)
    grouped = codes.reshape(-1, GROUP) * scales.astype(np.float32).reshape(-1, 1)
    return grouped.reshape(records, layout.vectors, layout.padded)[..., : layout.length]


def group_weights(importance: F32 | None, layout: RecordLayout, records: int) -> F32 | None:
    """Importance laid out like the groups, [GROUP, records * vectors * groups], mean 1."""
    if importance is None:
        return None
    padded = np.zeros((layout.vectors, layout.padded), np.float32)
    padded[:, : layout.length] = importance
    grouped = padded.reshape(-1, GROUP)
    mean = grouped.mean(axis=1, keepdims=True)
    # a floor keeps channels that calibration never excited from being thrown away
    grouped = np.where(mean > 0, grouped / np.where(mean > 0, mean, 1), 1) + np.float32(0.02)
    return np.tile(np.ascontiguousarray(grouped.T.astype(np.float32)), (1, records))


def _search_scales(x: F32, weight: F32 | None) -> F32:
    """The FP16-representable scale of each group [M] that minimises the (weighted) INT4 error.

    Scales are bounded below so that the INT8 code reaches every value of the group: without the
    bound the INT4 error falls by another 0.6 %, but the INT8 error rises by 40-60 %.
    """
    top = np.abs(x).argmax(axis=0)
    extreme = x[top, np.arange(x.shape[1])]
    nothing = np.abs(extreme) < _SMALLEST
    safe = np.where(nothing, np.float32(1), extreme)
    opposite = -np.minimum((x / safe).min(axis=0), 0)
    bound = np.maximum(np.float32(1 / 8.5), opposite * np.float32(1 / 7.45))
    weighted = x if weight is None else x * weight
    best_error = np.full(x.shape[1], np.inf, np.float32)
    best = np.zeros(x.shape[1], np.float32)
    for steps in _SEARCH:
        q = np.rint(x * (np.float32(-steps) / safe))
        np.clip(q, -8, 7, out=q)
        along = np.add.reduce(weighted * q, axis=0)
        np.multiply(q, q, out=q)
        if weight is not None:
            q *= weight
        norm = np.add.reduce(q, axis=0)
        # the scale that fits these codes best, as a share of the extreme value
        share = np.abs(along / np.where(norm == 0, 1, norm) / safe)
        scale = _as_f16(-safe * np.maximum(share, bound))
        error = _error(x, scale, weight)
        better = error < best_error
        best_error[better] = error[better]
        best[better] = scale[better]
    best[nothing] = 0
    return best


def _as_f16(scale: F32) -> F32:
    limit = np.float32(np.finfo(np.float16).max)
    return np.clip(scale, -limit, limit).astype(np.float16).astype(np.float32)


def _error(x: F32, scale: F32, weight: F32 | None) -> F32:
    """Summed (weighted) squared INT4 error of each group [M]."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    q = np.rint(x * inverse)
    np.clip(q, -8, 7, out=q)
    q *= scale
    q -= x
    np.multiply(q, q, out=q)
    if weight is not None:
        q *= weight
    return np.add.reduce(q, axis=0)


def _codes(x: F32, scale: F32, given: F32 | None) -> tuple[F32, F32]:
    """Codes q and r [GROUP, M] as f32 integers: nearest to x given the scale, and q if given."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    ratio = np.clip(x * inverse, -9, 9)  # an FP16 scale that underflowed must not overflow here
    q = np.clip(np.rint(ratio), -8, 7) if given is None else given
    r = np.clip(np.rint((ratio - q) * 16), -8, 7)
    return q, r
