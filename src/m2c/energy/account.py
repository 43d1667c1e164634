"""The account of a run: what each phase took, by component, per token and in carbon.

A plain dictionary, as reports and programs want it. A total is given only if something was
measured, and always with what it covers. Knows nothing about text.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from m2c.energy import carbon
from m2c.energy.meter import COMPONENTS, SSD_HOW, Lap, Meter, ssd_joules
from m2c.tiers.ssd import LinkStats

BOUNDARY: Final = (
    "the whole machine's chips while the run lasted, whoever used them, idle level included; not "
    "in it: mainboard, fans, losses of the power supply, loading"
)
STATES: Final = ("measured", "estimated", "absent")
NAMES: Final = {"cpu": "CPU", "dram": "DRAM", "gpu": "GPU", "ssd": "SSD"}


@dataclass(frozen=True)
class Phase:
    """A lap in which `tokens` were computed and `ssd` was read."""

    lap: Lap
    tokens: int
    ssd: LinkStats


@dataclass(frozen=True)
class Grid:
    """Grams of CO2e per kWh, and where the figure comes from."""

    g_per_kwh: float = carbon.GRID_G_PER_KWH
    source: str = carbon.GRID_SOURCE


def account(
    meter: Meter, idle: Lap | None, phases: Sequence[Phase], grid: Grid,
    parts: Sequence[carbon.Part],
) -> dict[str, Any]:  # fmt: skip
    """Joules, seconds, grams; None where nothing was measured."""
    making_g = sum(part.grams for part in parts)
    # what was lost on the way is absent throughout: phases must cover the same components
    phases = [replace(phase, lap=_kept(phase.lap, meter)) for phase in phases]
    seen = {part for phase in phases for part in phase.lap.joules}
    return {
        "boundary": BOUNDARY,
        "components": {name: _component(meter, name, name in seen) for name in COMPONENTS},
        "idle": _idle(idle),
        "phases": {phase.lap.name: _phase(phase, grid, making_g) for phase in phases},
        "grid": asdict(grid),
        "pue": carbon.PUE,
        "embodied": {
            "parts": [asdict(part) for part in parts], "total_g": making_g,
            "lifetime_years": carbon.LIFETIME_YEARS, "lifetime_source": carbon.LIFETIME_SOURCE,
            "absent": carbon.UNCOUNTED,
        },
    }  # fmt: skip


def _kept(lap: Lap, meter: Meter) -> Lap:
    joules = {name: value for name, value in lap.joules.items() if name not in meter.absent}
    return replace(lap, joules=joules)


def _component(meter: Meter, name: str, seen: bool) -> dict[str, str]:
    if name == "ssd":
        return {"state": "estimated", "how": SSD_HOW, "hint": ""}
    if name in meter.absent:
        lost = meter.absent[name]
        return {"state": "absent", "how": lost.why, "hint": lost.hint}
    if not seen:
        return {"state": "absent", "how": "was not read", "hint": ""}
    return {"state": "measured", "how": meter.how(name), "hint": ""}


def _idle(lap: Lap | None) -> dict[str, Any] | None:
    if lap is None or not lap.joules:
        return None
    watts = {name: joules / lap.seconds for name, joules in lap.joules.items()}
    return {"seconds": lap.seconds, "watts": watts, "total_watts": sum(watts.values())}


def _phase(phase: Phase, grid: Grid, making_g: float) -> dict[str, Any]:
    lap, tokens = phase.lap, phase.tokens
    joules = {**lap.joules, "ssd": ssd_joules(phase.ssd.busy_s)}
    facts: dict[str, Any] = {
        "tokens": tokens, "seconds": lap.seconds, "joules": joules,
        "ssd_nbytes": phase.ssd.nbytes, "ssd_busy_s": phase.ssd.busy_s,
        "counters_start": lap.start, "counters_end": lap.end,
    }  # fmt: skip
    embodied = carbon.embodied_g(making_g, lap.seconds)
    if not lap.joules or not tokens:
        facts |= dict.fromkeys(("total_j", "watts", "j_per_token", "wh_per_1k"))
        facts |= dict.fromkeys(("operational_g_per_1k", "sci_g_per_1k"))
        return facts | {"embodied_g_per_1k": 1e3 * embodied / tokens if tokens else None}
    total = sum(joules.values())
    operational = carbon.operational_g(total, grid.g_per_kwh)
    return facts | {
        "total_j": total, "watts": total / lap.seconds, "j_per_token": total / tokens,
        "wh_per_1k": carbon.wh_per_1k(total / tokens),
        "operational_g_per_1k": 1e3 * operational / tokens,
        "embodied_g_per_1k": 1e3 * embodied / tokens,
        "sci_g_per_1k": 1e3 * (operational + embodied) / tokens,
    }  # fmt: skip


def energy_line(facts: dict[str, Any]) -> str:
    """The account in one line."""
    if not is_measured(facts):
        ssd = sum(phase["joules"]["ssd"] for phase in facts["phases"].values())
        return f"energy: not measured, SSD about {ssd:.3g} J in all (estimated); {states_of(facts)}"
    grid = facts["grid"]
    parts = []
    for name in ("decode", "prefill"):
        phase = facts["phases"][name]
        if phase["j_per_token"] is not None:
            parts.append(
                f"{name} {phase['j_per_token']:.3g} J/token ({phase['watts']:.3g} W), per 1000 "
                f"tokens {phase['wh_per_1k']:.3g} Wh and {phase['operational_g_per_1k']:.3g} + "
                f"{phase['embodied_g_per_1k']:.2g} gCO2e (operational + embodied)"
            )
    if facts["idle"]:
        parts.append(f"idle before {facts['idle']['total_watts']:.3g} W")
    parts.append(f"at {grid['g_per_kwh']:g} g/kWh ({grid['source']})")
    return f"energy: {', '.join(parts)}; {states_of(facts)}"


def is_measured(facts: dict[str, Any]) -> bool:
    """Whether any component is: else there are no totals."""
    return any(part["state"] == "measured" for part in facts["components"].values())


def states_of(facts: dict[str, Any]) -> str:
    """Which components are measured, estimated and absent; why absent, each reason once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, part in facts["components"].items():
        why = ""
        if part["state"] == "absent":
            why = f" ({'; '.join(filter(None, (part['how'], part['hint'])))})"
        groups.setdefault((part["state"], why), []).append(NAMES[name])
    order = sorted(groups.items(), key=lambda item: STATES.index(item[0][0]))
    return "; ".join(f"{state} {', '.join(names)}{why}" for (state, why), names in order)
