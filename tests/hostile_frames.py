"""Records and frames of the exact plane that lie, for both decoders."""

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import numpy as np
import torch

from m2c.bundle.exact import encode_frames, round_to
from m2c.bundle.planes import RecordLayout, quantize
from m2c.kernels.native import NativeKernels, load_native
from m2c.kernels.rows import ExactFrames, PackedRows, as_exact_tensor

# records, vectors, length, records per frame
SHAPES: Final = ((7, 3, 20, 1), (9, 1, 33, 4), (5, 1, 96, 2), (3, 2, 250, 3))


@dataclass(frozen=True)
class Case:
    rows: PackedRows
    words: str
    finite: bool  # whether all scales are numbers; else any weights will do

    @classmethod
    def mutated(cls, rng: random.Random) -> "Case":
        shape, kind = rng.choice(SHAPES), rng.choice(("bf16", "f16"))
        rows = honest(shape, kind)
        frames = rows.frames
        assert frames is not None
        int4, int8, data = (
            rows.int4.numpy().copy(),
            rows.int8.numpy().copy(),
            frames.data.numpy().copy(),
        )
        nbytes, escapes = frames.nbytes.copy(), frames.escapes.copy()
        what = rng.choice(("int4", "int8", "data", "sizes", "escapes", "places", "scales"))
        if what in ("int4", "int8", "data"):
            _scribble(rng, {"int4": int4, "int8": int8, "data": data}[what])
        elif what == "sizes":  # bytes move from one frame to the next, or are lost
            i, j = (rng.randrange(len(nbytes)) for _ in range(2))
            moved = rng.choice((1, 6, int(nbytes[i])))
            nbytes[i] -= min(moved, int(nbytes[i]))
            nbytes[j] += len(data) - int(nbytes.sum())
        elif what == "escapes":
            i = rng.randrange(len(escapes))
            escapes[i] = rng.choice(
                (0, int(escapes[i]) + 1, int(nbytes[i]) // 6, 1 << 31, 2**32 - 1)
            )
        elif what == "scales":
            layout = rows.layout
            scales = int4[:, layout.code_nbytes :]
            scales[rng.randrange(len(scales))] = rng.choice((0, 0x7C, 0xFC, 0x7E, 1, 0xFF))
        else:
            _misplace(rng, data, nbytes, escapes)
        made = replace(frames, data=torch.from_numpy(data), nbytes=nbytes, escapes=escapes)
        layout = rows.layout
        scales = np.ascontiguousarray(int4[:, layout.code_nbytes :]).view(np.float16)
        new = PackedRows(layout, torch.from_numpy(int4), torch.from_numpy(int8), made)
        return cls(new, f"{shape} {kind} {what}", bool(np.isfinite(scales).all()))

    def native(self) -> torch.Tensor:
        return kernels().decode(self.rows)

    def reference(self) -> torch.Tensor:
        assert self.rows.frames is not None
        bits = self.rows.exact_bits(0, len(self.rows))
        return as_exact_tensor(bits, self.rows.frames.exact_type)


@cache
def kernels() -> NativeKernels:
    made = load_native("auto", 1)
    assert made is not None
    return made


@cache
def honest(shape: tuple[int, int, int, int], exact_type: str) -> PackedRows:
    records, vectors, length, per_frame = shape
    rng, layout = np.random.default_rng(records), RecordLayout(vectors, length)
    values = rng.standard_normal((records, vectors, length)).astype(np.float32)
    int4, int8, _ = quantize(values)
    values[rng.random(values.shape) < 0.1] *= 1e3
    true = round_to(values, exact_type).reshape(records, -1)
    made = encode_frames(true, int4, int8, layout, exact_type=exact_type, frame_records=per_frame)
    data = np.frombuffer(made.data, np.uint8).copy()
    frames = ExactFrames(torch.from_numpy(data), made.nbytes, made.escapes, per_frame, exact_type)
    return PackedRows(layout, torch.from_numpy(int4), torch.from_numpy(int8), frames)


def _scribble(rng: random.Random, array: np.ndarray) -> None:
    flat = array.reshape(-1)
    for _ in range(rng.choice((1, 1, 3, 50))):
        flat[rng.randrange(len(flat))] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))


def _misplace(
    rng: random.Random, data: np.ndarray, nbytes: np.ndarray, escapes: np.ndarray
) -> None:
    """Another position for one escape."""
    held = np.flatnonzero(escapes)
    frame = int(held[rng.randrange(len(held))])
    end = int(nbytes[: frame + 1].sum())
    at = end - 6 * rng.randrange(1, int(escapes[frame]) + 1)
    place = rng.choice((0, 1, 63, 65, 1 << 16, 1 << 31, 2**32 - 1))
    data[at : at + 4] = np.frombuffer(place.to_bytes(4, "little"), np.uint8)
