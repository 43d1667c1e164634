"""Where m2c keeps its own small files, and the model that was used last.

`$M2C_HOME` (default `~/.cache/m2c`) holds profiles and `state.json`. Knows nothing about models.
"""

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from m2c.bundle.files import disk_errors, read_small, write_atomic
from m2c.bundle.strict import decode, dump_json, load_json
from m2c.errors import BadInput

_MAX_STATE_NBYTES = 1 << 16


@dataclass(frozen=True)
class State:
    """The defaults that later commands use when given no name."""

    model: str = ""  # as it was given to m2c profile
    bundle: str = ""  # path of the bundle packed last


def home() -> Path:
    if given := os.environ.get("M2C_HOME"):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "m2c"


def read_state() -> State:
    """The recorded defaults; empty ones when there are none or the file is damaged."""
    path = home() / "state.json"
    try:
        return decode(State, load_json(read_small(path, limit=_MAX_STATE_NBYTES), file=path),
                      file=path)  # fmt: skip
    except BadInput:
        return State()


def record(*, model: str | None = None, bundle: Path | None = None) -> None:
    """Remember what later commands should use by default."""
    known = read_state()
    state = State(
        known.model if model is None else model,
        known.bundle if bundle is None else str(bundle.resolve()),
    )
    write_atomic(make_folder(home()) / "state.json", dump_json(asdict(state)) + b"\n")


def profile_path(name: str, fingerprint: str) -> Path:
    """Where the profile of a checkpoint lies: one file per checkpoint content."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    return home() / "profiles" / f"{safe[:80]}-{fingerprint[:12]}.safetensors"


def make_folder(path: Path) -> Path:
    """`path`, there when this returns."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path
