"""The arrays of a small safetensors file that is in memory, whatever it says.

Knows nothing about which tensors belong there.
"""

from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from m2c.errors import BadInput


def load_tensors(
    data: bytes, path: Path, what: str = "a readable safetensors file"
) -> dict[str, npt.NDArray[Any]]:
    """Raises BadInput naming `path`, and `what` it should be, for a damaged file, and for dtypes
    and shapes that numpy lacks."""
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: not {what} ({reason})") from None
