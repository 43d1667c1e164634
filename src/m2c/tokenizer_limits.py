"""How much longer a tokenizer.json may make a text: a small file must not fill the memory.

Steps of a pipeline multiply: forty replacements of `a` by `aa` make a terabyte of one letter, and
the engine then ends the whole process. Knows nothing about what the steps are for.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from m2c.errors import UnsupportedModel

MOST: Final = 4096  # letters that one letter may become; those of published models stay below
_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_GROWTH: Final = {
    "NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Lowercase": 3, "BertNormalizer": 8,
    "ByteLevel": 4, "Metaspace": 2, "Precompiled": 32,
}  # fmt: skip


def require_bounded(document: Mapping[str, Any], source: str) -> None:
    """Raises UnsupportedModel for a pipeline that makes text longer without bound.

    What is malformed in other ways is left to the engine to refuse.
    """
    for part in _PARTS:
        growth, maps = 1, 0
        for step in _objects(document.get(part)):
            growth *= _growth(step)
            maps += step.get("type") == "Precompiled"  # replaces by texts as long as its own table
            if growth > MOST or maps > 1:
                raise UnsupportedModel(
                    f"{source}: its {part} makes a text more than {MOST} times as long",
                    "get this model from another place",
                )


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """All JSON objects in `value`; without recursion, which hostile nesting would exhaust."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _growth(step: Mapping[str, Any]) -> int:
    kind = step.get("type")
    if kind == "Replace":
        return _replaced(step.get("pattern"), step.get("content"))
    if kind == "Prepend":
        return 1 + _len(step.get("prepend"))
    if kind == "TemplateProcessing":
        tokens = [_len(t.get("ids")) for t in _objects(step.get("special_tokens")) if "ids" in t]
        return max(1, _len(step.get("single"))) * max([1, *tokens])
    return _GROWTH.get(kind, 1) if isinstance(kind, str) else 1


def _replaced(pattern: Any, content: Any) -> int:
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1, -(-_len(content) // len(literal)))
    return 1 + _len(content)  # an expression may match between all letters


def _len(value: Any) -> int:
    return len(value) if isinstance(value, str | list) else 0
