"""A safetensors file: its header read strictly, its tensors read by rows.

The header is 8 bytes of length and a JSON object of name -> dtype, shape, data_offsets; the tensors
follow, back to back, up to the last byte. A header that does not describe exactly that is refused.
Knows nothing about models: names are whatever the file says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import torch

from m2c.bundle.strict import parse_object
from m2c.errors import BadInput, UnsupportedModel
from m2c.model.ranged_file import RangedFile, check_rows

_MAX_HEADER = 100_000_000
_MAX_DIMS = 8
_BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_TORCH: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor: `offset` is absolute in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """Opened at once, read on demand. `entries` lists the tensors, `header` is its raw bytes."""

    def __init__(self, path: Path) -> None:
        """Raises BadInput when the header is not a well-formed one for this very file."""
        self.path = path
        self.file = RangedFile(path)
        self.header = _read_header(self.file)
        self.entries: Mapping[str, Entry] = _parse_header(self.header, self.file)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) in the file's dtype: f32, f16 or bf16. The tensor owns its memory.

        Raises UnsupportedModel for another dtype, BadInput when the file was cut since it was
        opened, KeyError and IndexError for a name or rows that are not there.
        """
        entry = self.entries[name]
        dtype = _TORCH.get(entry.dtype)
        if dtype is None:
            message = f"{self.path}: {name} is stored as {entry.dtype}"
            raise UnsupportedModel(message, "this version reads F32, F16 and BF16")
        shape = entry.shape or (1,)
        end = check_rows(name, start, stop, shape[0])
        row_nbytes = prod(shape[1:]) * dtype.itemsize
        tensor = torch.empty((end - start, *shape[1:]), dtype=dtype)
        if tensor.numel():
            view = tensor.view(-1).view(torch.uint8).numpy().data
            self.file.read_into(view, entry.offset + start * row_nbytes)
        return tensor if entry.shape else tensor.reshape(())


def _read_header(file: RangedFile) -> bytes:
    if file.size < 10:
        raise BadInput(f"{file.path}: {file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= min(_MAX_HEADER, file.size - 8):
        raise BadInput(
            f"{file.path}: the safetensors header claims {length} bytes", "fetch the file again"
        )
    header = bytes(file.read(8, length))
    if header[:1] != b"{":
        raise BadInput(f"{file.path}: not a safetensors file")
    return header


def _parse_header(header: bytes, file: RangedFile) -> dict[str, Entry]:
    path = str(file.path)
    raw = parse_object(header, f"{path}: header")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadInput(f"{path}: __metadata__ is not a map of strings")
    start = 8 + len(header)
    entries = {name: _entry(name, facts, start, path) for name, facts in raw.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise BadInput(f"{path}: {name[:80]} leaves a hole or overlaps at byte {entry.offset}")
        end += entry.nbytes
    if end != file.size:
        hint = "fetch the file again" if end > file.size else ""
        raise BadInput(f"{path}: holds {file.size} bytes, its header describes {end}", hint)
    return entries


def _entry(name: str, facts: Any, start: int, path: str) -> Entry:
    name = name[:80]  # for errors
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadInput(f"{path}: the entry of {name} needs dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise BadInput(f"{path}: {name} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise BadInput(f"{path}: {name} has a malformed shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadInput(f"{path}: {name} has malformed data_offsets")
    nbytes = offsets[1] - offsets[0]
    if prod(shape) * _BITS[dtype] != nbytes * 8:
        raise BadInput(f"{path}: {name} takes {nbytes} bytes, which is not its shape in {dtype}")
    return Entry(dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:
    """A list of non-negative 63-bit integers; `true` is not one."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )
