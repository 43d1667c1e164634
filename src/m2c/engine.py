"""A bundle made ready to decode: its plan, its store, its transformer, its tokenizer.

Knows nothing about sampling, text streams or printing.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from m2c.bundle.bundle import Bundle
from m2c.bundle.importance import Importance
from m2c.bundle.shard import BLOCK
from m2c.contents import config_of, importance_of, in_shard_order, tokenizer_of, vectors_of
from m2c.device import device_of, family_of, workers_of
from m2c.disk import DEFAULT, disk_profile
from m2c.drafting import Draft, OwnDraft, SharedDraft
from m2c.errors import DoesNotFit, UsageError
from m2c.hardware import auto_dram, auto_threads
from m2c.kernels.dispatch import exact_weights
from m2c.kernels.workers import Workers
from m2c.model.config import ModelConfig
from m2c.model.footprint import (
    RunShape,
    footprint_of_bundle,
    footprint_of_config,
)
from m2c.model.kv import KvCache
from m2c.model.mix import Mix, assumed_mix
from m2c.model.transformer import Transformer
from m2c.speculate import FEW_AT_ONCE, MOST_AT_ONCE
from m2c.tiers.facts import Budget, DraftFact, Footprint
from m2c.tiers.plan import DEPTH, Plan, make_plan
from m2c.tiers.policies import POLICY_NAMES
from m2c.tiers.store import NeuronStore
from m2c.tokenizer import Tokenizer

DEFAULT_CTX: Final = 4096
ASSUMED_EXACT_TYPE: Final = "bf16"
_INT4: Final = Mix(0, 0, 100)
_UNBOUNDED: Final = 1 << 62


@dataclass(frozen=True)
class RunOptions:
    """What a person may ask of a run; None means: choose for me."""

    mix: Mix | None = None
    dense: str | None = None  # precision of attention, embeddings and head
    ctx_size: int | None = None
    kv_type: str = "f16"
    threads: int | None = None
    device: str = "cpu"
    dram: int | None = None
    hbm: int | None = None
    policy: str | None = None
    depth: int = DEPTH
    kernel: str = "auto"  # native.CHOICES
    speculate: bool = False  # draft tokens, verify several in a pass
    draft: Bundle | None = None  # another model that drafts; its vocabulary must be the same
    aside: int = 0  # bytes that whoever runs the model needs beside it, of the same memory


class Engine:
    """Use as a context manager. `model` is the Transformer, `store` its weights."""

    def __init__(
        self, bundle: Bundle, options: RunOptions, *,
        progress: Callable[[int], None] = lambda nbytes: None,
        record: Callable[[int, str, Any], None] | None = None, tokenizer: Tokenizer | None = None,
        workers: Workers | None = None,
    ) -> None:  # fmt: skip
        """tokenizer: the bundle's own, for whoever has made it already. workers: of another engine,
        which closes them."""
        device_of(options.device)  # it must be there before anything is planned
        self.bundle = bundle
        self.closing = ExitStack()  # what else ends with this engine
        self.config = config_of(bundle)
        importance = importance_of(bundle)
        shape = run_shape(bundle, self.config, options)
        self.shape, self.plan = plan_for(bundle, self.config, shape, importance, options)
        self.speculates = options.speculate
        self.tokenizer = tokenizer or tokenizer_of(bundle)
        try:
            self._open(options, workers, importance, progress, record)
        except BaseException:
            self.closing.close()
            raise

    def _open(
        self, options: RunOptions, workers: Workers | None, importance: Importance,
        progress: Callable[[int], None], record: Callable[[int, str, Any], None] | None,
    ) -> None:  # fmt: skip
        """Everything that must be closed again."""
        bundle, device = self.bundle, device_of(options.device)
        threads = self.shape.threads
        self.workers = workers or workers_of(options.device, options.kernel, threads)
        if workers is None:
            self.closing.callback(self.workers.close)
        # a probe takes a second: only for those who will read while they decode
        self.disk = disk_profile(bundle) if self.plan.ssd_nbytes_per_token else DEFAULT
        self.store = NeuronStore(
            bundle, self.plan, self.shape.precisions, device=device, progress=progress,
            io_threads=self.disk.depth, request_blocks=self.disk.request_nbytes // BLOCK,
            decode=partial(exact_weights, workers=self.workers), gather=self.workers.gather,
        )  # fmt: skip
        self.closing.callback(self.store.close)
        vectors = in_shard_order(vectors_of(bundle, self.config), importance)
        vectors = {k: v.to(device) for k, v in vectors.items()}
        # needed to choose neurons, of which no expert's is chosen
        scored = [] if self.config.num_experts else importance.layers
        norms = [torch.from_numpy(layer.down_norm[layer.order]).to(device) for layer in scored]
        kv = KvCache(self.config, self.shape.ctx_size, kv_type=self.shape.kv_type, device=device)
        self.model = Transformer(
            self.config, self.store, vectors=vectors, down_norms=norms, mix=self.shape.mix, kv=kv,
            workers=self.workers, upgrades=self.store, record=record,
        )  # fmt: skip
        self.draft: Draft | None = None
        if self.store.draft is not None:
            self.draft = SharedDraft(
                Transformer(
                    self.config,
                    self.store.draft,
                    vectors=vectors,
                    down_norms=norms,
                    mix=_INT4,
                    kv=kv,
                    workers=self.workers,
                )
            )
        elif options.speculate and options.draft is not None:
            self.draft = self._own_draft(options.draft, options, progress)

    def _own_draft(
        self, bundle: Bundle, options: RunOptions, progress: Callable[[int], None]
    ) -> OwnDraft:
        """The other model, ready, in the memory that the plan has counted for it."""
        assert self.plan.footprint.draft is not None
        chosen = replace(
            _draft_options(bundle, self.shape.ctx_size, options),
            dram=self.plan.footprint.draft.nbytes,
        )
        engine = Engine(
            bundle, chosen, progress=progress, tokenizer=self.tokenizer, workers=self.workers
        )
        self.closing.enter_context(engine)
        return OwnDraft(engine.model, bundle.path.stem, self.config.vocab_size)

    def stop_when(self, asked: Callable[[], bool]) -> None:
        """Break a pass off with Stopped once `asked`, within a layer."""
        self.model.stop_asked = asked
        if self.draft is not None:
            self.draft.model.stop_asked = asked

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.close()


def run_shape(bundle: Bundle, config: ModelConfig, options: RunOptions) -> RunShape:
    """The options with the choices left open made."""
    mix = options.mix or Mix.of_percent(bundle.manifest.mix.percent)
    return shape_for(config, options, mix)


def shape_for(config: ModelConfig, options: RunOptions, mix: Mix) -> RunShape:
    longest = config.max_position_embeddings
    ctx_size = options.ctx_size or min(longest, DEFAULT_CTX)
    if ctx_size > longest:
        raise UsageError(f"--ctx-size {ctx_size} is beyond the {longest} tokens of this model")
    threads = options.threads or auto_threads()
    kernels = family_of(options.device, options.kernel)
    by_expert, stored = config.num_experts > 0, False
    if by_expert:
        require_mix(mix, config)
        mix = mix.among(config.num_experts_per_tok)
        # exact rows that were decoded have no lower planes
        stored = mix.best == "fp16" and not mix.is_uniform
    dense = options.dense or mix.dense
    # attention and head are a small part of what a token reads, and all of its tokens read it
    if by_expert and options.dense is None and dense == "int4":
        dense = "int8"
    return RunShape(
        mix, dense, ctx_size, options.kv_type, threads, kernels, stored=stored, by_expert=by_expert
    )


def require_mix(mix: Mix, config: ModelConfig) -> None:
    """Raises UsageError where a model cannot run at this mix."""
    if config.num_experts and mix.drop:
        raise UsageError(
            f"--drop {mix.drop:g}: nothing of a mixture of experts can be dropped",
            "leave out --drop; --mix lowers the precision of a token's last experts",
        )


def budget_for(options: RunOptions) -> Budget:
    """The memory to use. Raises UsageError where a device would have to be there to say."""
    hbm = options.hbm
    if options.device != "cpu":
        if hbm is None:
            device = device_of(options.device)
            torch.cuda.empty_cache()  # what torch keeps of an engine that was closed is free
            hbm = torch.cuda.mem_get_info(device)[0] * 9 // 10
        if not hbm:
            raise UsageError("--hbm 0 leaves a GPU nothing to compute on", "use --device cpu")
    dram = auto_dram() if options.dram is None else options.dram
    return Budget(dram, hbm or 0)


def policy_for(options: RunOptions, budget: Budget, *, experts: bool = False) -> str:
    """In DRAM the hottest are pinned; in HBM the active set of the token before is kept. Of experts
    those used last."""
    policy = options.policy or ("lru" if experts else "atu" if budget.hbm else "pinned")
    if policy not in POLICY_NAMES:
        raise UsageError(f"--policy {policy}: choose one of {', '.join(POLICY_NAMES)}")
    return policy


def plan_for(
    bundle: Bundle, config: ModelConfig, shape: RunShape, importance: Importance,
    options: RunOptions,
) -> tuple[RunShape, Plan]:  # fmt: skip
    """The plan, and the shape it is for. Raises DoesNotFit naming a budget that works."""

    def footprint(candidate: RunShape) -> Footprint:
        return footprint_of_bundle(
            bundle, config, candidate, importance.hit_share, _popularity(config, importance)
        )

    return _plan(footprint, shape, options)


def _popularity(config: ModelConfig, importance: Importance) -> npt.NDArray[np.float32] | None:
    """[layers, experts] share of the tokens that use an expert; None where there are none."""
    if not config.num_experts:
        return None
    shares = np.stack([layer.frequency for layer in importance.layers])
    return shares[:, :: config.intermediate_size]  # all neurons of an expert have the same


def plan_without_weights(config: ModelConfig, options: RunOptions) -> tuple[RunShape, Plan]:
    """As `plan_for`, of a model known by its config alone: sizes are estimates."""

    def footprint(candidate: RunShape) -> Footprint:
        return footprint_of_config(config, candidate, ASSUMED_EXACT_TYPE)

    mix = options.mix or assumed_mix(config.num_experts_per_tok)
    shape = shape_for(config, options, mix)
    return _plan(footprint, shape, options)


def _plan(
    footprint: Callable[[RunShape], Footprint], shape: RunShape, options: RunOptions
) -> tuple[RunShape, Plan]:
    budget = budget_for(options)
    shapes, draft = [shape], None
    if options.speculate:
        if options.device != "cpu" and shape.kernels == "torch":
            # its sums depend on how many tokens share a pass
            raise UsageError("exact mode on a GPU needs the CUDA kernels", "leave out --kernel")
        shapes = speculative_shapes(shape, budget, own=options.draft is not None)
        draft = options.draft and _draft_fact(options.draft, shape.ctx_size, options)

    def planned(candidate: RunShape) -> Plan:
        found = footprint(candidate)
        workspace = found.workspace_nbytes + options.aside
        found = replace(found, draft=draft or found.draft, workspace_nbytes=workspace)
        policy = policy_for(options, budget, experts=found.experts is not None)
        return make_plan(found, budget, policy=policy, depth=options.depth)

    refused: list[DoesNotFit] = []
    slow: tuple[RunShape, Plan] | None = None
    for candidate in shapes:
        try:
            plan = planned(candidate)
        except DoesNotFit as error:
            refused.append(error)
            continue
        # 16-bit weights in memory save their decoding, but only all of them save the reading
        streams = plan.streamed or plan.expert_slots is not None or plan.link_nbytes_per_token
        if candidate is shapes[-1] or candidate.stored or not streams:
            return candidate, plan
        slow = slow or (candidate, plan)
    if slow is not None:
        return slow
    least = min(refused, key=lambda error: error.smallest)
    for flag, given, what in (("--dram", options.dram, ""), ("--hbm", options.hbm, "GPU ")):
        if given is None and least.message.startswith(flag):
            message = f"not enough free {what}memory: {least.message}"
            raise DoesNotFit(message, least.hint, least.smallest)
    raise least


def _draft_options(bundle: Bundle, ctx_size: int, options: RunOptions) -> RunOptions:
    """How a bundle is run that drafts for a context of `ctx_size`: INT4 planes in memory."""
    longest = config_of(bundle).max_position_embeddings
    return RunOptions(
        mix=_INT4, dense="int4", ctx_size=min(ctx_size, longest), kv_type=options.kv_type,
        threads=options.threads, kernel=options.kernel, dram=_UNBOUNDED,
    )  # fmt: skip


def _draft_fact(bundle: Bundle, ctx_size: int, options: RunOptions) -> DraftFact:
    """What a bundle that drafts takes, everything included."""
    config, chosen = config_of(bundle), _draft_options(bundle, ctx_size, options)
    shape = run_shape(bundle, config, chosen)
    plan = plan_for(bundle, config, shape, importance_of(bundle), chosen)[1]
    return DraftFact(
        plan.used_dram, plan.compute_nbytes_per_token, config.num_hidden_layers, bundle.path.stem
    )


def speculative_shapes(shape: RunShape, budget: Budget, *, own: bool = False) -> list[RunShape]:
    """Ways to verify drafts, the fastest first.

    With the INT4 planes in memory to draft with, or, where they do not fit or the drafts are of
    another model (`own`), without. Exact weights are kept decoded if all of them fit, else as
    stored. Where only the text so far drafts and weights stream, the logits of few tokens leave
    more memory for weights.
    """
    if budget.hbm and own:
        raise UsageError("another model drafts in DRAM", "leave out --hbm and --device, or --draft")
    if not shape.mix.is_uniform or shape.dense != shape.mix.floor:
        raise UsageError("exact mode verifies at one precision", "leave out --mix and --dense")
    few = replace(shape, at_once=FEW_AT_ONCE)
    shape = replace(shape, at_once=MOST_AT_ONCE)
    exact = shape.mix.floor == "fp16"
    if own:
        return [shape, replace(shape, stored=True)] if exact else [shape]
    if shape.mix.floor == "int4":
        return [shape, few]
    if shape.mix.floor == "int8":
        return [replace(shape, drafts=True, stored=True), few]
    return [
        replace(shape, drafts=True), replace(shape, drafts=True, stored=True),
        replace(few, stored=True),
    ]  # fmt: skip
