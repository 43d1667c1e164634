"""JSON from files we did not write: no duplicate keys, no NaN, no traceback.

Knows nothing about what the JSON means.
"""

import json
from typing import Any, NoReturn

from m2c.errors import BadInput


def parse_object(data: bytes, file: str) -> dict[str, Any]:
    """The JSON object in `data`; `file` names it in errors. Raises BadInput for anything else."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        raise BadInput(f"{file}: the JSON is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadInput(f"{file}: not valid JSON ({error})", "fetch the file again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{file}: holds a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice[:80]!r}")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
