"""A sentencepiece `tokenizer.model`: the fields of its protobuf that decide what text becomes.

A strict reader of our own: lengths are checked before they are used, and a field that is read has
the type it must have. Knows nothing about tokenizing: that is `m2c.tokenizer_spm`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from m2c.errors import BadInput, UnsupportedModel

MAX_NBYTES: Final = 16 << 20  # the largest published ones take 5 MB
UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
MODEL_TYPES: Final = {UNIGRAM: "unigram", BPE: "BPE", 3: "word", 4: "char"}
_MAX_PIECES = 1 << 20  # and fields of any message: each takes a microsecond and 100 bytes
_AGAIN = "fetch the file again from where the model came from"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True)
class SpmFile:
    """`kinds`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte, as in GGUF."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    model_type: int
    bos_id: int
    eos_id: int
    whitespace_as_suffix: bool
    has_rules: bool  # text, or what is decoded, goes through a table of replacements
    dummy_prefix: bool
    removes_whitespace: bool
    escapes_whitespace: bool


def read_spm(data: bytes, source: str) -> SpmFile:
    """Raises BadInput for bytes that are no such file; `source` names them."""
    if len(data) > MAX_NBYTES:
        raise BadInput(f"{source}: {len(data)} bytes is more than any tokenizer.model holds")
    if _is_tiktoken(data):
        raise UnsupportedModel(
            f"{source}: a tiktoken vocabulary, not a sentencepiece one",
            "get the tokenizer.json of this model and put it beside it",
        )
    try:
        return _read(data)
    except (ValueError, struct.error) as error:
        raise BadInput(f"{source}: not a sentencepiece model ({error})", _AGAIN) from None


def _read(data: bytes) -> SpmFile:
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    denormalizer: dict[int, int | bytes] = {}
    settings = {2: trainer, 3: normalizer, 5: denormalizer}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            pieces.append(_bytes(piece.get(1, b"")).decode("utf-8"))
            scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            kinds.append(_int(piece.get(3, 1)))
        elif number in settings:
            settings[number].update(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    return SpmFile(
        pieces, scores, kinds,
        model_type=_int(trainer.get(3, UNIGRAM)),
        bos_id=_int(trainer.get(41, 1)),
        eos_id=_int(trainer.get(42, 2)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        has_rules=bool(normalizer.get(2) or denormalizer.get(2)),
        dummy_prefix=bool(normalizer.get(3, 1)),
        removes_whitespace=bool(normalizer.get(4, 1)),
        escapes_whitespace=bool(normalizer.get(5, 1)),
    )  # fmt: skip


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; 4- and 8-byte values as bytes."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > _MAX_PIECES:
            raise ValueError(f"more than {_MAX_PIECES} fields")
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if kind == _BYTES:
            nbytes, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            nbytes = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if nbytes > len(data) - at:
            raise ValueError(f"it ends inside a field, at byte {at}")
        yield tag >> 3, data[at : at + nbytes]
        at += nbytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & ((1 << 64) - 1), at
    raise ValueError(f"a number without end at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number belongs")
    return value


def _is_tiktoken(data: bytes) -> bool:
    """Lines of a base64 word and a rank: what Llama 3's original folder calls tokenizer.model."""
    first, newline, _ = data[:64].partition(b"\n")
    word, space, rank = first.partition(b" ")
    return bool(newline and space and word and rank.isdigit())
