"""Strict JSON to frozen dataclasses and back: the only door through which file facts come in.

Unknown and duplicate keys, wrong types (a bool is not an int), non-finite numbers and values out
of range are refused with the file and the key. Knows nothing about what the values mean.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from m2c.errors import BadInput

MAX_JSON_NBYTES = 64 << 20
_MAX_VALUES = 1 << 22  # in one file: each takes up to 100 bytes of memory, however short its text
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
T = TypeVar("T")
_AGAIN = "fetch the file again"


def load_json(data: bytes, *, file: Path | str) -> Any:
    """The JSON value in `data`. Raises BadInput on duplicate keys, NaN, bad UTF-8 or bad JSON."""
    if len(data) > MAX_JSON_NBYTES:
        raise BadInput(f"{file}: {len(data)} bytes of JSON is more than any such file holds")
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise BadInput(f"{file}: more than {_MAX_VALUES} JSON values")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant,
            parse_float=_finite, parse_int=_integer,
        )  # fmt: skip
    except RecursionError:
        raise BadInput(f"{file}: not valid JSON (nested too deeply)", _AGAIN) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadInput(f"{file}: not valid JSON ({error})", _AGAIN) from None


def parse_object(data: bytes, file: Path | str) -> dict[str, Any]:
    """The JSON object in `data`; `file` names it in errors. Raises BadInput for anything else.

    Text that is not Unicode (half a surrogate pair) is refused: it can neither be printed nor be
    part of a path, and other readers refuse it too.
    """
    value = load_json(data, file=file)
    if not isinstance(value, dict):
        raise BadInput(f"{file}: holds a JSON {type(value).__name__}, not an object", _AGAIN)
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise BadInput(f"{file}: not valid JSON (half a character)", _AGAIN) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"duplicate key {twice[:80]!r}")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:80]} is beyond any float")
    return value


def _integer(text: str) -> int:
    if text == "-0":  # an integer to Python, a float to others
        raise ValueError("-0 is not an integer")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def dump_json(value: Any) -> bytes:
    """Canonical bytes: sorted keys, no spaces, so that equal facts are equal bytes."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def decode(cls: type[T], value: Any, *, file: Path | str, where: str = "") -> T:
    """A frozen dataclass `cls` from a JSON object. Raises BadInput naming file and key."""
    if not isinstance(value, dict):
        raise BadInput(f"{file}: {where or 'the top level'} must be an object")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise BadInput(f"{file}: unknown key {where}{unknown[0][:80]!r}")
    arguments = {}
    for name, field in fields.items():
        if name not in value:
            if field.default is dataclasses.MISSING:
                raise BadInput(f"{file}: key {where}{name!r} is missing")
            continue
        arguments[name] = _value(hints[name], value[name], file, f"{where}{name}")
    return cls(**arguments)


def _value(kind: Any, value: Any, file: Path | str, where: str) -> Any:
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(arm for arm in typing.get_args(kind) if arm is not types.NoneType)
        origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return decode(kind, value, file=file, where=f"{where}.")  # type: ignore[arg-type]
    if origin is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise BadInput(f"{file}: {where} must be a list")
        return tuple(_value(item, v, file, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        item = typing.get_args(kind)[1]
        if not isinstance(value, dict):
            raise BadInput(f"{file}: {where} must be an object")
        return {key: _value(item, v, file, f"{where}.{key[:80]}") for key, v in value.items()}
    if kind is float and type(value) is int:
        if abs(value) >= 1 << 62:
            raise BadInput(f"{file}: {where} is out of range")
        return float(value)
    if type(value) is not kind:
        raise BadInput(f"{file}: {where} must be of type {kind.__name__}")
    if kind is int and not 0 <= value < 1 << 62:
        raise BadInput(f"{file}: {where} is out of range")
    return value
