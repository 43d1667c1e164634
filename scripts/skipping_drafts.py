"""Drafts that compute some neurons only: all of them, the truly best, or those a predictor names.

Knows nothing about how predictors are made or what comes of the drafts.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from predictors import Packed
from torch import Tensor

from m2c.contents import vectors_of
from m2c.engine import Engine
from m2c.kernels.dispatch import attention, gate_up, gather_ffn, matmul_rows, rank, scored_ffn
from m2c.kernels.dispatch import down as add_down
from m2c.kernels.operands import Norm
from m2c.kernels.rows import PackedRows
from m2c.model.mix import Mix
from m2c.model.transformer import Transformer
from m2c.tiers.store import FFN

LayerFfn = Callable[[int, Tensor, PackedRows, Norm], Tensor]


class Draft(Transformer):
    """The engine's draft with another FFN: `ffn(layer, x, neurons, norm)` returns the new x."""

    def __init__(self, engine: Engine, ffn: LayerFfn) -> None:
        assert engine.draft is not None
        assert engine.store.draft is not None
        super().__init__(
            engine.config, engine.store.draft, vectors=vectors_of(engine.bundle, engine.config),
            down_norms=engine.model._down_norms, mix=Mix(0, 0, 100), kv=engine.model.kv,
            workers=engine.workers,
        )  # fmt: skip
        self._ffn = ffn

    def forward(self, ids: npt.NDArray[np.int32], *, all_logits: bool = False) -> Tensor:
        self.kv.require_room(len(ids))
        x = self._store.embed(ids)
        for layer in range(self.config.num_hidden_layers):
            x = self._layer(layer, x)
        self.kv.advance(len(ids))
        (head,) = next(self._store.uses("head", self.config.num_hidden_layers)).values()
        return matmul_rows(x[-1:], head, self._workers, norm=self._norm)[0]

    def _layer(self, layer: int, x: Tensor) -> Tensor:
        vectors = self._layers[layer]
        for rows in self._store.uses("dense", layer):
            call = self._attention_call(layer, rows)
            x = attention(x, call, self.kv.length, self._workers, norm=vectors.attn_norm)
        (rows,) = self._store.uses("neurons", layer)
        neurons = rows[FFN]
        assert isinstance(neurons, PackedRows)
        return self._ffn(layer, x, neurons, vectors.ffn_norm)


def all_neurons(engine: Engine) -> LayerFfn:
    def ffn(layer: int, x: Tensor, neurons: PackedRows, norm: Norm) -> Tensor:
        out = x.clone()
        gather_ffn(x, neurons, engine.config.hidden_act, engine.workers, norm=norm, into=out)
        return out

    return ffn


def best_neurons(engine: Engine, share: int) -> LayerFfn:
    """The neurons that truly score best: what a perfect predictor would choose. No faster."""
    act, workers = engine.config.hidden_act, engine.workers

    def ffn(layer: int, x: Tensor, neurons: PackedRows, norm: Norm) -> Tensor:
        activations = scored_ffn(x, neurons, act, workers, norm=norm, into=x.clone())
        norms = engine.model._down_norms[layer]
        kept = rank(activations, norms, [(len(neurons) * share // 100, 1)], workers)
        out = x.clone()
        add_down(torch.where(kept == 1, activations, 0), neurons, workers, into=out)
        return out

    return ffn


def predicted_neurons(engine: Engine, share: int, predictors: list["Packed"]) -> LayerFfn:
    act, workers = engine.config.hidden_act, engine.workers

    def ffn(layer: int, x: Tensor, neurons: PackedRows, norm: Norm) -> Tensor:
        made = predictors[layer]
        features = matmul_rows(x, made.features, workers, norm=norm)
        guess = gate_up(features, made.neurons, act, workers)
        norms = engine.model._down_norms[layer]
        kept = rank(guess, norms, [(len(neurons) * share // 100, 1)], workers)
        ids = torch.from_numpy(np.flatnonzero(kept[0].numpy()).astype(np.int32))
        some = PackedRows(neurons.layout, neurons.int4, index4=ids)
        out = x.clone()
        gather_ffn(x, some, act, workers, norm=norm, into=out)
        return out

    return ffn
