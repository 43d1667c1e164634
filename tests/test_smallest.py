"""A budget that is too small is refused before a weight is read, and the size that is named works.

One MiB less does not: what is named is the smallest. tests/test_store.py computes with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from command_line import Said, m2c
from running import plan_of
from trials import trials

from m2c import engine as engines
from m2c.bundle.bundle import Bundle
from m2c.engine import RunOptions, plan_without_weights
from m2c.errors import DoesNotFit
from m2c.kernels.native import LIBRARY
from m2c.model.aliases import ALIASES
from m2c.model.mix import PRECISIONS, Mix
from m2c.modes import exact_options
from m2c.tiers.plan import Plan
from m2c.tiers.policies import POLICY_NAMES
from m2c.tiers.ssd import SsdReader
from m2c.units import GiB, MiB

NAMED = r"the smallest that works is (--dram|--hbm) (\d+)MiB"
MIXES = ["100/0/0", "0/100/0", "0/0/100", "0/25/75", "5/15/80", "50/50/0", "30/0/70", "1/98/1"]
CONFIGS = {name: alias.config() for name, alias in ALIASES.items()}


def drawn_options(rng: np.random.Generator, longest: int) -> RunOptions:
    def pick(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    options = RunOptions(
        mix=Mix.parse(pick(MIXES), float(pick([0, 0, 30]))), dense=pick([None, *PRECISIONS]),
        ctx_size=int(2 ** rng.uniform(4, np.log2(longest))), kv_type=pick(["f16", "f32"]),
        threads=int(rng.integers(1, 65)), policy=pick([None, *POLICY_NAMES]),
        depth=int(rng.integers(1, 65)), kernel=pick(["auto", "torch"]), aside=pick([0, 10 * MiB]),
    )  # fmt: skip
    if rng.random() < 0.4:
        return exact_options(replace(options, dense=None), pick(PRECISIONS))
    return options


def require_smallest(
    plan: Callable[[RunOptions], Plan], options: RunOptions, tier: str, rng: np.random.Generator
) -> int:
    """What is named for `tier` works, in bytes and in MiB, as does all above; less does not."""

    def of(nbytes: int) -> Plan:
        return plan(replace(options, **{tier: nbytes}))

    with pytest.raises(DoesNotFit, match=NAMED) as caught:
        of(1)
    smallest = caught.value.smallest
    found = re.search(NAMED, str(caught.value))
    assert found is not None
    assert found[1] == f"--{tier}"
    typed = int(found[2]) * MiB
    assert smallest <= typed < smallest + MiB
    for nbytes in (smallest, typed, int(smallest * (1 + 3 * rng.random())), 64 * smallest):
        made = of(nbytes)
        assert (made.used_hbm if tier == "hbm" else made.used_dram) <= nbytes
    for nbytes in (smallest - 1, typed - MiB, int(smallest * rng.random())):
        with pytest.raises(DoesNotFit):
            of(max(1, nbytes))
    return smallest


@pytest.mark.campaign
def test_what_is_named_is_the_smallest(deep_bundle: Bundle, tiny_bundle: Bundle) -> None:
    """Of bundles, and of models of 0.1 to 70 billion parameters that are not here."""
    names = sorted(CONFIGS)
    for trial in trials("R9-plan", ci=20, campaign=2_000):
        with trial as seed:
            rng = np.random.default_rng(seed)

            if seed % 4 == 0:
                bundle = deep_bundle if seed % 8 else tiny_bundle
                options = drawn_options(rng, 256)
                if options.speculate and rng.random() < 0.5:
                    options = replace(options, draft=tiny_bundle)

                def plan(asked: RunOptions, bundle: Bundle = bundle) -> Plan:
                    return plan_of(bundle, asked)

            else:
                config = CONFIGS[names[int(rng.integers(len(names)))]]
                options = drawn_options(rng, config.max_position_embeddings)
                if config.num_experts and options.mix is not None:
                    options = replace(options, mix=replace(options.mix, drop=0.0))

                def plan(asked: RunOptions, config: Any = config) -> Plan:
                    return plan_without_weights(config, asked)[1]

            if not options.speculate and rng.random() < 0.4:
                hbm = require_smallest(plan, replace(options, dram=1 << 50), "hbm", rng)
                options = replace(options, hbm=int(hbm * (1 + rng.choice([0, rng.random(), 50]))))
            require_smallest(plan, options, "dram", rng)


@pytest.mark.parametrize("name", ["qwen2.5-coder-1.5b", "mistral-7b"])
def test_with_a_gpu_the_smallest_is_that_of_either_way_to_fill_it(name: str) -> None:
    """Slabs first and blocks first leave DRAM with different needs; each was tried alone once."""
    rng, config = np.random.default_rng(0), CONFIGS[name]

    def plan(asked: RunOptions) -> Plan:
        return plan_without_weights(config, asked)[1]

    options = RunOptions(mix=Mix.parse("0/25/75"), ctx_size=512, threads=2, kernel="torch")
    least = require_smallest(plan, replace(options, dram=1 << 50), "hbm", rng)
    for share in np.linspace(1, 3, 9):
        require_smallest(plan, replace(options, hbm=int(least * share)), "dram", rng)


# -- the commands ----------------------------------------------------------------------------------


def drawn_words(rng: np.random.Generator) -> tuple[str, list[object]]:
    """A command and its options, --dram left out."""
    command = str(rng.choice(["run", "run", "run", "eval"]))
    words: list[object] = ["-q", "-t", int(rng.integers(1, 4))]
    mode = "mixed" if command == "eval" else str(rng.choice(["mixed", "exact", "auto"]))
    if command == "run":
        words += ["--mode", mode, "--ctx-size", int(rng.integers(32, 257))]
    if mode == "exact":
        words += ["--exact-precision", rng.choice(PRECISIONS)]
    if mode == "mixed":
        words += ["--mix", rng.choice(MIXES)]
    kernel = rng.choice(["auto", "torch"]) if LIBRARY.exists() else "torch"
    return command, [*words, "--kernel", kernel]


@pytest.mark.campaign
@pytest.mark.slow
def test_commands_refuse_before_they_read_and_then_work(
    deep_bundle: Bundle, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a fine day and nobody spoke of the letter. " * 4)
    for trial in trials("R9-commands", ci=5, campaign=150):
        with trial as seed:
            command, words = drawn_words(np.random.default_rng(seed))
            own = ["--text", text, "-w", 32] if command == "eval" else ["-n", 3, "-p", "it was"]

            line = (command, deep_bundle.path, *own, *words, "--dram")
            said = partial(with_dram, line)
            least = require_refused(said, 1)
            require_refused(said, least - 1)
            works = said(least)
            assert works.code == 0, works.err
            assert works.out


def with_dram(line: Sequence[object], mib: int) -> Said:
    """A command line that ends with --dram."""
    return m2c(*line, f"{mib}MiB")


def require_refused(said: Callable[[int], Said], mib: int) -> int:
    """Exit 7 without a byte of weights read; the MiB that are named."""

    def nothing(*_: Any) -> None:
        raise AssertionError("weights are read")

    with patch.object(SsdReader, "read", nothing), patch.object(SsdReader, "read_now", nothing):
        found = said(mib)
    assert found.code == 7, found.err
    assert f"--dram {mib}.00 MiB is too small" in found.reason
    named = re.search(NAMED, found.reason)
    assert named is not None, found.reason
    return int(named[2])


def test_evaluation_names_what_all_its_mixes_need(deep_bundle: Bundle, tmp_path: Path) -> None:
    """The first pass, over the checkpoint's weights, is not the one that needs most."""
    text = tmp_path / "text.txt"
    text.write_text("It was a fine day and nobody spoke of the letter. " * 4)
    line = ("eval", deep_bundle.path, "--text", text, "-w", 32, "-t", 1, "-q", "--mix", "0/0/100")

    def least(*more: object) -> int:
        return require_refused(partial(with_dram, (*line, *more, "--dram")), 1)

    assert least() < least("--mix", "5/15/80")


@pytest.mark.parametrize(
    ("given", "what"), [({}, "not enough free memory: --dram"), ({"hbm": MiB}, "--hbm")]
)
def test_only_memory_that_was_not_given_is_called_not_free(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, given: dict[str, int], what: str
) -> None:
    monkeypatch.setattr(engines, "auto_dram", lambda: 1 if not given else GiB)
    with pytest.raises(DoesNotFit) as caught:
        plan_of(tiny_bundle, RunOptions(ctx_size=32, threads=1, **given))
    assert caught.value.message.startswith(what)
