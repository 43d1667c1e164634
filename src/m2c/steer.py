"""Which INT4 codes to write where rounding errors are to make up for each other.

Rows of a matrix: over the places of each row. Down columns: over the neurons, each output apart, so
over a whole layer at once. Knows nothing about which matrices a model has.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m2c.bundle.exact import widen
from m2c.bundle.planes import GROUP, RecordLayout, group_weights, quantize
from m2c.bundle.steering import Factors, spread_scales, steer
from m2c.encode import bits_of
from m2c.kernels.encoder import Encoder
from m2c.kernels.workers import Workers

_RECORDS = 512  # whose scales are searched at a time

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U16 = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Steering:
    exact_type: str  # "bf16" or "f16"
    encoder: Encoder | None  # None: the numpy reference

    def rows(self, rows: Tensor, importance: F32, factors: Factors) -> I8 | None:
        """Codes [n, length] of rows of a matrix; None if a weight is no number.

        importance: [length], what the scale search weighs errors with.
        """
        bits = bits_of(rows, self.exact_type)
        scales = self._scales(bits, importance)
        return None if scales is None else self._steer(bits, scales, factors, columns=False)

    def columns(self, columns: Tensor, factors: Factors, workers: Workers) -> I8 | None:
        """Codes [neurons, outputs] of down columns, in the order in which codes are chosen; None
        if a weight is no number."""
        neurons, outputs = columns.shape
        bits = bits_of(columns, self.exact_type)
        flat = np.ones(outputs, np.float32)

        def searched(i: int) -> U16 | None:
            return self._scales(bits[i * _RECORDS : (i + 1) * _RECORDS], flat)

        pieces = workers.map(searched, -(-neurons // _RECORDS))
        known = [piece for piece in pieces if piece is not None]
        if len(known) < len(pieces):
            return None
        scales = np.concatenate(known)
        groups = scales.shape[1]
        share = -(-groups // workers.threads)
        codes = np.empty(bits.shape, np.int8)

        def steered(i: int) -> None:
            some = slice(i * share, (i + 1) * share)
            own = slice(some.start * GROUP, some.stop * GROUP)
            codes[:, own] = self._steer(bits[:, own], scales[:, some], factors, columns=True)

        workers.map(steered, -(-groups // share))
        return codes

    def _scales(self, bits: U16, importance: F32) -> U16 | None:
        layout = RecordLayout(1, bits.shape[1])
        if self.encoder is not None:
            weights = group_weights(importance[None], layout, 1)
            assert weights is not None
            return self.encoder.scales(bits, weights, layout, exact_type=self.exact_type)
        values = widen(np.ascontiguousarray(bits), self.exact_type)
        if not np.isfinite(values).all():
            return None
        int4 = quantize(values[:, None], importance[None])[0]
        return np.ascontiguousarray(int4[:, layout.code_nbytes :]).view(np.uint16)

    def _steer(self, bits: U16, scales: U16, factors: Factors, *, columns: bool) -> I8:
        if self.encoder is not None:
            return self.encoder.steer(
                bits, scales, factors, exact_type=self.exact_type, columns=columns
            )
        values = widen(np.ascontiguousarray(bits), self.exact_type)
        spread = spread_scales(scales.view(np.float16).astype(np.float32), bits.shape[1])
        if columns:
            return steer(values, spread, factors)
        return steer(np.ascontiguousarray(values.T), np.ascontiguousarray(spread.T), factors).T
