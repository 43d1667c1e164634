"""What the commands that write pages share: where a page may go, and the plan on it.

Knows nothing about what is on the pages besides.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from m2c.errors import BadInput, UsageError

if TYPE_CHECKING:
    from m2c.bundle.bundle import Bundle
    from m2c.bundle.importance import Importance
    from m2c.pages.show_page import Planned

_MAX_NBYTES = 64 << 20


def require_page(path: Path, flag: str, suffixes: tuple[str, ...]) -> None:
    """Raises before the work whose result goes there. What others wrote is not overwritten."""
    from m2c.bundle.files import read_small
    from m2c.cli.names import require_writable
    from m2c.pages.html import MARK

    if path.suffix not in suffixes:
        raise UsageError(f"{flag} {path}: must end in {' or '.join(suffixes)}")
    require_writable(path, flag)
    if (
        path.exists()
        and (data := read_small(path, limit=_MAX_NBYTES))
        and MARK.encode() not in data
    ):
        raise BadInput(
            f"{flag} {path}: is there already and no report of m2c",
            "give another name, or remove it",
        )


def default_plans(bundle: "Bundle", importance: "Importance") -> "list[Planned]":
    """Mixed and exact mode with the memory that is free now."""
    from m2c.cli.runs import describe_plan
    from m2c.contents import config_of
    from m2c.engine import RunOptions, plan_for, run_shape
    from m2c.errors import DoesNotFit
    from m2c.modes import exact_options
    from m2c.pages.show_page import Planned
    from m2c.tiers.parts import tier_parts

    config, found = config_of(bundle), []
    for title, options in (
        ("Mixed mode", RunOptions()), ("Exact mode", exact_options(RunOptions()))
    ):  # fmt: skip
        try:
            shape = run_shape(bundle, config, options)
            shape, plan = plan_for(bundle, config, shape, importance, options)
            found.append(Planned(title, tier_parts(plan), describe_plan(plan, shape)))
        except DoesNotFit as error:
            found.append(Planned(title, refused=str(error)))
    return found
