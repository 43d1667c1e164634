"""What the shell may complete a MODEL or BUNDLE with: aliases, bundles, the ones used last.

Shells ask at every press of a key, so nothing heavy is imported; what cannot be read is no
candidate. Files and folders are the shell's own business.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import typer

from m2c.errors import M2CError

R = TypeVar("R")


def models(context: typer.Context, typed: str) -> list[str]:
    """Aliases, and the model profiled last."""
    from m2c.home import read_state
    from m2c.model.aliases import ALIASES

    return _fitting([*ALIASES, _quietly(lambda: read_state().model) or ""], typed)


def bundles(context: typer.Context, typed: str) -> list[str]:
    """Names of the bundles under --ssd, and the path of the one packed last."""
    from m2c.bundle.bundle import SUFFIX
    from m2c.home import read_state

    ssd = context.params.get("ssd") or os.environ.get("M2C_SSD")
    found = _quietly(lambda: [path.stem for path in Path(ssd).glob(f"*{SUFFIX}")]) if ssd else []
    return _fitting([*(found or []), _quietly(lambda: read_state().bundle) or ""], typed)


def models_and_bundles(context: typer.Context, typed: str) -> list[str]:
    return _fitting(models(context, typed) + bundles(context, typed), typed)


def _fitting(names: list[str], typed: str) -> list[str]:
    return sorted({name for name in names if name and name.startswith(typed)})


def _quietly(find: Callable[[], R]) -> R | None:
    """A traceback between two presses of a key helps nobody."""
    try:
        return find()
    except (M2CError, OSError, RuntimeError):
        return None
