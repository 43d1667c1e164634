"""Typed, ranged reads from a parsed JSON object: `true` is not 1, `"4"` is not 4.

Knows nothing about models; the caller names each field, its range and its default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from m2c.errors import BadInput, UnsupportedModel


@dataclass(frozen=True)
class Fields:
    """`file` and `where` (a prefix of the key) name the field in errors. null means absent."""

    data: Mapping[str, Any]
    file: str
    where: str = ""

    def integer(self, key: str, low: int, high: int) -> int:
        """An int in [low, high]. Raises BadInput."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._refuse(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """A float in [low, high]. Raises BadInput."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(key, value, "a number")
        if not low <= value <= high:
            self._refuse(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def maybe_integer(self, key: str, low: int, high: int) -> int | None:
        """As `integer`, or None when absent."""
        return None if self.data.get(key) is None else self.integer(key, low, high)

    def maybe_number(self, key: str, low: float, high: float) -> float | None:
        """As `number`, or None when absent."""
        return None if self.data.get(key) is None else self.number(key, low, high)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """true or false; `default` when absent. Raises BadInput."""
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        """A JSON object, or None when absent. Raises BadInput."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, Mapping):
            self._refuse(key, value, "an object")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], supported: str) -> str:
        """One of `allowed`. Raises UnsupportedModel, with `supported` as the hint, for another."""
        value = self.data.get(key)
        if not isinstance(value, str):
            self._refuse(key, value, "a string")
        if value not in allowed:
            message = f"{self.file}: {self.where}{key} {value[:80]!r} is not supported"
            raise UnsupportedModel(message, supported)
        return value

    def choices(self, key: str, allowed: tuple[str, ...], count: int, supported: str) -> list[str]:
        """A list of `count` of `allowed`. Raises as `choice`."""
        value = self.data.get(key)
        if not isinstance(value, list) or len(value) != count:
            self._refuse(key, value, f"a list of {count} strings")
        one = (Fields({key: item}, self.file, self.where) for item in value)
        return [item.choice(key, allowed, supported) for item in one]

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of rising integers in [low, high]; empty when absent. Raises BadInput."""
        value = self.data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            self._refuse(key, value, "a list of integers")
        found = [Fields({key: item}, self.file).integer(key, low, high) for item in value]
        if found != sorted(set(found)):
            self._refuse(key, value, "a rising list of integers")
        return tuple(found)

    def numbers(self, key: str, low: float, high: float, count: int) -> tuple[float, ...]:
        """A list of `count` floats in [low, high]. Raises BadInput."""
        value = self.data.get(key)
        if not isinstance(value, list | tuple) or len(value) != count:
            self._refuse(key, value, f"a list of {count} numbers")
        one = (Fields({key: item}, self.file, self.where) for item in value)
        return tuple(item.number(key, low, high) for item in one)

    def token(self, key: str, vocab_size: int) -> int | None:
        """A token id, or None when absent. Raises BadInput."""
        return self.maybe_integer(key, 0, vocab_size - 1)

    def tokens(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """A list of at most 256 token ids, without repeats. Raises BadInput."""
        value = self.data.get(key)
        if not isinstance(value, list | tuple) or len(value) > 256:
            self._refuse(key, value, "a list of token ids")
        ids = (Fields({key: item}, self.file).integer(key, 0, vocab_size - 1) for item in value)
        return tuple(dict.fromkeys(ids))

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        got = "missing" if value is None else repr(value)[:80]
        raise BadInput(f"{self.file}: {self.where}{key} is {got}, not {wanted}")
