"""The page of `m2c show --html`: what a profile or a bundle says, in curves.

Takes facts and arrays; reads no file and makes no plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2c.bundle.importance import Importance
from m2c.pages import html
from m2c.pages.plan_part import plan_figure
from m2c.pages.svg import Axis, Bar, Line, bar_chart, line_chart
from m2c.units import GiB, MiB, format_size

_PERCENT = tuple(range(101))


@dataclass(frozen=True)
class Planned:
    """A plan for a way of decoding: bars and words, or why there is none."""

    title: str
    tiers: Sequence[dict[str, Any]] = ()
    words: Sequence[str] = ()
    refused: str = ""


def show_page(
    facts: dict[str, Any], importance: Importance, plans: Sequence[Planned], *, created: str
) -> bytes:
    """facts: of `m2c show --json`; those of a profile have no planes."""
    known = importance.calibration
    neurons = len(importance.layers[0].order)
    name = facts.get("name") or known.model
    subtitle = f"Profile of {known.model}, {known.tokens} tokens of {known.text_source}"
    top = [
        (str(known.layers), "layers"), (f"{neurons}", "neurons a layer"),
        (f"{known.tokens}", f"tokens of {known.text_source}"),
    ]  # fmt: skip
    body = []
    if "planes" in facts:
        subtitle = f"{facts['path']}, packed by {facts['created_by']}"
        top = _bundle_cards(facts) + top
    body += [html.cards(top), _curves(importance), _layers(importance)]
    if "planes" in facts:
        body.append(_planes(facts))
    if plans:
        body.append(_plans(plans))
    return html.page(str(name), subtitle, body, created=created)


def _bundle_cards(facts: dict[str, Any]) -> list[tuple[str, str]]:
    total = sum(sum(sizes.values()) for sizes in facts["planes"].values())
    weights = sum(facts["weights"].values())
    of = "a token's experts" if "num_experts" in facts["architecture"] else "neurons"
    size = f"{weights / 1e9:.2f} G" if weights >= 1e9 else f"{weights / 1e6:.0f} M"
    return [
        (format_size(total), f"bundle, {8 * total / weights:.2f} bits a weight"),
        (size, f"weights, {facts['exact_type'].upper()}"),
        ("/".join(map(str, facts["mix"])), f"default mix: % of {of} at FP16/INT8/INT4"),
    ]


def _curves(importance: Importance) -> str:
    layers = importance.layers
    own = 100 * np.mean([layer.coverage_own for layer in layers], axis=0)
    fixed = 100 * np.mean([layer.coverage_static for layer in layers], axis=0)
    hits = 100 * importance.hit_share
    share = Axis("share held, %", high=100)
    top = Axis("hottest neurons of a layer, %", high=100)
    coverage = line_chart(
        [
            Line("a token's own top neurons: output energy", _PERCENT, own.tolist()),
            Line("the profile's ranking: output energy", _PERCENT, fixed.tolist()),
            Line("the profile's ranking: uses that it serves", _PERCENT, hits.tolist()),
            Line("chance", _PERCENT, _PERCENT),
        ],
        top, share, title="Coverage: share held by the hottest neurons, mean over layers",
    )  # fmt: skip
    at = (5, 10, 20, 30, 50, 70)
    table = html.table(
        ["neurons", "own", "ranking", "uses served"],
        [[f"{k} %", *(f"{curve[k]:.1f} %" for curve in (own, fixed, hits))] for k in at],
    )
    return html.section(
        "What a few neurons hold",
        html.side_by_side(
            html.figure(
                "Coverage", coverage,
                "Mean over the layers. The distance between the first two curves is what is lost "
                "by choosing neurons once instead of for each token.",
                html.folded("The figures", table),
            ),
            html.figure(
                "Importance", _importance_chart(importance),
                "Mean score of a neuron over that of its layer's average neuron; the score is "
                "|act(gate·x)·(up·x)|·‖down column‖.",
            ),
        ),
        intro="A neuron is a row of gate and up and a column of down. Where the curves rise "
        "steeply, few neurons at high precision are enough, and pinning the hottest serves most "
        "of the uses.",
    )  # fmt: skip


def _importance_chart(importance: Importance) -> str:
    chosen = sorted({0, len(importance.layers) // 2, len(importance.layers) - 1})
    lines = []
    for i in chosen:
        layer = importance.layers[i]
        ranked = layer.mean[layer.order].astype(np.float64)
        at = np.linspace(0, len(ranked) - 1, 101).astype(np.int64)
        relative = ranked[at] / max(float(ranked.mean()), 1e-30)
        lines.append(Line(f"layer {i}", _PERCENT, relative.tolist()))
    return line_chart(
        lines, Axis("rank in the layer, %", high=100),
        Axis("mean score, 1 = average (log)", log=True),
        title="Importance of the neurons of three layers by rank",
    )  # fmt: skip


def _layers(importance: Importance) -> str:
    layers = importance.layers
    at = range(len(layers))
    held = [
        Line(f"own {k} %", at, [100 * float(layer.coverage_own[k]) for layer in layers])
        for k in (10, 30, 50)
    ]
    fixed = [100 * float(layer.coverage_static[30]) for layer in layers]
    lines = [*held, Line("ranking 30 %", at, fixed)]
    overlap = [
        Line(f"top {k} %", at, [100 * float(layer.overlap[i]) for layer in layers])
        for i, k in enumerate((10, 30))
    ]
    layer = Axis("layer", high=float(len(layers) - 1))
    rows = [
        [str(i), *(f"{line.ys[i]:.0f} %" for line in lines), *(f"{o.ys[i]:+.0f}" for o in overlap)]
        for i in at
    ]
    header = ["layer", *(line.name for line in lines), *(f"overlap {o.name}" for o in overlap)]
    return html.section(
        "Layer by layer",
        html.side_by_side(
            html.figure(
                "Output energy held",
                line_chart(lines, layer, Axis("share of the layer's output energy, %", high=100),
                           title="Output energy held by the top neurons, by layer"),
            ),
            html.figure(
                "Overlap of adjacent tokens",
                line_chart(overlap, layer, Axis("overlap above chance, points"),
                           title="Overlap of the top neurons of adjacent tokens, by layer"),
                "How much of a token's top set the token before it had too, beyond chance: what "
                "a cache that keeps the last token's neurons can win.",
            ),
        ),
        html.folded("All layers", html.table(header, rows)),
    )  # fmt: skip


def _planes(facts: dict[str, Any]) -> str:
    planes = facts["planes"]
    count = sum(facts["weights"].values())
    largest = max(sum(sizes.values()) for sizes in planes.values())
    unit, factor = ("GiB", GiB) if largest >= GiB else ("MiB", MiB)
    architecture = facts.get("architecture", {})
    shared = ", shared experts" if "shared_expert_intermediate_size" in architecture else ""
    names = {"dense": f"attention, embeddings, head{shared}", "neurons": "neurons"}
    bars, rows = [], []
    for plane, sizes in planes.items():
        total = sum(sizes.values())
        parts = {names[kind]: nbytes / factor for kind, nbytes in sizes.items()}
        bars.append(
            Bar(f"{plane.upper()} plane", parts,
                f"{format_size(total)}, {8 * total / count:.2f} bits a weight")
        )  # fmt: skip
        rows.append([plane.upper(), *(format_size(n) for n in (*sizes.values(), total))])
    chart = bar_chart(bars, Axis(f"size on the SSD, {unit}"), title="Sizes of the planes")
    return html.section(
        "Sizes by plane",
        html.side_by_side(
            html.figure("On the SSD", chart),
            html.figure("The figures", html.table(["plane", *names.values(), "all"], rows)),
        ),
        intro="INT4 is the first plane alone, INT8 the first two, the exact weights all three: "
        "each plane holds only what the one below it lacks.",
    )  # fmt: skip


def _plans(plans: Sequence[Planned]) -> str:
    figures = [
        plan_figure(plan.title, plan.tiers, plan.words)
        if not plan.refused
        else html.figure(plan.title, html.lines([plan.refused]))
        for plan in plans
    ]
    return html.section(
        "The plan for this machine",
        html.side_by_side(*figures),
        intro="With the memory that is free now and default settings.",
    )
