"""Mixed or exact: which way of decoding suits a bundle, a memory budget and this machine.

Both are planned and their speed predicted before a byte of weights is read. Knows nothing about
printing.
"""

from contextlib import closing
from dataclasses import dataclass, replace
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
    """The options with the mode made, and tokens per second predicted for each mode that fits."""

    options: RunOptions
    predicted: dict[str, float]

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
    exact, kernel = exact_options(options), kernel_name(options)
    config, importance = config_of(bundle), importance_of(bundle)
    weights = parameter_count(config)
    predicted: dict[str, float] = {}
    refused: DoesNotFit | None = None
    speeds: Speeds | None = None
    for mode, chosen in (("mixed", options), ("exact", exact)):
        try:
            shape = run_shape(bundle, config, chosen)
            shape, plan = plan_for(bundle, config, shape, importance, chosen)
        except DoesNotFit as error:
            refused = refused or error
            continue
        if speeds is None or (plan.ssd_nbytes_per_token and not speeds.ssd):
            ssd = disk_profile(bundle).bytes_per_s if plan.ssd_nbytes_per_token else 0.0
            memory = probe_dram(shape.threads) if speeds is None else speeds.memory
            speeds = Speeds(ssd, 0.0, memory)
        if mode == "exact":
            predicted[mode] = predicted_exact_tps(plan, shape, weights, speeds, kernel=kernel)
        else:
            predicted[mode] = predicted_tps(plan, speeds)
    if not predicted:
        assert refused is not None
        raise refused
    if predicted.get("exact", 0.0) >= _WORTH * predicted.get("mixed", 0.0):
        return Choice(exact, predicted)
    return Choice(options, predicted)
