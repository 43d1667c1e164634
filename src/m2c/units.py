"""Byte sizes as people write them: `20GiB`, `512MiB`, `1.5GB`.

Memory is printed in binary units, bandwidth in decimal ones.
"""

import re

from m2c.errors import UsageError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

_FACTORS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KiB, "mib": MiB, "gib": GiB, "tib": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes in `text`. A bare number is refused: nobody agrees on what it would mean."""
    match = _SIZE.fullmatch(text)
    if not match or len(text) > 32:
        raise UsageError(f"{text!r} is not a size", "write it like 20GiB, 512MiB or 1.5GB")
    number, unit = match.groups()
    if not unit:
        raise UsageError(f"{text!r} has no unit", f"did you mean {number}GiB?")
    factor = _FACTORS.get(unit.lower())
    if factor is None:
        raise UsageError(
            f"{text!r} has the unknown unit {unit!r}", "use GiB, MiB, KiB, GB, MB or KB"
        )
    return int(float(number) * factor)


def format_size(nbytes: int | float) -> str:
    """`nbytes` in the largest binary unit that keeps it at or above one, e.g. `3.52 GiB`."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{int(nbytes)} B"
