"""The forward pass over a bundle: token ids in, logits out, weights from the store.

Knows nothing about text, sampling or where the bytes lie.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.errors import BadInput
from m2c.kernels.dispatch import attention, matmul_into, matmul_rows, run_stack
from m2c.kernels.gpu import GpuKernels, Replays
from m2c.kernels.operands import AttentionCall, LayerCall, Stack
from m2c.kernels.reference import soft_capped
from m2c.kernels.rows import Rows
from m2c.kernels.workers import Workers
from m2c.model.attention import (
    MATRICES,
    Rotary,
    attention_call,
    embedded,
    layer_facts,
    norm_of,
)
from m2c.model.config import ModelConfig
from m2c.model.experts import SHARED, expert_ffn, router_of
from m2c.model.ffn import mixed_ffn, uniform_ffn
from m2c.model.footprint import LOGITS
from m2c.model.kv import KvCache
from m2c.model.mix import Mix
from m2c.tiers.store import FFN

Ids = npt.NDArray[np.int32]
# tokens that pass all layers in one call; more take long, and Ctrl-C waits for the end of a call
_AT_ONCE: Final = 8


class Weights(Protocol):
    """What a forward pass asks of `tiers`: `NeuronStore` or `DraftPlanes`."""

    device: torch.device

    @property
    def holds_all(self) -> bool: ...

    @property
    def holds_experts(self) -> bool: ...

    def uses(self, kind: str, layer: int) -> Iterator[Mapping[str, Rows]]: ...

    def experts(self, layer: int, ids: Ids, planes: Ids) -> Iterator[Rows]: ...

    def embed(self, ids: Ids) -> Tensor: ...


class Upgrades(Protocol):
    """Where rows above the floor come from: `NeuronStore`."""

    @property
    def holds_upgrades(self) -> bool: ...

    def upgrade(self, layer: int, plane: str, ids: Ids, floor: Rows, *, step: bool) -> Rows: ...

    def chosen(self, layer: int, plane: str, index: Tensor, floor: Rows) -> Rows | None: ...

    def served_again(self) -> None: ...


class Stopped(Exception):
    """A pass was broken off as somebody asked for it; the KV cache is as long as before."""


class Transformer:
    """vectors: `small_tensors`, f32, biases of neurons in the order of the rows.

    down_norms: [layers] of [neurons].
    """

    def __init__(
        self, config: ModelConfig, store: Weights, *, vectors: dict[str, Tensor],
        down_norms: list[Tensor], mix: Mix, kv: KvCache, workers: Workers,
        upgrades: Upgrades | None = None, record: Callable[[int, str, Ids], None] | None = None,
    ) -> None:  # fmt: skip
        """upgrades: not needed for a mix of one precision."""
        self.config = config
        self.kv = kv
        self.record = record
        # asked between layers, where store and caches are consistent: a signal may come anywhere
        self.stop_asked: Callable[[], bool] = lambda: False
        self._store = store
        self._vectors = vectors
        self._mix = mix
        self._upgrades = upgrades
        self._workers = workers
        layers = range(config.num_hidden_layers)
        self._layers = [layer_facts(config, vectors, layer) for layer in layers]
        self._routers = [
            router_of(config, vectors, layer) for layer in layers if config.num_experts
        ]
        self._expert_levels = mix.by_rank(config.num_experts_per_tok) if self._routers else ()
        # a norm of the FFN's output comes between its sum and what it is added to; experts are
        # chosen between the layers
        plain = not self._routers and not any(facts.ffn_out_norm for facts in self._layers)
        self._stacks = mix.is_uniform and plain
        self._norm = norm_of(config, vectors, "model.norm")
        self._down_norms = down_norms
        self._calls: dict[int, AttentionCall] = {}
        self._replays: Replays = {}
        self._rotary = Rotary(config, kv.ctx_size, store.device)

    def forward(self, ids: Ids, *, all_logits: bool = False) -> Tensor:
        """Append `ids` [tokens] to the context; logits of the last one [vocab], or of all
        [tokens, vocab], f32.

        Every layer's weights are read once, however many tokens there are. Raises UsageError when
        the context is full, BadInput when the logits are not finite, Stopped when `stop_asked`.
        """
        self.kv.require_room(len(ids))
        count, ids = len(ids), self._filled(ids) if all_logits else ids
        x = embedded(self.config, self._vectors, self._store.embed(ids), self.kv.length)
        gpu = self._workers.replaying
        if gpu is not None and self._steady(len(ids)):
            run, key = partial(self._pass, all_logits=all_logits), (len(ids), all_logits)
            known = self._replays.get(key) is not None
            logits = gpu.replayed(self._replays, key, x, self.kv.length, run)
            if known and self._upgrades is not None:
                self._upgrades.served_again()
        else:
            logits = self._pass(x, all_logits=all_logits)
        logits = logits[:count]
        self.kv.advance(count)
        self._workers.check()
        # before a soft cap, which makes a large number of an infinite one
        if not all(math.isfinite(end) for end in logits.aminmax()):
            raise BadInput("the model's output is not finite", "check the bundle with m2c check")
        if self.config.logits_scaling is not None:
            logits = logits / self.config.logits_scaling
        if self.config.final_logit_softcapping is not None:
            logits = soft_capped(logits, self.config.final_logit_softcapping)
        return logits if all_logits else logits[0]

    def _filled(self, ids: Ids) -> Ids:
        """Where passes are recorded, with so many tokens behind that there are few sizes of them:
        to record one takes as long as many passes, and nobody keeps what the others leave."""
        if self._workers.replaying is None or not self._steady(len(ids)):
            return ids
        size = 1 << (len(ids) - 1).bit_length()
        if size > self.kv.ctx_size - self.kv.length:
            return ids
        return np.pad(ids, (0, size - len(ids)), mode="edge")

    def _pass(self, x: Tensor, *, all_logits: bool) -> Tensor:
        """Hidden states [tokens, hidden] through all layers to logits [tokens or 1, vocab]."""
        if self.stop_asked():
            raise Stopped
        if len(x) <= _AT_ONCE and self._stacks and self._store.holds_all:
            x = run_stack(x, self._stack, self.kv.length, self._workers)
        else:
            for layer in range(self.config.num_hidden_layers):
                if self.stop_asked():
                    raise Stopped
                x = self._layer(layer, x)
        return self._logits(x if all_logits else x[-1:])

    def _steady(self, tokens: int) -> bool:
        """Whether every pass of `tokens` uses the same memory, and the host need not know what it
        chooses: of several tokens together it must."""
        if tokens > _AT_ONCE or self._routers or self.record is not None or self.stop_asked():
            return False
        chosen = self._mix.is_uniform or (tokens == 1 and self._holds_upgrades)
        return chosen and self._store.holds_all

    @property
    def _holds_upgrades(self) -> bool:
        """Whether a GPU has all that is above the floor: what it chooses need not be known here."""
        held = self._upgrades is not None and self._upgrades.holds_upgrades
        return held and isinstance(self._workers.native, GpuKernels)

    def _logits(self, x: Tensor) -> Tensor:
        """[tokens, vocab] f32 of hidden states [tokens, hidden].

        Those of many tokens are large: where the head comes in pieces they are put in their place,
        so that they are not held twice.
        """
        vocab = self.config.vocab_size
        logits, start = None, 0
        for rows in self._store.uses("head", self.config.num_hidden_layers):
            for head in rows.values():
                if len(head) == vocab:
                    logits = matmul_rows(x, head, self._workers, norm=self._norm)
                    continue
                if logits is None:
                    logits = torch.empty(len(x), vocab, device=x.device)
                part = logits[:, start : start + len(head)]
                matmul_into(part, x, head, self._workers, norm=self._norm, at_once=LOGITS)
                start += len(head)
        assert logits is not None
        return logits

    def _layer(self, layer: int, x: Tensor) -> Tensor:
        facts, act, given = self._layers[layer], self.config.activation, x
        for rows in self._store.uses("dense", layer):
            call = self._attention_call(layer, rows)
            x = attention(x, call, self.kv.length, self._workers, norm=facts.attn_norm)
            if self._routers:  # here: a shared expert's rows are valid as long as attention's
                x = expert_ffn(
                    x, self._routers[layer], partial(self._store.experts, layer),
                    levels=self._expert_levels, norm=facts.ffn_norm, act=act,
                    workers=self._workers, out_norm=facts.ffn_out_norm, shared=rows.get(SHARED),
                    stay=self._store.holds_experts,
                )  # fmt: skip
        if self._routers:
            return x
        onto = None
        if self.config.parallel_norms:
            x, onto = given, x
        more = {"onto": onto, "bias": facts.up_bias, "out_bias": facts.down_bias}
        neurons = (rows[FFN] for rows in self._store.uses("neurons", layer))
        if self._mix.is_uniform:
            return uniform_ffn(
                x, neurons, norm=facts.ffn_norm, act=act, workers=self._workers,
                out_norm=facts.ffn_out_norm, **more,
            )  # fmt: skip
        single = x.shape[0] == 1
        record = self.record if single else None
        asks = single and record is None and self._holds_upgrades
        for floor in neurons:  # one block: a mix needs all scores before it can choose
            fetch = partial(self._fetch, layer, floor, single)
            x = mixed_ffn(
                x, floor, self._down_norms[layer], norm=facts.ffn_norm, act=act, mix=self._mix,
                fetch=fetch, workers=self._workers, out_norm=facts.ffn_out_norm,
                record=None if record is None else partial(record, layer),
                chosen_rows=partial(self._chosen, layer, floor) if asks else None, **more,
            )  # fmt: skip
        return x

    def _chosen(self, layer: int, floor: Rows, plane: str, index: Tensor) -> Rows | None:
        assert self._upgrades is not None
        return self._upgrades.chosen(layer, plane, index, floor)

    def _fetch(self, layer: int, floor: Rows, single: bool, plane: str, ids: Ids) -> Rows:
        assert self._upgrades is not None
        return self._upgrades.upgrade(layer, plane, ids, floor, step=single)

    @cached_property
    def _stack(self) -> Stack:
        """All layers, of weights that stay where they are."""
        act, found = self.config.activation, []
        for layer, facts in enumerate(self._layers):
            (dense,) = self._store.uses("dense", layer)
            (neurons,) = self._store.uses("neurons", layer)
            call = self._attention_call(layer, dense)
            found.append(
                LayerCall(
                    call, facts.attn_norm, neurons[FFN], facts.ffn_norm, act, facts.up_bias,
                    facts.down_bias,
                )
            )  # fmt: skip
        return Stack(tuple(found), parallel=self.config.parallel_norms > 0)

    def _attention_call(self, layer: int, rows: Mapping[str, Rows]) -> AttentionCall:
        """Made once for rows that stay where they are: a model has few of them and many tokens."""
        call = self._calls.get(layer)
        if call is None or call.projections[0] is not rows[MATRICES[0]]:
            keys, values = self.kv.of_layer(layer)
            call = self._calls[layer] = attention_call(
                self.config, self._layers[layer], rows, rotary=self._rotary, keys=keys,
                values=values,
            )  # fmt: skip
        return call
