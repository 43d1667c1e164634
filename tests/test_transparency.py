"""The cache is transparent, whatever is drawn: random runs against one with all in memory.

tests/test_store.py has the grid by which a difference is understood; here it is looked for.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from running import MIXES, GiB, named_smallest, options_for, plan_of
from shadow import require_true_copies
from tiny_models import pack_folder, write_checkpoint
from trials import trials

from m2c.bundle.bundle import Bundle
from m2c.bundle.shard import BLOCK
from m2c.disk import DiskProfile
from m2c.engine import Engine, RunOptions
from m2c.errors import UsageError
from m2c.generate import prefill
from m2c.kernels.native import CHOICES, NativeKernels
from m2c.model.mix import PRECISIONS, Mix
from m2c.modes import exact_options
from m2c.sampling import Sampler, SamplingParams
from m2c.speculate import Speculator
from m2c.tiers.policies import POLICY_NAMES

VOCAB, LONGEST = 300, 256
Run = tuple[list[int], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One run. batches: the prompt as it is given to the model."""

    options: RunOptions
    batches: list[list[int]]
    tokens: int
    disk: DiskProfile
    pieces: int  # bytes a piece of a layer aims at
    room: float  # of the memory between the smallest and all
    hbm_room: float | None

    @property
    def ids(self) -> list[int]:
        return [token for batch in self.batches for token in batch]

    @property
    def oracle(self) -> RunOptions:
        """One thread, nothing cached, one context size: all of it in memory."""
        return replace(
            self.options, threads=1, ctx_size=LONGEST, dram=GiB, hbm=None, policy=None,
            speculate=False, draft=None, depth=3,
        )  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Other weights, another shape, a tied head; the same vocabulary."""
    shape = {
        "num_hidden_layers": 5, "hidden_size": 96, "intermediate_size": 1030, "hidden_act": "relu",
        "tie_word_embeddings": True,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("tied")
    return pack_folder(write_checkpoint(folder / "c", shape, seed=4), folder / "tied.m2c")


@pytest.fixture(scope="module")
def kernel_names() -> list[str]:
    """What this machine has."""
    found = ["torch"]
    for name in CHOICES:
        if name not in ("auto", "torch"):
            try:
                NativeKernels(name, 1).close()
            except UsageError:
                continue
            found.append(name)
    return found


def draw(rng: np.random.Generator, kernel_names: list[str], other: Bundle, itself: Bundle) -> Case:
    """A case from everything that a person may set, with sizes for tiny models."""

    def pick(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    kernel = pick(kernel_names)
    length, tokens = int(rng.integers(1, 70)), int(rng.integers(2, 9))
    plain = RunOptions(
        mix=draw_mix(rng), dense=pick([None, None, *PRECISIONS]), kv_type=pick(["f16", "f32"]),
        ctx_size=int(rng.integers(length + tokens + 1, LONGEST + 1)),
        threads=int(rng.integers(1, 5)), policy=pick([None, *POLICY_NAMES]),
        depth=int(pick([1, 2, 3, 5, 30])), kernel=kernel,
    )  # fmt: skip
    hbm_room = None
    if kernel != "torch" and rng.random() < 0.3:
        plain = exact_options(replace(plain, dense=None), pick(PRECISIONS))
        plain = replace(plain, draft=pick([None, None, other, itself]))
    elif rng.random() < 0.4:
        hbm_room = draw_room(rng)
    cuts = np.sort(rng.choice(np.arange(1, length + 1), min(length, pick([1, 1, 2, 5])), False))
    ids = rng.integers(0, VOCAB, length)
    batches = [part.tolist() for part in np.split(ids, cuts) if len(part)]
    disk = DiskProfile(int(pick([1, 2, 3, 8, 32])) * BLOCK, int(pick([1, 2, 4, 8, 16])))
    return Case(plain, batches, tokens, disk, pick([1, 8 << 20]), draw_room(rng), hbm_room)


def draw_mix(rng: np.random.Generator) -> Mix:
    known = list(MIXES.values())
    if rng.random() < 0.5:
        return known[int(rng.integers(len(known)))]
    first, second = sorted(int(share) for share in rng.integers(0, 101, 2))
    drop = float(rng.integers(0, 60)) if rng.random() < 0.25 else 0.0
    return Mix(first, second - first, 100 - second, drop)


def draw_room(rng: np.random.Generator) -> float:
    """Both ends often: that is where plans change their kind."""
    return float(rng.choice([0.0, 1.0, rng.random(), rng.random()]))


def with_budgets(bundle: Bundle, case: Case) -> RunOptions:
    options = case.options
    if case.hbm_room is not None:
        smallest = named_smallest(bundle, replace(options, hbm=1, dram=GiB))
        most = plan_of(bundle, replace(options, hbm=GiB, dram=GiB)).used_hbm
        options = replace(options, hbm=smallest + int((most - smallest) * case.hbm_room))
    smallest = named_smallest(bundle, replace(options, dram=1))
    most = max(smallest, plan_of(bundle, replace(options, dram=GiB)).used_dram)
    return replace(options, dram=smallest + int((most - smallest) * case.room))


def one_by_one(engine: Engine, batches: list[list[int]], tokens: int) -> Run:
    """Greedy tokens, and the logits of every position of prompt and text."""
    model = engine.model
    model.kv.truncate(0)
    rows = [model.forward(np.asarray(batch, np.int32), all_logits=True) for batch in batches]
    ids: list[int] = []
    for _ in range(tokens):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(model.forward(np.asarray(ids[-1:], np.int32), all_logits=True))
    return ids, torch.cat(rows)


def speculated(engine: Engine, ids: list[int], tokens: int) -> Run:
    """As `one_by_one`, from drafts; then all logits in one pass."""
    model = engine.model
    model.kv.truncate(0)
    speculator = Speculator(model, engine.draft, Sampler(SamplingParams()))
    found = list(speculator.tokens(prefill(model, ids), ids, tokens))
    model.kv.truncate(0)
    return found, model.forward(np.asarray(ids + found, np.int32), all_logits=True)


def compare(bundle: Bundle, case: Case) -> None:
    """Cold, then warm; then what is in memory against the SSD."""
    with Engine(bundle, case.oracle) as engine:
        assert not engine.plan.streamed
        tokens, logits = one_by_one(engine, case.batches, case.tokens)
    options = with_budgets(bundle, case)
    with Engine(bundle, options) as engine:
        assert engine.plan.used_dram <= (options.dram or 0)
        assert engine.plan.used_hbm <= (options.hbm or 0)
        for state in ("cold", "warm"):
            if options.speculate:
                found = speculated(engine, case.ids, case.tokens)
            else:
                found = one_by_one(engine, case.batches, case.tokens)
            assert found[0] == tokens, state
            assert torch.equal(found[1], logits), state
            require_true_copies(engine)


@pytest.fixture(scope="module")
def cases(deep_bundle: Bundle, tied: Bundle, kernel_names: list[str]) -> Any:
    """From a seed to a bundle and a case."""

    def drawn(seed: int) -> tuple[Bundle, Case]:
        rng = np.random.default_rng(seed)
        bundle, other = (deep_bundle, tied) if rng.random() < 0.6 else (tied, deep_bundle)
        return bundle, draw(rng, kernel_names, other, bundle)

    return drawn


@pytest.mark.campaign
@pytest.mark.slow
def test_no_setting_changes_a_bit(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in trials("R17-transparency", ci=5, campaign=500):
        with trial as seed:
            bundle, case = cases(seed)
            monkeypatch.setattr("m2c.model.footprint.PIECE_NBYTES", case.pieces)
            monkeypatch.setattr("m2c.engine.disk_profile", lambda bundle, disk=case.disk: disk)
            compare(bundle, case)


def test_the_shadow_sees_a_stale_record(deep_bundle: Bundle) -> None:
    """Of each kind of memory: a slot of the slab, the prefix, a resident block."""
    options = options_for(Mix(5, 15, 80), policy="lru")
    with Engine(deep_bundle, options) as engine:
        engine.model.forward(np.asarray([3, 4, 5], np.int32))
        engine.model.forward(np.asarray([6], np.int32))
        assert require_true_copies(engine) > 8 * 700
        upgrade = engine.store._upgrades[3, "fp16"]
        assert upgrade._slab is not None
        assert upgrade.cache is not None
        slot = int(upgrade.cache.lookup(upgrade.cache.ids)[0])
        rows = (engine.store._uses["neurons", 2][0].rows or {})["ffn"]
        for memory, what in (
            (upgrade._slab[slot], "slab 3 fp16"),
            (rows.int4[5], "neurons 2 ffn"),  # type: ignore[union-attr]
            (torch.from_numpy(upgrade.source._prefix), "prefix 3 fp16"),
        ):
            if not len(memory):
                continue
            bits = memory.view(torch.uint8)
            bits[0] ^= 1
            with pytest.raises(AssertionError, match=what):
                require_true_copies(engine)
            bits[0] ^= 1
        require_true_copies(engine)
