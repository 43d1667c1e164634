"""The header of a GGUF file: metadata and the list of tensors, each number checked before use.

Versions 2 and 3, little-endian. Layout: magic, version, two counts, key-value pairs, tensor infos,
padding to `general.alignment`, tensor data. One pass over the bytes, read in large steps.
Knows nothing about models, names or dequantisation.
"""

import struct
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.ranged_file import RangedFile

# ggml type -> name, weights per block, bytes per block
GGML_TYPES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
# value types 0-12 without string (8) and array (9)
_SCALARS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_HEADER = 256 << 20  # the header of a 128k-token vocabulary takes 8 MiB
# in all arrays together: each becomes a Python object; the largest vocabularies have 800,000
_MAX_ITEMS = 1 << 21
_STEP = 4 << 20


@dataclass(frozen=True)
class TensorInfo:
    """`shape` is in the order of numpy (GGUF stores it reversed), `offset` absolute in the file."""

    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_nbytes(self) -> int:
        return self.nbytes // prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufHeader:
    """`nbytes` is the length of everything before the padding that precedes the tensor data."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    nbytes: int


def read_header(file: RangedFile) -> GgufHeader:
    """Raises BadInput for a damaged header, UnsupportedModel for an unknown version or type."""
    cursor = _Cursor(file)
    version = _version(cursor)
    tensor_count, pair_count = cursor.unpack("<QQ")
    # the smallest tensor info takes 32 bytes, the smallest pair 13
    if tensor_count * 32 + pair_count * 13 > min(file.size, _MAX_HEADER):
        raise BadInput(f"{file.path}: the GGUF header claims more entries than the file can hold")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise BadInput(f"{file.path}: the GGUF key {key[:80]!r} occurs twice")
        metadata[key] = cursor.value(key)
    alignment = _alignment(metadata, file)
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        if name in tensors:
            raise BadInput(f"{file.path}: the GGUF tensor {name[:80]!r} occurs twice")
        tensors[name] = _tensor_info(cursor, name, alignment)
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(version, metadata, _placed(tensors, start, file), cursor.position)


class _Cursor:
    """Reads forward through the start of a file, never past its end or `_MAX_HEADER`."""

    def __init__(self, file: RangedFile) -> None:
        self.file = file
        self.data = bytearray()
        self.position = 0
        self.items = 0

    def advance(self, count: int) -> int:
        """Skip `count` bytes, which are then in `data`; returns where they begin."""
        begin, end = self.position, self.position + count
        if end > len(self.data):
            self._load(end)
        self.position = end
        return begin

    def _load(self, end: int) -> None:
        if end > self.file.size:
            raise BadInput(
                f"{self.file.path}: the GGUF header claims {end} bytes of {self.file.size}",
                "fetch the file again",
            )
        if end > _MAX_HEADER:
            raise BadInput(f"{self.file.path}: the GGUF header is larger than {_MAX_HEADER} bytes")
        loaded = len(self.data)
        step = max(end - loaded, _STEP)
        self.data += self.file.read(loaded, min(step, self.file.size - loaded))

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack_from(layout, self.data, self.advance(struct.calcsize(layout)))

    def text(self) -> str:
        (length,) = self.unpack("<Q")
        begin = self.advance(length)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{self.file.path}: the text at byte {begin} is not UTF-8") from None

    def value(self, key: str) -> Any:
        (kind,) = self.unpack("<I")
        if kind != _ARRAY:
            return self.text() if kind == _STRING else self._scalars(key, kind, 1)[0]
        kind, count = self.unpack("<IQ")
        self.items += count
        if self.items > _MAX_ITEMS:
            raise BadInput(f"{self.file.path}: {key[:80]} claims an array of {count} items")
        return self._texts(count) if kind == _STRING else self._scalars(key, kind, count)

    def _texts(self, count: int) -> list[str]:
        if self.position + 8 * count > self.file.size:
            raise BadInput(f"{self.file.path}: a list of {count} texts does not fit in the file")
        return [self.text() for _ in range(count)]

    def _scalars(self, key: str, kind: int, count: int) -> list[Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise BadInput(f"{self.file.path}: {key[:80]} has the unknown value type {kind}")
        begin = self.advance(count * np.dtype(dtype).itemsize)
        numbers = np.frombuffer(bytes(self.data[begin : self.position]), dtype)
        if kind == _BOOL:
            if (numbers > 1).any():
                raise BadInput(f"{self.file.path}: {key[:80]} is neither true nor false")
            numbers = numbers.astype(bool)
        return numbers.tolist()


def _version(cursor: _Cursor) -> int:
    path = cursor.file.path
    if cursor.file.size < 24:
        raise BadInput(f"{path}: {cursor.file.size} bytes are too few for a GGUF file")
    magic, version = cursor.unpack("<4sI")
    if magic != b"GGUF":
        raise BadInput(f"{path}: not a GGUF file")
    if version not in (2, 3):
        what = f"GGUF version {version}" if version < 1 << 16 else "a big-endian GGUF"
        raise UnsupportedModel(f"{path}: {what}", "this version reads little-endian GGUF 2 and 3")
    return version


def _alignment(metadata: dict[str, Any], file: RangedFile) -> int:
    alignment = metadata.get("general.alignment", 32)
    valid = type(alignment) is int and 0 < alignment <= 1 << 16
    if not valid or alignment & (alignment - 1):
        raise BadInput(f"{file.path}: general.alignment is {str(alignment)[:40]}, not a power of 2")
    return alignment


def _tensor_info(cursor: _Cursor, name: str, alignment: int) -> TensorInfo:
    """With `offset` still relative to the tensor data."""
    path = cursor.file.path
    (dims,) = cursor.unpack("<I")
    if not 1 <= dims <= 4:
        raise BadInput(f"{path}: {name[:80]} has {dims} dimensions")
    shape = cursor.unpack(f"<{dims}Q")[::-1]
    kind, offset = cursor.unpack("<IQ")
    if kind not in GGML_TYPES:
        known = ", ".join(known_name for known_name, _, _ in GGML_TYPES.values())
        raise UnsupportedModel(
            f"{path}: {name[:80]} has the ggml type {kind}", f"this version reads {known}"
        )
    type_name, block, block_nbytes = GGML_TYPES[kind]
    if 0 in shape or prod(shape) >= 2**63 or shape[-1] % block or offset % alignment:
        raise BadInput(f"{path}: {name[:80]} has a malformed shape or offset")
    return TensorInfo(type_name, shape, offset, prod(shape) // block * block_nbytes)


def _placed(tensors: dict[str, TensorInfo], start: int, file: RangedFile) -> dict[str, TensorInfo]:
    """The same with absolute offsets, none overlapping another or the end of the file."""
    placed = {
        name: TensorInfo(info.type_name, info.shape, start + info.offset, info.nbytes)
        for name, info in tensors.items()
    }
    end = start
    for name, info in sorted(placed.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise BadInput(f"{file.path}: {name[:80]} overlaps the tensor before it")
        end = info.offset + info.nbytes
        if end > file.size:
            raise BadInput(
                f"{file.path}: {name[:80]} ends at byte {end} of {file.size}",
                "fetch the file again",
            )
    return placed
