"""The energy account on a page: what was measured, estimated or is absent, and the carbon of it.

A function of the facts that `energy.account` gives.
"""

from typing import Any

from m2c.energy.account import NAMES, is_measured
from m2c.pages import html
from m2c.pages.svg import Axis, Bar, bar_chart, number


def energy_section(facts: dict[str, Any]) -> str:
    measured = is_measured(facts)
    figures = [html.figure("Per token", _phases(facts, measured))]
    if measured:
        figures.insert(0, html.figure("By component", _bars(facts), _idle(facts)))
    states = [
        [NAMES[name], part["state"], f"{part['how']}. {part['hint']}".removesuffix(" ").strip()]
        for name, part in facts["components"].items()
    ]
    intro = f"Boundary: {facts['boundary']}."
    if not measured:
        intro = f"Nothing could be measured, so there is no total. {intro}"
    return html.section(
        "Energy and carbon", html.side_by_side(*figures),
        html.side_by_side(
            html.figure(
                "What the figures are",
                html.table(["component", "state", "how"], states, words=True),
            ),
            html.figure("Carbon: what was assumed", _assumed(facts)),
        ),
        intro=intro,
    )  # fmt: skip


def _bars(facts: dict[str, Any]) -> str:
    bars = []
    for name, phase in facts["phases"].items():
        if phase["total_j"] is not None:
            parts = {NAMES[part]: joules for part, joules in phase["joules"].items()}
            words = f"{number(phase['total_j'])} J in {number(phase['seconds'])} s"
            bars.append(Bar(f"{name}, {phase['tokens']} tokens", parts, words))
    return bar_chart(bars, Axis("energy, J"), title="Energy of each phase by component")


def _idle(facts: dict[str, Any]) -> str:
    idle = facts["idle"]
    if not idle:
        return "The idle level was not measured."
    parts = ", ".join(f"{NAMES[name]} {number(watts)} W" for name, watts in idle["watts"].items())
    return (
        f"Idle level in the {number(idle['seconds'])} s before loading: "
        f"{number(idle['total_watts'])} W ({parts}). It is not subtracted."
    )


def _phases(facts: dict[str, Any], measured: bool) -> str:
    shown = {
        "tokens": ("tokens", ""), "seconds": ("time", " s"), "total_j": ("energy", " J"),
        "watts": ("mean power", " W"), "j_per_token": ("energy per token", " J"),
        "wh_per_1k": ("energy per 1000 tokens", " Wh"),
        "operational_g_per_1k": ("operational carbon per 1000 tokens", " g"),
        "embodied_g_per_1k": ("embodied carbon per 1000 tokens", " g"),
        "sci_g_per_1k": ("both (SCI) per 1000 tokens", " g"),
    }  # fmt: skip
    phases = facts["phases"]
    rows = [
        [words, *(_cell(phase[key], unit) for phase in phases.values())]
        for key, (words, unit) in shown.items()
        if any(phase[key] is not None for phase in phases.values())
    ]
    if not measured:
        reads = (_cell(phase["joules"]["ssd"], " J") for phase in phases.values())
        rows.append(["SSD (estimate)", *reads])
    return html.table(["", *phases], rows)


def _cell(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{number(value)}{unit}"


def _assumed(facts: dict[str, Any]) -> str:
    grid, embodied = facts["grid"], facts["embodied"]
    rows = [
        ["grid", f"{grid['g_per_kwh']:g} gCO2e/kWh: {grid['source']}"],
        ["PUE", f"{facts['pue']:g}"],
        *(
            [f"making: {part['name']}", f"{number(part['grams'] / 1e3)} kg: {part['source']}"]
            for part in embodied["parts"]
        ),
        ["making: not counted", embodied["absent"]],
        ["lifetime", f"{embodied['lifetime_years']:g} years, {embodied['lifetime_source']}"],
    ]
    return html.table([], rows, words=True)
