"""Mixed or exact: which way of decoding suits a bundle, a memory budget and this machine.

Both are planned and their speed predicted before a byte of weights is read. Knows nothing about
printing.
"""

from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Final

from m2c.bundle.bundle import Bundle
from m2c.contents import config_of, importance_of
from m2c.disk import disk_profile
from m2c.engine import RunOptions, kernel_for, plan_for, run_shape
from m2c.errors import DoesNotFit
from m2c.hardware import probe_dram
from m2c.kernels.workers import Workers
from m2c.model.config import parameter_count
from m2c.model.mix import Mix
from m2c.predict import Speeds, predicted_exact_tps, predicted_tps

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


def exact_options(options: RunOptions, precision: str = "fp16") -> RunOptions:
    """The options for verifying drafts at `precision` ("fp16": the checkpoint's own weights)."""
    return replace(options, mix=_MIXES[precision], dense=precision, speculate=True)


def kernel_name(options: RunOptions) -> str:
    """Of the kernels that the options mean on this machine."""
    with closing(Workers(1, kernel=kernel_for(options))) as workers:
        return workers.kernel


def choose_mode(bundle: Bundle, options: RunOptions) -> Choice:
    """Exact where it is predicted to reach half of the mixed mode's speed, or is all that fits.

    Raises DoesNotFit when neither fits.
    """
    predictor = _Predictor(bundle, options)
    predicted: dict[str, float] = {}
    refused: DoesNotFit | None = None
    mixed, exact = replace(options, draft=None), exact_options(options)
    drafts: dict[str, float] = {}
    try:
        predicted["mixed"] = predictor.tps(mixed)[0]
    except DoesNotFit as error:
        refused = error
    try:
        exact, drafts = _best_draft(predictor, exact)
        predicted["exact"] = max(drafts.values())
    except DoesNotFit:
        if refused is not None:
            raise refused from None
    if predicted.get("exact", 0.0) >= _WORTH * predicted.get("mixed", 0.0):
        return Choice(exact, predicted, drafts)
    return Choice(mixed, predicted)


def choose_draft(bundle: Bundle, options: RunOptions) -> Choice:
    """For exact mode: drafts by the other model, or as without it, whichever promises more.

    Raises DoesNotFit when neither fits.
    """
    best, drafts = _best_draft(_Predictor(bundle, options), options)
    return Choice(best, {}, drafts)


class _Predictor:
    """Plans and predicts for one bundle; disk and memory are measured once, when first needed."""

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        self._bundle, self._config = bundle, config_of(bundle)
        self._importance, self._kernel = importance_of(bundle), kernel_name(options)
        self._speeds: Speeds | None = None

    def tps(self, options: RunOptions) -> tuple[float, str]:
        """Tokens per second predicted, and where drafts come from. Raises DoesNotFit."""
        shape = run_shape(self._bundle, self._config, options)
        shape, plan = plan_for(self._bundle, self._config, shape, self._importance, options)
        speeds = self._speeds
        if speeds is None or (plan.ssd_nbytes_per_token and not speeds.ssd):
            reads = bool(plan.ssd_nbytes_per_token)
            ssd = disk_profile(self._bundle).bytes_per_s if reads else 0.0
            memory = probe_dram(min(shape.threads, 8)) if speeds is None else speeds.memory
            speeds = self._speeds = Speeds(ssd, 0.0, memory)
        if not options.speculate:
            return predicted_tps(plan, speeds), ""
        weights = parameter_count(self._config)
        tps = predicted_exact_tps(plan, shape, weights, speeds, kernel=self._kernel)
        draft = plan.footprint.draft
        return tps, (draft.name or "INT4 planes") if draft is not None else "the text so far"


def _best_draft(predictor: _Predictor, options: RunOptions) -> tuple[RunOptions, dict[str, float]]:
    """The options with the best source of drafts that fits, and what each source promises."""
    ways = [replace(options, draft=None)] + [options] * (options.draft is not None)
    found: list[tuple[float, str, RunOptions]] = []
    refused: DoesNotFit | None = None
    for way in ways:
        try:
            found.append((*predictor.tps(way), way))
        except DoesNotFit as error:
            refused = refused or error
    if not found:
        assert refused is not None
        raise refused
    best = max(found, key=lambda one: one[0])
    return best[2], {name: tps for tps, name, _ in found}
