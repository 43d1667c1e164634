"""Mixed or exact: which way of decoding suits a model, a memory budget and this machine.

Both are planned and their speed predicted before a byte of weights is read, for a bundle or for a
model that is not here. Knows nothing about printing.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Final

from m2c.bundle.bundle import Bundle
from m2c.contents import config_of, importance_of
from m2c.device import family_of, workers_of
from m2c.disk import disk_profile
from m2c.engine import RunOptions, plan_for, plan_without_weights, run_shape
from m2c.errors import DoesNotFit
from m2c.hardware import probe_dram
from m2c.model.config import ModelConfig
from m2c.model.footprint import RunShape
from m2c.model.mix import Mix
from m2c.model.tensors import active_count
from m2c.predict import Speeds, decoding_s, predicted_exact_tps, predicted_tps
from m2c.tiers.plan import Plan

MODES: Final = ("auto", "exact", "mixed")
_MIXES: Final = {"fp16": Mix(100, 0, 0), "int8": Mix(0, 100, 0), "int4": Mix(0, 0, 100)}
# exact output is worth this share of the speed
_WORTH: Final = 0.5


@dataclass(frozen=True)
class Choice:
    """The options with the mode made, and tokens per second predicted for each mode that fits.

    drafts: likewise, for where exact mode's drafts may come from, if there was a choice.
    """

    options: RunOptions
    predicted: dict[str, float]
    drafts: dict[str, float] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return "exact" if self.options.speculate else "mixed"


@dataclass(frozen=True)
class Planner:
    """A model that can be planned: a bundle, or a config alone."""

    config: ModelConfig
    plan: Callable[[RunOptions], tuple[RunShape, Plan]]  # raises DoesNotFit


@dataclass(frozen=True)
class Outlook:
    """One mode, planned, with the tokens per second predicted for it."""

    options: RunOptions
    shape: RunShape
    plan: Plan
    tps: float


def exact_options(options: RunOptions, precision: str = "fp16") -> RunOptions:
    """The options for verifying drafts at `precision` ("fp16": the checkpoint's own weights)."""
    return replace(options, mix=_MIXES[precision], dense=precision, speculate=True)


def kernel_name(options: RunOptions) -> str:
    """Of the kernels that the options mean on this machine; a GPU need not be there to be planned
    for."""
    if options.device != "cpu":
        return family_of(options.device, options.kernel)
    with closing(workers_of(options.device, options.kernel, 1)) as workers:
        return workers.kernel


def planner_of_bundle(bundle: Bundle) -> Planner:
    """Plans with the bundle's true sizes."""
    config, importance = config_of(bundle), importance_of(bundle)

    def plan(options: RunOptions) -> tuple[RunShape, Plan]:
        shape = run_shape(bundle, config, options)
        return plan_for(bundle, config, shape, importance, options)

    return Planner(config, plan)


def planner_of_config(config: ModelConfig) -> Planner:
    """Plans with estimated sizes."""
    return Planner(config, lambda options: plan_without_weights(config, options))


def outlooks(
    planner: Planner, modes: dict[str, RunOptions], speeds_for: Callable[[RunShape, Plan], Speeds]
) -> dict[str, Outlook]:
    """Of the modes with these options those that fit. Raises DoesNotFit when none does."""
    weights = active_count(planner.config)
    found: dict[str, Outlook] = {}
    refused: DoesNotFit | None = None
    for mode, options in modes.items():
        try:
            shape, plan = planner.plan(options)
        except DoesNotFit as error:
            # the mode that needs least is the one whose need is worth naming
            if refused is None or error.smallest < refused.smallest:
                refused = error
            continue
        speeds = speeds_for(shape, plan)
        kernel = kernel_name(options)
        if shape.speculates:
            tps = predicted_exact_tps(plan, shape, weights, speeds, kernel=kernel)
        else:
            decode_s = decoding_s(planner.config, shape, plan, kernel)
            tps = predicted_tps(plan, speeds, decode_s=decode_s, kernel=kernel)
        found[mode] = Outlook(options, shape, plan, tps)
    if not found:
        assert refused is not None
        raise refused
    return found


def preferred(found: dict[str, Outlook]) -> str:
    """Exact where it is predicted to reach half of the mixed mode's speed, or is all that fits."""
    tps = {mode: outlook.tps for mode, outlook in found.items()}
    exact = "exact" in tps and tps["exact"] >= _WORTH * tps.get("mixed", 0.0)
    return "exact" if exact else "mixed"


def choose_mode(bundle: Bundle, options: RunOptions) -> Choice:
    """The preferred mode at the speeds of this machine. Raises DoesNotFit when neither fits."""
    ways = {"mixed": replace(options, draft=None), **_by_draft(exact_options(options))}
    found = outlooks(planner_of_bundle(bundle), ways, _measured(bundle))
    exact = [outlook for way, outlook in found.items() if way != "mixed"]
    modes = {mode: outlook for mode, outlook in found.items() if mode == "mixed"}
    if exact:
        modes["exact"] = max(exact, key=lambda outlook: outlook.tps)
    taken = preferred(modes)
    predicted = {mode: outlook.tps for mode, outlook in modes.items()}
    return Choice(modes[taken].options, predicted, _promises(exact) if taken == "exact" else {})


def choose_draft(bundle: Bundle, options: RunOptions) -> Choice:
    """For exact mode: drafts by the other model, or as without it, whichever promises more.

    Raises DoesNotFit when neither fits.
    """
    found = outlooks(planner_of_bundle(bundle), _by_draft(options), _measured(bundle))
    best = max(found.values(), key=lambda outlook: outlook.tps)
    return Choice(best.options, {}, _promises(found.values()))


def _by_draft(options: RunOptions) -> dict[str, RunOptions]:
    """Exact mode with and without the other model that may draft."""
    ways = {"exact": replace(options, draft=None)}
    return ways if options.draft is None else {**ways, "exact, other draft": options}


def _promises(found: Iterable[Outlook]) -> dict[str, float]:
    """Tokens per second by where drafts come from."""
    promises = {}
    for outlook in found:
        draft = outlook.plan.footprint.draft
        name = "the text so far" if draft is None else draft.name or "INT4 planes"
        promises[name] = outlook.tps
    return promises


def _measured(bundle: Bundle) -> Callable[[RunShape, Plan], Speeds]:
    """Speeds of disk and memory, each measured once, when a plan first needs it."""
    speeds: Speeds | None = None

    def measured(shape: RunShape, plan: Plan) -> Speeds:
        nonlocal speeds
        if speeds is None or (plan.ssd_nbytes_per_token and not speeds.ssd):
            ssd = disk_profile(bundle).bytes_per_s if plan.ssd_nbytes_per_token else 0.0
            memory = probe_dram(shape.threads) if speeds is None else speeds.memory
            speeds = Speeds(ssd, 0.0, memory)
        return speeds

    return measured
