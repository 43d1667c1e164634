"""The page of `m2c run --report`: plan, hit rates, bytes and seconds of each token, energy.

A function of the facts that the JSON report holds; reads nothing else.
"""

from collections.abc import Sequence
from typing import Any

from m2c.pages import html
from m2c.pages.energy_part import energy_section
from m2c.pages.plan_part import plan_figure
from m2c.pages.svg import Axis, Line, line_chart, number
from m2c.units import MiB

_TIERS = {"hbm_or_cache": "neuron cache", "dram": "DRAM", "ssd": "SSD"}
_QUOTED = 20_000  # characters


def run_page(report: dict[str, Any]) -> bytes:
    """report: of `cli.report`."""
    run = report["run"]
    body = [html.cards(_cards(report)), _texts(report), _plan(report), _speed(report)]
    if run["speculation"]:
        body.append(_passes(report))
    body.append(_traffic(report))
    body.append(_hits(report))
    if report["energy"]:
        body.append(energy_section(report["energy"]))
    body.append(_setup(report))
    ran = f"{run['mode']} mode, {run['generated_tokens']} tokens after {run['prompt_tokens']}"
    title = f"{report['bundle']['name']}: a run"
    return html.page(title, f"{ran}; {report['bundle']['path']}", body, created=report["created"])


def _cards(report: dict[str, Any]) -> list[tuple[str, str]]:
    run = report["run"]
    expected = run["predicted_tps"]
    found = [
        (
            f"{number(run['decode_tps'])} tok/s",
            f"decoding (expected {number(expected)})" if expected else "decoding",
        ),
        (f"{number(run['prefill_tps'])} tok/s", f"prompt of {run['prompt_tokens']} tokens"),
        (f"{number(run['ttft_s'])} s", "to the first token"),
        (_mb(run["ssd_nbytes_per_token"]), "from the SSD per token"),
        (f"{number(run['peak_memory_nbytes'] / MiB)} MiB", "peak memory of the process"),
    ]
    if speculation := run["speculation"]:
        found.append((f"{speculation['acceptance']:.0%}", "of the drafts accepted"))
    decode = ((report["energy"] or {}).get("phases") or {}).get("decode")
    if decode and decode["j_per_token"] is not None:
        found.append((f"{number(decode['j_per_token'])} J", "per decoded token"))
    return found


def _texts(report: dict[str, Any]) -> str:
    figures = []
    for title, key in (("System message", "system"), ("Prompt", "prompt"), ("Answer", "answer")):
        text = report[key]
        if text:
            cut = len(text) > _QUOTED
            more = f", the first {_QUOTED} of {len(text)} characters" if cut else ""
            figures.append(html.figure(title + more, html.quoted(text[:_QUOTED])))
    return html.section("Text", html.side_by_side(*figures))


def _plan(report: dict[str, Any]) -> str:
    plan = report["plan"]
    return html.section(
        "Where the weights lay",
        html.side_by_side(
            plan_figure("Plan", plan["tiers"]),
            html.figure("In words", html.lines(plan["words"])),
        ),
    )


class _Steps:
    """The decoded tokens one by one, or pass by pass: those of a pass come together."""

    def __init__(self, report: dict[str, Any]) -> None:
        count, begin = len(report["tokens"]["seconds"]), 0
        self.axis = Axis("pass" if report["passes"] else "token")
        self._parts: list[slice] = []
        # a stop may cut the last pass short
        sizes = [found["accepted"] + 1 for found in report["passes"]] or [1] * count
        for size in sizes:
            self._parts.append(slice(begin, begin + size))
            begin += size
        self._parts = [part for part in self._parts if part.start < count]
        first = 1 if report["passes"] else 2  # the first token is the prompt's
        self.at = range(first, first + len(self._parts))

    def means(self, values: Sequence[float], factor: float) -> list[float]:
        """Of each step's tokens, times `factor`."""
        parts = [values[part] for part in self._parts]
        return [factor * sum(part) / len(part) for part in parts]


def _speed(report: dict[str, Any]) -> str:
    seconds = report["tokens"]["seconds"]
    if not seconds:
        return html.section("Seconds per token", intro="Only one token was generated.")
    steps = _Steps(report)
    times = steps.means(seconds, 1e3)
    chart = line_chart(
        [Line("time", steps.at, times)], steps.axis, Axis("time of a token, ms"),
        title="Milliseconds of each token",
    )  # fmt: skip
    ordered = sorted(times)
    middle, late = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)]
    caption = f"Median {number(middle)} ms, 95 % below {number(late)} ms."
    if report["passes"]:
        caption += " The time of a pass over the tokens that it gave."
    ends = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
    steps_word = "passes" if report["passes"] else "tokens"
    spread = line_chart(
        [Line(steps_word, [0.0, *ordered], [0.0, *ends])], Axis("time of a token, ms"),
        Axis(f"{steps_word} that took at most so long, %", high=100),
        title="Distribution of the time of a token",
    )  # fmt: skip
    return html.section(
        "Seconds per token",
        html.side_by_side(
            html.figure("Over the run", chart, caption), html.figure("Distribution", spread)
        ),
    )


def _passes(report: dict[str, Any]) -> str:
    passes, facts = report["passes"], report["run"]["speculation"]
    at = range(1, len(passes) + 1)
    pass_axis = Axis("pass")
    counts = line_chart(
        [
            Line("drafted", at, [p["drafted"] for p in passes]),
            Line("accepted", at, [p["accepted"] for p in passes]),
        ],
        pass_axis, Axis("tokens"), title="Drafted and accepted tokens of each pass",
    )  # fmt: skip
    times = line_chart(
        [
            Line("drafting", at, [1e3 * p["draft_s"] for p in passes]),
            Line("verifying", at, [1e3 * p["pass_s"] for p in passes]),
        ],
        pass_axis, Axis("time, ms"), title="Milliseconds of drafting and verifying of each pass",
    )  # fmt: skip
    return html.section(
        "Drafts and passes",
        html.side_by_side(
            html.figure("Tokens of a pass", counts, "A pass gives one token more than accepted."),
            html.figure("Time of a pass", times),
        ),
        intro=f"{facts['accepted']} of {facts['drafted']} drafted tokens were right "
        f"({facts['acceptance']:.0%}), {facts['tokens_per_pass']:.2f} tokens per pass over "
        f"{facts['passes']} passes; drafts from: {facts['drafts']}.",
    )


def _traffic(report: dict[str, Any]) -> str:
    tokens, run = report["tokens"], report["run"]
    if not tokens["seconds"]:
        return ""
    steps = _Steps(report)
    lines = [Line("SSD to DRAM", steps.at, steps.means(tokens["ssd_nbytes"], 1e-6))]
    if run["plan"]["hbm_budget"]:
        lines.append(Line("DRAM to HBM", steps.at, steps.means(tokens["link_nbytes"], 1e-6)))
    chart = html.lines(["Nothing was read while decoding: all weights were in memory."])
    if any(any(line.ys) for line in lines):
        chart = line_chart(
            lines, steps.axis, Axis("read per token, MB"), title="Megabytes of a token by link"
        )
    count = len(tokens["seconds"])
    rows = [
        ["SSD, prompt", _mb(run["prefill_ssd_nbytes"]), "-", "-"],
        _link_row("SSD, decoding", sum(tokens["ssd_nbytes"]), count, run["ssd_bytes_per_second"]),
    ]
    if run["plan"]["hbm_budget"]:
        moved = sum(tokens["link_nbytes"])
        rows.append(_link_row("DRAM to HBM, decoding", moved, count, run["link_bytes_per_second"]))
    rows.append(["weights computed", "-", _mb(run["weights_nbytes_per_token"]), "-"])
    table = html.table(["from", "in all", "per token", "speed"], rows)
    return html.section(
        "Bytes by tier",
        html.side_by_side(html.figure("Over the run", chart), html.figure("In all", table)),
        intro="Reads run ahead, so a token's reading may fall into the time of the one before.",
    )


def _link_row(name: str, nbytes: int, tokens: int, speed: float) -> list[str]:
    said = f"{speed / 1e9:.2f} GB/s" if speed else "-"
    return [name, _mb(nbytes), _mb(nbytes / tokens), said]


def _mb(nbytes: float) -> str:
    return f"{number(nbytes / 1e6)} MB"


def _hits(report: dict[str, Any]) -> str:
    figures = []
    for plane, served in report["tokens"]["upgrades"].items():
        totals = [sum(counts) for counts in zip(*served.values(), strict=True)]
        used = [i for i, total in enumerate(totals) if total]
        experts = plane.startswith("experts")
        what = "experts" if experts else "upgrades"
        # with a mix planes of experts are read one by one
        one = plane.removeprefix("experts").strip()
        name = f"{one.upper()} plane" if one else "Experts"
        name = f"Experts, {name}" if experts and one else name
        if not used:
            continue
        tiers = {**_TIERS, "hbm_or_cache": "HBM"} if experts else _TIERS
        lines = [
            Line(
                f"{name} ({sum(served[key]) / sum(totals):.1%})", [i + 2 for i in used],
                [100 * served[key][i] / totals[i] for i in used],
            )
            for key, name in tiers.items() if any(served[key])
        ]  # fmt: skip
        chart = line_chart(
            lines, Axis("token"), Axis(f"share of the token's {what}, %", high=100),
            title=f"{name}: {what} served by each tier, by token",
        )  # fmt: skip
        words = "In the legend: the share over the whole run."
        counted = "experts" if experts else "neurons"
        each = number(sum(totals) / len(used))
        said = f"{sum(totals)} {counted} in all, {each} a token. {words}"
        figures.append(html.figure(name, chart, said))
    if not figures:
        return html.section(
            "Hit rates",
            intro="Nothing was fetched by neuron or by expert, so there is nothing to hit or miss.",
        )
    return html.section(
        "Hit rates", html.side_by_side(*figures),
        intro="Neurons above the lowest precision, or experts, and the tier that had them when a "
        "token needed them.",
    )  # fmt: skip


def _setup(report: dict[str, Any]) -> str:
    tables = [
        html.figure(title, html.table([], [[k, v] for k, v in report[key].items()], words=True))
        for title, key in (("Settings", "settings"), ("Machine and versions", "machine"))
    ]
    return html.section("Settings, machine, versions", html.side_by_side(*tables))
