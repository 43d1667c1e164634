"""A plan on a page: a bar per tier, and the plan in words.

Knows nothing about how plans are made.
"""

from collections.abc import Sequence
from typing import Any, Final

from m2c.pages import html
from m2c.pages.svg import Axis, Bar, bar_chart
from m2c.units import GiB, MiB, format_size

_MUCH: Final = 4


def plan_figure(title: str, tiers: Sequence[dict[str, Any]], words: Sequence[str] = ()) -> str:
    """tiers: of `tiers.parts.tier_parts`. words: the plan in lines."""
    most = max(sum(tier["parts"].values()) for tier in tiers)
    budget = max(tier["budget"] for tier in tiers)
    # beside a budget that is hardly touched nothing could be told apart
    shows_room = budget <= _MUCH * most
    most = budget if shows_room else most
    unit, factor = ("GiB", GiB) if most >= GiB else ("MiB", MiB)
    bars = []
    for tier in tiers:
        used = sum(tier["parts"].values())
        bars.append(
            Bar(
                tier["name"], {name: n / factor for name, n in tier["parts"].items()},
                f"{format_size(used)} of {format_size(tier['budget'])}",
                tier["budget"] / factor * shows_room,
            )
        )  # fmt: skip
    chart = bar_chart(bars, Axis(f"memory, {unit}"), title=f"{title}: what lies in each tier")
    rows = [
        [f"{tier['name']}: {name}", format_size(nbytes)]
        for tier in tiers for name, nbytes in tier["parts"].items()
    ]  # fmt: skip
    more = html.folded("In words", html.lines(words)) if words else ""
    more += html.folded("The figures", html.table(["part", "size"], rows))
    caption = "Grey: allowed by the budget and not needed."
    if not shows_room:
        caption = "The budget is far larger than what is needed; only that is drawn."
    return html.figure(title, chart, caption, more)
